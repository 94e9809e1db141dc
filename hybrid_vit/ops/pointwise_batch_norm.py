"""A 1x1 convolution, batch norm and an activation, of which only the result is ever written.

What a 1x1 convolution's output averages to, and how it varies, follows from its input: the mean is
mean(x) W and the variance of a channel with the kernel w is w' Cov(x) w. So the statistics need no
pass over the output, which is the wider map (four times in MOAT and in ResNet's bottlenecks).
Backward, the sums that batch norm's gradient takes over the output follow in the same way from
x' g, which is the kernel's gradient but for small products. Differentiated in reverse only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.ops.mixed_convolution import grouped_product, spread_groups
from hybrid_vit.ops.platforms import target_platform

_CPU_CHANNELS = 192
Activation = Callable[[jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def pointwise_batch_norm(
  x: jax.Array,
  kernel: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
  activation: Activation | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`activation(batch_norm(x @ kernel))` by the batch's own statistics, float32 between.

  Args:
    x: `[..., C]`, any floating dtype.
    kernel: `[C, O]`, or `[n, groups, m]` of a grouped convolution as in `ops.mixed_convolution`,
      with C = n groups and O = groups m; it is cast to the dtype of `x`.
    scale: float32 `[O]`.
    bias: float32 `[O]`.
    epsilon: added to the variance.
    activation: of float32, element by element; None for none. Its input is computed once more for
      the backward pass, not kept.

  Returns:
    (`[..., O]` in the dtype of `x`; mean and biased variance of `x @ kernel`, float32 `[O]`,
    through which no gradient goes). The product is not rounded before it is normalised.
  """
  out, mean, var, *_ = normalised_product(x, kernel, scale, bias, epsilon, activation)
  return out, mean, var


def pays(channels: int) -> bool:
  """Whether it was found to be faster than the two operations, of so many channels of the input.

  Always on TPUs, by their compiler; on CPUs the products of many channels cost more than the passes
  that they save. Elsewhere it was not measured.
  """
  platform = target_platform()
  return platform == "tpu" or (platform == "cpu" and channels <= _CPU_CHANNELS)


def pointwise_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The convolution alone, `[..., O]` in the dtype of `x`; arguments as above.

  On a CPU the cells are one axis of the product: with several, XLA copies the transposed operands
  in the backward pass, which takes three times as long there. Elsewhere they stay what they are:
  one axis would ask for the order in memory of its rows, and maps go to and fro between that and
  the one that convolutions ask for.
  """
  if kernel.ndim == 3:
    return grouped_product(x, kernel.reshape(kernel.shape[0], -1), kernel.shape[1])
  rows = x.reshape(-1, x.shape[-1]) if target_platform() == "cpu" else x
  return (rows @ kernel.astype(x.dtype)).reshape(*x.shape[:-1], kernel.shape[-1])


def _forward(
  *arguments: Any,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]:
  out, mean, var, *others = normalised_product(*arguments)
  return (out, mean, var), (*arguments[:4], mean, var, *others)


# Jitted under a name of its own, by which `tools.summarize` counts the convolution alone.
@functools.partial(jax.jit, static_argnums=(4, 5))
def normalised_product(
  x: jax.Array,
  kernel: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
  activation: Activation | None,
) -> tuple[jax.Array, ...]:
  """The result, mean and variance, and of the input its mean `[C]` and Cov(x, x W) `[C, O]`."""
  cast = _of_all_channels(kernel.astype(x.dtype))
  wide = cast.astype(jnp.float32)
  mean_x = jnp.mean(x, _cells(x), dtype=jnp.float32)
  # Float32 as such, also by a TPU: what is left after the mean's square may be little.
  squares = _over_cells(x, x, lax.Precision.HIGHEST) / _count(x)
  covariance = squares - mean_x[:, None] * mean_x
  crossed = _exactly(covariance, wide)
  mean = _exactly(mean_x, wide)
  var = jnp.maximum(jnp.sum(wide * crossed, 0), 0.0)
  factor = scale * lax.rsqrt(var + epsilon)
  out = _affine(x, cast, factor, bias - mean * factor)
  if activation is not None:
    out = activation(out)
  return out.astype(x.dtype), mean, var, mean_x, crossed


def _backward(
  epsilon: float,
  activation: Activation | None,
  kept: tuple[jax.Array, ...],
  cotangents: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  x, kernel, scale, bias, mean, var, mean_x, crossed = kept
  g = cotangents[0]
  rstd = lax.rsqrt(var + epsilon)
  factor = scale * rstd
  cast = _of_all_channels(kernel.astype(x.dtype))
  if activation is not None:
    # Without the barrier a compiler takes the forward pass's product, and keeps it in float32.
    again = lax.optimization_barrier(cast)
    _, pull = jax.vjp(activation, _affine(x, again, factor, bias - mean * factor))
    g = pull(g.astype(jnp.float32))[0].astype(x.dtype)
  wide = cast.astype(jnp.float32)
  met = _over_cells(x, g)
  dbias = jnp.sum(g, _cells(x), dtype=jnp.float32)
  dscale = rstd * (jnp.sum(wide * met, 0) - mean * dbias)
  # Batch norm's gradient is factor (g - dbias / n - normal dscale / n), with normal = (x W - mean)
  # rstd; what follows are its products with x and with W, of which only g's is over a wide map.
  dkernel = factor * (met - mean_x[:, None] * dbias - rstd * crossed * dscale)
  slope = factor * rstd * dscale / _count(x)
  back = _exactly(wide * slope, wide.T).astype(x.dtype)
  constant = _exactly(mean * slope - factor * dbias / _count(x), wide.T)
  dx = jnp.matmul(g, (wide * factor).T.astype(x.dtype), preferred_element_type=jnp.float32)
  dx = dx - jnp.matmul(x, back, preferred_element_type=jnp.float32) + constant
  # The kernel's gradient is not rounded on its way to the parameter.
  _, of_own = jax.vjp(_of_all_channels, kernel.astype(jnp.float32))
  return dx.astype(x.dtype), of_own(dkernel)[0].astype(kernel.dtype), dscale, dbias


def _of_all_channels(kernel: jax.Array) -> jax.Array:
  return kernel if kernel.ndim == 2 else spread_groups(kernel)


def _affine(x: jax.Array, kernel: jax.Array, factor: jax.Array, shift: jax.Array) -> jax.Array:
  return jnp.matmul(x, kernel, preferred_element_type=jnp.float32) * factor + shift


def _over_cells(a: jax.Array, b: jax.Array, precision: Any = None) -> jax.Array:
  """`[C, O]`, float32."""
  axes = (_cells(a), _cells(b))
  return lax.dot_general(
    a, b, (axes, ((), ())), precision=precision, preferred_element_type=jnp.float32
  )


def _exactly(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _cells(x: jax.Array) -> tuple[int, ...]:
  return tuple(range(x.ndim - 1))


def _count(x: jax.Array) -> int:
  return x.size // x.shape[-1]


pointwise_batch_norm.defvjp(_forward, _backward)
