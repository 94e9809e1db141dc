"""Pillow's resampling of 8-bit RGB pictures, compiled for this machine's vectors: the same bits.

Pillow's own loops take one number at a time. These take 32 lines at once along them, and whole
lines from one to the next. Weights and sums are Pillow's: a filter in double precision, as whole
numbers of 22 bits behind the point, and each pass rounded to 8 bits.

Needs numba, the extra "fast"; importing this file compiles, or reads what an earlier process left
in numba's cache. `resizing` imports it when it first resizes.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

_BITS = 22
# Rows that the pass along the lines takes at once: 96 sums fill whole vectors.
_ROWS = 32
_IMAGE = numba.types.Array(numba.uint8, 3, "A", readonly=True)  # or not, and of any strides
_LINES = numba.uint8[:, ::1]
_TABLE = numba.int32[:, ::1]


def _compile(signature: Any) -> Any:
  """numba's compiler, which frees the interpreter's lock; its cache where there is room for one."""

  def decorate(function: Any) -> Any:
    try:
      return numba.njit(signature, nogil=True, cache=True)(function)
    except RuntimeError:  # neither beside this file nor at home can anything be written
      return numba.njit(signature, nogil=True)(function)

  return decorate


@_compile(numba.float64(numba.float64, numba.int64))
def _filter(x, support):
  """The filter with this support at x: 1 is the bilinear one, 2 the bicubic one."""
  x = abs(x)
  if support == 1:
    return 1.0 - x if x < 1.0 else 0.0
  if x < 1.0:
    return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
  if x < 2.0:
    return (((x - 5) * x + 8) * x - 4) * -0.5
  return 0.0


@_compile(numba.types.UniTuple(_TABLE, 2)(*[numba.int64] * 5))
def _weights(before, after, start, length, support):
  """Of `length` pixels from `start` on: (first pixel, how many) `[length, 2]` and their weights."""
  scale = before / after
  wide = max(scale, 1.0)
  reach = support * wide
  most = math.ceil(reach) * 2 + 1
  spans = np.empty((length, 2), np.int32)
  weights = np.zeros((length, most), np.int32)
  values = np.empty(most)
  for i in range(length):
    centre = (start + i + 0.5) * scale
    first = max(int(centre - reach + 0.5), 0)
    count = min(int(centre + reach + 0.5), before) - first
    total = 0.0
    for k in range(count):
      values[k] = _filter((k + first - centre + 0.5) * (1.0 / wide), support)
      total += values[k]
    for k in range(count):
      value = values[k] / total if total != 0.0 else values[k]
      value *= 1 << _BITS
      weights[i, k] = int(value - 0.5) if value < 0 else int(value + 0.5)
    spans[i, 0], spans[i, 1] = first, count
  return spans, weights


@_compile(numba.void(_IMAGE, numba.int64, _TABLE, _TABLE, _LINES))
def _along_lines(image, top, spans, weights, out):
  """Lines from `top` on → `out` `[rows, 3 width]`, rows a multiple of `_ROWS`."""
  height, width, _ = image.shape
  lanes = np.empty((width, 3 * _ROWS), np.uint8)
  totals = np.empty(3 * _ROWS, np.int32)
  pixels = np.empty(3 * _ROWS, np.uint8)
  for begin in range(0, out.shape[0], _ROWS):
    for row in range(_ROWS):
      y = min(top + begin + row, height - 1)
      for x in range(width):
        lanes[x, 3 * row] = image[y, x, 0]
        lanes[x, 3 * row + 1] = image[y, x, 1]
        lanes[x, 3 * row + 2] = image[y, x, 2]
    for i in range(spans.shape[0]):
      first = spans[i, 0]
      totals[:] = 1 << (_BITS - 1)
      for k in range(spans[i, 1]):
        weight = weights[i, k]
        for j in range(3 * _ROWS):
          totals[j] += weight * np.int32(lanes[first + k, j])
      # In a loop of its own, which becomes vectors; the next one cannot.
      for j in range(3 * _ROWS):
        pixels[j] = min(max(totals[j] >> _BITS, 0), 255)
      for row in range(_ROWS):
        out[begin + row, 3 * i] = pixels[3 * row]
        out[begin + row, 3 * i + 1] = pixels[3 * row + 1]
        out[begin + row, 3 * i + 2] = pixels[3 * row + 2]


@_compile(numba.void(_LINES, numba.int64, _TABLE, _TABLE, _LINES))
def _across_lines(lines, top, spans, weights, out):
  """`lines`, whose first is line `top` of the picture, → `out`, both `[rows, 3 width]`."""
  totals = np.empty(out.shape[1], np.int32)
  for i in range(out.shape[0]):
    first = spans[i, 0] - top
    totals[:] = 1 << (_BITS - 1)
    for k in range(spans[i, 1]):
      weight = weights[i, k]
      for j in range(totals.shape[0]):
        totals[j] += weight * np.int32(lines[first + k, j])
    for j in range(totals.shape[0]):
      out[i, j] = min(max(totals[j] >> _BITS, 0), 255)


def resample(
  image: np.ndarray,
  size: tuple[int, int],
  support: int,
  part: tuple[int, int, int, int],
  columns_first: bool,
) -> np.ndarray:
  """Resizes and gives a part of the result, without making the rest.

  Args:
    image: uint8 `[H, W, 3]`, of any strides.
    size: (height, width) of the whole result.
    support: 1 for bilinear, 2 for bicubic.
    part: (top, left, height, width) in the whole result.
    columns_first: the first pass, behind which is rounded, is along the columns, not the lines.

  Returns:
    uint8 `[height, width, 3]` of the part, to the bit what Pillow gives by that order of passes.
  """
  top, left, height, width = part
  if columns_first:
    turned = resample(
      image.transpose(1, 0, 2), (size[1], size[0]), support, (left, top, width, height), False
    )
    return turned.transpose(1, 0, 2)
  columns, column_weights = _weights(image.shape[1], size[1], left, width, support)
  rows, row_weights = _weights(image.shape[0], size[0], top, height, support)
  first, last = int(rows[0, 0]), int(rows[-1].sum())
  lines = np.empty((-(-(last - first) // _ROWS) * _ROWS, 3 * width), np.uint8)
  _along_lines(image, first, columns, column_weights, lines)
  out = np.empty((height, 3 * width), np.uint8)
  _across_lines(lines, first, rows, row_weights, out)
  return out.reshape(height, width, 3)
