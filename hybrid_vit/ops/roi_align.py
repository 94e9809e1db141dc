"""RoIAlign (arXiv:1703.06870, section 3): features of boxes, averaged over bilinear samples.

A box is cut into P x P bins, a bin sampled at s x s places, evenly within it; a sample lies between
the centres of four cells. Its rules are torchvision's, mmcv's and detectron2's: a sample beyond -1
or the map's length counts as 0 and stays in the mean, one nearer is moved onto the map. Weights of
rows and of columns are independent, which gives two forms:

- "gather" reads and adds one cell of every bin at a time: least arithmetic. Where sampling is
  adaptive, boxes go in groups of as many cells.
- "matrix" multiplies by a matrix of rows' weights and one of columns': no gather at all, in either
  direction; the work does not grow with the number of samples.

Neither stores all that it read: the matrices go by parts of the boxes. Boxes get no gradient.

Deviation: the adaptive number of samples ends at `max_samples`, which boxes of up to twice the
map's longer side do not reach by default.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.ops.separable_sums import Taps, separable_sums

FORMS = ("gather", "matrix")
# On CPUs a fifth to a twelfth of the matrices' time; by a TPU's compiler half of their cycles
# (docs/results/operations).
DEFAULT_FORM = "gather"
LEVEL_RULES = ("mmdetection", "detectron2", "torchvision")
# Numbers that a part of the boxes may take in between.
_PART = 2**24


def roi_align(
  features: jax.Array,
  boxes: jax.Array,
  *,
  output_size: int | tuple[int, int],
  spatial_scale: float,
  sampling_ratio: int,
  aligned: bool,
  max_samples: int | None = None,
  form: str | None = None,
) -> jax.Array:
  """Features of boxes from one map.

  Args:
    features: `[B, H, W, C]`, any floating dtype; sums are float32.
    boxes: `[B, R, 4]` of each picture, in its pixels.
    output_size: P, or (rows, columns).
    spatial_scale: cells a pixel: 1 / stride.
    sampling_ratio: s, samples of a bin in each direction; 0 is adaptive: ceil(side in cells / P).
    aligned: whether boxes are moved by half a cell, so that cells' centres lie at whole numbers
      plus a half (mmdetection, detectron2); else sides are at least one cell (torchvision's own
      Mask R-CNN).
    max_samples: the largest adaptive s; None allows boxes of twice the map's longer side.
    form: one of `FORMS`; None takes `DEFAULT_FORM`.

  Returns:
    `[B, R, rows, columns, C]` of the features' dtype.

  Raises:
    ValueError: shapes, or a form, that do not fit.
  """
  level = jnp.zeros(boxes.shape[:2], jnp.int32)
  return _align(
    [features], boxes, level, output_size, [spatial_scale], sampling_ratio, aligned, max_samples,
    form,
  )  # fmt: skip


def pyramid_roi_align(
  features: Sequence[jax.Array],
  boxes: jax.Array,
  *,
  output_size: int | tuple[int, int],
  strides: Sequence[int],
  sampling_ratio: int,
  aligned: bool,
  finest_scale: float = 56.0,
  level_rule: str = "mmdetection",
  max_samples: int | None = None,
  form: str | None = None,
) -> jax.Array:
  """Features of boxes, each from the map of its size.

  Args:
    features: maps `[B, H, W, C]`, finest first.
    boxes: `[B, R, 4]`.
    output_size: P, or (rows, columns).
    strides: of the maps, such as (4, 8, 16, 32).
    sampling_ratio: as in `roi_align`, and so are the others.
    aligned: likewise.
    finest_scale: of `roi_levels`.
    level_rule: of `roi_levels`.
    max_samples: likewise.
    form: likewise.

  Returns:
    `[B, R, rows, columns, C]`.

  Raises:
    ValueError: shapes, or a form, that do not fit.
  """
  if len(features) != len(strides):
    raise ValueError(
      f"pyramid_roi_align: {len(features)} maps and {len(strides)} strides; as many were expected"
    )
  level = roi_levels(boxes, len(features), finest_scale, level_rule)
  scales = [1 / stride for stride in strides]
  return _align(
    features, boxes, level, output_size, scales, sampling_ratio, aligned, max_samples, form
  )


def roi_levels(
  boxes: jax.Array, levels: int, finest_scale: float = 56.0, rule: str = "mmdetection"
) -> jax.Array:
  """The map that each box reads (arXiv:1612.03144, equation 1).

  Args:
    boxes: `[..., 4]`.
    levels: how many maps there are.
    finest_scale: sqrt(area) below twice this is the finest's; 56 makes 224 the third's.
    rule: where the small number lies that keeps exact sizes from being rounded down:
      "mmdetection" adds 1e-6 to the ratio to the finest scale, "detectron2" 1e-8 to that to four
      times it, "torchvision" 1e-6 to the logarithm.

  Returns:
    int32 `[...]`, 0 to `levels` - 1.

  Raises:
    ValueError: another rule.
  """
  if rule not in LEVEL_RULES:
    raise ValueError(f"roi_levels: rule is {rule!r}; one of {', '.join(LEVEL_RULES)} was expected")
  side = jnp.sqrt((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))
  if rule == "mmdetection":
    level = jnp.log2(side / finest_scale + 1e-6)
  elif rule == "detectron2":
    level = 2 + jnp.log2(side / (4 * finest_scale) + 1e-8)
  else:
    level = 2 + jnp.log2(side / (4 * finest_scale)) + 1e-6
  level = jnp.nan_to_num(jnp.floor(level), nan=0.0, posinf=levels, neginf=0.0)
  return jnp.clip(level, 0, levels - 1).astype(jnp.int32)


def _align(
  features, boxes, level, output_size, scales, sampling_ratio, aligned, max_samples, form
) -> jax.Array:
  shapes = [f.shape for f in features]
  if any(len(s) != 4 or s[0] != shapes[0][0] or s[3] != shapes[0][3] for s in shapes):
    raise ValueError(f"roi_align: maps must be [B, H, W, C] with one B and C; got {shapes}")
  if boxes.ndim != 3 or boxes.shape[0] != shapes[0][0] or boxes.shape[2] != 4:
    raise ValueError(
      f"roi_align: boxes must be [B, R, 4], B of the maps, {shapes[0][0]}; got {boxes.shape}"
    )
  form = DEFAULT_FORM if form is None else form
  if form not in FORMS:
    raise ValueError(f"roi_align: unknown form {form!r}; known: {', '.join(FORMS)}")
  bins = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
  if sampling_ratio:
    samples = sampling_ratio
  else:
    longest = max(max(s[1:3]) for s in shapes)
    samples = max_samples or math.ceil(2 * longest / min(bins))
  boxes = lax.stop_gradient(boxes).astype(jnp.float32)
  places = functools.partial(_axis, ratio=sampling_ratio, samples=samples, aligned=aligned)
  if not boxes.shape[1]:
    return jnp.zeros((boxes.shape[0], 0, *bins, shapes[0][3]), features[0].dtype)
  if form == "gather":
    return _gathered(features, boxes, level, bins, scales, samples, places, not sampling_ratio)
  return _multiplied(features, boxes, level, bins, scales, samples, places, not sampling_ratio)


def _axis(low, high, scale, bins, *, ratio, samples, aligned):
  """(first place, bin's length, number of samples) of boxes along an axis, each `[...]`."""
  shift = 0.5 if aligned else 0.0
  start, end = low * scale - shift, high * scale - shift
  length = end - start if aligned else jnp.maximum(end - start, 1.0)
  if ratio:
    count = jnp.full(length.shape, float(ratio))
  else:
    count = jnp.clip(jnp.ceil(length / bins), 0, samples)
  return start, length / bins, count


def _sample(axis, bins: int, i, length):
  """Place of sample i of each bin on the map, `[..., bins]`, and its weight in the bin's mean."""
  start, size, count = (value[..., None] for value in axis)
  at = start + jnp.arange(bins, dtype=jnp.float32) * size
  at = at + (i + 0.5) * size / jnp.maximum(count, 1)
  inside = (at >= -1) & (at <= length) & (i < count)
  return jnp.clip(at, 0, length - 1), inside / jnp.maximum(count, 1)


def _parts(boxes: int, numbers: int) -> tuple[int, int]:
  """Into how many parts of how many boxes to go, where one box takes `numbers`."""
  size = min(boxes, max(1, _PART // max(numbers, 1)))
  parts = -(-boxes // size)
  return parts, -(-boxes // parts)


def _by_parts(function, arrays, boxes: int, numbers: int) -> jax.Array:
  """`function` of arrays `[B, R, ...]`, some boxes at a time."""
  parts, size = _parts(boxes, numbers)
  if parts == 1:
    return function(arrays)

  def split(x):
    x = jnp.pad(x, [(0, 0), (0, parts * size - boxes)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], parts, size, *x.shape[2:]), 1, 0)

  y = lax.map(function, jax.tree.map(split, arrays))
  y = jnp.moveaxis(y, 0, 1)
  return y.reshape(y.shape[0], parts * size, *y.shape[3:])[:, :boxes]


def _gathered(features, boxes, level, bins, scales, samples, places, adaptive) -> jax.Array:
  batch, channels = features[0].shape[0], features[0].shape[3]
  flat = jnp.concatenate([f.reshape(batch, -1, channels) for f in features], axis=1)
  heights, widths = (jnp.array([f.shape[k] for f in features]) for k in (1, 2))
  offsets = jnp.cumsum(heights * widths) - heights * widths
  scale = jnp.array(scales, jnp.float32)[level]
  height, width = heights[level], widths[level]
  rows = places(boxes[..., 1], boxes[..., 3], scale, bins[0])
  columns = places(boxes[..., 0], boxes[..., 2], scale, bins[1])
  if adaptive:
    longest = [max(f.shape[k] for f in features) for k in (1, 2)]
    taps = (
      _window(rows, bins[0], samples, height, longest[0]),
      _window(columns, bins[1], samples, width, longest[1]),
    )
  else:
    taps = _pairs(rows, bins[0], samples, height), _pairs(columns, bins[1], samples, width)
  return separable_sums(flat, offsets[level], width, *taps).astype(flat.dtype)


def _pairs(axis, bins: int, samples: int, length) -> Taps:
  """The two cells of each of a fixed number of samples."""
  length = length[..., None]
  cells, weights = [], []
  for i in range(samples):
    at, weight = _sample(axis, bins, i, length.astype(jnp.float32))
    lower = jnp.floor(at)
    for cell, part in ((lower, 1 - (at - lower)), (lower + 1, at - lower)):
      cells.append(jnp.clip(cell.astype(jnp.int32), 0, length - 1))
      weights.append(weight * part)
  return Taps(jnp.stack(cells), jnp.stack(weights))


def _window(axis, bins: int, samples: int, length, longest: int) -> Taps:
  """All cells from the first sample's to the last one's: samples are close where many."""
  length = length[..., None]
  real = length.astype(jnp.float32)
  count = axis[2]

  def lower(i):
    return jnp.floor(_sample(axis, bins, i, real)[0]).astype(jnp.int32)

  first = lower(0.0)
  last = lower(jnp.maximum(count - 1, 0)[..., None])
  cells = first + jnp.arange(longest).reshape(-1, *[1] * first.ndim)

  def add(i, weights):
    at, weight = _sample(axis, bins, i, real)
    return weights + weight * jnp.maximum(1 - jnp.abs(at - cells), 0)

  weights = lax.fori_loop(
    0, _most_samples(count, samples), add, jnp.zeros(cells.shape, jnp.float32)
  )
  number = jnp.clip(jnp.max(last - first, axis=-1) + 2, 0, longest)
  number = jnp.where(count > 0, number, 0)
  return Taps(jnp.clip(cells, 0, length - 1), weights, number)


def _most_samples(count: jax.Array, samples: int) -> jax.Array:
  """As many rounds as the largest box needs; boxes have no gradient, so a loop may end there."""
  return jnp.minimum(jnp.max(count).astype(jnp.int32), samples)


def _multiplied(features, boxes, level, bins, scales, samples, places, adaptive) -> jax.Array:
  total = jnp.zeros((), jnp.float32)
  for i, (f, scale) in enumerate(zip(features, scales)):
    batch, height, width, channels = f.shape
    rows = places(boxes[..., 1], boxes[..., 3], scale, bins[0])
    columns = places(boxes[..., 0], boxes[..., 2], scale, bins[1])
    across = _matrix(columns, bins[1], width, samples, adaptive) * (level == i)[..., None, None]
    down = _matrix(rows, bins[0], height, samples, adaptive)
    product = functools.partial(
      jnp.einsum,
      precision=lax.Precision.HIGHEST if f.dtype == jnp.float32 else None,
      preferred_element_type=jnp.float32,
    )

    def part(matrices, f=f, product=product):
      down, across = (m.astype(f.dtype) for m in matrices)
      # The longer side first: what is left in between is smaller.
      if f.shape[2] >= f.shape[1]:
        y = product("brqw,bhwc->brqhc", across, f)
        return product("brph,brqhc->brpqc", down, y.astype(f.dtype))
      y = product("brph,bhwc->brpwc", down, f)
      return product("brqw,brpwc->brpqc", across, y.astype(f.dtype))

    numbers = batch * channels * max(bins) * min(height, width)
    total = total + _by_parts(part, (down, across), boxes.shape[1], numbers)
  return total.astype(features[0].dtype)


def _matrix(axis, bins: int, length: int, samples: int, adaptive: bool) -> jax.Array:
  """Weight of each cell of an axis in each bin, float32 `[..., bins, length]`."""
  cells = jnp.arange(length, dtype=jnp.float32)

  def add(i, matrix):
    at, weight = _sample(axis, bins, i, float(length))
    near = jnp.maximum(1 - jnp.abs(at[..., None] - cells), 0)
    return matrix + weight[..., None] * near

  start = jnp.zeros((*axis[0].shape, bins, length), jnp.float32)
  if not adaptive:
    for i in range(samples):
      start = add(i, start)
    return start
  return lax.fori_loop(0, _most_samples(axis[2], samples), add, start)
