"""Losses of depth: predicted and true metres `[B, H, W]`, 0 in the truth for "not measured".

Everything is float32. Pixels that were not measured add nothing to a loss or a gradient, whatever
was predicted there; without a measured pixel a loss is 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Predictions are above 0 by their heads; this keeps a logarithm finite where one rounds to 0.
_LEAST = 1e-6


def silog(predicted: jax.Array, truth: jax.Array, *, weight: float) -> jax.Array:
  """Scale-invariant logarithmic error, sqrt(mean d^2 - weight (mean d)^2), d = log truth - log p.

  Over the measured pixels of the whole batch (Eigen et al., arXiv:1406.2283, equation 4, its root;
  GLPN and MIM-Depth-Estimation with weight 0.5). 0.85 of bts is `10 * silog(…, weight=0.85)`.

  Args:
    predicted: metres, above 0.
    truth: metres; 0 for "not measured".
    weight: of the squared mean, 0 to 1.
  """
  apart, valid = _log_difference(predicted, truth)
  count = _count(valid)
  mean = jnp.sum(apart) / count
  return _root(jnp.sum(jnp.square(apart)) / count - weight * jnp.square(mean))


def sig_loss(predicted: jax.Array, truth: jax.Array, *, epsilon: float = 1e-3) -> jax.Array:
  """10 sqrt(var g + 0.15 (mean g)^2), g = log(p + epsilon) - log(truth + epsilon).

  SILog with weight 0.85 but for the variance, which is the unbiased one (AdaBins and
  Monocular-Depth-Estimation-Toolbox's SigLoss).
  """
  valid = truth > 0
  count = _count(valid)
  p = jnp.where(valid, predicted.astype(jnp.float32), 1.0)
  t = jnp.where(valid, truth.astype(jnp.float32), 1.0)
  g = jnp.where(valid, jnp.log(jnp.maximum(p, 0.0) + epsilon) - jnp.log(t + epsilon), 0.0)
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

  Mean of |difference of neighbours of d|, d = log p - log truth, over pairs of measured
  pixels, summed over `scales` at every 2^k-th pixel (Li and Snavely, "MegaDepth", CVPR 2018,
  arXiv:1804.00607, equation 4).
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
  nearest measured depth; of each picture `pixels` evenly spread ones are looked at.

  Args:
    centers: metres, `[B, N]`.
    truth: metres, `[B, H, W]`; 0 for "not measured".
    pixels: of a picture.
  """
  flat = truth.astype(jnp.float32).reshape(truth.shape[0], -1)
  flat = flat[:, :: max(flat.shape[1] // pixels, 1)]
  valid = flat > 0
  apart = jnp.square(centers.astype(jnp.float32)[:, :, None] - flat[:, None, :])
  to_bin = jnp.sum(jnp.where(valid, jnp.min(apart, axis=1), 0.0), axis=1)
  to_depth = jnp.min(jnp.where(valid[:, None], apart, jnp.inf), axis=2)
  measured = jnp.any(valid, axis=1)
  to_depth = jnp.mean(jnp.where(measured[:, None], to_depth, 0.0), axis=1)
  return jnp.mean(to_bin / jnp.maximum(jnp.sum(valid, axis=1), 1) + to_depth)


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
