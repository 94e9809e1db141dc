"""Photos → detected objects as COCO's JSON of results, and a sheet on which they are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit.box_inference import Objects
from hybrid_vit.coco_results import coco_results, write_results
from hybrid_vit.data import arguments as check
from hybrid_vit.data.classes import names_or_numbers
from hybrid_vit.data.palettes import spread_palette
from hybrid_vit.data.splits import sample_indices
from hybrid_vit.detection_plots import plot_detections
from hybrid_vit.photos import for_each_photo
from hybrid_vit.stored_tasks import StoredTask
from hybrid_vit.tasks.detection import as_shown

MIN_SCORE = 0.3
# Photos on one sheet.
_MOST = 12


@dataclasses.dataclass(frozen=True)
class PredictedObjects:
  """What was found in one photo.

  Attributes:
    photo: its path.
    image: uint8 `[H, W, 3]`.
    found: of at least the score asked for.
    min_score: that score.
    summary: lines for people.
  """

  photo: Path
  image: np.ndarray
  found: Objects
  min_score: float
  summary: tuple[str, ...]


def predict_objects(
  stored: StoredTask, photos: Sequence[str | Path], top: int = 5, min_score: float = MIN_SCORE
) -> tuple[list[PredictedObjects], dict[Path, str]]:
  """Objects in photos, in the pixels of each.

  Args:
    stored: the weights and their task.
    photos: files.
    top: how many objects a summary names, the surest first.
    min_score: objects of a lower score are left out.

  Returns:
    (predictions in the order of the photos, the reason for each photo that could not be read).

  Raises:
    ValueError: a score that is none.
  """
  check.number("min_score", min_score, 0, 1)
  names = class_names(stored)

  def predicted(photo: Path, image: np.ndarray) -> PredictedObjects:
    found = _from_score(stored.objects(image), min_score)
    said = _summary(found, names, top, min_score)
    return PredictedObjects(photo, image, found, min_score, said)

  return for_each_photo(photos, None, predicted)


def class_names(stored: StoredTask) -> tuple[str, ...]:
  """Names of a detector's classes, or numbers in their place."""
  return names_or_numbers(stored.task.object_class_names, stored.task.num_classes)


def draw_objects(
  stored: StoredTask, predictions: Sequence[PredictedObjects], png: str | Path
) -> None:
  """Draws photos and their objects; of more than a dozen, so many spread evenly."""
  shown = [predictions[i] for i in sample_indices(len(predictions), _MOST)]
  names = class_names(stored)
  plot_detections(
    [p.image for p in shown],
    [as_shown(p.found) for p in shown],
    names,
    spread_palette(len(names)),
    png,
    min_score=min((p.min_score for p in shown), default=MIN_SCORE),
  )


def save_objects(
  stored: StoredTask, photos: Sequence[str | Path], predictions: Sequence[PredictedObjects],
  file: str | Path,
) -> Path:  # fmt: skip
  """Writes all objects as COCO's results: a list with an entry for each.

  Beside what `coco_results` gives, an entry has "file_name", the photo's, and "category_name"; its
  "image_id" is the photo's place in `photos`, from 0.

  Args:
    stored: the weights and their task.
    photos: all that were asked for.
    predictions: of those that could be read, in the same order.
    file: a `.json`; its directory is made.
  """
  names, written = class_names(stored), Path(file).expanduser()
  rows: list[dict[str, Any]] = []
  places = iter(enumerate(map(Path, photos)))
  for prediction in predictions:
    place = next(i for i, photo in places if photo == prediction.photo)
    for label, row in zip(
      prediction.found.labels, coco_results(prediction.found, place, stored.task.category_ids)
    ):
      rows.append({"file_name": prediction.photo.name, **row, "category_name": names[label]})
  write_results(rows, written)
  return written


def _from_score(found: Objects, least: float) -> Objects:
  kept = np.flatnonzero(found.scores >= least)
  masks = None if found.masks is None else tuple(found.masks[i] for i in kept)
  return Objects(found.boxes[kept], found.scores[kept], found.labels[kept], masks)


def _summary(found: Objects, names: Sequence[str], top: int, least: float) -> tuple[str, ...]:
  count = len(found.labels)
  lines = [f"{count} object{'s' * (count != 1)} with a score from {least:g}"]
  for box, label, score in list(zip(found.boxes, found.labels, found.scores))[:top]:
    corners = ", ".join(f"{value:.0f}" for value in box)
    lines.append(f"{score:6.1%}  {names[label]} in ({corners})")
  return tuple(lines)
