"""Layers that two or more networks share; what one network alone needs stays in its own file."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# These are layers, too, to those who read a network.
from hybrid_vit.ops.activations import gelu as gelu
from hybrid_vit.ops.activations import quick_gelu as quick_gelu
from hybrid_vit.ops.attention import attention_weights
from hybrid_vit.ops.attention import dot_product_attention as dot_product_attention
from hybrid_vit.ops.attention import split_heads as split_heads
from hybrid_vit.ops.batch_norm import batch_norm as batch_norm_op
from hybrid_vit.ops.convolution import conv_general_dilated
from hybrid_vit.ops.depth_multiplier import multiplied_depthwise_conv
from hybrid_vit.ops.layer_norm import layer_norm as layer_norm_op
from hybrid_vit.ops.platforms import target_platform
from hybrid_vit.ops.pointwise_batch_norm import (
  pays,
  pointwise_batch_norm,
  pointwise_product,
)
from hybrid_vit.ops.relative_position import relative_position_bias as relative_position_bias

Initializer = Callable[..., jax.Array]


class ShapedParameters:
  """For modules that declare parameters as `param(name, init, shape, dtype)`: quicker tracing.

  Where a parameter is there, Flax traces its initializer in every call, to compare what shape it
  gives: two fifths of tracing an evaluation. Here the shape is known before.
  """

  if not TYPE_CHECKING:  # To types it is Flax's own.

    def param(self, name: str, init_fn: Initializer, *arguments: Any, **options: Any) -> Any:
      """See `nn.Module.param`, which has the last word of a shape that differs."""
      # Where parameters are made Flax looks whether two have one name.
      if arguments and not self.is_initializing() and self.has_variable("params", name):
        value = self.get_variable("params", name)
        if np.shape(value) == arguments[0]:
          return value
      return super().param(name, init_fn, *arguments, **options)


class BatchNorm(ShapedParameters, nn.Module):
  """Batch normalisation whose statistics are float32 whatever the compute type.

  Under `jax.jit` with a sharded batch the mean is over the global batch. With `num_groups` > 1 the
  batch is split into that many contiguous groups, each normalised by its own mean and variance, as
  if each were one device's batch; the running figures take the groups' average.

  Attributes:
    epsilon: added to the variance.
    momentum: of the running figures, in the sense new = momentum * old + (1 - momentum) * batch
      (torch's momentum is 1 minus this).
    num_groups: groups of the batch axis, in training only.
    unbiased_variance: the running variance takes n / (n - 1) of the batch's, as torch does.
    scale_init: where the scale begins.
    dtype: of the result.
  """

  epsilon: float
  momentum: float
  num_groups: int = 1
  unbiased_variance: bool = False
  scale_init: Initializer = nn.initializers.ones
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    train: bool,
    *,
    kernel: jax.Array | None = None,
    offset: jax.Array | None = None,
    activation: Callable[[jax.Array], jax.Array] | None = None,
  ) -> jax.Array:
    """Normalises `[B, ..., C]`, or with a `kernel` the product of both, `[B, ..., O]`.

    Args:
      x: of any floating dtype.
      train: by the batch's own statistics, which the running figures then take in.
      kernel: see `ops.pointwise_batch_norm`.
      offset: `[O]`, with a `kernel`: the bias of the product, which only the running mean shows.
      activation: of the result, in float32; with a `kernel` only.

    Raises:
      ValueError: where `num_groups` does not divide the batch.
    """
    channels = x.shape[-1] if kernel is None else math.prod(kernel.shape[1:])
    scale = self.param("scale", self.scale_init, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
    if not train:
      # Also of a kernel: norms that are frozen are called so in the midst of a training.
      if kernel is not None:
        x = pointwise_product(x, kernel)
        x = x if offset is None else x + offset.astype(x.dtype)
      factor = scale * lax.rsqrt(running_var.value + self.epsilon)
      shift = bias - running_mean.value * factor
      normal = x.astype(jnp.float32) * factor + shift
      return (normal if activation is None else activation(normal)).astype(self.dtype)

    groups = self.num_groups
    if x.shape[0] % groups:
      raise ValueError(f"batch norm: {groups} groups do not divide a batch of {x.shape[0]}")
    grouped = x.reshape(groups, x.shape[0] // groups, *x.shape[1:])
    if kernel is None:
      out, mean, var = batch_norm_op(grouped, scale, bias, self.epsilon, self.dtype)
    else:
      of_group = functools.partial(
        pointwise_batch_norm, epsilon=self.epsilon, activation=activation
      )
      out, mean, var = jax.vmap(of_group, (0, None, None, None))(grouped, kernel, scale, bias)
      mean = mean if offset is None else mean + lax.stop_gradient(offset)
    if not self.is_initializing():
      count = x.size // (groups * x.shape[-1])
      correction = count / max(count - 1, 1) if self.unbiased_variance else 1.0
      kept, new = self.momentum, 1.0 - self.momentum
      running_mean.value = kept * running_mean.value + new * mean.mean(0)
      running_var.value = kept * running_var.value + new * correction * var.mean(0)
    return out.reshape(*x.shape[:-1], channels)


class DropPath(nn.Module):
  """Drops the branch of a sample with probability `rate`; the kept ones are divided by 1 - rate."""

  rate: Any  # a number, or a float32 array of one where blocks are scanned

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[B, ...]`; draws from the "dropout" stream in training when `rate` is not the number 0."""
    is_array = isinstance(self.rate, jax.Array)
    if not train or (not is_array and self.rate == 0.0):
      return x
    shape = (x.shape[0],) + (1,) * (x.ndim - 1)
    keep = 1.0 - self.rate
    kept = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
    # An array would widen bfloat16, which a number does not.
    keep = keep.astype(x.dtype) if is_array else keep
    return jnp.where(kept, x / keep, 0.0).astype(x.dtype)


class Conv(ShapedParameters, nn.Conv):
  """Flax's own with the operation of `ops/convolution.py`.

  Depthwise ones and networks' 1x1 ones have layers of their own below.
  """

  conv_general_dilated: Any = conv_general_dilated


class Dense(ShapedParameters, nn.Dense):
  """Flax's own, for layers that a network has in each block."""


class DenseGeneral(ShapedParameters, nn.DenseGeneral):
  """Flax's own, likewise."""


class DepthwiseConv(ShapedParameters, nn.Module):
  """A depthwise convolution: parameters `kernel` `[kh, kw, 1, C]` and, if asked, `bias` `[C]`.

  With a `multiplier` m each channel has m kernels, one after the other: `C m` for `C` in these
  shapes and in the result.
  """

  kernel_size: tuple[int, int]
  stride: int
  padding: Any
  use_bias: bool
  kernel_init: Initializer
  dtype: Any = jnp.float32
  bias_init: Initializer = nn.initializers.zeros
  multiplier: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (*self.kernel_size, 1, x.shape[-1] * self.multiplier)
    kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
    x = multiplied_depthwise_conv(
      x.astype(self.dtype), kernel, stride=self.stride, padding=self.padding
    )
    if self.use_bias:
      bias = self.param("bias", self.bias_init, (x.shape[-1],), jnp.float32)
      x = x + bias.astype(self.dtype)
    return x


class PointwiseConv(ShapedParameters, nn.Module):
  """A 1x1 convolution of `[..., C]` as one matrix product over all cells.

  Its parameters are those of `nn.Dense`; the product is `ops.pointwise_batch_norm`'s.
  """

  features: int
  use_bias: bool = True
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  bias_init: nn.initializers.Initializer = nn.initializers.zeros
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    product: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
  ) -> jax.Array:
    """`[..., C]` to `[..., features]`; `product(x, kernel)` may stand for the plain one."""
    kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
    y = x.astype(self.dtype)
    if product is not None:
      return product(y, kernel)
    y = pointwise_product(y, kernel)
    if self.use_bias:
      bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
      y = y + bias.astype(self.dtype)
    return y


