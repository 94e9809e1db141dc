"""COCO's forms of masks: polygons and run lengths, plain or compressed, and bitmaps.

Runs go down the columns, one column after the other, and begin with zeros. A compressed list holds
differences to the run two before, in digits of five bits as printable characters. Polygons are
drawn as pycocotools does (common/maskApi.c): edges in whole fifths of a pixel, a column's toggles
where an edge crosses its middle; results are equal to its, cell by cell.

Deviations: lists that pycocotools would read past, such as runs that do not add up to the picture,
are refused; polygons of two points, which it takes for boxes, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Cells of a polygon's raster in a pixel.
_FIFTHS = 5
# Pixels that a polygon may reach away: edges are drawn whole, within the picture or not.
_FARTHEST = 1 << 20


class Rle(NamedTuple):
  """A mask as run lengths.

  Attributes:
    size: (height, width).
    counts: int64 `[n]`, zeros and ones in turn, zeros first; they add up to height * width.
  """

  size: tuple[int, int]
  counts: np.ndarray


def encode_mask(mask: np.ndarray) -> Rle:
  """Runs of a bitmap `[H, W]`, whose non-zero pixels are the mask."""
  if mask.ndim != 2:
    raise ValueError(f"a mask must be [H, W]; got {mask.shape}")
  flat = (np.asarray(mask) != 0).ravel(order="F")
  changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
  if flat.size and flat[0]:
    changes = np.concatenate([[0], changes])
  return _from_changes(changes, (mask.shape[0], mask.shape[1]))


def decode_mask(rle: Rle) -> np.ndarray:
  """The bitmap, bool `[H, W]`."""
  values = np.arange(len(rle.counts)) % 2 == 1
  return np.repeat(values, rle.counts).reshape(rle.size, order="F")


def read_segmentation(segmentation: Any, size: Sequence[int]) -> Rle:
  """The `segmentation` of an annotation or a result, in any of COCO's forms.

  Args:
    segmentation: polygons (lists x1, y1, x2, y2 ...), or a mapping of "size" and "counts" (a list,
      or a compressed str or bytes).
    size: (height, width) of its picture.

  Raises:
    ValueError: what is none of these, is of another size, or does not add up to it.
  """
  height, width = int(size[0]), int(size[1])
  if not isinstance(segmentation, Mapping):
    return draw_polygons(segmentation, (height, width))
  own = tuple(int(n) for n in segmentation["size"])
  if own != (height, width):
    raise ValueError(
      f"a mask of {' x '.join(map(str, own))} for a picture of {height} x {width}: one size was "
      "expected"
    )
  counts = segmentation["counts"]
  if isinstance(counts, str | bytes):
    runs = decompress_counts(counts)
  else:
    runs = np.asarray(counts, np.int64)
  if runs.ndim != 1 or (runs < 0).any():
    raise ValueError(f"run lengths {str(counts)[:40]}: whole numbers from 0 on were expected")
  if runs.sum() != height * width:
    raise ValueError(
      f"run lengths add up to {runs.sum()}; {height * width} were expected of {height} x {width}"
    )
  return Rle((height, width), runs)


def write_segmentation(rle: Rle) -> dict[str, Any]:
  """A mask as results have it: "size", and compressed "counts" as a str."""
  return {"size": [int(n) for n in rle.size], "counts": compress_counts(rle.counts)}


def count_pixels(counts: Any) -> int | None:
  """The sum of a plain list of run lengths; None for what is none."""
  try:
    runs = np.asarray(counts, np.float64)
  except (TypeError, ValueError, OverflowError):
    return None
  right = runs.ndim == 1 and bool(np.all((runs >= 0) & (runs == np.floor(runs))))
  return int(runs.sum()) if right and np.isfinite(runs.sum()) else None


def decompress_counts(counts: str | bytes) -> np.ndarray:
  """Run lengths, int64 `[n]`, of a compressed list.

  Raises:
    ValueError: a character that cannot be in one, or a list that breaks off.
  """
  data = counts.encode("ascii", "replace") if isinstance(counts, str) else bytes(counts)
  digits = np.frombuffer(data, np.uint8).astype(np.int64) - 48
  if not digits.size:
    return np.zeros(0, np.int64)
  if (digits < 0).any() or (digits > 63).any() or digits[-1] & 32:
    raise ValueError(f"{data[:20]!r}... is no compressed list of run lengths, or breaks off")
  ends = np.flatnonzero(digits & 32 == 0)
  starts = np.concatenate([[0], ends[:-1] + 1])
  place = np.arange(digits.size) - np.repeat(starts, ends - starts + 1)
  values = np.add.reduceat((digits & 31) << (5 * place), starts)
  negative = digits[ends] & 16 != 0
  values = values - np.where(negative, np.int64(1) << (5 * (ends - starts + 1)), 0)
  # From the fourth on, each is a difference to the one two before.
  values[1::2] = np.cumsum(values[1::2])
  values[2::2] = np.cumsum(values[2::2])
  return values


def compress_counts(counts: np.ndarray) -> str:
  """The compressed list of run lengths: the inverse of `decompress_counts`."""
  left = np.array(counts, np.int64)
  left[3:] -= np.asarray(counts, np.int64)[1:-2]
  rows, going = [], np.ones(left.shape, bool)
  while going.any():
    digit = left & 31
    left = left >> 5
    more = np.where(digit & 16, left != -1, left != 0)
    rows.append(np.where(going, 48 + digit + 32 * more, 0))
    going &= more
  digits = np.stack(rows, axis=1).ravel() if rows else np.zeros(0, np.int64)
  return digits[digits > 0].astype(np.uint8).tobytes().decode("ascii")


def draw_polygons(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> Rle:
  """The union of polygons, each filled by the rule of even and odd.

  Args:
    polygons: each x1, y1, x2, y2 ... in pixels, of three points or more; none is an empty mask.
    size: (height, width).

  Raises:
    ValueError: fewer points, an odd number of coordinates, or one that is not finite or beyond a
      million pixels.
  """
  return merge_masks([_drawn(polygon, size) for polygon in polygons], size)


def merge_masks(masks: Sequence[Rle], size: tuple[int, int]) -> Rle:
  """The union of masks of one size."""
  if len(masks) == 1:
    return masks[0]
  intervals = [mask_intervals(rle) for rle in masks]
  starts = np.concatenate([i[0] for i in intervals] or [np.zeros(0, np.int64)])
  ends = np.concatenate([i[1] for i in intervals] or [np.zeros(0, np.int64)])
  places = np.concatenate([starts, ends])
  steps = np.concatenate([np.ones_like(starts), -np.ones_like(ends)])
  # Where one interval ends and another begins, the beginning first: no change in between.
  order = np.lexsort((-steps, places))
  depth = np.cumsum(steps[order])
  before = depth - steps[order]
  return _from_changes(places[order][(depth > 0) != (before > 0)], size)


def mask_area(rle: Rle) -> int:
  """Its number of pixels."""
  return int(rle.counts[1::2].sum())


def mask_box(rle: Rle) -> tuple[int, int, int, int]:
  """The smallest (x, y, width, height) around it; zeros for an empty mask."""
  starts, ends = mask_intervals(rle)
  if not starts.size:
    return 0, 0, 0, 0
  height = rle.size[0]
  left, right = int(starts[0]) // height, (int(ends[-1]) - 1) // height
  if (starts // height != (ends - 1) // height).any():
    top, bottom = 0, height - 1
  else:
    top, bottom = int((starts % height).min()), int(((ends - 1) % height).max())
  return left, top, right - left + 1, bottom - top + 1


def mask_intervals(rle: Rle) -> tuple[np.ndarray, np.ndarray]:
  """Where runs of ones start and end (exclusive), int64 `[n]` each; none of them is empty."""
  places = np.cumsum(rle.counts)
  count = len(places) // 2
  starts, ends = places[: 2 * count : 2], places[1 : 2 * count : 2]
  kept = ends > starts
  return (starts, ends) if kept.all() else (starts[kept], ends[kept])


def _from_changes(changes: np.ndarray, size: tuple[int, int]) -> Rle:
  """Of the places, rising, at which the mask begins and ends in turn."""
  places = np.concatenate([changes, [size[0] * size[1]]]).astype(np.int64)
  counts = np.diff(places, prepend=0)
  # A mask up to the last pixel has no zeros behind it.
  return Rle(size, counts[:-1] if len(counts) > 1 and not counts[-1] else counts)


def _drawn(polygon: Sequence[float], size: tuple[int, int]) -> Rle:
  height, width = size
  points = np.asarray(polygon, np.float64)
  if points.ndim != 1 or points.size < 6 or points.size % 2 or not np.isfinite(points).all():
    raise ValueError(
      f"a polygon of {points.size} numbers, {points.ravel()[:6].tolist()}...: x and y of three "
      "points or more, all finite, were expected"
    )
  if np.abs(points).max() > _FARTHEST:
    farthest = points[np.abs(points).argmax()]
    raise ValueError(
      f"a polygon that reaches to {farthest:g}; at most {_FARTHEST:,} pixels were expected"
    )
  corners = np.trunc(_FIFTHS * points.reshape(-1, 2) + 0.5).astype(np.int64)
  u, v = _outline(corners, np.roll(corners, -1, axis=0))
  crossing = u[1:] != u[:-1]
  column = np.where(u[1:] < u[:-1], u[1:], u[1:] - 1)[crossing]
  row = np.minimum(v[1:], v[:-1])[crossing]
  # Cell 5 x + 2 is the middle of column x.
  x, rest = np.divmod(column - _FIFTHS // 2, _FIFTHS)
  y = np.ceil(np.clip((row + 0.5) / _FIFTHS - 0.5, 0, height)).astype(np.int64)
  kept = (rest == 0) & (x >= 0) & (x < width)
  toggles, times = np.unique((x * height + y)[kept], return_counts=True)
  changes = toggles[times % 2 == 1]
  return _from_changes(changes[changes < height * width], size)


def _outline(start: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """All raster cells of edges `[E, 2]` in order: a step of one along the longer axis of each."""
  span = np.abs(end - start)
  flat = span[:, 0] >= span[:, 1]
  long, short = np.where(flat, 0, 1), np.where(flat, 1, 0)
  edges = np.arange(len(start))
  # An edge is drawn from its lower end, whichever way it goes.
  turned = start[edges, long] > end[edges, long]
  low, high = np.where(turned[:, None], end, start), np.where(turned[:, None], start, end)
  length = span[edges, long]
  slope = (high - low)[edges, short] / np.maximum(length, 1)
  edge = np.repeat(edges, length + 1)
  step = np.arange(edge.size) - np.repeat(np.cumsum(length + 1) - (length + 1), length + 1)
  step = np.where(turned[edge], length[edge] - step, step)
  along = low[edges, long][edge] + step
  across = np.trunc(low[edges, short][edge] + slope[edge] * step + 0.5).astype(np.int64)
  return np.where(flat[edge], along, across), np.where(flat[edge], across, along)
