"""Layers that train with several branches and answer with one convolution.

Pavan Kumar Anasosalu Vasu et al., "MobileOne", CVPR 2023, arXiv:2206.04040, and "FastViT", ICCV
2023, arXiv:2303.14189, as the authors' ml-mobileclip has them (`modules/common/mobileone.py`,
`models/mci.py`, `modules/text/repmixer.py`). MobileCLIP's image encoders (`mci.py`) and its mixed
text tower (`text.py`) are made of them.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from hybrid_vit.models import layers

BATCH_NORM_EPSILON = 1e-5

# The authors cut at 2, a hundred standard deviations: plainly normal.
LINEAR_INIT = nn.initializers.normal(0.02)

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Options:
  """What all layers of one network have in common.

  Attributes:
    reparameterized: each group of branches is one convolution, see `reparameterize`.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with batch norm statistics of their own.
    dtype: of the computation.
  """

  reparameterized: bool
  batch_norm_momentum: float
  batch_norm_groups: int
  dtype: Any


def reparameterize(variables: Mapping[str, Any]) -> dict[str, Any]:
  """Merges the branches of a trained network into one convolution each (MobileOne, section 3.2).

  Args:
    variables: of a network built with `reparameterized=False`: "params" and "batch_stats".

  Returns:
    Variables for the same network built with `reparameterized=True`. Its answers in evaluation are
    the same up to rounding; the arithmetic of the merge is float64. The batch norms after the
    depthwise convolution of the MLPs and before attention stay, as in the authors' code.
  """
  params, stats = _merge(variables["params"], variables.get("batch_stats", {}))
  merged = {"params": params, "batch_stats": stats}
  flat = traverse_util.flatten_dict(merged)  # drops collections and modules that became empty
  return traverse_util.unflatten_dict(flat)


def batch_norm(options: Options, name: str) -> layers.BatchNorm:
  """Torch's batch norm."""
  return layers.batch_norm(options, epsilon=BATCH_NORM_EPSILON, unbiased_variance=True, name=name)


