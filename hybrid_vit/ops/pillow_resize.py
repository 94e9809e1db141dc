"""Pillow's resizing of 8-bit pictures within a program of the device, to the bit.

The sizes of the pictures may be open in an exported program, so nothing here is computed from them
while it is traced. Pillow's weights are whole numbers of 22 bits behind the point, computed in
float64; a pass is a sum of their products with pixels, rounded to 8 bits.

Sums are products of matrices, on CPUs loops over the filter's pixels. For the products each weight
is written as three whole numbers of 8 bits, h 2^16 + m 2^8 + l. These are exact in bfloat16, and
their sums are in float32: so the precision of the device's products does not matter.

`hybrid_vit.data.resizing` is the same for pictures that are loaded.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.ops.platforms import on_cpu

_BITS = 22
_SUPPORT = {"bilinear": 1, "bicubic": 2}
FILTERS = ("nearest", *_SUPPORT)

Sides = tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]


def resize_like_pillow(
  images: jax.Array,
  whole: Sides,
  interpolation: str,
  corner: Sides = (0, 0),
  size: tuple[int, int] | None = None,
) -> jax.Array:
  """Resizes as Pillow 13 does, and gives a part of the result without making the rest.

  Args:
    images: uint8 `[B, H, W, C]`; any of B, H and W may be symbolic.
    whole: (height, width) of the whole result; numbers, or int32 scalars of the program.
    interpolation: a name in `FILTERS`; all but "nearest" are antialiased.
    corner: (top, left) of the part in the whole, as `whole`; what lies outside of it is black.
    size: (height, width) of the part; None for the whole, which must then be of numbers.

  Returns:
    uint8 `[B, *size, C]`.

  Raises:
    ValueError: pictures of another type or rank, another filter, or no size.
  """
  if images.ndim != 4 or images.dtype != jnp.uint8:
    raise ValueError(
      f"pictures of {images.dtype} {list(images.shape)}; uint8 [B, H, W, C] was expected"
    )
  if interpolation not in FILTERS:
    raise ValueError(f"interpolation {interpolation!r}; {', '.join(FILTERS)} are known")
  if size is None:
    height, width = whole
    if not (isinstance(height, int) and isinstance(width, int)):
      raise ValueError("the size of the result is not known before the program runs; give `size`")
    size = (height, width)
  before = [jnp.asarray(side, jnp.int32) for side in images.shape[1:3]]
  after = [jnp.asarray(side, jnp.int32) for side in whole]
  start = [jnp.asarray(side, jnp.int32) for side in corner]
  if interpolation == "nearest":
    for axis in (0, 1):
      places = _nearest(before[axis], after[axis], start[axis], size[axis])
      images = jnp.take(images, places, axis=axis + 1, mode="clip")
    rows, columns = (_inside(start[axis], size[axis], after[axis]) for axis in (0, 1))
    return jnp.where((rows[:, None] & columns)[..., None], images, 0).astype(jnp.uint8)
  rows, columns = (
    _weights(images.shape[axis + 1], after[axis], start[axis], size[axis], interpolation)
    for axis in (0, 1)
  )
  # Pillow 13 begins with the columns where they lose more than twice as many pixels as the lines.
  # The order matters, because what comes of the first pass is rounded.
  columns_first = before[0] - after[0] > 2 * jnp.maximum(before[1] - after[1], 0)
  return lax.cond(
    columns_first,
    lambda x: _pass(_pass(x, rows, 1), columns, 2),
    lambda x: _pass(_pass(x, columns, 2), rows, 1),
    images,
  )


def _pass(images: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
  """uint8 `[B, H, W, C]` and int32 `[size, side of axis]` → uint8, that axis of `size`."""
  sums = on_cpu(
    functools.partial(_by_pixels, axis=axis), functools.partial(_by_products, axis=axis)
  )
  total = sums(images, weights) + (1 << (_BITS - 1))
  return jnp.clip(total >> _BITS, 0, 255).astype(jnp.uint8)


def _by_products(images: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
  """Sums of pixels times weights, int32, as products of matrices."""
  low = ((weights + 128) & 255) - 128
  rest = (weights - low) >> 8
  middle = ((rest + 128) & 255) - 128
  parts = jnp.stack([(rest - middle) >> 8, middle, low]).astype(jnp.float32)
  sums = jnp.einsum(
    "pih,bhwc->pbiwc" if axis == 1 else "pjw,bhwc->pbhjc", parts, images.astype(jnp.float32)
  )
  high, middle, low = sums.astype(jnp.int32)
  return (high << 16) + (middle << 8) + low


def _by_pixels(images: jax.Array, weights: jax.Array, axis: int) -> jax.Array:
  """The same, pixel by pixel within the filter: fewer operations, and none for a matrix unit."""
  size, side = weights.shape
  first = jnp.argmax(weights != 0, axis=1).astype(jnp.int32)
  last = jnp.max(jnp.where(weights != 0, lax.iota(jnp.int32, side), 0), axis=1)
  kept = (*images.shape[:axis], size, *images.shape[axis + 1 :])
  along = (-1,) + (1,) * (3 - axis)

  def add(k: jax.Array, total: jax.Array) -> jax.Array:
    at = first + k
    weight = jnp.take_along_axis(weights, at[:, None], axis=1, mode="fill", fill_value=0)
    pixels = jnp.take(images, at, axis=axis, mode="clip")
    return total + weight.reshape(along) * pixels.astype(jnp.int32)

  return lax.fori_loop(0, jnp.max(last - first) + 1, add, jnp.zeros(kept, jnp.int32))


def _inside(start: jax.Array, length: int, after: jax.Array) -> jax.Array:
  places = start + jnp.arange(length, dtype=jnp.int32)
  return (places >= 0) & (places < after)


def _weights(
  side: int, after: jax.Array, start: jax.Array, length: int, interpolation: str
) -> jax.Array:
  """Pillow's whole numbers for `length` pixels from `start` on: int32 `[length, side]`.

  Computed in float64, as there. Pillow sums over the pixels whose centres are within the filter's
  support; outside of it the filter is 0.
  """
  before = jnp.asarray(side, jnp.int32)
  inside = _inside(start, length, after)
  with jax.enable_x64(True):
    scale = before.astype(jnp.float64) / after.astype(jnp.float64)
    places = jnp.arange(length, dtype=jnp.int32) + start
    centres = (places.astype(jnp.float64) + 0.5) * scale
    pixels = lax.iota(jnp.int32, side).astype(jnp.float64)
    apart = (pixels - centres[:, None] + 0.5) * (1.0 / jnp.maximum(scale, 1.0))
    values = _filter(jnp.abs(apart), interpolation)
    total = values.sum(1, keepdims=True)
    values = jnp.where(inside[:, None], values / jnp.where(total == 0.0, 1.0, total), 0.0)
    values *= 1 << _BITS
    # astype cuts off what is behind the point.
    return jnp.where(values < 0, values - 0.5, values + 0.5).astype(jnp.int32)


def _filter(x: jax.Array, interpolation: str) -> jax.Array:
  """The filter at x ≥ 0, in pixels of the smaller picture."""
  if interpolation == "bilinear":
    return jnp.maximum(1.0 - x, 0.0)
  near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
  far = (((x - 5) * x + 8) * x - 4) * -0.5
  return jnp.where(x < 1.0, near, jnp.where(x < 2.0, far, 0.0))


def _nearest(before: jax.Array, after: jax.Array, start: jax.Array, length: int) -> jax.Array:
  """Which pixels those from `start` on are: int32 `[length]`.

  Summed up step by step as Pillow does, so that ties fall as they do there.
  """
  with jax.enable_x64(True):
    step = before.astype(jnp.float64) / after.astype(jnp.float64)

    def onward(position, i):
      return position + jnp.where(i > 0, step, 0.0), position

    first = lax.fori_loop(jnp.int32(0), jnp.maximum(start, 0), lambda _, x: x + step, step * 0.5)
    _, positions = lax.scan(onward, first, start + jnp.arange(1, length + 1, dtype=jnp.int32))
    return positions.astype(jnp.int32)
