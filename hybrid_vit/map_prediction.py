"""Photos → predicted maps as files, and a sheet on which they lie over the photos."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hybrid_vit.data.classes import names_or_numbers
from hybrid_vit.data.splits import sample_indices
from hybrid_vit.dense_plots import plot_depths, plot_segmentations, save_depth, save_map
from hybrid_vit.photos import for_each_photo, unused_names
from hybrid_vit.stored_tasks import StoredTask

# Photos on one sheet.
_MOST = 12


@dataclasses.dataclass(frozen=True)
class PredictedMap:
  """What one photo shows.

  Attributes:
    photo: its path.
    image: uint8 `[H, W, 3]`.
    values: classes, int32 `[H, W]`, or metres, float32 `[H, W]`.
    summary: lines for people.
  """

  photo: Path
  image: np.ndarray
  values: np.ndarray
  summary: tuple[str, ...]


def predict_maps(
  stored: StoredTask, photos: Sequence[str | Path], top: int = 5
) -> tuple[list[PredictedMap], dict[Path, str]]:
  """Maps of photos, each of the photo's own size.

  Args:
    stored: the weights and their task.
    photos: files.
    top: how many classes a summary names, the largest first.

  Returns:
    (predictions in the order of the photos, the reason for each photo that could not be read).
  """

  def predicted(photo: Path, image: np.ndarray) -> PredictedMap:
    if stored.name != "depth":
      values = stored.classes(image)
      return PredictedMap(photo, image, values, _areas(stored, values, top))
    values = stored.depth(image)
    said = f"{values.min():.2f} to {values.max():.2f} m, in the middle {np.median(values):.2f} m"
    return PredictedMap(photo, image, values, (said,))

  return for_each_photo(photos, None, predicted)


def draw_maps(stored: StoredTask, predictions: Sequence[PredictedMap], png: str | Path) -> None:
  """Draws photos and their maps; of more than a dozen, so many spread evenly."""
  shown = [predictions[i] for i in sample_indices(len(predictions), _MOST)]
  photos, values = [p.image for p in shown], [p.values for p in shown]
  if stored.name != "depth":
    names = names_or_numbers(stored.task.map_class_names, stored.task.num_classes)
    plot_segmentations(photos, values, names, np.array(stored.task.palette, np.uint8), png)
  else:
    plot_depths(photos, values, png)


def save_maps(
  stored: StoredTask, predictions: Sequence[PredictedMap], directory: str | Path
) -> list[Path]:
  """Writes `<photo>.png` for each: classes in the palette, or depth in millimetres of 16 bits."""
  names = unused_names([prediction.photo for prediction in predictions], ".png")
  written = [Path(directory) / name for name in names]
  for prediction, path in zip(predictions, written):
    if stored.name != "depth":
      save_map(prediction.values, np.array(stored.task.palette, np.uint8), path)
    else:
      # What 16 bits hold at this scale; KITTI's 80 m do not fit in millimetres.
      scale = 1000.0 if stored.task.protocol.max_depth < 65.0 else 256.0
      save_depth(prediction.values, path, scale)
  return written


def _areas(stored: StoredTask, classes: np.ndarray, top: int) -> tuple[str, ...]:
  names = names_or_numbers(stored.task.map_class_names, stored.task.num_classes)
  counts = np.bincount(classes.ravel(), minlength=len(names))
  order = np.argsort(-counts, kind="stable")[:top]
  return tuple(f"{counts[i] / classes.size:6.1%}  {names[i]}" for i in order if counts[i])
