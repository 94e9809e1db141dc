"""Resampling, by Pillow's definition: the one that published figures were measured with.

The filter is widened by the factor of shrinking (antialiasing), and each of the two passes is
rounded to 8 bits. OpenCV's and JAX's resizing are other functions. With the extra "fast" the same
numbers are computed by `compiled_resizing`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
import platform
from collections.abc import Callable

import numpy as np
import PIL
from PIL import Image

from hybrid_vit.data.decoding import CorruptPictureError

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_SUPPORT = {"bilinear": 1, "bicubic": 2}
FILTERS = ("nearest", *_FILTERS)

# What would become larger than this, and than it was, is not worked on: such are pictures a few
# pixels wide, which "the short side to 256" makes endless.
_MAX_PIXELS = 2**26
_MAX_SIDE = 2**24
# A part is cut out of the whole where that is at most so many times as large: to the bit.
_WASTE = 8

_PILLOW = int(PIL.__version__.partition(".")[0])

# (top, left, height, width) in the resized picture.
Part = tuple[int, int, int, int]


def resize_image(
  image: np.ndarray, size: tuple[int, int], interpolation: str, part: Part | None = None
) -> np.ndarray:
  """Resizes as Pillow does, to the bit.

  Args:
    image: uint8 or float32 `[H, W, C]`; of any type with "nearest".
    size: (height, width).
    interpolation: a name in `FILTERS`; all but "nearest" are antialiased.
    part: only this of the result. Where the whole would be more than eight times as large, it is
      never made, and values may be one grey level off.

  Returns:
    `[height, width, C]` of the same type.

  Raises:
    CorruptPictureError: the result would be far larger than picture and reason.
    TypeError: another type.
  """
  if interpolation == "nearest":
    return resize_nearest(image, size, part)
  before = image.shape[0], image.shape[1]
  top, left, height, width = part or (0, 0, *size)
  if size[0] * size[1] <= _WASTE * height * width:
    if before != size and image.dtype == np.uint8 and image.shape[2:] == (3,):
      _check_growth(before, size, max(before[0], size[0]) * size[1])
      if (compiled := _compiled()) is not None:
        wanted, columns_first = (top, left, height, width), _columns_first(before, size)
        return compiled(image, size, _SUPPORT[interpolation], wanted, columns_first)
    whole = image if before == size else _resampled(image, size, interpolation, None)
    return whole[top : top + height, left : left + width]
  # Pillow takes the box in float32, which is exact enough near the origin only.
  y0, y1, rows = _reach(before[0], size[0], top, height, interpolation)
  x0, x1, columns = _reach(before[1], size[1], left, width, interpolation)
  return _resampled(image[rows, columns], (height, width), interpolation, (x0, y0, x1, y1))


def resize_box(
  image: np.ndarray,
  size: tuple[int, int],
  interpolation: str,
  box: tuple[float, float, float, float],
) -> np.ndarray:
  """Resizes a part of a picture whose border may lie within pixels.

  Args:
    image: uint8 `[H, W, 3]`.
    size: (height, width) of the result.
    interpolation: "bilinear" or "bicubic".
    box: (left, top, right, bottom) in pixels; the filter sees what lies around it.

  Returns:
    uint8 `[height, width, 3]`.

  Raises:
    CorruptPictureError: see `resize_image`.
  """
  return _resampled(image, size, interpolation, box)


@functools.cache
def _compiled() -> Callable[..., np.ndarray] | None:
  """Pillow's resampling to the bit, several times as fast, where the extra "fast" is installed."""
  if not can_be_compiled() or not importlib.util.find_spec("numba"):
    return None
  try:
    return importlib.import_module("hybrid_vit.data.compiled_resizing").resample
  except ImportError as error:
    logging.warning("numba is installed and cannot be used (%s): Pillow resizes", error)
    return None


def can_be_compiled() -> bool:
  """Whether compiled loops give this machine's Pillow's bits."""
  # Elsewhere Pillow's own compiler may fuse multiplications and additions: other last bits.
  return platform.machine() == "x86_64" and _PILLOW == 13


def resizer() -> str:
  """Whose loops resize pictures here: "numba" or "Pillow"; the pixels are the same."""
  return "Pillow" if _compiled() is None else "numba"


def _columns_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
  """Pillow 13's choice: the columns where they lose more than twice as many pixels as the lines."""
  return before[0] - after[0] > 2 * max(before[1] - after[1], 0)


def resize_nearest(
  values: np.ndarray, size: tuple[int, int], part: Part | None = None
) -> np.ndarray:
  """The same for values that must not be mixed: `[H, W, …]` of any type."""
  top, left, height, width = part or (0, 0, *size)
  _check_growth((values.shape[0], values.shape[1]), size, height * width)
  rows = nearest_indices(values.shape[0], size[0])[top : top + height]
  columns = nearest_indices(values.shape[1], size[1])[left : left + width]
  return values[rows[:, None], columns]


def nearest_indices(before: int, after: int) -> np.ndarray:
  """Which of `before` pixels each of `after` ones is: the one under its centre, int64 `[after]`.

  Summed up step by step as Pillow does, so that ties fall as they do there.
  """
  step = before / after
  positions = np.full(after, step)
  positions[0] = step * 0.5
  return np.cumsum(positions).astype(np.int64)


def _reach(
  before: int, after: int, start: int, length: int, interpolation: str
) -> tuple[float, float, slice]:
  """The ends of a part along one side, and the pixels that matter to it, from which they count."""
  scale = before / after
  margin = _SUPPORT[interpolation] * max(scale, 1.0) + 1
  low, high = start * scale, (start + length) * scale
  first, last = max(0, math.floor(low - margin)), min(before, math.ceil(high + margin))
  return low - first, min(high, last) - first, slice(first, last)


def _resampled(
  image: np.ndarray,
  size: tuple[int, int],
  interpolation: str,
  box: tuple[float, float, float, float] | None,
) -> np.ndarray:
  if image.dtype not in (np.uint8, np.float32):
    raise TypeError(f"pictures of {image.dtype} cannot be resized; uint8 or float32 was expected")
  height, width = size
  # The first pass makes all rows of the new width.
  _check_growth((image.shape[0], image.shape[1]), size, max(image.shape[0], height) * width)
  if image.dtype == np.uint8 and image.shape[2:] == (3,):
    pictures = [Image.fromarray(np.ascontiguousarray(image))]
  else:
    pictures = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(image, 2, 0)]
  resized = [
    np.asarray(picture.resize((width, height), _FILTERS[interpolation], box))
    for picture in pictures
  ]
  return resized[0] if resized[0].ndim == 3 else np.stack(resized, axis=-1)


def _check_growth(before: tuple[int, int], after: tuple[int, int], pixels: int) -> None:
  if pixels > max(_MAX_PIXELS, before[0] * before[1]) or max(after) > _MAX_SIDE:
    raise CorruptPictureError(
      f"a picture of {before[0]:,} x {before[1]:,} (height x width) is too long and thin "
      f"to be resized to {after[0]:,} x {after[1]:,}"
    )
