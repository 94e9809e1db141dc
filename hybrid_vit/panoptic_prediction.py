"""Photos → panoptic segments in COCO's format, and a sheet on which they lie over the photos."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hybrid_vit.data.classes import names_or_numbers
from hybrid_vit.data.splits import sample_indices
from hybrid_vit.mask_inference import PanopticPicture
from hybrid_vit.panoptic_plots import plot_panoptic
from hybrid_vit.photos import for_each_photo, unused_names
from hybrid_vit.stored_tasks import StoredTask

# Photos on one sheet.
_MOST = 12


@dataclasses.dataclass(frozen=True)
class PredictedSegments:
  """What one photo shows.

  Attributes:
    photo: its path.
    image: uint8 `[H, W, 3]`.
    picture: its segments.
    summary: lines for people.
  """

  photo: Path
  image: np.ndarray
  picture: PanopticPicture
  summary: tuple[str, ...]


def predict_segments(
  stored: StoredTask, photos: Sequence[str | Path], top: int = 5
) -> tuple[list[PredictedSegments], dict[Path, str]]:
  """Segments of photos, each of the photo's own size.

  Args:
    stored: the weights and their task.
    photos: files.
    top: how many segments a summary names, the largest first.

  Returns:
    (predictions in the order of the photos, the reason for each photo that could not be read).
  """
  names = _names(stored)

  def predicted(photo: Path, image: np.ndarray) -> PredictedSegments:
    picture = stored.panoptic(image)
    areas = _areas(picture)
    largest = sorted(picture.segments, key=lambda s: -areas[s.id])[:top]
    count = len(picture.segments)
    said = [f"{count} segment{'s' * (count != 1)}"]
    said += [f"{areas[s.id] / picture.map.size:6.1%}  {names[s.category]}" for s in largest]
    return PredictedSegments(photo, image, picture, tuple(said))

  return for_each_photo(photos, None, predicted)


def draw_segments(
  stored: StoredTask, predictions: Sequence[PredictedSegments], png: str | Path
) -> None:
  """Draws photos and their segments; of more than a dozen, so many spread evenly."""
  shown = [predictions[i] for i in sample_indices(len(predictions), _MOST)]
  palette = np.array(stored.task.palette, np.uint8)
  plot_panoptic([p.image for p in shown], [p.picture for p in shown], _names(stored), palette, png)


def save_segments(
  stored: StoredTask,
  photos: Sequence[str | Path],
  predictions: Sequence[PredictedSegments],
  directory: str | Path,
) -> list[Path]:
  """Writes `<photo>.png`, whose colours are segments' numbers, and `panoptic.json` of them all.

  The format is COCO's (r + 256 g + 256² b). A category's id is the number of its class, a picture's
  its place in `photos`, from 0.
  """
  place, names = Path(directory), _names(stored)
  place.mkdir(parents=True, exist_ok=True)
  files = unused_names([p.photo for p in predictions], ".png")
  numbers = iter(enumerate(map(Path, photos)))
  annotations: list[dict[str, Any]] = []
  for prediction, file in zip(predictions, files):
    ids = prediction.picture.map.astype(np.uint32)
    colors = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
    Image.fromarray(colors).save(place / file)
    areas = _areas(prediction.picture)
    segments = [
      {"id": s.id, "category_id": s.category, "isthing": int(s.is_thing), "area": areas[s.id]}
      for s in prediction.picture.segments
    ]
    number = next(i for i, photo in numbers if photo == prediction.photo)
    annotations.append({"image_id": number, "file_name": file, "segments_info": segments})
  things = set(stored.task.thing_classes)
  categories = [
    {"id": i, "name": name, "isthing": int(i in things)} for i, name in enumerate(names)
  ]
  listing = place / "panoptic.json"
  listing.write_text(json.dumps({"annotations": annotations, "categories": categories}))
  return [*(place / file for file in files), listing]


def _names(stored: StoredTask) -> tuple[str, ...]:
  return names_or_numbers(stored.task.map_class_names, stored.task.num_classes)


def _areas(picture: PanopticPicture) -> dict[int, int]:
  """Pixels of each segment, by its id."""
  ids, counts = np.unique(picture.map, return_counts=True)
  return dict(zip(ids.tolist(), counts.tolist()))
