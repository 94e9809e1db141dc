"""Operations for photos with segments, by the recipes that predict a class and a mask of each.

Deviation: segments of which a crop leaves no pixel are no targets; Mask2Former's panoptic training
keeps them with empty masks, its training of instances does not.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hybrid_vit.data import arguments as check
from hybrid_vit.data import segments
from hybrid_vit.data.box_operations import take_rows
from hybrid_vit.data.folders import tell_once
from hybrid_vit.data.lazy_masks import as_lazy
from hybrid_vit.data.transform_registry import Example, Transform, register_transform


@register_transform("keep_segments")
def keep_segments(count: int = 100, *, kinds: Mapping[str, str]) -> Transform:
  """Segments that are no crowd and have a pixel, of more than `count` the largest; numbered anew.

  Pixels of the others belong to no segment. How many were left out for their size is there as
  "objects_left_out", int32, and told once.
  """
  check.whole("count", count)
  if count > segments.MOST:
    raise ValueError(f"count is {count}; at most {segments.MOST} was expected")
  if segments.MAP not in kinds:
    raise ValueError(
      f"keep_segments chooses among {segments.MAP!r}, which the task does not read; it reads: "
      f"{', '.join(kinds)}"
    )

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    if segments.MAP not in example:
      raise ValueError(
        f"the examples have no {segments.MAP!r}; they have: {', '.join(sorted(example))}"
      )
    rows, areas = segments.known_segments(example)
    crowd = np.asarray(example.get(segments.CROWD, np.zeros(len(areas))), bool)
    rows = rows[(areas[rows] > 0) & ~crowd[rows]]
    chosen, left_out = _largest(areas[rows], count, "keep_segments")
    return {**segments.chosen_segments(example, rows[chosen]), "objects_left_out": left_out}

  return transform


@register_transform("pack_masks")
def pack_masks(count: int = 100, *, kinds: Mapping[str, str]) -> Transform:
  """Masks that have a pixel, of more than `count` the largest, as a bit a pixel.

  uint8 `[N, H, W / 8]`: of 100 objects on 1024 x 1024 13 MB, of which bitmaps are 105 MB. Objects
  that are left out lose all their rows; how many were, for their size, is "objects_left_out".
  Nothing on the plane may follow it.
  """
  check.whole("count", count)
  names = [name for name, kind in kinds.items() if kind == "masks"]
  if len(names) != 1:
    raise ValueError(
      f"pack_masks: the task has {len(names)} keys of kind 'masks'; one was expected"
    )
  (name,) = names

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    masks = as_lazy(example[name])
    height, width = masks.shape[1:]
    if width % 8:
      raise ValueError(
        f"pack_masks of masks {width} wide: a multiple of 8 was expected; pad_to one before"
      )
    bits = np.zeros((len(masks), height, width // 8), np.uint8)
    areas = np.zeros(len(masks), np.int64)
    for row in range(len(masks)):
      bitmap = masks.part(row, 0, 0, height, width)
      bits[row], areas[row] = np.packbits(bitmap != 0, axis=-1), np.count_nonzero(bitmap)
    rows = np.flatnonzero(areas)
    chosen, left_out = _largest(areas[rows], count, "pack_masks")
    example = {**take_rows({**example, name: bits}, rows[chosen], kinds)}
    return {**example, "objects_left_out": left_out}

  return transform


def _largest(areas: np.ndarray, count: int, operation: str) -> tuple[np.ndarray, np.ndarray]:
  """Which of some areas are the `count` largest, rising, and how many are left out, int32."""
  left_out = max(len(areas) - count, 0)
  if left_out:
    tell_once(
      f"{operation}({count})",
      f"a picture has {len(areas):,} segments, of which the {count} largest stay; of this one and "
      'others "objects_left_out" says how many did not',
    )
  chosen = np.sort(np.argsort(-areas, kind="stable")[:count])
  return chosen, np.array(left_out, np.int32)
