"""How each kind of stored task is asked about photos, drawn and written: a table by its name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_vit.map_prediction import draw_maps, predict_maps, save_maps
from hybrid_vit.object_prediction import draw_objects, predict_objects, save_objects
from hybrid_vit.panoptic_prediction import draw_segments, predict_segments, save_segments
from hybrid_vit.stored_tasks import StoredTask

Photos = Sequence[str | Path]


@dataclasses.dataclass(frozen=True)
class Asked:
  """What the command asks of a task.

  Attributes:
    predict: `(stored, photos, top, min_score) → (predictions, photo → why it could not be read)`;
      a prediction has its "photo" and a "summary" in lines for people.
    draw: `(stored, predictions, png)` draws a sheet.
    output: the option by which the predictions are written as files: "maps" or "objects".
    save: `(stored, photos, predictions, place) → the files written`, for that option.
    has_scores: whether predictions have scores, so that `min_score` says something.
  """

  predict: Callable[[StoredTask, Photos, int, float], tuple[list[Any], dict[Path, str]]]
  draw: Callable[[StoredTask, Sequence[Any], str | Path], None]
  output: str
  save: Callable[[StoredTask, Photos, Sequence[Any], str | Path], list[Path]]
  has_scores: bool = False


_MAPS = Asked(
  predict=lambda stored, photos, top, _: predict_maps(stored, photos, top),
  draw=draw_maps,
  output="maps",
  save=lambda stored, _, predictions, place: save_maps(stored, predictions, place),
)
_OBJECTS = Asked(
  predict=predict_objects,
  draw=draw_objects,
  output="objects",
  save=lambda *given: [save_objects(*given)],
  has_scores=True,
)
_SEGMENTS = Asked(
  predict=lambda stored, photos, top, _: predict_segments(stored, photos, top),
  draw=draw_segments,
  output="maps",
  save=save_segments,
)
ASKED: Mapping[str, Asked] = {
  "segmentation": _MAPS,
  "mask_segmentation": _MAPS,
  "depth": _MAPS,
  "detection": _OBJECTS,
  "instance_segmentation": _OBJECTS,
  "panoptic_segmentation": _SEGMENTS,
}
OUTPUTS = tuple(dict.fromkeys(asked.output for asked in ASKED.values()))
