"""Positions of a map's cells as sines and cosines of its rows and columns.

Carion et al., "End-to-End Object Detection with Transformers", arXiv:2005.12872, the normalised
form of the authors' `PositionEmbeddingSine`, which Mask2Former and Deformable DETR took over.
"""

from __future__ import annotations

import math

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
    offset: 0 in Mask2Former, -0.5 in Deformable DETR and DINO.

  Returns:
    float32 `[height, width, features]`.

  Raises:
    ValueError: channels that 4 does not divide.
  """
  if features % 4:
    raise ValueError(f"sine positions have {features} channels; a multiple of 4 was expected")
  half = features // 2
  waves = temperature ** (2 * (np.arange(half) // 2) / half)

  def along(length: int) -> np.ndarray:  # [length, half]
    places = (np.arange(1, length + 1) + offset) / (length + _EPSILON) * 2 * math.pi
    angles = places[:, None] / waves
    return np.where(np.arange(half) % 2, np.cos(angles), np.sin(angles))

  height, width = size
  rows = np.broadcast_to(along(height)[:, None], (height, width, half))
  columns = np.broadcast_to(along(width)[None], (height, width, half))
  return np.concatenate([rows, columns], axis=-1).astype(np.float32)
