"""Operations for photos with segments, by the recipes that predict a class and a mask of each.

Deviation: segments of which a crop leaves no pixel are no targets; Mask2Former's panoptic training
keeps them with empty masks, its training of instances does not.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hybrid_vit.data import arguments as check
from hybrid_vit.data import segments
from hybrid_vit.data.box_operations import largest_rows, take_rows
from hybrid_vit.data.lazy_masks import as_lazy
from hybrid_vit.data.transform_registry import (
  Example,
  Transform,
  only_key,
  register_transform,
  value_of,
)


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
    value_of(example, segments.MAP)
    rows, areas = segments.known_segments(example)
    crowd = np.asarray(example.get(segments.CROWD, np.zeros(len(areas))), bool)
    rows = rows[(areas[rows] > 0) & ~crowd[rows]]
    chosen, left_out = largest_rows(areas[rows], count, "keep_segments", "segments")
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
  name = only_key(kinds, "masks")

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
    chosen, left_out = largest_rows(areas[rows], count, "pack_masks", "segments")
    packed = take_rows({**example, name: bits}, rows[chosen], kinds)
    return {**packed, "objects_left_out": left_out}

  return transform
