"""Losses that detectors share, element by element; who sums divides."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """-t log p - (1 - t) log(1 - p) with p the sigmoid, float32 of the logits' shape."""
  logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
  return jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """-log of the softmax `[..., K]` at labels, int `[...]`: float32 `[...]`."""
  logs = jax.nn.log_softmax(logits.astype(jnp.float32))
  return -jnp.take_along_axis(logs, labels[..., None], axis=-1)[..., 0]


def smooth_l1(found: jax.Array, targets: jax.Array, beta: float) -> jax.Array:
  """|d| - beta / 2, and d^2 / (2 beta) below beta (arXiv:1504.08083, equation 3); 0: plain |d|."""
  apart = jnp.abs(found.astype(jnp.float32) - targets.astype(jnp.float32))
  if not beta:
    return apart
  return jnp.where(apart < beta, 0.5 * apart**2 / beta, apart - 0.5 * beta)


def sigmoid_focal(
  logits: jax.Array, targets: jax.Array, alpha: float = 0.25, gamma: float = 2.0
) -> jax.Array:
  """-alpha_t (1 - p_t)^gamma log p_t (arXiv:1708.02002, equation 5), float32.

  Args:
    logits: of any shape.
    targets: 0 or 1 of the same shape.
    alpha: weight of targets of 1; 1 - alpha that of others.
    gamma: the exponent.
  """
  logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
  p = jax.nn.sigmoid(logits)
  missed = jnp.where(targets > 0, 1 - p, p)
  weight = jnp.where(targets > 0, alpha, 1 - alpha)
  return weight * missed**gamma * binary_cross_entropy(logits, targets)
