"""Maps read at any places, bilinear: PyTorch's `grid_sample` without aligned corners.

A place is (x, y), each from 0 to 1 over the whole map; the centre of cell (i, j) of a map is
((j + 0.5) / width, (i + 0.5) / height). Outside the map everything is 0. Places and sums are
float32. (`grid_sample` counts from -1 to 1: its place is twice ours less 1.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def sample_points(maps: jax.Array, points: jax.Array) -> jax.Array:
  """All channels at a picture's points.

  Args:
    maps: `[B, H, W, C]`, of any type.
    points: float32 `[B, N, 2]`.

  Returns:
    float32 `[B, N, C]`.
  """
  batch, height, width, channels = maps.shape
  flat = maps.reshape(batch, -1, channels)
  total = jnp.zeros((), jnp.float32)
  for index, part in four_neighbours(points, (height, width)):
    rows = jnp.take_along_axis(flat, index[..., None], axis=1, mode="clip")
    total = total + rows.astype(jnp.float32) * part[..., None]
  return total


def sample_masks(masks: jax.Array, points: jax.Array) -> jax.Array:
  """Each mask at points of its own, or all masks of a picture at the same.

  Args:
    masks: `[B, G, H, W]`, of any type.
    points: float32 `[B, G or 1, N, 2]`.

  Returns:
    float32 `[B, G, N]`.
  """
  batch, count, height, width = masks.shape
  flat = masks.reshape(batch, count, -1)
  total = jnp.zeros((), jnp.float32)
  for index, part in four_neighbours(points, (height, width)):
    index = jnp.broadcast_to(index, (batch, count, index.shape[-1]))
    values = jnp.take_along_axis(flat, index, axis=2, mode="clip")
    total = total + values.astype(jnp.float32) * part
  return total


def four_neighbours(points: jax.Array, size: tuple[int, int]) -> list[tuple[jax.Array, jax.Array]]:
  """The cells around places `[..., 2]` on a map of `size`: their numbers, row by row, and parts.

  Returns:
    four pairs of int32 and float32 `[...]`. A cell that is not on the map has the part 0 and the
    number of one that is.
  """
  height, width = size
  left, right_part = cell_before(points[..., 0], width)
  top, lower_part = cell_before(points[..., 1], height)
  found = []
  for row, y_part in ((top, 1.0 - lower_part), (top + 1, lower_part)):
    for column, x_part in ((left, 1.0 - right_part), (left + 1, right_part)):
      inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
      index = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
      found.append((index, jnp.where(inside, y_part * x_part, 0.0)))
  return found


def cell_before(place: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
  """The last cell whose centre is not beyond a place, and how far beyond it the place is, 0 to 1.

  Cells far outside, in either direction, are not told apart.
  """
  position = place.astype(jnp.float32) * length - 0.5
  # What is outside by millions of cells has no integer.
  position = jnp.clip(position, -2.0, length + 1.0)
  low = jnp.floor(position)
  return low.astype(jnp.int32), position - lax.stop_gradient(low)
