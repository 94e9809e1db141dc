"""One table of what weights are worth: several sets, test sizes, raw and averaged weights.

python -m hybrid_vit.tools.evaluate_sets --weights=DIR --sizes=224,256,288 --table=results \\
  --set=folder:/imagenet --set=v2=imagenet_v2:/imagenetv2 --imagenet_c=/imagenet-c

A set is a source, or NAME=source; "imagenet_v2:", "imagenet_real:", "imagenet_a:", "imagenet_r:"
and "imagenet_sketch:" follow those sets' own rules (hybrid_vit.data.imagenet_variants). Larger
pictures than those of the training often do better (FixRes, arXiv:1906.06423); the crop keeps its
ratio. Writes PATH.csv and PATH.md.

Weights of an image and a text tower classify by the names of a set's classes, with --templates of
prompts, or with --kind=retrieval find pictures by captions and captions by pictures.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from hybrid_vit import checkpoints, recipes, sharding
from hybrid_vit.data.classes import check_same_classes
from hybrid_vit.data.evaluation import open_evaluation
from hybrid_vit.data.imagenet_variants import VARIANTS, corruption_errors, corruption_sets
from hybrid_vit.data.pipeline import EvaluationSettings
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.tables import write_table
from hybrid_vit.tasks import image_text_evaluation as measure
from hybrid_vit.tasks.base import evaluation_kind
from hybrid_vit.tasks.classification import LOSSES, Classification
from hybrid_vit.tasks.retrieval import RECALLS
from hybrid_vit.weights.stored import StoredNetwork, check_finite, network_of
from hybrid_vit.weights.stored_clip import StoredClip, clip_of
from hybrid_vit.weights.transfer import is_clip

AVERAGES = ("both", "averaged", "raw")
COLUMNS = ("weights", "size", "set", "examples", "top1", "top5", "loss")
_CORRUPTED = "imagenet_c/"


def evaluate_network(
  network: StoredNetwork | StoredClip,
  sets: Mapping[str, str],
  sizes: Sequence[int | None] = (None,),
  *,
  split: str = "validation",
  batch_size: int = 64,
  data_dir: str | None = None,
  max_batches: int | None = None,
  kind: str = "",
  templates: str | Sequence[str] | None = None,
  show: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
  """A row for each size and set, with "size", "set" and the task's measures.

  Args:
    network: a classifier, or two towers.
    sets: name → source.
    sizes: sides of the pictures; None for what the weights expect.
    split: of sources that have several.
    batch_size: of all devices together.
    data_dir: of prepared TFDS data.
    max_batches: where each pass ends early; None: at its end.
    kind: of two towers, "zero_shot" (or "") or "retrieval".
    templates: of two towers' prompts, see `data.prompts.read_templates`; None for the usual one.
    show: told each row as soon as it is there.

  Returns:
    The rows; of ImageNet-C's sets ("imagenet_c/snow/3") also its mean errors, whose "value" is in
    place of measures.

  Raises:
    ValueError: no classifier, weights that are no numbers, or other classes than a set's.
  """
  expected = network.preprocessing
  mean, std = tuple(expected.mean), tuple(expected.std)
  if isinstance(network, StoredClip):
    measured = measure.kind_of(kind, network.model.text.context_length)
    evaluators: Any = functools.partial(
      measure.evaluators_for, measure.Encoders(network.model, mean, std)
    )
  else:
    if kind or templates is not None:
      raise ValueError(f"these weights of {network.name} have no text tower: no kind, no templates")
    task: Any = _classification(network, mean, std)
    measured, evaluators = evaluation_kind(task, ""), task.evaluators
  mesh = sharding.make_mesh({"data": -1})
  variables = jax.device_put(network.variables, sharding.replicated(mesh))
  rows: list[dict[str, Any]] = []
  for size in sizes:
    asked = dataclasses.replace(expected, image_size=size or expected.image_size)
    settings = [
      EvaluationSettings(
        name=name,
        source=source,
        split=split,
        data_dir=data_dir,
        batch_size=batch_size,
        transform=recipes.eval_transform(asked) + measured.transform,
        own_transform=size is not None,
        max_batches=max_batches,
        kind=kind,
        options={} if templates is None else {"templates": templates},
      )
      for name, source in sets.items()
    ]
    data = open_evaluation(settings, lambda _: measured.fields, mesh)
    if isinstance(network, StoredNetwork):
      for item in data:
        _check_classes(network, item.name, item.info.get("class_names", ()))
    top1 = {}
    for evaluator in evaluators(data):
      rows.append({"size": asked.image_size, "set": evaluator.name, **evaluator.run(variables)})
      top1[evaluator.name] = rows[-1].get("top1")
      show(rows[-1])
    corrupted = {
      name.removeprefix(_CORRUPTED): value
      for name, value in top1.items()
      if name.startswith(_CORRUPTED) and value is not None
    }
    for name, value in corruption_errors(corrupted).items():
      rows.append({"size": asked.image_size, "set": f"{_CORRUPTED}{name}", "value": value})
  return rows


def _classification(
  network: StoredNetwork, mean: tuple[float, ...], std: tuple[float, ...]
) -> Classification:
  if not network.num_classes or network.loss not in LOSSES:
    raise ValueError(
      f"these weights of {network.name} are no classifier: {network.num_classes} classes, trained "
      f"by the loss {network.loss!r}"
    )
  check_finite(network)
  return Classification(
    model=network.model,
    num_classes=network.num_classes,
    mean=mean,
    std=std,
    loss_name=network.loss,
    class_names=network.class_names,
  )


def _check_classes(network: StoredNetwork, name: str, found: Sequence[str]) -> None:
  if found and network.class_names:
    check_same_classes(network.class_names, found, f"evaluation set {name!r}")
  elif found and len(found) != network.num_classes:
    raise ValueError(
      f"evaluation set {name!r} has {len(found)} classes, the network {network.num_classes}"
    )


def _sets(given: Sequence[str], imagenet_c: str | None) -> dict[str, str]:
  found: dict[str, str] = {}
  for text in given:
    name, equals, source = text.partition("=")
    # In "imagenet_real:/path?labels=…" the sign stands behind the source's colon.
    if not equals or ":" in name:
      source = text
      kind = text.partition(":")[0]
      name = kind if kind in VARIANTS else text
    if name in found:
      raise ValueError(f"two sets are called {name!r}: name them, --set=NAME=source")
    found[name] = source
  if imagenet_c:
    found |= {f"{_CORRUPTED}{name}": s for name, s in corruption_sets(imagenet_c).items()}
  if not found:
    raise ValueError("nothing to evaluate on: give --set=source or --imagenet_c=/path")
  return found


def _sizes(text: str) -> tuple[int, ...]:
  try:
    found = tuple(int(part) for part in text.split(","))
  except ValueError:
    found = (0,)
  if min(found) < 1:
    raise argparse.ArgumentTypeError(f"{text!r}: sides in pixels were expected, e.g. 224,256,288")
  return found


def _load(weights: str, arch: str | None, *, raw: bool = False) -> StoredNetwork | StoredClip:
  found, metadata = checkpoints.load_weights(weights, raw=raw)
  if is_clip(found):
    return clip_of(weights, found, metadata, arch)
  return network_of(weights, found, metadata, arch)


def _networks(
  weights: str, arch: str | None, average: str
) -> dict[str, StoredNetwork | StoredClip]:
  """ "averaged" and "raw" where there are both; else the one that is there, called "weights"."""
  if average == "raw":
    return {"raw": _load(weights, arch, raw=True)}
  usual = _load(weights, arch)
  if "averaged" not in str(usual.metadata.get("weights", "")):
    if average == "averaged":
      raise ValueError(f"{weights} holds no average of weights: --average=both takes what is there")
    return {"weights": usual}
  if average == "averaged":
    return {"averaged": usual}
  try:
    return {"averaged": usual, "raw": _load(weights, arch, raw=True)}
  except checkpoints.CheckpointError:
    return {"averaged": usual}


def _line(row: Mapping[str, Any]) -> str:
  figures = (
    f"top-1 {row['top1']:.2%}"
    if "top1" in row
    else ", ".join(f"{name} {row[name]:.2%}" for name in RECALLS)
  )
  return f"  {row['set']} at {row['size']}: {figures} of {row['examples']:,.0f}"


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 0, or 1 after an error."""
  parser = argparse.ArgumentParser(prog="evaluate_sets", description=__doc__.splitlines()[0])
  parser.add_argument("--weights", required=True, help="directory of the weights")
  parser.add_argument("--arch", help="network; default: as the weights say")
  parser.add_argument("--set", action="append", default=[], help="[NAME=]source; may be repeated")
  parser.add_argument("--imagenet_c", help="folder of ImageNet-C: all corruptions and severities")
  parser.add_argument("--sizes", type=_sizes, default=(None,), help="e.g. 224,256; default: one")
  parser.add_argument("--average", choices=AVERAGES, default="both", help="weights of a state")
  parser.add_argument("--split", default="validation", help="of sources that have several")
  parser.add_argument("--data_dir", help="of prepared TFDS data")
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument("--max_batches", type=int, help="end each pass early: for a try")
  kinds = ("", measure.ZERO_SHOT, measure.RETRIEVAL)
  parser.add_argument("--kind", choices=kinds, default="", help="what two towers are measured by")
  parser.add_argument("--templates", help='of prompts: a file, or "imagenet" for OpenAI\'s 80')
  parser.add_argument("--table", help="PATH of PATH.csv and PATH.md")
  args = parser.parse_args(argv)
  rows: list[dict[str, Any]] = []
  try:
    if args.batch_size < 1 or (args.max_batches or 1) < 1:
      raise ValueError("--batch_size and --max_batches must be at least 1")
    sets = _sets(args.set, args.imagenet_c)
    for which, network in _networks(args.weights, args.arch, args.average).items():
      said = network.metadata.get("weights", "")
      print(f"{network.name}, {which} from {args.weights}" + (f": {said}" if said else ""))
      found = evaluate_network(
        network,
        sets,
        args.sizes,
        split=args.split,
        batch_size=args.batch_size,
        data_dir=args.data_dir,
        max_batches=args.max_batches,
        kind=args.kind,
        templates=args.templates,
        show=lambda row: print(_line(row), flush=True),
      )
      rows += [{"weights": which, **row} for row in found]
    for row in rows:
      if "value" in row:
        print(f"  {row['weights']}, {row['set']} at {row['size']}: {row['value']:.2%}")
    if args.table:
      print("written to " + " and ".join(map(str, write_table(args.table, rows, COLUMNS))))
  except (ValueError, OSError, checkpoints.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  run_tool(main)