class Convolution(nn.Module):
  """A convolution with zeros of half the kernel around the map.

  `groups` is 1 or the number of input channels; in the latter case output channel o reads input
  channel o // (features / groups). The kernel is `[in, features]` for 1x1, else
  `[kh, kw, in / groups, features]`.
  """

  features: int
  kernel_size: Size
  stride: int
  groups: int
  use_bias: bool
  kernel_init: Any
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` to `[B, ceil(H / stride), ceil(W / stride), features]`."""
    channels, stride = x.shape[-1], self.stride
    common = {
      "use_bias": self.use_bias,
      "kernel_init": self.kernel_init,
      "bias_init": layers.torch_bias_init(math.prod(self.kernel_size) * channels // self.groups),
      "dtype": self.dtype,
    }
    pads = [(k // 2, k // 2) for k in self.kernel_size]
    conv: nn.Module
    if self.groups == channels:
      times = self.features // channels
      conv = layers.DepthwiseConv(self.kernel_size, stride, pads, multiplier=times, **common)
    elif self.kernel_size == (1, 1):
      x = x[:, ::stride, ::stride]
      conv = layers.PointwiseConv(self.features, **common)
    else:
      conv = layers.Conv(self.features, self.kernel_size, strides=stride, padding=pads, **common)
    nn.share_scope(self, conv)
    return conv(x)


class ConvNorm(nn.Module):
  """A convolution without bias, then batch norm."""

  features: int
  kernel_size: Size
  stride: int
  groups: int
  options: Options
  kernel_init: Any = layers.torch_conv_init

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = Convolution(
      self.features,
      self.kernel_size,
      self.stride,
      self.groups,
      use_bias=False,
      kernel_init=self.kernel_init,
      dtype=self.options.dtype,
      name="conv",
    )(x)
    return batch_norm(self.options, "norm")(x, train)


class MobileOne(nn.Module):
  """A convolution, a 1x1 convolution and the input, each batch-normalised, and added.

  Attributes:
    features: channels of the output.
    kernel_size: of the main branch. The 1x1 branch is there when the first number is above 1: a
      quirk of the authors', by which the text tower's (1, 11) has none.
    stride: with 1 and an equal number of channels there is the branch of the input.
    groups: see `Convolution`.
    options: see `Options`.
    se_width: hidden width of squeeze-and-excitation on the sum; None for none.
    activate: GELU at the end.
  """

  features: int
  kernel_size: Size
  stride: int
  groups: int
  options: Options
  se_width: int | None = None
  activate: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    if self.options.reparameterized:
      y = merged_convolution(self.features, self.kernel_size, self.stride, self.groups, self)(x)
    else:
      main = (self.features, self.kernel_size, self.stride, self.groups, self.options)
      y = ConvNorm(*main, name="conv_branch")(x, train)
      if self.kernel_size[0] > 1:
        scale = (self.features, (1, 1), self.stride, self.groups, self.options)
        y = y + ConvNorm(*scale, name="scale_branch")(x, train)
      if x.shape[-1] == self.features and self.stride == 1:
        y = y + batch_norm(self.options, "skip_norm")(x, train)
    if self.se_width is not None:
      y = SqueezeExcitation(self.se_width, self.options.dtype, name="se")(y)
    return layers.gelu(y) if self.activate else y


def merged_convolution(
  features: int, kernel_size: Size, stride: int, groups: int, module: Any
) -> Convolution:
  """What is left of the branches of `module` when they are merged."""
  return Convolution(
    features,
    kernel_size,
    stride,
    groups,
    use_bias=True,
    kernel_init=layers.torch_conv_init,
    dtype=module.options.dtype,
    name="reparam_conv",
  )


class SqueezeExcitation(nn.Module):
  """Scales the channels by a sigmoid of two dense layers, ReLU between, over the map's mean."""

  hidden: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.mean((1, 2), keepdims=True, dtype=np.float32).astype(self.dtype)
    y = nn.relu(self._dense(y, self.hidden, "reduce"))
    return x * nn.sigmoid(self._dense(y, x.shape[-1], "expand"))

  def _dense(self, x: jax.Array, features: int, name: str) -> jax.Array:
    return nn.Dense(
      features,
      kernel_init=layers.torch_conv_init,
      bias_init=layers.torch_bias_init(x.shape[-1]),
      dtype=self.dtype,
      name=name,
    )(x)


class RepMixer(nn.Module):
  """x + layer_scale * (mixer(x) - norm(x)): a depthwise convolution when merged (FastViT, 3.2)."""

  kernel_size: Size
  layer_scale: float | None
  options: Options

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    width = x.shape[-1]
    if self.options.reparameterized:
      return merged_convolution(width, self.kernel_size, 1, width, self)(x)
    y = MobileOne(width, self.kernel_size, 1, width, self.options, activate=False, name="mixer")(
      x, train
    )
    y = y - batch_norm(self.options, "norm")(x, train)
    if self.layer_scale is not None:
      y = layers.LayerScale(self.layer_scale, name="layer_scale")(y)
    return x + y


class ConvMlp(nn.Module):
  """Depthwise convolution, batch norm, and an MLP with GELU."""

  hidden: int
  kernel_size: Size
  options: Options

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    width = x.shape[-1]
    x = ConvNorm(width, self.kernel_size, 1, width, self.options, LINEAR_INIT, name="conv")(
      x, train
    )
    dense = {"kernel_init": LINEAR_INIT, "dtype": self.options.dtype}
    x = layers.gelu(layers.PointwiseConv(self.hidden, **dense, name="fc1")(x))
    return layers.PointwiseConv(width, **dense, name="fc2")(x)


class RepMixerBlock(nn.Module):
  """RepMixer, then the residual MLP; drop path is on the MLP alone, as in the authors' code."""

  mlp_ratio: float
  mixer_kernel_size: Size
  mlp_kernel_size: Size
  layer_scale: float | None
  drop_path_rate: float
  options: Options

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = RepMixer(self.mixer_kernel_size, self.layer_scale, self.options, name="token_mixer")(
      x, train
    )
    hidden = int(self.mlp_ratio * x.shape[-1])
    y = ConvMlp(hidden, self.mlp_kernel_size, self.options, name="mlp")(x, train)
    if self.layer_scale is not None:
      y = layers.LayerScale(self.layer_scale, name="layer_scale")(y)
    return x + layers.DropPath(self.drop_path_rate, name="drop_path")(y, train)


def _merge(params: Any, stats: Any) -> tuple[Any, Any]:
  """(parameters, statistics) of a module and what is below it, branches merged."""
  if not isinstance(params, Mapping) or "mean" in stats:  # an array, or a batch norm that stays
    return params, stats
  if "mixer" in params:  # RepMixer
    mixer, _ = _merge(params["mixer"], stats["mixer"])
    kernel, bias = _float64(mixer["reparam_conv"], "kernel", "bias")
    identity = _identity(kernel.shape)
    normed, normed_bias = _fold(identity, params["norm"], stats["norm"])
    scale = _float64(params["layer_scale"], "gamma")[0] if "layer_scale" in params else np.ones(())
    kernel = identity + scale * (kernel - normed)
    return {"reparam_conv": _float32(kernel, scale * (bias - normed_bias))}, {}

  kernel = bias = np.zeros(())
  if "conv_branch" in params:  # MobileOne
    kernel, bias = _fold_branch(params, stats, "conv_branch")
    if "scale_branch" in params:
      small, small_bias = _fold_branch(params, stats, "scale_branch")
      kernel, bias = _add_centred(kernel, small), bias + small_bias
    if "skip_norm" in params:
      identity = _identity(kernel.shape)
      skip, skip_bias = _fold(identity, params["skip_norm"], stats["skip_norm"])
      kernel, bias = kernel + skip, bias + skip_bias
  elif "large_branch" in params:
    kernel, bias = _fold_branch(params, stats, "large_branch")
    small, small_bias = _fold_branch(params, stats, "small_branch")
    kernel, bias = _add_centred(kernel, small), bias + small_bias
  elif "position_conv" in params:
    kernel, bias = _float64(params["position_conv"], "kernel", "bias")
    kernel = kernel + _identity(kernel.shape)

  branches = ("conv_branch", "scale_branch", "skip_norm", "large_branch", "small_branch")
  rest = [k for k in params if k not in (*branches, "position_conv")]
  below = {k: _merge(params[k], stats.get(k, {})) for k in rest}
  merged = {k: v[0] for k, v in below.items()}
  if len(rest) < len(params):
    merged["reparam_conv"] = _float32(kernel, bias)
  return merged, {k: v[1] for k, v in below.items()}


def _fold_branch(params, stats, name: str) -> tuple[np.ndarray, np.ndarray]:
  (kernel,) = _float64(params[name]["conv"], "kernel")
  return _fold(kernel, params[name]["norm"], stats[name]["norm"])


def _fold(kernel: np.ndarray, norm, stats) -> tuple[np.ndarray, np.ndarray]:
  """Kernel and bias that give what batch norm makes of the convolution."""
  scale, bias = _float64(norm, "scale", "bias")
  mean, var = _float64(stats, "mean", "var")
  factor = scale / np.sqrt(var + BATCH_NORM_EPSILON)
  return kernel * factor, bias - mean * factor


def _identity(shape: tuple[int, ...]) -> np.ndarray:
  """The kernel that changes nothing: `[C, C]` or depthwise `[kh, kw, 1, C]`."""
  if len(shape) == 2:
    return np.eye(shape[0])
  kernel = np.zeros(shape)
  kernel[shape[0] // 2, shape[1] // 2] = 1.0
  return kernel


def _add_centred(kernel: np.ndarray, small: np.ndarray) -> np.ndarray:
  small = small if small.ndim == 4 else small[None, None]
  low = [(n - m) // 2 for n, m in zip(kernel.shape[:2], small.shape[:2])]
  pads = [(k, n - m - k) for k, n, m in zip(low, kernel.shape[:2], small.shape[:2])]
  return kernel + np.pad(small, (*pads, (0, 0), (0, 0)))


def _float64(tree, *names: str) -> list[np.ndarray]:
  return [np.asarray(tree[name], np.float64) for name in names]


def _float32(kernel: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
  return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
