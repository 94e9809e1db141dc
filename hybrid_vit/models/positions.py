"""Tables of positions at other sizes than those that they were made for."""

import math

import jax
import jax.numpy as jnp
import numpy as np


def resize_grid(table: jax.Array, made: tuple[int, int], size: tuple[int, int]) -> jax.Array:
  """Resizes positions `[t + H*W, C]` of a grid `made` = (H, W) to `size`; the first t stay.

  Bicubic with half-pixel centres, no antialiasing and torch's coefficient of -0.75, as DeiT's
  fine-tuning does it. (timm also blurs before it shrinks a table.) An equal size changes nothing.
  """
  if tuple(made) == tuple(size):
    return table
  prefix = table.shape[0] - made[0] * made[1]
  grid = table[prefix:].reshape(*made, table.shape[-1])
  by_row, by_column = (_cubic_matrix(n, m) for n, m in zip(made, size))
  highest = jax.lax.Precision.HIGHEST
  grid = jnp.einsum("ih,jw,hwc->ijc", by_row, by_column, grid, precision=highest)
  return jnp.concatenate([table[:prefix], grid.reshape(-1, table.shape[-1])])


def resize_square_grid(table: jax.Array, length: int) -> jax.Array:
  """`resize_grid` of a table `[t + n*n, C]` to `[length, C]`, between squares, with t from 0 to 2.

  Raises:
    ValueError: where a length is not a square's, or t is not the same.
  """
  sides = [math.isqrt(n) for n in (table.shape[0], length)]
  prefixes = [n - side**2 for n, side in zip((table.shape[0], length), sides)]
  if prefixes[0] != prefixes[1] or prefixes[0] > 2:
    raise ValueError(
      f"positions of {table.shape[0]} and {length} tokens are not those of two squares; make the "
      "network with the position_size of its weights, it resizes by itself"
    )
  return resize_grid(table, (sides[0], sides[0]), (sides[1], sides[1]))


def pair(size: tuple[int, int] | int) -> tuple[int, int]:
  """(rows, columns) of a size that may be one number."""
  return (size, size) if isinstance(size, int) else size


def resize_sequence(table: jax.Array, length: int) -> jax.Array:
  """Resizes positions `[N, C]` to `[length, C]`, linear, half-pixel centres, no antialiasing."""
  if table.shape[0] == length:
    return table
  shape = (length, table.shape[1])
  return jax.image.resize(table, shape, method="bilinear", antialias=False)


def _cubic_matrix(length: int, new_length: int) -> np.ndarray:
  """`[new_length, length]`: torch's bicubic interpolation along one axis; edges are repeated."""
  a = -0.75
  matrix = np.zeros((new_length, length))
  for i in range(new_length):
    place = (i + 0.5) * length / new_length - 0.5
    first = int(np.floor(place)) - 1
    for j in range(first, first + 4):
      d = abs(place - j)
      near = ((a + 2) * d - (a + 3)) * d * d + 1
      far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
      matrix[i, min(max(j, 0), length - 1)] += near if d <= 1 else far
  return matrix.astype(np.float32)
