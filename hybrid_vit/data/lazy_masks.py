"""Masks of objects that stay encoded until one of them, or a part of one, is asked for.

A photo of COCO has seven objects, one of LVIS up to 300; as bitmaps these would be moved and
resized whole, a byte a pixel each. Here what has been done to the picture's plane is noted, and
done once to a table of where each pixel comes from, through which any part of any mask is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hybrid_vit.data.errors import CorruptExampleError
from hybrid_vit.data.geometry import OnPlaneLater, Plane, Size, merged
from hybrid_vit.data.mask_encoding import Rle, decode_mask, encode_mask

# A mask when it is asked for: run lengths, or a bitmap `[H, W]`.
Read = Callable[[], Rle | np.ndarray]


class LazyMasks(OnPlaneLater):
  """N masks, to the eye an array uint8 `[N, H, W]` of zeros and ones.

  Args:
    size: (height, width) of the masks as they are read.
    readers: what gives each of them; may raise CorruptExampleError.
    planes: what has been done to the picture since, in order.
  """

  dtype = np.dtype(np.uint8)
  ndim = 3

  def __init__(self, size: Size, readers: Sequence[Read], planes: Sequence[Plane] = ()):
    self._before, self._readers, self._planes = size, list(readers), merged(planes)
    self._table: np.ndarray | None = None

  @property
  def shape(self) -> tuple[int, int, int]:
    """(N, height, width) now."""
    size = self._planes[-1].size if self._planes else self._before
    return len(self._readers), size[0], size[1]

  def __len__(self) -> int:
    return len(self._readers)

  def __getitem__(self, rows: Any) -> LazyMasks:
    """Those of chosen rows: a slice, or an array of whole numbers or of bool."""
    chosen = np.arange(len(self))[rows].reshape(-1)
    out = LazyMasks(self._before, [self._readers[i] for i in chosen], self._planes)
    out._table = self._table
    return out

  def moved(self, plane: Plane) -> LazyMasks:
    """Those after a change of the picture's plane."""
    return LazyMasks(self._before, self._readers, [*self._planes, plane])

  def part(self, row: int, top: int, left: int, bottom: int, right: int) -> np.ndarray:
    """One mask within a box of whole pixels, uint8 `[bottom - top, right - left]`."""
    bitmap = self._bitmap(row)
    if not self._planes:
      return bitmap[top:bottom, left:right].astype(np.uint8)
    places = self._places()[top:bottom, left:right]
    return ((bitmap.reshape(-1)[places] != 0) & (places >= 0)).astype(np.uint8)

  def rle(self, row: int) -> Rle:
    """One mask as run lengths."""
    if not self._planes:
      read = self._readers[row]()
      return read if isinstance(read, Rle) else encode_mask(read)
    return encode_mask(self.part(row, 0, 0, *self.shape[1:]))

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    out = np.empty(self.shape, np.uint8)
    for row in range(len(self)):
      out[row] = self.part(row, 0, 0, *self.shape[1:])
    return out if dtype is None else out.astype(dtype)

  def _bitmap(self, row: int) -> np.ndarray:
    read = self._readers[row]()
    bitmap = decode_mask(read) if isinstance(read, Rle) else np.asarray(read) != 0
    if bitmap.shape != self._before:
      raise CorruptExampleError(
        f"mask {row} is {bitmap.shape[0]} x {bitmap.shape[1]} and its picture {self._before[0]} x "
        f"{self._before[1]} (height x width); one size was expected"
      )
    return np.ascontiguousarray(bitmap)

  def _places(self) -> np.ndarray:
    """Which pixel each is, counted along the rows as the masks are read; -1 for none of them."""
    if self._table is None:
      height, width = self._before
      table = np.arange(height * width, dtype=np.int32).reshape(height, width)
      for plane in self._planes:
        table = plane.map(table, -1)
      self._table = table
    return self._table


def as_lazy(masks: Any) -> LazyMasks:
  """The same of an array `[N, H, W]`; what is lazy stays as it is."""
  if isinstance(masks, LazyMasks):
    return masks
  array = np.asarray(masks)
  if array.ndim != 3:
    raise ValueError(f"masks have shape {list(array.shape)}; [N, H, W] was expected")
  return LazyMasks((array.shape[1], array.shape[2]), [_Row(array, i) for i in range(len(array))])


class _Row:
  def __init__(self, array: np.ndarray, row: int):
    self._array, self._row = array, row

  def __call__(self) -> np.ndarray:
    return self._array[self._row]
