"""Losses of depth: predicted and true metres `[B, H, W]`, 0 in the truth for "not measured".

Everything is float32. Pixels that were not measured add nothing to a loss or a gradient, whatever
was predicted there; without a measured pixel a loss is 0, and its gradient, too.

Deviations: predictions below 1e-6 m count as 1e-6 in a logarithm; the variance of one pixel is 0,
not no number; the authors of MegaDepth compare pixels two apart, where here, as with MiDaS,
neighbours are; AdaBins compares all measured depths of a picture, where here so
many as `pixels` says stand for more.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

# Predictions are above 0 by their heads; this keeps a logarithm finite where one rounds to 0.
_LEAST = 1e-6
# Multiples of it, whole parts left out, are spread evenly for any number of them.
_GOLDEN = (np.sqrt(5) - 1) / 2


def silog(predicted: jax.Array, truth: jax.Array, *, weight: float) -> jax.Array:
  """Scale-invariant logarithmic error, sqrt(mean d^2 - weight (mean d)^2), d = log truth - log p.

  Over the measured pixels of the whole batch (Eigen et al., arXiv:1406.2283, equation 4, its root;
  GLPN and MIM-Depth-Estimation with weight 0.5). 0.85 of bts is `10 * silog(…, weight=0.85)`.

  Args:
    predicted: metres, above 0.
    truth: metres; 0 for "not measured".
    weight: of the squared mean, 0 to 1.

  Returns:
    float32 scalar, as of all losses here.
  """
  apart, valid = _log_difference(predicted, truth)
  count = _count(valid)
  mean = jnp.sum(apart) / count
  return _root(jnp.sum(jnp.square(apart)) / count - weight * jnp.square(mean))


def sig_loss(predicted: jax.Array, truth: jax.Array, *, epsilon: float = 1e-3) -> jax.Array:
  """10 sqrt(var g + 0.15 (mean g)^2), g = log(p + epsilon) - log(truth + epsilon).

  10 times SILog of weight 0.85, but for the variance, which is the unbiased one (AdaBins' loss as
  its code has it; `epsilon` is that of Monocular-Depth-Estimation-Toolbox's SigLoss, 0 AdaBins').
  """
  valid = truth > 0
  count = _count(valid)
  p = jnp.where(valid, jnp.maximum(predicted.astype(jnp.float32), _LEAST), 1.0)
  t = jnp.where(valid, truth.astype(jnp.float32), 1.0)
  g = jnp.where(valid, jnp.log(p + epsilon) - jnp.log(t + epsilon), 0.0)
  mean = jnp.sum(g) / count
  spread = jnp.sum(jnp.where(valid, jnp.square(g - mean), 0.0)) / jnp.maximum(count - 1.0, 1.0)
  return 10.0 * _root(spread + 0.15 * jnp.square(mean))


def l1(predicted: jax.Array, truth: jax.Array) -> jax.Array:
  """Mean absolute error of the measured pixels, metres."""
  error, valid = _error(predicted, truth)
  return jnp.sum(error) / _count(valid)


def berhu(predicted: jax.Array, truth: jax.Array, *, part: float = 0.2) -> jax.Array:
  """Reverse Huber loss: |e| up to c, above it (e^2 + c^2) / 2c; c is `part` of the largest error.

  Laina et al., "Deeper Depth Prediction with Fully Convolutional Residual Networks", 3DV 2016,
  arXiv:1606.00373, equation 2; c is of the whole batch and has no gradient.
  """
  error, valid = _error(predicted, truth)
  limit = jnp.maximum(jax.lax.stop_gradient(part * jnp.max(error)), _LEAST)
  loss = jnp.where(error <= limit, error, (jnp.square(error) + jnp.square(limit)) / (2.0 * limit))
  return jnp.sum(jnp.where(valid, loss, 0.0)) / _count(valid)


def gradient_matching(predicted: jax.Array, truth: jax.Array, *, scales: int = 4) -> jax.Array:
  """How much log depth changes where it should not: sharp edges at the places of the true ones.

  |Differences of neighbours of d|, across and down, d = log p - log truth, where both are measured:
  their sum over the number of measured pixels, of every 2^k-th row and column for k from 0 to
  `scales` - 1, added up (Li and Snavely, "MegaDepth", CVPR 2018, arXiv:1804.00607, equation 4).
  """
  apart, valid = _log_difference(predicted, truth)
  total = jnp.zeros((), jnp.float32)
  for k in range(scales):
    d, there = apart[:, :: 2**k, :: 2**k], valid[:, :: 2**k, :: 2**k]
    across = there[:, :, 1:] & there[:, :, :-1]
    down = there[:, 1:] & there[:, :-1]
    steps = jnp.sum(jnp.where(across, jnp.abs(d[:, :, 1:] - d[:, :, :-1]), 0.0))
    steps += jnp.sum(jnp.where(down, jnp.abs(d[:, 1:] - d[:, :-1]), 0.0))
    total = total + steps / _count(there)
  return total


def bins_chamfer(centers: jax.Array, truth: jax.Array, *, pixels: int = 2048) -> jax.Array:
  """How far bins and true depths are from each other, AdaBins (arXiv:2011.14141), equation 5.

  Mean of the squared distance of each measured depth to its nearest bin, and of each bin to its
  nearest measured depth; then of the pictures, one without a measured depth counting as 0.

  Args:
    centers: metres, `[B, N]`.
    truth: metres, `[B, H, W]`; 0 for "not measured".
    pixels: measured ones of a picture that are looked at, spread evenly over them; of fewer all.
  """
  flat = truth.astype(jnp.float32).reshape(truth.shape[0], -1)
  flat = _some_measured(flat, min(pixels, flat.shape[1]))
  valid = flat > 0
  centers = centers.astype(jnp.float32)
  # By the places of the nearest: the gradient of a minimum compares it with what it is the minimum
  # of, and where a compiler computes that twice, rounded otherwise, divides by no match at all.
  apart = jax.lax.stop_gradient(jnp.abs(centers[:, :, None] - flat[:, None, :]))
  nearest_bins = jnp.take_along_axis(centers, jnp.argmin(apart, axis=1), axis=1)
  to_bin = jnp.sum(jnp.where(valid, jnp.square(nearest_bins - flat), 0.0), axis=1)
  places = jnp.argmin(jnp.where(valid[:, None], apart, jnp.inf), axis=2)
  to_depth = jnp.square(centers - jnp.take_along_axis(flat, places, axis=1))
  measured = jnp.any(valid, axis=1)
  to_depth = jnp.mean(jnp.where(measured[:, None], to_depth, 0.0), axis=1)
  return jnp.mean(to_bin / jnp.maximum(jnp.sum(valid, axis=1), 1) + to_depth)


def _some_measured(depths: jax.Array, number: int) -> jax.Array:
  """`number` of the depths above 0 of each row of `[B, P]`, evenly spread; 0 where there are less.

  One comes from each of `number` equal parts, at a place in it that changes: at a constant step a
  picture's columns would line up.
  """
  so_far = jnp.cumsum(depths > 0, axis=1, dtype=jnp.int32)
  count = so_far[:, -1:]
  order = np.arange(number)
  spread = jnp.asarray(order + order * _GOLDEN % 1, jnp.float32) * (count / number)
  wanted = jnp.where(count > number, spread.astype(jnp.int32), order)
  places = jax.vmap(jnp.searchsorted)(so_far, jnp.minimum(wanted, count - 1) + 1)
  taken = jnp.take_along_axis(depths, jnp.minimum(places, depths.shape[1] - 1), axis=1)
  return jnp.where(order < count, taken, 0.0)


def _count(valid: jax.Array) -> jax.Array:
  return jnp.maximum(jnp.sum(valid, dtype=jnp.float32), 1.0)


def _error(predicted: jax.Array, truth: jax.Array) -> tuple[jax.Array, jax.Array]:
  valid = truth > 0
  apart = jnp.where(valid, predicted.astype(jnp.float32), 0.0) - truth.astype(jnp.float32)
  return jnp.where(valid, jnp.abs(apart), 0.0), valid


def _log_difference(predicted: jax.Array, truth: jax.Array) -> tuple[jax.Array, jax.Array]:
  valid = truth > 0
  p = jnp.where(valid, jnp.maximum(predicted.astype(jnp.float32), _LEAST), 1.0)
  t = jnp.where(valid, truth.astype(jnp.float32), 1.0)
  return jnp.log(t) - jnp.log(p), valid


def _root(x: jax.Array) -> jax.Array:
  """Square root whose gradient at 0 is 0: a perfect prediction, and nothing measured."""
  positive = x > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)
