"""GELUs whose backward pass keeps the input alone, in its own type.

What JAX derives keeps two or three float32 maps of each, of which a compiler recomputes none, since
the error function and the exponential count as dear: up to six times the input's bytes in bfloat16.
Both are differentiated in reverse only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_SQRT_HALF = np.float32(np.sqrt(0.5))
_DENSITY = np.float32(1.0 / np.sqrt(2.0 * np.pi))
# Abramowitz and Stegun, 7.1.26, halved: 0.5 erfc(z) to 1e-7, float32's rounding.
_TAIL_SCALE = np.float32(0.3275911)
_TAIL = np.array([1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592]) / 2
_TAIL = _TAIL.astype(np.float32)
_QUICK = np.float32(1.702)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
  """The exact GELU, x * Phi(x), by the error function, in float32; the dtype of `x` is kept."""
  y = x.astype(jnp.float32)
  return (0.5 * y * (1.0 + lax.erf(y * _SQRT_HALF))).astype(x.dtype)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return gelu(x), x


def _gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
  y = x.astype(jnp.float32)
  exponential = jnp.exp(-0.5 * y * y)
  # Phi by the exponential that its density needs anyway.
  t = 1.0 / (1.0 + _TAIL_SCALE * jnp.abs(y) * _SQRT_HALF)
  tail = jnp.polyval(_TAIL, t) * t * exponential
  slope = jnp.where(y < 0, tail, 1.0 - tail) + y * _DENSITY * exponential
  return ((g.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def quick_gelu(x: jax.Array) -> jax.Array:
  """x * sigmoid(1.702 x), CLIP's and CvT's GELU, in float32; the dtype of `x` is kept."""
  y = x.astype(jnp.float32)
  return (y * jax.nn.sigmoid(_QUICK * y)).astype(x.dtype)


def _quick_gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  return quick_gelu(x), x


def _quick_gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
  y = x.astype(jnp.float32)
  gate = jax.nn.sigmoid(_QUICK * y)
  slope = gate * (1.0 + _QUICK * y * (1.0 - gate))
  return ((g.astype(jnp.float32) * slope).astype(x.dtype),)


quick_gelu.defvjp(_quick_gelu_forward, _quick_gelu_backward)
