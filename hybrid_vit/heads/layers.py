"""Layers that two or more heads share: mmcv's ConvModule, and transposed convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.models.layers import BatchNorm, Conv, Initializer, ShapedParameters

# mmcv's for convolutions before a ReLU: normal, variance 2 / fan_out.
he_normal_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class ConvNorm(nn.Module):
  """A convolution without bias, batch norm and ReLU: mmcv's ConvModule with a norm.

  Attributes:
    features: channels of the result.
    kernel_size: side of the kernel, odd; zeros around the map keep its size.
    dilation: of the kernel.
    activation: whether the ReLU is there.
    epsilon: of the batch norm.
    momentum: of the batch norm's running figures; 0.9 is PyTorch's 0.1.
    unbiased_variance: of the running variance, as PyTorch has it.
    num_groups: groups of the batch with statistics of their own.
    kernel_init: of the kernel.
    dtype: of the computation.
  """

  features: int
  kernel_size: int
  dilation: int = 1
  activation: bool = True
  epsilon: float = 1e-5
  momentum: float = 0.9
  unbiased_variance: bool = True
  num_groups: int = 1
  kernel_init: Initializer = he_normal_fan_out
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[B, H, W, C]` to `[B, H, W, features]`."""
    pad = self.dilation * (self.kernel_size // 2)
    x = Conv(
      self.features,
      (self.kernel_size, self.kernel_size),
      padding=((pad, pad), (pad, pad)),
      kernel_dilation=self.dilation,
      use_bias=False,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      name="conv",
    )(x)
    x = BatchNorm(
      epsilon=self.epsilon,
      momentum=self.momentum,
      num_groups=self.num_groups,
      unbiased_variance=self.unbiased_variance,
      dtype=self.dtype,
      name="norm",
    )(x, train)
    return nn.relu(x) if self.activation else x


def conv_norm(module: Any, features: int, kernel_size: int, name: str, **options: Any) -> ConvNorm:
  """`ConvNorm` with a head's `batch_norm_momentum`, `batch_norm_groups` and `dtype`."""
  return ConvNorm(
    features,
    kernel_size,
    momentum=module.batch_norm_momentum,
    num_groups=module.batch_norm_groups,
    dtype=module.dtype,
    name=name,
    **options,
  )


class Deconv(ShapedParameters, nn.Module):
  """A transposed convolution as PyTorch's ConvTranspose2d: `kernel` is `[kh, kw, in, out]`.

  Cell (i, j) adds kernel[a, b] to cell (stride i + a - padding, stride j + b - padding) of the
  result, which is (H - 1) stride - 2 padding + k + output_padding high.

  Attributes:
    features: channels of the result.
    kernel_size: side of the kernel.
    stride: how many times larger the result is, about.
    padding: rows and columns cut off on each side.
    output_padding: rows and columns more at the end.
    use_bias: whether there is one.
    kernel_init: of the kernel; its fans are those of a convolution of this kernel.
    bias_init: of the bias.
    dtype: of the computation.
  """

  features: int
  kernel_size: int
  stride: int
  padding: int = 0
  output_padding: int = 0
  use_bias: bool = True
  kernel_init: Initializer = he_normal_fan_out
  bias_init: Initializer = nn.initializers.zeros
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]`, enlarged."""
    size = self.kernel_size
    shape = (size, size, x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).astype(self.dtype)
    x = x.astype(self.dtype)
    if size == self.stride and not self.padding and not self.output_padding:
      # Nothing overlaps: one matrix product, whose columns are the cells.
      y = jnp.einsum("bhwi,klio->bhkwlo", x, kernel)
      batch, height, _, width, _, features = y.shape
      y = y.reshape(batch, height * size, width * size, features)
    else:
      low = size - 1 - self.padding
      pads = (low, low + self.output_padding)
      y = lax.conv_general_dilated(
        x,
        kernel[::-1, ::-1],
        window_strides=(1, 1),
        padding=(pads, pads),
        lhs_dilation=(self.stride, self.stride),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
      )
    if self.use_bias:
      bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
      y = y + bias.astype(self.dtype)
    return y


def dropout_channels(module: nn.Module, x: jax.Array, rate: float, train: bool) -> jax.Array:
  """Drops whole channels of a picture with probability `rate` (Dropout2d); others are enlarged."""
  if not train or not rate:
    return x
  shape = (x.shape[0], 1, 1, x.shape[-1])
  kept = jax.random.bernoulli(module.make_rng("dropout"), 1.0 - rate, shape)
  return jnp.where(kept, x / (1.0 - rate), 0.0).astype(x.dtype)


def classifier(features: int, name: str = "classifier") -> nn.Conv:
  """The 1x1 convolution to the classes, float32: normal with 0.01, bias 0, as mmseg's conv_seg."""
  return Conv(
    features, (1, 1), kernel_init=nn.initializers.normal(0.01), dtype=jnp.float32, name=name
  )


def check_levels(name: str, features: Sequence[Any], least: int, most: int | None = None) -> None:
  """How many maps a head takes.

  Raises:
    ValueError: it is given fewer or more; the message names them.
  """
  if len(features) < least or (most is not None and len(features) > most):
    expected = f"{least}" if most == least else f"{least} or more"
    if most is not None and most != least:
      expected = f"{least} to {most}"
    found = ", ".join(f"{f.name} (stride {f.stride})" for f in features) or "none"
    raise ValueError(f"{name} takes {expected} maps; the backbone gives {len(features)}: {found}")