class LayerNorm(ShapedParameters, nn.Module):
  """Layer norm over the last axis, float32 inside, see `ops.layer_norm`.

  Parameters `scale` and `bias` `[C]`.

  Attributes:
    epsilon: added to the variance.
    dtype: of the result.
  """

  epsilon: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalises `[..., C]`."""
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
    return layer_norm_op(x, scale, bias, self.epsilon, self.dtype)


def layer_norm(epsilon: float, dtype: Any, name: str | None = None) -> LayerNorm:
  """Layer norm over the last axis, see `ops.layer_norm`; parameters scale and bias."""
  return LayerNorm(epsilon=epsilon, dtype=dtype, name=name)


def batch_norm(module: Any, *, epsilon: float, unbiased_variance: bool, name: str) -> BatchNorm:
  """Batch norm as a module's `batch_norm_momentum`, `batch_norm_groups` and `dtype` say."""
  return BatchNorm(
    epsilon=epsilon,
    momentum=module.batch_norm_momentum,
    num_groups=module.batch_norm_groups,
    unbiased_variance=unbiased_variance,
    dtype=module.dtype,
    name=name,
  )


def pointwise_conv_norm(
  x: jax.Array,
  train: bool,
  conv: nn.Module,
  norm: BatchNorm,
  activation: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
  """`activation(norm(conv(x)))` of a 1x1 convolution that has no less channels than `x`.

  In training it is one operation where `pointwise_batch_norm.pays` says so. `conv` is a
  `PointwiseConv` without a bias, or calls `product` as that does and with a bias behind the kernel.
  """
  if train and pays(x.shape[-1]):

    def normalised(y: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
      return norm(y, train, kernel=kernel, offset=bias, activation=activation)

    return conv(x, normalised)
  x = norm(conv(x), train)
  return x if activation is None else activation(x)


class LayerScale(ShapedParameters, nn.Module):
  """Multiplies each channel of `[..., C]` by a parameter `gamma` that begins at `initial_value`."""

  initial_value: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    gamma = self.param(
      "gamma", nn.initializers.constant(self.initial_value), (x.shape[-1],), jnp.float32
    )
    return x * gamma.astype(x.dtype)


class ConvNeXtBlock(nn.Module):
  """Depthwise convolution, layer norm, two dense layers around a GELU, layer scale, plus the input.

  The block of ConvNeXt (arXiv:2201.03545, section 2.6), which RevCol's levels are made of too.

  Attributes:
    kernel_size: side of the depthwise kernel, odd; zeros around the map keep its size.
    hidden: width between the two dense layers.
    layer_scale_init: where the branch's factor of each channel begins; None for no factor.
    layer_norm_epsilon: of the norm.
    drop_path_rate: of the branch.
    kernel_init: of all three kernels; biases begin at 0.
    dtype: of the computation.
  """

  kernel_size: int
  hidden: int
  layer_scale_init: float | None
  layer_norm_epsilon: float
  drop_path_rate: float
  kernel_init: Initializer
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[B, H, W, C]` to the same shape."""
    size, pad, init = self.kernel_size, self.kernel_size // 2, self.kernel_init
    y = DepthwiseConv(
      (size, size),
      stride=1,
      padding=((pad, pad), (pad, pad)),
      use_bias=True,
      kernel_init=init,
      dtype=self.dtype,
      name="depthwise_conv",
    )(x)
    y = layer_norm(self.layer_norm_epsilon, self.dtype, "norm")(y)
    y = PointwiseConv(self.hidden, kernel_init=init, dtype=self.dtype, name="expand")(y)
    y = PointwiseConv(x.shape[-1], kernel_init=init, dtype=self.dtype, name="shrink")(gelu(y))
    if self.layer_scale_init is not None:
      y = LayerScale(self.layer_scale_init, name="layer_scale")(y)
    return x + DropPath(self.drop_path_rate, name="drop_path")(y, train)


# A convolution's kernel as PyTorch begins it: uniform within 1 / sqrt(fan_in).
torch_conv_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def torch_bias_init(fan_in: int) -> Initializer:
  """A bias as PyTorch begins it: uniform within 1 / sqrt(fan_in) of the layer's kernel."""
  bound = float(fan_in) ** -0.5

  def init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


def torch_dense(features: int, fan_in: int, dtype: Any, name: str) -> PointwiseConv:
  """A matrix that begins as PyTorch's Linear of `fan_in` inputs, the bias too."""
  return PointwiseConv(
    features,
    kernel_init=torch_conv_init,
    bias_init=torch_bias_init(fan_in),
    dtype=dtype,
    name=name,
  )


def check_stages(network: Any, *names: str) -> None:
  """Each attribute of `names` has one value for each stage that `network.depths` names.

  Raises:
    ValueError: for the first one that has not.
  """
  stages = len(network.depths)
  for name in names:
    values = getattr(network, name)
    if len(values) != stages:
      raise ValueError(
        f"{type(network).__name__}: depths names {stages} stages but {name} has {len(values)} "
        f"values: {values}"
      )


def check_output_norms(network: Any) -> None:
  """Each number in `network.output_norms` is that of a stage, counted from 1.

  Raises:
    ValueError: for the first one that is not.
  """
  stages = len(network.depths)
  for stage in network.output_norms:
    if not 1 <= stage <= stages:
      raise ValueError(
        f"{type(network).__name__}: output_norms names stage {stage}; the stages are 1 to {stages}"
      )


def linear_drop_path_rates(rate: float, depths: Sequence[int]) -> tuple[tuple[float, ...], ...]:
  """For each stage its blocks' rates: from 0 in the first block to `rate` in the last, evenly."""
  rates = np.linspace(0.0, rate, sum(depths))
  ends = np.cumsum(depths)
  return tuple(
    tuple(float(r) for r in rates[end - depth : end]) for end, depth in zip(ends, depths)
  )


def average_pool_same(x: jax.Array, window: int, stride: int) -> jax.Array:
  """Averages windows of `[B, H, W, C]` with TensorFlow's SAME padding, which never enters the mean.

  Sums in float32 and keeps the dtype of `x`. On TPUs by `reduce_window`, elsewhere as a sum of
  strided views: on a CPU the former and its gradient are scalar loops, and of the latter's gradient
  a TPU makes a pass over the map for each view.
  """
  size = x.shape[1:3]
  pads = lax.padtype_to_pads(size, (window, window), (stride, stride), "SAME")
  around = ((0, 0), *pads, (0, 0))
  out = [-(-n // stride) for n in size]
  total: Any = 0.0
  if target_platform() == "tpu":
    total = lax.reduce_window(
      x.astype(jnp.float32), 0.0, lax.add, (1, window, window, 1), (1, stride, stride, 1), around
    )
  else:
    padded = jnp.pad(x.astype(jnp.float32), around)
    ends = [stride * (n - 1) + 1 for n in out]
    for i in range(window):
      for j in range(window):
        total = total + padded[:, i : i + ends[0] : stride, j : j + ends[1] : stride]
  counts = []
  for n, (low, _), cells in zip(size, pads, out):
    start = np.arange(cells) * stride - low
    counts.append(np.minimum(start + window, n) - np.maximum(start, 0))
  count = np.outer(counts[0], counts[1]).astype(np.float32)[None, :, :, None]
  return (total / count).astype(x.dtype)


def resize_relative_table(table: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resizes a table of relative positions `[heads, 2H-1, 2W-1]` to `(2H'-1, 2W'-1)` = `size`.

  Bilinear with half-pixel centres and no antialiasing, also when shrinking (TensorFlow's
  `tf.image.resize`). An equal size is returned as it is.
  """
  if table.shape[1:] == tuple(size):
    return table
  shape = (table.shape[0], *size)
  return jax.image.resize(table, shape, method="bilinear", antialias=False)


def sow_attention(
  module: nn.Module, query: jax.Array, key: jax.Array, *, scale: float, bias: Any = None
) -> None:
  """Sows the weights of softmax attention over a whole map, float32 `[B, H, Q, K]`.

  As "attention_weights" among "intermediates", where the caller of `apply` made these mutable; else
  nothing is computed. Attention within several windows is not sown.

  Args:
    module: whose attention it is.
    query: `[B, Q, H, D]`, or `[B, windows, Q, H, D]`.
    key: `[B, K, H, D]`, or `[B, windows, K, H, D]`.
    scale: see `dot_product_attention`.
    bias: see there.
  """
  if not module.is_mutable_collection("intermediates"):
    return
  if query.ndim == 5 and query.shape[1] > 1:
    return
  weights = attention_weights(query, key, scale=scale, bias=bias)
  module.sow("intermediates", "attention_weights", weights.reshape(len(query), *weights.shape[-3:]))
