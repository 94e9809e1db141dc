"""Detected objects in COCO's format of results, as pycocotools' `loadRes` takes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from hybrid_vit.box_inference import Objects
from hybrid_vit.data.mask_encoding import write_segmentation
from hybrid_vit.paths import as_path


def coco_results(
  found: Objects, image_id: Any, category_ids: Sequence[int] = ()
) -> Iterator[dict[str, Any]]:
  """A picture's objects as COCO's results, a row each.

  Each has "image_id", "category_id" (the class's number where `category_ids` is empty), "bbox"
  (x, y, width, height), "score" and, where there are masks, "segmentation" as compressed runs.
  """
  for i, (box, label, score) in enumerate(zip(found.boxes, found.labels, found.scores)):
    sized = (*box[:2], *(box[2:] - box[:2]))
    row: dict[str, Any] = {
      "image_id": _plain(image_id),
      "category_id": _plain(category_ids[label]) if len(category_ids) else int(label),
      "bbox": [_shortest(value) for value in sized],
      "score": _shortest(score),
    }
    if found.masks is not None:
      row["segmentation"] = write_segmentation(found.masks[i])
    yield row


def write_results(rows: Sequence[dict[str, Any]], file: Any) -> None:
  """A list of results as JSON, one a line."""
  place = as_path(file)
  place.parent.mkdir(parents=True, exist_ok=True)
  lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
  place.write_text(f"[\n{lines}\n]\n" if rows else "[]\n", encoding="utf-8")


def _shortest(value: np.float32) -> float:
  """The number with the fewest digits that is this one in float32."""
  return float(str(np.float32(value)))


def _plain(identifier: Any) -> Any:
  """A number of NumPy's as JSON has it; others as they are."""
  return identifier.item() if isinstance(identifier, np.generic) else identifier
