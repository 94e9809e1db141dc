"""What a network sees in photos: likeliest classes, a map of classes or depth, objects, segments.

python -m hybrid_vit.tools.predict --weights=DIR photo.jpg another.png
python -m hybrid_vit.tools.predict --weights=DIR --zero_shot="a cat,a dog" photo.jpg
python -m hybrid_vit.tools.predict --weights=DIR --task=segmentation --maps=MAPS photo.jpg
python -m hybrid_vit.tools.predict --weights=DIR --task=detection --objects=FILE.json photo.jpg

DIR is a work directory, a checkpoint, an export, or what `hybrid_vit.tools.import_weights` wrote.
Of a work directory the export is taken, unless the run went on after it. Photos are prepared as the
weights expect. One that cannot be read is named and skipped, and the command then returns 2. With
--zero_shot the weights are of an image and a text tower, and the texts, as they stand, the classes.
Weights of segmentation or depth give a map of each photo, at its own size, over it; --maps writes
these as PNG, too: classes in their palette, depth in millimetres (KITTI's: 1/256 m). Weights of
detection give boxes, masks, names and scores of what they find with a score of at least
--min_score; --objects writes these as COCO's results, too, in which "image_id" is the photo's place
in the command, from 0. Of panoptic weights --maps writes COCO's format, colours that are segments'
numbers and a panoptic.json. --task is what the weights say where it is left out.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hybrid_vit import checkpoints, recipes
from hybrid_vit.class_prediction import (
  Prediction,
  check_classifier,
  class_probabilities,
  likeliest,
)
from hybrid_vit.data.splits import sample_indices
from hybrid_vit.object_prediction import MIN_SCORE
from hybrid_vit.photos import read_photos
from hybrid_vit.plots import one_line, plain_text, printable, save_figure
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.stored_predictions import ASKED, OUTPUTS
from hybrid_vit.stored_tasks import StoredTask, stored_task
from hybrid_vit.weights.stored import (
  StoredNetwork,
  class_names,
  network_of,
  task_of,
)
from hybrid_vit.weights.stored_clip import StoredClip, load_clip
from hybrid_vit.weights.transfer import without_text

TASKS = ("classification", *ASKED)
_BATCH_SIZE = 8
_MAX_IN_A_PICTURE = 24
_BAR, _TEXT = "#9ecae1", "#222222"


def predict(
  network: StoredNetwork, photos: Sequence[str | Path], top: int = 5
) -> tuple[list[Prediction], dict[Path, str]]:
  """The `top` likeliest classes of each photo.

  Returns:
    (predictions in the order of the photos, the reason for each photo that could not be read).

  Raises:
    ValueError: the weights have no classifier, are of another task, or hold what is no number.
  """
  check_classifier(network)
  names = class_names(network)
  images, skipped = read_photos(photos, network.preprocessing)
  predictions = []
  for batch, probabilities in _probabilities(network, images):
    predictions += [
      likeliest(photo, images[photo], row, names, top) for photo, row in zip(batch, probabilities)
    ]
  return predictions, skipped


def predict_zero_shot(
  model: StoredClip, photos: Sequence[str | Path], texts: Sequence[str], top: int = 5
) -> tuple[list[Prediction], dict[Path, str]]:
  """As `predict`, of texts instead of classes.

  Raises:
    ValueError: fewer than two texts after training by a softmax, where one alone is always certain;
      or none.
  """
  least = 1 if model.loss == "sigmoid" else 2
  if len(texts) < least:
    raise ValueError(
      f"--zero_shot has {len(texts)} texts ({', '.join(texts)}); at least {least} were expected, "
      'such as "a cat,a dog"'
    )
  images, skipped = read_photos(photos, model.preprocessing)
  found = model.encode_image(list(images.values()))
  rows = model.probabilities(found, model.encode_text(texts))
  made = [likeliest(p, images[p], row, texts, top) for p, row in zip(images, rows)]
  return made, skipped


def draw(predictions: Sequence[Prediction], png: str | Path) -> None:
  """Draws pictures as the network saw them, with bars for their likeliest classes.

  Of more than two dozen, so many spread evenly are drawn. Names are drawn letter by letter: none is
  a formula.
  """
  shown = [predictions[i] for i in sample_indices(len(predictions), _MAX_IN_A_PICTURE)]
  columns = min(len(shown), 2)
  rows = math.ceil(len(shown) / columns)
  # Texts are read for formulas when they are drawn, not when they are set.
  with plain_text():
    figure = Figure(figsize=(6.4 * columns, 2.6 * rows), dpi=110, layout="constrained")
    grid = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.5] * columns)
    for axes in grid.flat:
      axes.axis("off")
    for i, prediction in enumerate(shown):
      picture, bars = grid[i // columns, 2 * (i % columns) : 2 * (i % columns) + 2]
      picture.imshow(prediction.image)
      picture.set_title(one_line(prediction.photo.name, 26), fontsize=9)
      places = range(len(prediction.names))
      bars.barh(places, prediction.probabilities, color=_BAR, height=0.8)
      bars.set_xlim(0, 1)
      bars.set_ylim(len(prediction.names) - 0.4, -0.6)
      for place, name, probability in zip(places, prediction.names, prediction.probabilities):
        text = f"{one_line(name, 34)}  {probability:.1%}"
        bars.text(0.015, place, text, va="center", fontsize=9, color=_TEXT)
    save_figure(figure, png)


def _probabilities(
  network: StoredNetwork, images: dict[Path, np.ndarray]
) -> Iterator[tuple[list[Path], np.ndarray]]:
  """Photos and their probabilities `[N, K]`, batch by batch."""
  photos, run = list(images), class_probabilities(network)
  # One compiled shape for all batches.
  size = min(_BATCH_SIZE, len(photos))

  for start in range(0, len(photos), size or 1):
    part = photos[start : start + size]
    batch = np.stack([images[photo] for photo in part])
    batch = np.pad(batch, ((0, size - len(part)), (0, 0), (0, 0), (0, 0)))
    yield part, np.asarray(run(network.variables, batch))[: len(part)]


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 0, 2 where photos were skipped, or 1 after an error."""
  parser = argparse.ArgumentParser(prog="predict", description=__doc__.splitlines()[0])
  parser.add_argument("photos", nargs="+", help="files of pictures")
  parser.add_argument("--weights", required=True, help="directory of the weights")
  parser.add_argument("--arch", help="network; default: as the weights say")
  parser.add_argument("--top", type=int, default=5, help="how many classes")
  parser.add_argument("--output", default="predictions.png", help="the picture to write")
  parser.add_argument("--zero_shot", help='texts instead of classes, e.g. "a cat,a dog"')
  parser.add_argument("--task", choices=TASKS, help="default: as the weights say")
  parser.add_argument("--maps", help="directory to write maps of classes, depth or segments into")
  parser.add_argument("--objects", help="file to write COCO's results (.json) into")
  parser.add_argument(
    "--min_score", type=float, help=f"least score of detected objects (default: {MIN_SCORE})"
  )
  args = parser.parse_args(argv)
  network: StoredNetwork | StoredClip
  try:
    if args.zero_shot is not None:
      network = load_clip(args.weights, args.arch)
      texts = [text.strip() for text in args.zero_shot.split(",") if text.strip()]
      predictions, skipped = predict_zero_shot(network, args.photos, texts, args.top)
    else:
      weights, metadata = checkpoints.load_weights(args.weights)
      if _task(args, metadata) in ASKED:
        return _predict_dense(args, stored_task(args.weights, weights, metadata))
      network = network_of(args.weights, without_text(weights), metadata, args.arch)
      predictions, skipped = predict(network, args.photos, args.top)
  except (ValueError, ImportError, OSError, checkpoints.CheckpointError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  expected = network.preprocessing
  origin = network.metadata.get("weights")
  print(f"{network.name}, weights from {args.weights}" + (f": {origin}" if origin else ""))
  print(
    f"pictures prepared by {recipes.eval_transform(expected)}, mean {expected.mean}, std "
    f"{expected.std}: {network.preprocessing_said_by}"
  )
  if network.loss == "sigmoid":
    print("trained with a sigmoid: the probability of each class stands by itself")
  for prediction in predictions:
    print(printable(prediction.photo))
    for name, probability in zip(prediction.names, prediction.probabilities):
      print(f"  {probability:6.1%}  {printable(name)}")
  for photo, reason in skipped.items():
    print(f"skipped {printable(photo)}: {printable(reason)}", file=sys.stderr)
  if predictions:
    try:
      draw(predictions, args.output)
    except OSError as error:
      print(f"error: {args.output} cannot be written: {error}", file=sys.stderr)
      return 1
    print(f"drawn in {args.output}")
  return 2 if skipped else 0


def _task(args: argparse.Namespace, metadata: Mapping[str, Any]) -> str:
  """What the weights are of.

  Raises:
    ValueError: another task was asked for, or maps or objects of what makes none.
  """
  said = task_of(metadata)
  if args.task is not None and args.task != said:
    raise ValueError(f"the weights in {args.weights} are of the task {said!r}, not {args.task!r}")
  asked = ASKED.get(said)
  for output in OUTPUTS:
    if getattr(args, output) is not None and (asked is None or asked.output != output):
      raise ValueError(
        f"--{output}: the weights in {args.weights}, of the task {said!r}, give no {output}"
      )
  if args.min_score is not None and (asked is None or not asked.has_scores):
    raise ValueError(
      f"--min_score: the weights in {args.weights}, of the task {said!r}, detect no objects"
    )
  return said


def _predict_dense(args: argparse.Namespace, stored: StoredTask) -> int:
  """The command for weights of a dense task."""
  asked = ASKED[stored.name]
  min_score = MIN_SCORE if args.min_score is None else args.min_score
  predictions, skipped = asked.predict(stored, args.photos, args.top, min_score)
  print(f"{stored.network}, {stored.name}, weights from {args.weights}")
  print(f"pictures seen by {stored.task.inference}")
  for prediction in predictions:
    print(printable(prediction.photo))
    for line in prediction.summary:
      print(f"  {printable(line)}")
  for photo, reason in skipped.items():
    print(f"skipped {printable(photo)}: {printable(reason)}", file=sys.stderr)
  if predictions:
    asked.draw(stored, predictions, args.output)
    print(f"drawn in {args.output}")
  place = getattr(args, asked.output)
  if place is not None:
    for path in asked.save(stored, args.photos, predictions, place):
      print(f"written: {path}")
  return 2 if skipped else 0


if __name__ == "__main__":
  run_tool(main)
