"""Masks of boxes, as a head predicts them, put in their places in the picture.

A pixel's value is the mask's, sampled bilinearly (zeros beyond it, corners not aligned) where its
centre lies in the box; detectron2's `paste_masks_in_image` on a CPU, which takes one pixel around
the box. The two axes are independent: a small matrix product for each mask, over its region alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def paste_masks(
  masks: np.ndarray, boxes: np.ndarray, size: Sequence[int], threshold: float = 0.5
) -> np.ndarray:
  """Bitmaps of a picture's masks.

  Args:
    masks: probabilities `[N, h, w]`.
    boxes: `[N, 4]`, (x1, y1, x2, y2) in the picture's pixels.
    size: (height, width).
    threshold: pixels of at least that probability are the mask's.

  Returns:
    bool `[N, height, width]`.

  Raises:
    ValueError: not as many boxes as masks.
  """
  if masks.ndim != 3 or boxes.shape != (len(masks), 4):
    raise ValueError(
      f"masks are {list(masks.shape)} and boxes {list(boxes.shape)}: [N, h, w] and [N, 4] were "
      "expected"
    )
  pasted = np.zeros((len(masks), int(size[0]), int(size[1])), bool)
  for out, mask, box in zip(pasted, masks, boxes):
    values, (top, left) = paste_mask(mask, box, size)
    out[top : top + values.shape[0], left : left + values.shape[1]] = values >= threshold
  return pasted


def paste_mask(
  mask: np.ndarray, box: np.ndarray, size: Sequence[int]
) -> tuple[np.ndarray, tuple[int, int]]:
  """Probabilities of the region around a box, which are 0 elsewhere.

  Args:
    mask: probabilities `[h, w]`.
    box: `[4]`.
    size: (height, width) of the picture.

  Returns:
    float32 `[rows, columns]`, and the (row, column) of its upper left pixel; empty for a box
    outside the picture or not finite.
  """
  box = np.asarray(box, np.float32)
  if not np.isfinite(box).all():
    return np.zeros((0, 0), np.float32), (0, 0)
  top, down = _axis(box[1], box[3], int(size[0]), mask.shape[0])
  left, across = _axis(box[0], box[2], int(size[1]), mask.shape[1])
  return down @ np.asarray(mask, np.float32) @ across.T, (top, left)


def _axis(low: np.float32, high: np.float32, pixels: int, cells: int) -> tuple[int, np.ndarray]:
  """The first pixel of the region, and the weights of cells in each, float32 `[n, cells]`."""
  first = min(max(int(np.floor(low)) - 1, 0), pixels)
  last = max(min(int(np.ceil(high)) + 1, pixels), first)
  centres = np.arange(first, last, dtype=np.float32) + np.float32(0.5)
  with np.errstate(divide="ignore", invalid="ignore"):
    at = (centres - low) / (high - low) * np.float32(2) - np.float32(1)
  # A box of no length: the reference takes the mask's middle everywhere.
  at[np.isinf(at)] = 0
  # Beyond any cell, also where there is no number.
  at = np.nan_to_num(at, nan=-9.0)
  at = np.clip(
    ((at + np.float32(1)) * np.float32(cells) - np.float32(1)) / np.float32(2), -2, cells + 1
  )
  below = np.floor(at)
  weights = np.zeros((len(at), cells + 5), np.float32)
  rows, place = np.arange(len(at)), below.astype(int) + 2
  weights[rows, place] = 1 - (at - below)
  weights[rows, place + 1] = at - below
  return first, weights[:, 2 : 2 + cells]
