"""Maps resized without antialiasing by PyTorch's rules, for decoders and evaluation.

`F.interpolate` (bilinear with either `align_corners`, nearest) and `F.adaptive_avg_pool2d`, which
JAX has not with all of this. Each axis is resized by itself: `reference_bilinear` by a matrix of
which two numbers in a row are not 0; the fast form for whole factors (decoders double their maps)
by sums of neighbours, whose gradient is sums, too. Source positions are float32, as PyTorch's: at
the far end of a large map theirs are off by more than an answer's rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Above this factor a matrix product is the shorter way.
_LARGEST_FACTOR = 8


def resize_bilinear(x: jax.Array, size: Sequence[int], *, align_corners: bool) -> jax.Array:
  """Resizes `[B, H, W, C]` to `size`, bilinear, without antialiasing also when shrinking.

  Args:
    x: of any floating type, which the result has; sums are float32.
    size: (height, width).
    align_corners: whether the centres of the corner cells stay where they are; else their borders.

  Returns:
    `[B, height, width, C]`.
  """
  return resized_bilinear(x, (int(size[0]), int(size[1])), align_corners, True)


def reference_bilinear(x: jax.Array, size: Sequence[int], *, align_corners: bool) -> jax.Array:
  """`resize_bilinear` by two matrix products, whatever the sizes."""
  return resized_bilinear(x, (int(size[0]), int(size[1])), align_corners, False)


def resize_nearest(x: jax.Array, size: Sequence[int]) -> jax.Array:
  """Resizes `[B, H, W, C]`: row i of the result is row floor(i * H / height), columns alike."""
  for axis, new in ((1, int(size[0])), (2, int(size[1]))):
    old = x.shape[axis]
    if new == old:
      continue
    if new % old == 0:
      x = jnp.repeat(x, new // old, axis=axis, total_repeat_length=new)
    else:
      x = jnp.take(x, np.arange(new) * old // new, axis=axis)
  return x


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
  """Means of `[B, H, W, C]` over `size` x `size` bins, `[B, size, size, C]`.

  Bin i of n over a side of L covers floor(i L / n) up to ceil((i + 1) L / n): bins may overlap.
  """
  return averaged_bins(x, size)


def bilinear_matrix(old: int, new: int, align_corners: bool) -> np.ndarray:
  """What takes an axis of length `old` to `new`, float32 `[new, old]`."""
  low, high, part = bilinear_places(old, new, align_corners)
  matrix = np.zeros((new, old), np.float64)
  np.add.at(matrix, (np.arange(new), low), 1 - part)
  np.add.at(matrix, (np.arange(new), high), part)
  return matrix.astype(np.float32)


def bilinear_places(
  old: int, new: int, align_corners: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """For each place of the result: the place before and behind it, and how far it is between."""
  places = np.arange(new, dtype=np.float32)
  if align_corners:
    position = places * np.float32((old - 1) / max(new - 1, 1))
  else:
    half = np.float32(0.5)
    position = np.maximum((places + half) * np.float32(old / new) - half, np.float32(0))
  low = np.minimum(np.floor(position).astype(int), old - 1)
  return low, np.minimum(low + 1, old - 1), np.minimum(position - low, 1.0)


# Jitted, so that it goes by its name where multiply-adds are counted: those of resizing are not.
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def resized_bilinear(
  x: jax.Array, size: tuple[int, int], align_corners: bool, fast: bool
) -> jax.Array:
  dtype, y = x.dtype, x.astype(jnp.float32)
  # What shrinks first makes less work for the other.
  axes = sorted(((1, size[0]), (2, size[1])), key=lambda pair: pair[1] / x.shape[pair[0]])
  for axis, new in axes:
    old = y.shape[axis]
    if new == old:
      continue
    factor, rest = divmod(new, old)
    if fast and not align_corners and not rest and factor <= _LARGEST_FACTOR:
      y = _by_neighbours(y, axis, factor)
    else:
      y = _by_matrix(y, axis, bilinear_matrix(old, new, align_corners))
  return y.astype(dtype)


@functools.partial(jax.jit, static_argnums=(1,))
def averaged_bins(x: jax.Array, size: int) -> jax.Array:
  y = x.astype(jnp.float32)
  for axis in (1, 2):
    length = y.shape[axis]
    first = np.arange(size) * length // size
    end = -(-(np.arange(1, size + 1) * length) // size)
    places = np.arange(length)
    inside = (places >= first[:, None]) & (places < end[:, None])
    y = _by_matrix(y, axis, (inside / inside.sum(1, keepdims=True)).astype(np.float32))
  return y.astype(x.dtype)


def _by_matrix(x: jax.Array, axis: int, matrix: np.ndarray) -> jax.Array:
  subscripts = "bhwc,oh->bowc" if axis == 1 else "bhwc,ow->bhoc"
  return jnp.einsum(subscripts, x, matrix, precision=lax.Precision.HIGHEST)


def _by_neighbours(x: jax.Array, axis: int, factor: int) -> jax.Array:
  """`factor` values for each one: those of a phase lie equally far between the same neighbours."""
  ends = lax.slice_in_dim(x, 0, 1, axis=axis), lax.slice_in_dim(x, -1, None, axis=axis)
  before = jnp.concatenate([ends[0], lax.slice_in_dim(x, 0, -1, axis=axis)], axis)
  behind = jnp.concatenate([lax.slice_in_dim(x, 1, None, axis=axis), ends[1]], axis)
  phases = []
  for phase in range(factor):
    offset = (phase + 0.5) / factor - 0.5
    other = before if offset < 0 else behind
    phases.append(x if not offset else (1 - abs(offset)) * x + abs(offset) * other)
  shape = list(x.shape)
  shape[axis] *= factor
  return jnp.stack(phases, axis=axis + 1).reshape(shape)
