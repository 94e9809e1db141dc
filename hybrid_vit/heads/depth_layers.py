"""What two or more depth heads share."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.models.layers import Conv, Initializer

# exp(80) is 5e34: a depth of 1e-34 m.
_LOWEST = 80.0


def conv(
  features: int,
  kernel_size: int,
  name: str,
  *,
  kernel_init: Initializer,
  bias_init: Initializer = nn.initializers.zeros,
  use_bias: bool = True,
  dtype: Any = jnp.float32,
) -> nn.Conv:
  """A convolution of stride 1 whose zeros around the map keep its size; odd kernels."""
  pad = kernel_size // 2
  return Conv(
    features,
    (kernel_size, kernel_size),
    padding=((pad, pad), (pad, pad)),
    use_bias=use_bias,
    kernel_init=kernel_init,
    bias_init=bias_init,
    dtype=dtype,
    name=name,
  )


def bounded_depth(x: jax.Array, max_depth: float) -> jax.Array:
  """sigmoid(x) * max_depth, float32, above 0 however small x is."""
  # One rounding fewer than a sigmoid and a product; the bound keeps the gradient a number.
  return max_depth / (1.0 + jnp.exp(-jnp.maximum(x.astype(jnp.float32), -_LOWEST)))


def check_depth_head(name: str, head: Any) -> None:
  """What every depth head asks of its attributes.

  Raises:
    ValueError: more than one map, or a farthest depth that is not above 0.
  """
  if head.num_outputs != 1:
    raise ValueError(f"{name} gives one map of depth; num_outputs is {head.num_outputs}, not 1")
  if not head.max_depth > 0:
    raise ValueError(f"{name}: max_depth is {head.max_depth}; metres above 0 were expected")
