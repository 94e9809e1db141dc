"""Softmax attention that keeps its weights in the type of the computation, and nothing of float32.

What JAX derives of a float32 softmax keeps its result for the backward pass beside the rounded one,
which the product with the values keeps too: the largest array of a transformer, three times. On
TPUs the weights are not even divided by their sums: what they weigh is.
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
  if target_platform() == "tpu":
    return _attend_on_tpu(query * scale, key, value, bias)
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


def _attend_on_tpu(query: jax.Array, key: jax.Array, value: jax.Array, bias: Any) -> jax.Array:
  """Its largest arrays are `[..., H, K, Q]`: sums over the keys go over rows, not within them.

  With the queries first the compiler may put the pictures within the rows, and then turns
  everything.
  """
  if bias is not None:
    bias = jnp.swapaxes(jnp.atleast_2d(bias), -1, -2).astype(jnp.float32)
  return _divided_after(query, key, value, bias)


@jax.custom_vjp
def _divided_after(query: jax.Array, key: jax.Array, value: jax.Array, bias: Any) -> jax.Array:
  """Attention whose sum of exponentials divides the weighed values; `bias` is `[..., K, Q]`."""
  return _divided_after_forward(query, key, value, bias)[0]


def _divided_after_forward(
  query: jax.Array, key: jax.Array, value: jax.Array, bias: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
  logits = _product("...qhd,...khd->...hkq", query, key)
  if bias is not None:
    logits = logits + bias
  powers = jnp.exp(logits - jnp.max(logits, -2, keepdims=True)).astype(value.dtype)
  sums = jnp.sum(powers, -2, keepdims=True, dtype=jnp.float32)
  out = (_product("...hkq,...khe->...heq", powers, value) / sums).astype(value.dtype)
  return jnp.moveaxis(out, -1, -3), (query, key, value, bias, powers, sums, out)


def _divided_after_backward(kept: tuple[Any, ...], g: jax.Array) -> tuple[Any, ...]:
  query, key, value, bias, powers, sums, out = kept
  divided = (jnp.moveaxis(g, -3, -1).astype(jnp.float32) / sums).astype(value.dtype)
  # The sum over the keys of weights times their gradients, without either; of the rounded result,
  # as FlashAttention (arXiv:2205.14135, appendix B.4) has it.
  mean = jnp.sum(divided.astype(jnp.float32) * out.astype(jnp.float32), -2, keepdims=True)
  of_weights = _product("...heq,...khe->...hkq", divided, value)
  of_logits = powers.astype(jnp.float32) * (of_weights - mean)
  of_bias = None
  if bias is not None:
    _, pull = jax.vjp(lambda x: jnp.broadcast_to(x, of_logits.shape), bias)
    (of_bias,) = pull(of_logits)
  of_logits = of_logits.astype(query.dtype)
  return (
    _product("...hkq,...khd->...qhd", of_logits, key).astype(query.dtype),
    _product("...hkq,...qhd->...khd", of_logits, query).astype(key.dtype),
    _product("...hkq,...heq->...khe", powers, divided).astype(value.dtype),
    of_bias,
  )


_divided_after.defvjp(_divided_after_forward, _divided_after_backward)


def _product(axes: str, one: jax.Array, other: jax.Array) -> jax.Array:
  return jnp.einsum(axes, one, other, preferred_element_type=jnp.float32)


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
