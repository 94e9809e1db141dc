"""Batch norm by a batch's own statistics, whose backward pass keeps the input in its own type.

What JAX derives keeps float32 maps of the input and of its normalised form besides. Differentiated
in reverse only.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def batch_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalises each channel over all axes between the first and the last.

  Args:
    x: `[G, ..., C]`, any floating dtype; each of G groups is normalised by itself.
    scale: float32 `[C]`.
    bias: float32 `[C]`.
    epsilon: added to the variance.
    dtype: of the result.

  Returns:
    (like `x`; mean and biased variance, float32 `[G, C]`, through which no gradient goes). The
    variance is the mean of squares less the squared mean: one pass over the map, and where the
    batch is sharded one exchange of both.
  """
  return _forward(x, scale, bias, epsilon, dtype)[0]


def _forward(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Any
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
  y, axes = x.astype(jnp.float32), _axes(x)
  mean = jnp.mean(y, axis=axes, keepdims=True)
  var = jnp.maximum(jnp.mean(jnp.square(y), axis=axes, keepdims=True) - jnp.square(mean), 0.0)
  rstd = lax.rsqrt(var + epsilon)
  factor = scale * rstd
  out = (y * factor + (bias - mean * factor)).astype(dtype)
  shape = (x.shape[0], x.shape[-1])
  return (out, mean.reshape(shape), var.reshape(shape)), (x, mean, rstd, scale)


def _backward(
  epsilon: float, dtype: Any, kept: tuple[jax.Array, ...], cotangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
  del epsilon, dtype
  x, mean, rstd, scale = kept
  g, axes = cotangents[0].astype(jnp.float32), _axes(x)
  normal = (x.astype(jnp.float32) - mean) * rstd
  mean_g = jnp.mean(g, axis=axes, keepdims=True)
  mean_gn = jnp.mean(g * normal, axis=axes, keepdims=True)
  dx = scale * rstd * (g - mean_g - normal * mean_gn)
  count = x.size // (x.shape[0] * x.shape[-1])
  outer = tuple(range(x.ndim - 1))
  return dx.astype(x.dtype), count * jnp.sum(mean_gn, outer), count * jnp.sum(mean_g, outer)


def _axes(x: jax.Array) -> tuple[int, ...]:
  return tuple(range(1, x.ndim - 1))


batch_norm.defvjp(_forward, _backward)
