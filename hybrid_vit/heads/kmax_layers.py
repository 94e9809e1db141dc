"""Layers that all parts of kMaX-DeepLab share: a convolution with batch norm, batch norm, resizing.

Yu et al., "k-means Mask Transformer", ECCV 2022, arXiv:2207.04044; numerics are those of the
authors' PyTorch code (bytedance/kmax-deeplab): batch norm with epsilon 1e-3 and momentum 0.99, the
exact GELU, kernels that begin truncated normal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.models import layers
from hybrid_vit.ops.resize import resize_bilinear

BATCH_NORM_EPSILON = 1e-3
BATCH_NORM_MOMENTUM = 0.99

# They draw from a normal distribution cut at two standard deviations.
truncated_normal = nn.initializers.truncated_normal


class NormedConv(nn.Module):
  """A convolution, batch norm and a GELU where asked: the authors' ConvBN.

  Attributes:
    features: channels of the result; of a depthwise one those of the input.
    kernel_size: side of the kernel, odd; zeros around the map keep its size. 1 takes `[B, ..., C]`.
    dilation: of the kernel.
    depthwise: each channel has a kernel of its own.
    activation: whether the GELU is there.
    use_bias: whether the convolution has a bias, too.
    kernel_init: of the kernel; None for the authors' default, a variance of 2 over the channels of
      the input, whatever the kernel's size.
    scale_init: where the batch norm's scale begins.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation; norm statistics are float32.
  """

  features: int
  kernel_size: int = 1
  dilation: int = 1
  depthwise: bool = False
  activation: bool = True
  use_bias: bool = False
  kernel_init: layers.Initializer | None = None
  scale_init: float = 1.0
  batch_norm_momentum: float = BATCH_NORM_MOMENTUM
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[B, H, W, C]` to `[B, H, W, features]`."""
    init = self.kernel_init
    if init is None:
      init = truncated_normal((2.0 / x.shape[-1]) ** 0.5)
    pad = self.dilation * (self.kernel_size // 2)
    size = (self.kernel_size, self.kernel_size)
    options: dict[str, Any] = {"use_bias": self.use_bias, "kernel_init": init, "dtype": self.dtype}
    if self.depthwise:
      padding = ((pad, pad), (pad, pad))
      x = layers.DepthwiseConv(size, stride=1, padding=padding, **options, name="conv")(x)
    elif self.kernel_size == 1:
      x = layers.PointwiseConv(self.features, **options, name="conv")(x)
    else:
      x = layers.Conv(
        self.features,
        size,
        padding=((pad, pad), (pad, pad)),
        kernel_dilation=self.dilation,
        **options,
        name="conv",
      )(x)
    x = norm(self, "norm", self.scale_init)(x, train)
    return layers.gelu(x) if self.activation else x


def normed_conv(
  module: Any, features: int, kernel_size: int, name: str, **options: Any
) -> NormedConv:
  """`NormedConv` with a module's `batch_norm_momentum`, `batch_norm_groups` and `dtype`."""
  return NormedConv(
    features,
    kernel_size,
    batch_norm_momentum=module.batch_norm_momentum,
    batch_norm_groups=module.batch_norm_groups,
    dtype=module.dtype,
    name=name,
    **options,
  )


def depthwise_pair(
  module: Any, x: jax.Array, features: int, names: Sequence[str], train: bool
) -> jax.Array:
  """A depthwise 5x5 and a 1x1 convolution to `features` channels, each with its norm and GELU."""
  init = nn.initializers.xavier_uniform()
  x = normed_conv(module, x.shape[-1], 5, names[0], depthwise=True, kernel_init=init)(x, train)
  return normed_conv(module, features, 1, names[1])(x, train)


def norm(module: Any, name: str, scale_init: float = 1.0, dtype: Any = None) -> layers.BatchNorm:
  """Batch norm over the last axis, as a module's attributes say; `dtype` replaces its own."""
  return layers.BatchNorm(
    epsilon=BATCH_NORM_EPSILON,
    momentum=module.batch_norm_momentum,
    num_groups=module.batch_norm_groups,
    unbiased_variance=True,
    scale_init=nn.initializers.constant(scale_init),
    dtype=module.dtype if dtype is None else dtype,
    name=name,
  )


def head_norm(module: Any, x: jax.Array, name: str, train: bool) -> jax.Array:
  """Batch norm of attention logits `[B, heads, Q, K]`, one channel for each head."""
  return jnp.moveaxis(norm(module, name)(jnp.moveaxis(x, 1, -1), train), -1, 1)


def resize_map(x: jax.Array, size: Sequence[int], side: int) -> jax.Array:
  """Bilinear `[B, h, w, C]` → `[B, *size, C]`; corners stay aligned where `side` is odd.

  Pictures of 2^k n + 1 pixels have odd maps whose corner cells lie on each other; which side of
  which map the authors look at differs from place to place.
  """
  return resize_bilinear(x, size, align_corners=side % 2 == 1)
