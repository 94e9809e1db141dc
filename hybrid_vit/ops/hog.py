"""Histograms of oriented gradients, as the target of masked prediction (MaskFeat).

Chen Wei et al., "Masked Feature Prediction for Self-Supervised Visual Pre-Training", CVPR 2022,
arXiv:2112.09133, section 3; hard bins, as in the authors' code (facebookresearch/SlowFast).
"""

import jax
import jax.numpy as jnp


def hog(images: jax.Array, *, cell: int = 8, orientations: int = 9) -> jax.Array:
  """Histograms `[B, H/cell, W/cell, C, orientations]` in float32, each channel's of length 1.

  A pixel counts with the length of its Sobel gradient in the bin of its unsigned direction; the
  border is reflected. A channel's histogram is divided by its L2 norm, so that neither scale nor
  shift of a channel (a normalisation) changes it; a flat cell's stays 0.

  Args:
    images: `[B, H, W, C]`.
    cell: side of a histogram's square in pixels.
    orientations: bins of half a turn.

  Raises:
    ValueError: the picture is not whole cells.
  """
  batch, height, width, channels = images.shape
  if height % cell or width % cell:
    raise ValueError(
      f"HOG: a picture of {height}x{width} is not whole cells of {cell}x{cell}; resize it"
    )
  x = jnp.pad(images.astype(jnp.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
  down = x[:, :-2] + 2.0 * x[:, 1:-1] + x[:, 2:]
  across = x[:, :, :-2] + 2.0 * x[:, :, 1:-1] + x[:, :, 2:]
  by_column = down[:, :, :-2] - down[:, :, 2:]
  by_row = across[:, :-2] - across[:, 2:]
  length = jnp.sqrt(jnp.square(by_column) + jnp.square(by_row))
  turn = jnp.floor(jnp.arctan2(by_column, by_row) / jnp.pi * orientations)
  bins = turn.astype(jnp.int32) % orientations
  # One bin after the other: all at once would be a picture for each of them in memory.
  shape = (batch, height // cell, cell, width // cell, cell, channels)
  sums = [jnp.where(bins == k, length, 0.0).reshape(shape).sum((2, 4)) for k in range(orientations)]
  histograms = jnp.stack(sums, axis=-1)
  norm = jnp.sqrt(jnp.sum(jnp.square(histograms), axis=-1, keepdims=True))
  return histograms / jnp.maximum(norm, 1e-12)
