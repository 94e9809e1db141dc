"""Positions of a map's cells, or of boxes, as sines and cosines.

Carion et al., "End-to-End Object Detection with Transformers", arXiv:2005.12872, the normalised
form of the authors' `PositionEmbeddingSine`, which Mask2Former and Deformable DETR took over; of
boxes: Liu et al., "DAB-DETR", arXiv:2201.12329, section 4.2.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

# The authors add it to the length that places are divided by.
_EPSILON = 1e-6


def sine_positions(
  size: tuple[int, int], features: int, *, temperature: float, offset: float
) -> np.ndarray:
  """A table for a map that its picture fills.

  The first half of the channels is of the row, the other of the column; in each sines and cosines
  alternate, of wave lengths from 2 pi to `temperature` times that. Places are `offset` + 1,
  `offset` + 2, … over the length, times 2 pi.

  Args:
    size: (height, width).
    features: channels, divisible by 4.
    temperature: 10,000 in DETR and Mask2Former, 20 in DINO.
    offset: 0 in Mask2Former and DINO, -0.5 in Deformable DETR and detrex.

  Returns:
    float32 `[height, width, features]`.

  Raises:
    ValueError: channels that 4 does not divide.
  """
  half = _half(features)
  waves = _waves(half, temperature)

  def along(length: int) -> np.ndarray:  # [length, half]
    places = (np.arange(1, length + 1) + offset) / (length + _EPSILON) * 2 * math.pi
    angles = places[:, None] / waves
    return np.where(np.arange(half) % 2, np.cos(angles), np.sin(angles))

  height, width = size
  rows = np.broadcast_to(along(height)[:, None], (height, width, half))
  columns = np.broadcast_to(along(width)[None], (height, width, half))
  return np.concatenate([rows, columns], axis=-1).astype(np.float32)


def padded_sine_positions(
  size: tuple[int, int], valid: jax.Array, features: int, *, temperature: float, offset: float
) -> jax.Array:
  """`sine_positions` of maps whose pictures fill their first rows and columns alone.

  Rows are counted along their column: those of columns beyond the picture have the place 0, and
  those below it its last. Columns likewise.

  Args:
    size: (height, width).
    valid: int `[B, 2]`, rows and columns that the picture fills.
    features: channels, divisible by 4.
    temperature: as there.
    offset: as there.

  Returns:
    float32 `[B, height, width, features]`.

  Raises:
    ValueError: channels that 4 does not divide.
  """
  half = _half(features)
  counts = valid.astype(jnp.float32)
  inside = [jnp.arange(n) < valid[:, i, None] for i, n in enumerate(size)]

  def along(axis: int) -> jax.Array:  # [B, length]
    most = counts[:, axis, None]
    places = jnp.minimum(jnp.arange(1, size[axis] + 1), most) + offset
    return places / (most + _EPSILON)

  rows = jnp.where(inside[1][:, None, :], along(0)[:, :, None], 0.0)
  columns = jnp.where(inside[0][:, :, None], along(1)[:, None, :], 0.0)
  tables = [_sines(places, half, temperature) for places in (rows, columns)]
  return jnp.concatenate(tables, axis=-1)


def box_sine_positions(boxes: jax.Array, features: int, *, temperature: float) -> jax.Array:
  """Sines and cosines of boxes, `features` of each number, of y, x, width and height in turn.

  Args:
    boxes: float32 `[..., 4]`, (centre x, centre y, width, height) with the picture from 0 to 1.
    features: of each number, even.
    temperature: 10,000 in DAB-DETR and its followers.

  Returns:
    float32 `[..., 4 * features]`.
  """
  ordered = boxes[..., np.array([1, 0, 2, 3])]
  table = _sines(ordered, features, temperature)
  return table.reshape(*boxes.shape[:-1], 4 * features)


def _sines(places: jax.Array, features: int, temperature: float) -> jax.Array:
  """float32 `[...]`, whole turns → `[..., features]`."""
  angles = (places * (2 * math.pi))[..., None] / _waves(features, temperature).astype(np.float32)
  return jnp.where(np.arange(features) % 2, jnp.cos(angles), jnp.sin(angles))


def _waves(features: int, temperature: float) -> np.ndarray:
  return temperature ** (2 * (np.arange(features) // 2) / features)


def _half(features: int) -> int:
  if features % 4:
    raise ValueError(f"sine positions have {features} channels; a multiple of 4 was expected")
  return features // 2
