"""How well weights do on labelled pictures, class by class, with their worst mistakes.

python -m hybrid_vit.tools.report --weights=DIR --data=folder:/path --output=report

Writes report.html (one file that holds everything), classes.csv, confusion.csv, confusion.png and
reliability.png. A picture that cannot be read is named and left out, and the command returns 2.

Of a detector (--data=coco:/path) it writes what `hybrid_vit.detection_report` lists: COCO's
results, a table of the classes and a page of its failures.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybrid_vit import checkpoints, recipes, sharding
from hybrid_vit.data.classes import check_same_classes
from hybrid_vit.data.errors import MissingDataError
from hybrid_vit.data.evaluation import EvaluationSet
from hybrid_vit.data.pipeline import EvaluationSettings
from hybrid_vit.data.sources import Source, create_source
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.inference import Answers, answer
from hybrid_vit.measuring import (
  calibration,
  class_figures,
  confusion_matrix,
  probabilities,
  worst_mistakes,
)
from hybrid_vit.plots import one_line
from hybrid_vit.report_page import Mistake, page
from hybrid_vit.report_plots import draw_confusion, draw_reliability
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.stored_tasks import StoredTask, stored_task
from hybrid_vit.weights.stored import StoredNetwork, class_names, network_of, task_of
from hybrid_vit.weights.transfer import without_text

# Letters of a name on the page; files' names are shown from their end.
_LETTERS = 80
_PAIRS = 20


def write_report(
  network: StoredNetwork,
  source: Source,
  answers: Answers,
  directory: Path,
  *,
  title: str,
  facts: dict[str, str],
  bins: int = 15,
  mistakes: int = 24,
) -> dict[str, float]:
  """Writes everything; see the head of this file.

  Args:
    network: whose answers these are.
    source: the pictures.
    answers: see `inference.answer`.
    directory: where to; it is made.
    title: of the page.
    facts: what the page says at its head, beside the figures.
    bins: of the calibration.
    mistakes: how many are shown.

  Returns:
    "top1", "top5" (of more than five classes), "macro_f1", "ece".

  Raises:
    ValueError: the weights have no classifier, or their classes are not the data's.
  """
  if answers.logits is None:
    raise ValueError(f"these weights of {network.name} have no classifier")
  names, classes = class_names(network), network.num_classes
  if len(found := source.info.get("class_names", ())):
    check_same_classes(names, found, "the data (expected: those of the weights)")
  if int(answers.labels.max()) >= classes:
    raise ValueError(f"the data has class {answers.labels.max()}, the weights know {classes}")
  if "label_sets" in source.info:
    raise ValueError(
      "the report is for pictures of one class each, and these may have several: their figures are "
      "those of hybrid_vit.tools.evaluate_sets"
    )
  logits = answers.logits
  if (subset := source.info.get("class_subset")) is not None:
    # The others do not compete; finite, so that no probability is NaN.
    logits = np.where(np.isin(np.arange(classes), subset), logits, -1e30)
  probability = probabilities(logits, network.loss)
  labels, predicted = answers.labels, probability.argmax(1)
  confidence = probability.max(1)
  confusion = confusion_matrix(labels, predicted, classes)
  per_class = class_figures(confusion)
  calibrated = calibration(confidence, predicted == labels, bins)
  figures = {"top1": float(np.mean(predicted == labels))}
  if classes > 5:
    own = np.take_along_axis(probability, labels[:, None], 1)
    figures["top5"] = float(np.mean((~(probability < own)).sum(1) <= 5))
  figures |= {"macro_f1": float(np.nanmean(per_class.f1)), "ece": calibrated.ece}

  directory.mkdir(parents=True, exist_ok=True)
  columns = (per_class.precision, per_class.recall, per_class.f1)
  rows: list[tuple[str, int, float, float, float]] = [
    (name, int(n), float(p), float(r), float(f1))
    for name, n, p, r, f1 in zip(names, per_class.support, *columns)
  ]
  header = ("class", "pictures", "precision", "recall", "f1")
  _write_csv(directory / "classes.csv", header, rows)
  _write_csv(
    directory / "confusion.csv",
    ("true \\ predicted", *names),
    ((name, *row.tolist()) for name, row in zip(names, confusion)),
  )
  pictures = draw_confusion(confusion, names), draw_reliability(calibrated)
  for name, content in zip(("confusion.png", "reliability.png"), pictures):
    (directory / name).write_bytes(content)
  shown = worst_mistakes(probability, labels, mistakes)
  notes = [f"Calibration in {bins} equally wide bins of the predicted class's probability."]
  if network.loss == "sigmoid":
    notes.append("Trained with a sigmoid: the probability of each class stands by itself.")
  if answers.unreadable:
    listed = ", ".join(one_line(name, _LETTERS) for name in answers.unreadable[:10])
    notes.append(f"{len(answers.unreadable)} pictures could not be read, e.g. {listed}")
  said = {k: f"{v:.4f}" if k == "ece" else f"{v:.2%}" for k, v in figures.items()}
  text = page(
    title,
    {**facts, "pictures": f"{len(labels):,}", "classes": f"{classes:,}", **said},
    confusion_png=pictures[0],
    reliability_png=pictures[1],
    class_rows=[(one_line(r[0], _LETTERS), r[1], r[2], r[3], r[4]) for r in rows],
    confused=_confused(confusion, names),
    mistakes=_mistakes(network, source, answers, probability, names, shown),
    notes=notes,
  )
  (directory / "report.html").write_text(text, encoding="utf-8")
  return figures


def report_detection(
  stored: StoredTask, data: str, split: str, directory: Path, *, batch_size: int
) -> tuple[dict[str, float], list[str]]:
  """Evaluates a detector and writes everything; see `detection_report`.

  Args:
    stored: the weights and their task.
    data: a source of objects, e.g. "coco:/path".
    split: part of it.
    directory: where to; it is made.
    batch_size: pictures that are read at a time.

  Returns:
    (the measures, the names of the files).

  Raises:
    ValueError: data of other classes, or without objects.
  """
  task = stored.task
  settings = EvaluationSettings(
    # A part of a split has brackets.
    name=re.sub(r"\W+", "_", split).strip("_"),
    source=data,
    split=split,
    batch_size=batch_size,
    transform=task.evaluation_transform,
    own_transform=False,
  )
  mesh = sharding.make_mesh({}, jax.devices()[:1])
  examples = EvaluationSet(settings, task.spec.evaluation, mesh)
  found = examples.info.get("object_class_names")
  if found is None:
    raise ValueError(f"{data} has no objects; a source such as coco:/path was expected")
  if names := task.object_class_names:
    check_same_classes(names, found, "the data (expected: those of the weights)")
  (evaluator,) = task.evaluators([examples])
  answers = evaluator.answers(jax.device_put(stored.variables))
  return evaluator.measure(answers), evaluator.write(answers, directory)


def _confused(confusion: np.ndarray, names: Sequence[str]) -> list[tuple[str, str, int]]:
  off = confusion - np.diag(np.diagonal(confusion))
  order = np.argsort(-off, axis=None, kind="stable")[:_PAIRS]
  pairs = [divmod(int(i), len(names)) for i in order]
  return [
    (one_line(names[a], _LETTERS), one_line(names[b], _LETTERS), int(off[a, b]))
    for a, b in pairs
    if off[a, b]
  ]


def _mistakes(
  network: StoredNetwork,
  source: Source,
  answers: Answers,
  probability: np.ndarray,
  names: Sequence[str],
  rows: Iterable[int],
) -> list[Mistake]:
  transform = parse_transform(recipes.eval_transform(network.preprocessing), "pil")
  found = []
  for row in rows:
    index, label = int(answers.indices[row]), int(answers.labels[row])
    image = transform(dict(source[index]), np.random.default_rng(index))["image"]
    best = int(probability[row].argmax())
    name = source.describe(index)
    found.append(
      Mistake(
        image,
        one_line(name if len(name) <= _LETTERS else "…" + name[1 - _LETTERS :], _LETTERS),
        one_line(names[label], _LETTERS),
        one_line(names[best], _LETTERS),
        float(probability[row, best]),
        float(probability[row, label]),
      )
    )
  return found


def _write_csv(path: Path, header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> None:
  with path.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(header)
    writer.writerows(rows)


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 0, 2 where pictures could not be read, or 1 after an error."""
  parser = argparse.ArgumentParser(prog="report", description=__doc__.splitlines()[0])
  parser.add_argument("--weights", required=True, help="directory of the weights")
  parser.add_argument("--arch", help="network; default: as the weights say")
  parser.add_argument("--data", required=True, help="source, e.g. folder:/path")
  parser.add_argument("--split", default="validation", help="part of the data")
  parser.add_argument("--output", default="report", help="directory to write")
  parser.add_argument("--bins", type=int, default=15, help="of the calibration")
  parser.add_argument("--mistakes", type=int, default=24, help="how many are shown")
  parser.add_argument("--batch_size", type=int, default=32)
  args = parser.parse_args(argv)
  try:
    if min(args.bins, args.batch_size) < 1 or args.mistakes < 0:
      raise ValueError("--bins and --batch_size must be at least 1, --mistakes not negative")
    weights, metadata = checkpoints.load_weights(args.weights)
    if task_of(metadata) == "detection":
      stored = stored_task(args.weights, weights, metadata)
      output = Path(args.output)
      figures, files = report_detection(
        stored, args.data, args.split, output, batch_size=args.batch_size
      )
      _tell(figures, args.output, ", ".join(files))
      return 0
    network = network_of(args.weights, without_text(weights), metadata, args.arch)
    source = create_source(args.data, args.split)
    answers = answer(network, source, batch_size=args.batch_size)
    expected = network.preprocessing
    facts = {
      "network": network.name,
      "weights": f"{args.weights} ({network.metadata.get('weights', '')})",
      "data": f"{args.data}, {args.split}",
      "prepared by": f"{recipes.eval_transform(expected)}, mean {expected.mean}, std "
      f"{expected.std}: {network.preprocessing_said_by}",
    }
    figures = write_report(
      network,
      source,
      answers,
      Path(args.output),
      title=f"{network.name} on {args.data}",
      facts=facts,
      bins=args.bins,
      mistakes=args.mistakes,
    )
  except (ValueError, OSError, MissingDataError, checkpoints.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  for name in answers.unreadable:
    print(f"left out, not readable: {one_line(name, 400)}", file=sys.stderr)
  _tell(figures, args.output, "report.html, classes.csv, confusion.csv and two pictures")
  return 2 if answers.unreadable else 0


def _tell(figures: Mapping[str, float], output: str, files: str) -> None:
  print(", ".join(f"{name} {value:.4f}" for name, value in figures.items()))
  print(f"written to {output}/: {files}")


if __name__ == "__main__":
  run_tool(main)
