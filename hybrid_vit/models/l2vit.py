"""L2ViT: linear global attention beside a local concentration module, between window attention.

Chuanyang Zheng, "The Linear Attention Resurrection in Vision Transformer", 2025, arXiv:2501.16182.
Follows the author's PyTorch code (ChuanyangZheng/L2ViT, `classification/models/l2vit.py`, and its
copy for detection and segmentation), with these differences:

* Convolutions begin as the linear layers do, as in the classification code; the copy for dense
  tasks draws them by another rule.
* The window of the copy for dense tasks is fixed at 7; here it is an argument.
* Only layer norm can stand before the classifier: the code names others, which fail when run.
* In bfloat16 the sums of the linear attention stay float32.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.models import layers
from hybrid_vit.models.blocks import apply_blocks
from hybrid_vit.models.registry import (
  FeatureSpec,
  Published,
  imagenet_preprocessing,
  output_pyramid,
  register,
)
from hybrid_vit.ops import windows as windows_op

# The author's truncation lies at a hundred standard deviations: a plain normal.
_INIT = nn.initializers.normal(0.02)
_NORM_EPSILON = 1e-5  # of layer norms and batch norms

# What the denominator of the linear attention does not fall below.
_LEAST_DENOMINATOR = 100.0

_BLOCK_TYPES = ("mixed", "global", "local")
_STEMS = ("conv", "conv4", "patch", "overlapped_patch")


class L2ViT(nn.Module):
  """The L2ViT backbone with its classifier (paper, section 3).

  A call takes images `[B, H, W, 3]` of any size and returns logits `[B, num_classes]` in float32
  (None when `num_classes` is 0) and the endpoints: "stem", "stage2_downsample" and so on (what a
  stage's first block reads), "stage1" to "stage4", "stage1_block0" and so on, "stage1_norm" and so
  on for the stages in `output_norms`, and "pre_logits" `[B, C]` (the mean over the map; with a
  classifier, of the normed and, if so asked, projected map).

  Attributes:
    widths: channels of each stage.
    depths: blocks of each stage.
    num_heads: attention heads of each stage.
    num_classes: 0 for no classifier: neither norm nor projection nor head.
    block_types: "mixed" (in each stage blocks 0, 2 … attend in windows, blocks 1, 3 … globally),
      "global" or "local" (all of them).
    mlp_ratios: hidden width of the MLP over the width, for each stage.
    window_size: side of the windows of local blocks.
    stem: "conv" (two 3x3 convolutions of stride 2), "conv4" (a 7x7, two 3x3 and a 2x2), "patch"
      (4x4, no overlap) or "overlapped_patch" (7x7).
    overlapped_downsampling: 3x3 kernels between the stages, not 2x2.
    position_gelu: GELU after the convolutions that tell positions.
    projection_width: width of a dense layer and ReLU before the mean over the map (the author's
      unpublished option has 1280); None for none.
    output_norms: stages, counted from 1, whose output has a layer norm beside the trunk;
      `features` then names these outputs alone. For dense tasks.
    drop_path_rate: of the last block; the first has 0, evenly between.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with batch norm statistics of their own.
    remat: recompute each block in the backward pass instead of storing its inside.
    scan_blocks: equal blocks as the turns of a loop, see `models/blocks.py`.
    dtype: of the computation; parameters, softmax, the linear attention's sums and norm statistics
      are float32.
  """

  widths: tuple[int, ...] = (96, 192, 384, 768)
  depths: tuple[int, ...] = (2, 2, 6, 2)
  num_heads: tuple[int, ...] = (3, 6, 12, 24)
  num_classes: int = 1000
  block_types: str = "mixed"
  mlp_ratios: tuple[float, ...] = (4.0, 4.0, 4.0, 4.0)
  window_size: int = 7
  stem: str = "conv"
  overlapped_downsampling: bool = False
  position_gelu: bool = False
  projection_width: int | None = None
  output_norms: tuple[int, ...] = ()
  drop_path_rate: float = 0.0
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  remat: bool = False
  scan_blocks: bool = False
  dtype: Any = jnp.float32

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The feature pyramid: name, stride and channels of each stage."""
    pyramid = [FeatureSpec(f"stage{i + 1}", 4 * 2**i, w) for i, w in enumerate(self.widths)]
    return output_pyramid(pyramid, self.output_norms)

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    self._check()
    endpoints = {}
    rates = layers.linear_drop_path_rates(self.drop_path_rate, self.depths)
    x = Stem(
      self.widths[0],
      self.stem,
      self.batch_norm_momentum,
      self.batch_norm_groups,
      self.dtype,
      name="stem",
    )(images.astype(self.dtype), train)
    endpoints["stem"] = x
    for stage, (depth, width) in enumerate(zip(self.depths, self.widths), start=1):
      if stage > 1:
        name = f"stage{stage}_downsample"
        x = Downsample(width, self.overlapped_downsampling, self.dtype, name=name)(x)
        endpoints[name] = x
      blocks = [
        {
          "attends_globally": self.block_types == "global"
          or (self.block_types == "mixed" and i % 2 == 1),
          "num_heads": self.num_heads[stage - 1],
          "mlp_ratio": self.mlp_ratios[stage - 1],
          "window_size": self.window_size,
          "position_gelu": self.position_gelu,
          "drop_path_rate": rates[stage - 1][i],
          "batch_norm_momentum": self.batch_norm_momentum,
          "batch_norm_groups": self.batch_norm_groups,
          "dtype": self.dtype,
        }
        for i in range(depth)
      ]
      x, outputs = apply_blocks(self, Block, f"stage{stage}_block", blocks, x, train)
      endpoints |= outputs
      endpoints[f"stage{stage}"] = x
      if stage in self.output_norms:
        name = f"stage{stage}_norm"
        endpoints[name] = layers.layer_norm(_NORM_EPSILON, self.dtype, name)(x)

    logits = None
    if self.num_classes:
      # The classifier is float32 throughout: it is small, and logits are promised in float32.
      x = layers.layer_norm(_NORM_EPSILON, jnp.float32, "head_norm")(x)
      if self.projection_width is not None:
        x = nn.relu(_dense(self.projection_width, jnp.float32, "head_projection")(x))
    x = x.mean((1, 2), dtype=jnp.float32)
    endpoints["pre_logits"] = x
    if self.num_classes:
      logits = nn.Dense(self.num_classes, kernel_init=_INIT, dtype=jnp.float32, name="head")(x)
    return logits, endpoints

  def _check(self) -> None:
    layers.check_stages(self, "widths", "num_heads", "mlp_ratios")
    for name, known in (("block_types", _BLOCK_TYPES), ("stem", _STEMS)):
      if getattr(self, name) not in known:
        raise ValueError(
          f"L2ViT: {name} is {getattr(self, name)!r}; it takes one of {', '.join(known)}"
        )
    for i, (width, heads) in enumerate(zip(self.widths, self.num_heads), start=1):
      if width % heads:
        raise ValueError(f"L2ViT: {heads} heads do not divide the width {width} of stage {i}")
    layers.check_output_norms(self)


class Stem(nn.Module):
  """An image, padded at the right and the bottom, to a normed map of stride 4; see `L2ViT.stem`."""

  width: int
  kind: str
  batch_norm_momentum: float
  batch_norm_groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = _pad_to_multiple(x, 4)
    half = self.width // 2
    if self.kind == "conv":
      x = self._norm("norm_0", _conv(half, 3, 2, 1, self.dtype, "conv_0")(x), train)
      x = _conv(self.width, 3, 2, 1, self.dtype, "conv_1")(nn.relu(x))
      x = self._norm("norm_1", x, train)
    elif self.kind == "conv4":
      for i, (kernel, stride) in enumerate(((7, 2), (3, 1), (3, 1))):
        x = _conv(half, kernel, stride, kernel // 2, self.dtype, f"conv_{i}", use_bias=False)(x)
        x = nn.relu(self._norm(f"norm_{i}", x, train))
      x = _conv(self.width, 2, 2, 0, self.dtype, "conv_3")(x)
    else:
      kernel, padding = (7, 3) if self.kind == "overlapped_patch" else (4, 0)
      x = _conv(self.width, kernel, 4, padding, self.dtype, "conv")(x)
    return layers.layer_norm(_NORM_EPSILON, self.dtype, "norm")(x)

  def _norm(self, name: str, x: jax.Array, train: bool) -> jax.Array:
    return _batch_norm(self, name)(x, train)


class Downsample(nn.Module):
  """Layer norm, zeros at the right and the bottom up to an even size, a convolution of stride 2."""

  width: int
  overlapped: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = _pad_to_multiple(layers.layer_norm(_NORM_EPSILON, self.dtype, "norm")(x), 2)
    kernel, padding = (3, 1) if self.overlapped else (2, 0)
    return _conv(self.width, kernel, 2, padding, self.dtype, "conv")(x)


class Block(nn.Module):
  """Attention and an MLP, each after a norm and beside a shortcut, with depthwise convolutions.

  A local block (LWA) attends in windows and tells positions before the attention and before the
  MLP; a global block (LGA) attends everywhere, tells positions once, and has the local
  concentration module between attention and MLP. Attributes as in `L2ViT`, those of one stage.
  """

  attends_globally: bool
  num_heads: int
  mlp_ratio: float
  window_size: int
  position_gelu: bool
  drop_path_rate: float
  batch_norm_momentum: float
  batch_norm_groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[B, H, W, C]` to the same shape."""

    def add(x: jax.Array, name: str, branch: jax.Array) -> jax.Array:
      return x + layers.DropPath(self.drop_path_rate, name=f"{name}_drop_path")(branch, train)

    def norm(x: jax.Array, name: str) -> jax.Array:
      return layers.layer_norm(_NORM_EPSILON, self.dtype, f"{name}_norm")(x)

    x = self._tell_positions(x, "position_conv")
    if self.attends_globally:
      attention: nn.Module = LinearAttention(self.num_heads, self.dtype, name="attention")
    else:
      attention = WindowAttention(self.num_heads, self.window_size, self.dtype, name="attention")
    x = add(x, "attention", attention(norm(x, "attention")))
    if self.attends_globally:
      local = LocalConcentration(
        self.batch_norm_momentum, self.batch_norm_groups, self.dtype, name="concentration"
      )
      x = add(x, "concentration", local(norm(x, "concentration"), train))
    else:
      x = self._tell_positions(x, "second_position_conv")
    mlp = MLP(int(x.shape[-1] * self.mlp_ratio), self.dtype, name="mlp")
    return add(x, "mlp", mlp(norm(x, "mlp")))

  def _tell_positions(self, x: jax.Array, name: str) -> jax.Array:
    """Conditional position encoding: the map plus a depthwise convolution of itself."""
    y = _depthwise(3, self.dtype, name)(x)
    return x + (layers.gelu(y) if self.position_gelu else y)


class WindowAttention(nn.Module):
  """Softmax attention within windows; no position bias, no shift.

  Zeros that fill up the last windows attend and are attended to like any cell: there is no mask.
  """

  num_heads: int
  window_size: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    size, channels = (x.shape[1], x.shape[2]), x.shape[-1]
    window = (self.window_size, self.window_size)
    tokens, _ = windows_op.partition_windows(x, window)
    query, key, value = _query_key_value(tokens, self.num_heads, self.dtype)
    scale = (channels // self.num_heads) ** -0.5
    out = layers.dot_product_attention(query, key, value, scale=scale)
    out = _dense(channels, self.dtype, "out")(out.reshape(tokens.shape))
    return windows_op.merge_windows(out, window, size)


class LinearAttention(nn.Module):
  """Global attention at linear cost: q (k^T v) over q . sum(k), with q and k behind ReLU.

  The denominator has a floor, on which all of it lies where there are few cells, and each head
  multiplies by a parameter `temperature` that begins at its width to the power -0.5.
  """

  num_heads: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, channels = x.shape[0], x.shape[-1]
    head_width = channels // self.num_heads
    temperature = self.param(
      "temperature",
      nn.initializers.constant(head_width**-0.5),
      (self.num_heads, 1, 1),
      jnp.float32,
    )
    tokens = x.reshape(batch, -1, channels)
    query, key, value = _query_key_value(tokens, self.num_heads, self.dtype)
    query, key = nn.relu(query).astype(jnp.float32), nn.relu(key)
    summary = jnp.einsum("bnhd,bnhe->bhde", key, value, preferred_element_type=jnp.float32)
    mass = jnp.einsum("bnhd,bhd->bnh", query, key.sum(1, dtype=jnp.float32))
    out = jnp.einsum("bnhd,bhde->bnhe", query, summary * temperature)
    out = out / jnp.maximum(mass, _LEAST_DENOMINATOR)[..., None]
    return _dense(channels, self.dtype, "out")(out.reshape(x.shape))


class LocalConcentration(nn.Module):
  """Two depthwise 7x7 convolutions with GELU, then batch norm, between them."""

  batch_norm_momentum: float
  batch_norm_groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = layers.gelu(_depthwise(7, self.dtype, "conv_0")(x))
    return _depthwise(7, self.dtype, "conv_1")(_batch_norm(self, "norm")(x, train))


class MLP(nn.Module):
  """Two dense layers with GELU between them; the width of the input comes back."""

  hidden: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = layers.gelu(_dense(self.hidden, self.dtype, "fc1")(x))
    return _dense(x.shape[-1], self.dtype, "fc2")(y)


def _query_key_value(x: jax.Array, heads: int, dtype: Any) -> tuple[jax.Array, ...]:
  """One projection `[..., C]` to query, key, value `[..., heads, C / heads]`."""
  return layers.split_heads(_dense(3 * x.shape[-1], dtype, "qkv")(x), 3, heads)


def _pad_to_multiple(x: jax.Array, n: int) -> jax.Array:
  """Zeros at the bottom and the right of `[B, H, W, C]`."""
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % n), (0, -x.shape[2] % n), (0, 0)))


def _conv(
  features: int,
  kernel: int,
  stride: int,
  padding: int,
  dtype: Any,
  name: str,
  use_bias: bool = True,
) -> nn.Conv:
  return layers.Conv(
    features,
    (kernel, kernel),
    strides=stride,
    padding=padding,
    use_bias=use_bias,
    kernel_init=_INIT,
    dtype=dtype,
    name=name,
  )


def _depthwise(kernel: int, dtype: Any, name: str) -> layers.DepthwiseConv:
  around = (kernel // 2, kernel // 2)
  return layers.DepthwiseConv(
    (kernel, kernel),
    stride=1,
    padding=(around, around),
    use_bias=True,
    kernel_init=_INIT,
    dtype=dtype,
    name=name,
  )


def _dense(features: int, dtype: Any, name: str) -> layers.PointwiseConv:
  return layers.PointwiseConv(features, kernel_init=_INIT, dtype=dtype, name=name)


def _batch_norm(module: Any, name: str) -> layers.BatchNorm:
  return layers.batch_norm(module, epsilon=_NORM_EPSILON, unbiased_variance=True, name=name)


def _register_family() -> None:
  base = {"widths": (128, 256, 512, 1024), "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
  small = {"depths": (2, 2, 18, 2)}
  after_22k = "ImageNet-22K, then 1K"
  # name, arguments, drop path (of tiny and small not published: ours), input size, parameters,
  # multiply-adds in 10^9, top-1, data
  table: tuple[tuple[Any, ...], ...] = (
    ("l2vit_tiny", {}, 0.1, 224, 28596781, 4.7, 83.1, "ImageNet-1K"),
    ("l2vit_small", small, 0.2, 224, 50199157, 9.0, 84.1, "ImageNet-1K"),
    ("l2vit_base", base, 0.3, 224, 88577188, 15.9, 84.4, "ImageNet-1K"),
    ("l2vit_base_22k", base | {"num_classes": 21841}, 0.2, 224, 109939213, None, None, "22K"),
    ("l2vit_base_22kto1k", base, 0.2, 224, 88577188, 15.9, 86.0, after_22k),
    (
      "l2vit_base_384_22kto1k",
      base | {"window_size": 12},
      0.2,
      384,
      88577188,
      47.5,
      87.0,
      after_22k,
    ),
  )
  for name, arguments, drop_path, size, parameters, giga, top1, data in table:
    register(
      name,
      L2ViT,
      arguments | {"drop_path_rate": drop_path},
      preprocessing=imagenet_preprocessing(size),
      published=Published(
        parameters=parameters,
        multiply_adds=giga and round(giga * 1e9),
        top1=top1,
        source=f"readme of the author's code; the count of parameters from the code; {data}",
      ),
    )


_register_family()
