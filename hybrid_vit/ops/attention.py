"""Softmax attention that keeps its weights in the type of the computation, and nothing of float32.

What JAX derives of a float32 softmax keeps its result for the backward pass beside the rounded one,
which the product with the values keeps too: the largest array of a transformer, three times.
Differentiated in reverse only.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.ops.platforms import on_cpu, target_platform


def dot_product_attention(
  query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float, bias: Any = None
) -> jax.Array:
  """Softmax attention `[..., Q, H, D]`, `[..., K, H, D]`, `[..., K, H, E]` to `[..., Q, H, E]`.

  Logits, `bias` (broadcast to `[..., H, Q, K]`) and softmax are float32; the result has the dtype
  of `value`. The query is multiplied by `scale` first.
  """
  return on_cpu(_attend_on_cpu, _attend)(query * scale, key, value, bias)


def attention_weights(
  query: jax.Array, key: jax.Array, *, scale: float, bias: Any = None
) -> jax.Array:
  """What `dot_product_attention` weighs the values by, float32 `[..., H, Q, K]`, to look at."""
  logits = jnp.einsum(
    "...qhd,...khd->...hqk", query * scale, key, preferred_element_type=jnp.float32
  )
  return jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)


def split_heads(x: jax.Array, parts: int, num_heads: int) -> tuple[jax.Array, ...]:
  """One projection `[..., parts * C]` to so many of `[..., num_heads, C / num_heads]`.

  Cut before it is given further axes: with one of parts and one of heads behind it a TPU keeps the
  whole in registers of which a tenth is filled.
  """
  width = x.shape[-1] // (parts * num_heads)
  return tuple(
    part.reshape(*x.shape[:-1], num_heads, width) for part in jnp.split(x, parts, axis=-1)
  )


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, bias: Any) -> jax.Array:
  logits = jnp.einsum("...qhd,...khd->...hqk", query, key, preferred_element_type=jnp.float32)
  weights = softmax(logits if bias is None else add_bias(logits, bias), value.dtype)
  return jnp.einsum("...hqk,...khe->...qhe", weights, value)


@jax.custom_vjp
def _attend_on_cpu(query: jax.Array, key: jax.Array, value: jax.Array, bias: Any) -> jax.Array:
  """Where no gradient is asked for, with the heads in front.

  There a CPU's products with the heads between their axes take two to three times as long; with a
  gradient it is the other way round.
  """
  query, key, value = (jnp.swapaxes(x, -2, -3) for x in (query, key, value))
  logits = jnp.einsum("...qd,...kd->...qk", query, key, preferred_element_type=jnp.float32)
  weights = softmax(logits if bias is None else add_bias(logits, bias), value.dtype)
  return jnp.swapaxes(jnp.einsum("...qk,...ke->...qe", weights, value), -2, -3)


def _attend_forward(
  query: jax.Array, key: jax.Array, value: jax.Array, bias: Any
) -> tuple[jax.Array, Any]:
  return jax.vjp(_attend, query, key, value, bias)


def _attend_backward(back: Any, g: jax.Array) -> Any:
  return back(g)


_attend_on_cpu.defvjp(_attend_forward, _attend_backward)


def add_bias(logits: jax.Array, bias: Any) -> jax.Array:
  """The sum of `logits` and what is broadcast to its shape.

  On CPUs the gradient of the latter is summed by halves of the batch: XLA's reduction of a few
  large rows to one takes ten times as long there.
  """
  if target_platform() != "cpu":
    return logits + bias
  return _add_bias(logits, jnp.asarray(bias))


@jax.custom_vjp
def _add_bias(logits: jax.Array, bias: jax.Array) -> jax.Array:
  return logits + bias


def _add_bias_forward(logits: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
  return logits + bias, bias


def _add_bias_backward(bias: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
  shape = (1,) * (g.ndim - bias.ndim) + bias.shape
  of_bias = g
  for axis, size in enumerate(shape):
    if size == 1 and g.shape[axis] > 1:
      of_bias = _sum_by_halves(of_bias, axis)
  return g, of_bias.reshape(bias.shape).astype(bias.dtype)


def _sum_by_halves(x: jax.Array, axis: int) -> jax.Array:
  """The sum over an axis, which stays with size 1."""
  while (size := x.shape[axis]) > 1:
    half = size // 2
    added = lax.slice_in_dim(x, 0, half, axis=axis) + lax.slice_in_dim(x, half, 2 * half, axis=axis)
    rest = lax.slice_in_dim(x, 2 * half, size, axis=axis)
    x = added if size == 2 * half else jnp.concatenate([added, rest], axis)
  return x


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def softmax(logits: jax.Array, dtype: Any) -> jax.Array:
  """Over the last axis, computed in the type of `logits` (float32), rounded to `dtype`.

  The gradient is that of the rounded weights, which alone are kept.
  """
  return jax.nn.softmax(logits, axis=-1).astype(dtype)


def _softmax_forward(logits: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
  weights = softmax(logits, dtype)
  return weights, weights


def _softmax_backward(dtype: Any, weights: jax.Array, g: jax.Array) -> tuple[jax.Array]:
  del dtype
  kept, g = weights.astype(jnp.float32), g.astype(jnp.float32)
  return (kept * (g - jnp.sum(kept * g, axis=-1, keepdims=True)),)


softmax.defvjp(_softmax_forward, _softmax_backward)
