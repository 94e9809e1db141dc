"""SMT: scale-aware modulation first, self-attention last, and both in turn between them.

Weifeng Lin et al., "Scale-Aware Modulation Meet Transformer", ICCV 2023, arXiv:2307.08579. Follows
the authors' code (AFeng-x/SMT, `models/smt.py`). Nothing is computed differently. The detection
code's version is the same network in evaluation; its element-wise dropout in the place of drop path
is not repeated.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.models import layers
from hybrid_vit.models.blocks import apply_blocks
from hybrid_vit.models.registry import FeatureSpec, Preprocessing, Published, register
from hybrid_vit.ops.mixed_convolution import grouped_product, mixed_depthwise_conv

# The authors cut their normal at the absolute values 2 and -2: it is a plain one.
_INIT = nn.initializers.normal(0.02)
_BLOCK_NORM_EPSILON = 1e-6
_EMBEDDING_NORM_EPSILON = 1e-5
_BATCH_NORM_EPSILON = 1e-5

BLOCK_TYPES = ("modulation", "hybrid", "attention")


class SMT(nn.Module):
  """The SMT backbone with its classifier (paper, section 3).

  A call takes images `[B, H, W, 3]` of any size and returns logits `[B, num_classes]` in float32
  (None when `num_classes` is 0) and the endpoints: "stem", "stage1" and so on (after the stage's
  layer norm, which the next stage reads too), "stage1_block0" and so on for every block,
  "stage2_embedding" and so on (what opens a later stage), and "pre_logits" `[B, C]`.

  The stem gives ceil(H / 2) // 2 rows, every later stage the half, rounded up.

  Attributes:
    depths: blocks of each stage.
    widths: channels of each stage.
    num_classes: 0 for no classifier.
    block_types: for each stage "modulation", "attention" or "hybrid": both in turn, the first block
      modulates (paper, section 3.3).
    modulation_heads: of each stage; head i has a kernel of 3 + 2 i; None where nothing modulates.
    attention_heads: of each stage; None where nothing attends.
    mlp_ratios: hidden width of a block's second half over its width, for each stage.
    expand_ratio: width inside the aggregation of a modulation over the block's.
    qkv_bias: biases of the query, key and value projections, and of a modulation's two.
    qk_scale: factor of the attention logits; None for head size ^ -0.5.
    stem_kernel: side of the stem's first kernel, 3 or 7.
    layer_scale: initial value of the scale of each branch's channels; None for none.
    drop_path_rate: of the last block; from 0 in the first one, evenly.
    batch_norm_momentum: of the running statistics; short trainings want less than the authors'.
    batch_norm_groups: groups of the batch with batch norm statistics of their own.
    remat: recompute each block in the backward pass instead of storing its inside.
    scan_blocks: equal blocks as the turns of a loop, see `models/blocks.py`.
    dtype: of the computation; parameters, softmax, norm statistics and pooling are float32.
  """

  depths: tuple[int, ...]
  widths: tuple[int, ...] = (64, 128, 256, 512)
  num_classes: int = 1000
  block_types: tuple[str, ...] = ("modulation", "modulation", "hybrid", "attention")
  modulation_heads: tuple[int | None, ...] = (4, 4, 4, None)
  attention_heads: tuple[int | None, ...] = (None, None, 8, 16)
  mlp_ratios: tuple[float, ...] = (4.0, 4.0, 4.0, 2.0)
  expand_ratio: int = 2
  qkv_bias: bool = True
  qk_scale: float | None = None
  stem_kernel: int = 3
  layer_scale: float | None = None
  drop_path_rate: float = 0.0
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  remat: bool = False
  scan_blocks: bool = False
  dtype: Any = jnp.float32

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The feature pyramid: name, stride and channels of each stage."""
    return tuple(
      FeatureSpec(f"stage{i + 1}", 4 * 2**i, width) for i, width in enumerate(self.widths)
    )

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    self._check()
    endpoints = {}
    rates = layers.linear_drop_path_rates(self.drop_path_rate, self.depths)
    x = images.astype(self.dtype)
    for stage, (depth, width) in enumerate(zip(self.depths, self.widths)):
      if stage == 0:
        name = "stem"
        x = Stem(
          width,
          self.stem_kernel,
          self.batch_norm_momentum,
          self.batch_norm_groups,
          self.dtype,
          name=name,
        )(x, train)
      else:
        name = f"stage{stage + 1}_embedding"
        x = PatchEmbedding(width, self.dtype, name=name)(x)
      endpoints[name] = x
      blocks = [
        {
          "attention_heads": self.attention_heads[stage] if self.attends(stage, i) else None,
          "modulation_heads": self.modulation_heads[stage],
          "mlp_ratio": self.mlp_ratios[stage],
          "expand_ratio": self.expand_ratio,
          "qkv_bias": self.qkv_bias,
          "qk_scale": self.qk_scale,
          "layer_scale": self.layer_scale,
          "drop_path_rate": rates[stage][i],
          "batch_norm_momentum": self.batch_norm_momentum,
          "batch_norm_groups": self.batch_norm_groups,
          "dtype": self.dtype,
        }
        for i in range(depth)
      ]
      x, outputs = apply_blocks(self, Block, f"stage{stage + 1}_block", blocks, x, train)
      endpoints |= outputs
      x = layers.layer_norm(_BLOCK_NORM_EPSILON, self.dtype, f"stage{stage + 1}_norm")(x)
      endpoints[f"stage{stage + 1}"] = x

    x = x.mean((1, 2), dtype=jnp.float32)
    endpoints["pre_logits"] = x
    logits = None
    if self.num_classes:
      # The classifier is float32 throughout: it is small, and logits are promised in float32.
      logits = nn.Dense(self.num_classes, kernel_init=_INIT, dtype=jnp.float32, name="head")(x)
    return logits, endpoints

  def attends(self, stage: int, block: int) -> bool:
    """Whether a block, both counted from 0, attends; it modulates else."""
    kind = self.block_types[stage]
    return kind == "attention" or (kind == "hybrid" and block % 2 == 1)

  def _check(self) -> None:
    names = ("widths", "block_types", "modulation_heads", "attention_heads", "mlp_ratios")
    layers.check_stages(self, *names)
    if self.stem_kernel not in (3, 7):
      raise ValueError(f"SMT: stem_kernel is 3 or 7, not {self.stem_kernel}")
    for stage, kind in enumerate(self.block_types):
      if kind not in BLOCK_TYPES:
        raise ValueError(f"SMT: block_types has {kind!r}; known: {', '.join(BLOCK_TYPES)}")
      for i in range(self.depths[stage]):
        name = "attention_heads" if self.attends(stage, i) else "modulation_heads"
        heads, width = getattr(self, name)[stage], self.widths[stage]
        if not heads or heads < 0 or width % heads:
          raise ValueError(
            f"SMT: {name} of stage {stage + 1}, where a block needs them, is {heads}; it has to "
            f"divide the width {width}"
          )


class Stem(nn.Module):
  """A strided convolution, batch norm and ReLU, a 2x2 convolution of stride 2, and layer norm."""

  width: int
  kernel_size: int
  batch_norm_momentum: float
  batch_norm_groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[B, H, W, 3]` to `[B, ceil(H / 2) // 2, ceil(W / 2) // 2, width]`.

    Raises:
      ValueError: for images of less than 3 rows or columns.
    """
    if min(x.shape[1:3]) < 3:
      raise ValueError(f"SMT: images have at least 3 x 3 cells, not {x.shape[1]} x {x.shape[2]}")
    size = self.kernel_size
    x = layers.Conv(
      self.width,
      (size, size),
      strides=2,
      padding=size // 2,
      use_bias=False,
      kernel_init=_conv_init(size**2 * self.width),
      dtype=self.dtype,
      name="conv_0",
    )(x)
    x = nn.relu(_batch_norm(self, "batch_norm")(x, train))
    x = layers.Conv(
      self.width,
      (2, 2),
      strides=2,
      padding=0,
      kernel_init=_conv_init(4 * self.width),
      dtype=self.dtype,
      name="conv_1",
    )(x)
    return layers.layer_norm(_EMBEDDING_NORM_EPSILON, self.dtype, "norm")(x)


class PatchEmbedding(nn.Module):
  """A 3x3 convolution of stride 2 and a layer norm after it."""

  width: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` to `[B, ceil(H / 2), ceil(W / 2), width]`."""
    x = layers.Conv(
      self.width,
      (3, 3),
      strides=2,
      padding=1,
      kernel_init=_conv_init(9 * self.width),
      dtype=self.dtype,
      name="conv",
    )(x)
    return layers.layer_norm(_EMBEDDING_NORM_EPSILON, self.dtype, "norm")(x)


class Block(nn.Module):
  """Modulation or attention, then a convolutional MLP, each after a norm and added to its input.

  Attributes as in `SMT`, of one stage; the block attends where `attention_heads` is not None.
  """

  attention_heads: int | None
  modulation_heads: int | None
  mlp_ratio: float
  expand_ratio: int
  qkv_bias: bool
  qk_scale: float | None
  layer_scale: float | None
  drop_path_rate: float
  batch_norm_momentum: float
  batch_norm_groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = layers.layer_norm(_BLOCK_NORM_EPSILON, self.dtype, "norm1")(x)
    if self.attention_heads is not None:
      y = Attention(
        self.attention_heads, self.qkv_bias, self.qk_scale, self.dtype, name="attention"
      )(y)
    else:
      y = ScaleAwareModulation(
        self.modulation_heads or 0,
        self.expand_ratio,
        self.qkv_bias,
        self.batch_norm_momentum,
        self.batch_norm_groups,
        self.dtype,
        name="modulation",
      )(y, train)
    x = x + self._finish(y, 1, train)

    y = layers.layer_norm(_BLOCK_NORM_EPSILON, self.dtype, "norm2")(x)
    y = _dense(self, int(self.mlp_ratio * x.shape[-1]), "mlp_fc1")(y)
    y = layers.gelu(y + _depthwise(self, 3, "mlp_conv")(y))
    y = _dense(self, x.shape[-1], "mlp_fc2")(y)
    return x + self._finish(y, 2, train)

  def _finish(self, x: jax.Array, branch: int, train: bool) -> jax.Array:
    if self.layer_scale is not None:
      x = layers.LayerScale(self.layer_scale, name=f"layer_scale{branch}")(x)
    return layers.DropPath(self.drop_path_rate, name=f"drop_path{branch}")(x, train)


class ScaleAwareModulation(nn.Module):
  """Multiplies a projection of each cell by a modulator from kernels of several sizes.

  Paper, section 3.1: multi-head mixed convolution, then scale-aware aggregation, whose groups hold
  one channel of every head. There is no softmax, and the value has no activation.

  Attributes:
    num_heads: head i convolves its run of channels with a kernel of 3 + 2 i cells a side.
    expand_ratio: see `SMT`.
    use_bias: of the value's and the modulator's first projection.
    batch_norm_momentum: see `SMT`.
    batch_norm_groups: see `SMT`.
    dtype: of the computation.
  """

  num_heads: int
  expand_ratio: int
  use_bias: bool
  batch_norm_momentum: float
  batch_norm_groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[B, H, W, C]` to the same shape."""
    width, heads = x.shape[-1], self.num_heads
    value = _dense(self, width, "value", self.use_bias)(x)
    scales = _dense(self, width, "scales", self.use_bias)(x)
    kernels, biases = zip(
      *(_HeadKernel(3 + 2 * i, width // heads, name=f"scale_conv_{i}")() for i in range(heads))
    )
    mixed = mixed_depthwise_conv(scales, kernels) + jnp.concatenate(biases).astype(self.dtype)
    expand = GroupedPointwiseConv(
      width // heads, heads * self.expand_ratio, self.dtype, name="expand"
    )
    norm = _batch_norm(self, "batch_norm")
    y = layers.pointwise_conv_norm(mixed, train, expand, norm, layers.gelu)
    modulator = layers.PointwiseConv(
      width, kernel_init=_conv_init(width), dtype=self.dtype, name="shrink"
    )(y)
    return _dense(self, width, "out")(modulator * value)


class _HeadKernel(layers.ShapedParameters, nn.Module):
  """Parameters of one head's convolution: kernel `[size, size, 1, width]` and bias `[width]`."""

  size: int
  width: int

  @nn.compact
  def __call__(self) -> tuple[jax.Array, jax.Array]:
    shape = (self.size, self.size, 1, self.width)
    kernel = self.param("kernel", _conv_init(self.size**2), shape, jnp.float32)
    return kernel, self.param("bias", nn.initializers.zeros, (self.width,), jnp.float32)


class GroupedPointwiseConv(layers.ShapedParameters, nn.Module):
  """A 1x1 convolution of each group of channels by itself: `[..., n G]` to `[..., G m]`.

  Group g has channel g of each of the n heads. Its parameters are a kernel `[n, G m]` and a bias
  `[G m]`, as those of a grouped convolution. `product(x, kernel, bias)`, with the kernel as
  `[n, G, m]`, may stand for the plain one.
  """

  groups: int
  features_per_group: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, product: Callable[..., jax.Array] | None = None) -> jax.Array:
    inputs, outputs = x.shape[-1] // self.groups, self.groups * self.features_per_group
    init = _conv_init(self.features_per_group)
    kernel = self.param("kernel", init, (inputs, outputs), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (outputs,), jnp.float32)
    if product is not None:
      return product(x, kernel.reshape(inputs, self.groups, self.features_per_group), bias)
    return grouped_product(x, kernel, self.groups) + bias.astype(self.dtype)


class Attention(nn.Module):
  """Global self-attention without a position bias, plus a 3x3 depthwise convolution of the values.

  Attributes:
    num_heads: of the attention.
    use_bias: of the query's and the fused key and value projection.
    scale: factor of the logits; None for head size ^ -0.5.
    dtype: of the computation; logits and softmax are float32.
  """

  num_heads: int
  use_bias: bool
  scale: float | None
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` to the same shape."""
    batch, _, _, width = x.shape
    query = _dense(self, width, "query", self.use_bias)(x)
    key, value = jnp.split(_dense(self, 2 * width, "key_value", self.use_bias)(x), 2, axis=-1)

    def by_head(t: jax.Array) -> jax.Array:  # [B, tokens, heads, head size]
      return t.reshape(batch, -1, self.num_heads, width // self.num_heads)

    scale = (width // self.num_heads) ** -0.5 if self.scale is None else self.scale
    layers.sow_attention(self, by_head(query), by_head(key), scale=scale)
    out = layers.dot_product_attention(by_head(query), by_head(key), by_head(value), scale=scale)
    out = out.reshape(x.shape) + _depthwise(self, 3, "value_conv")(value)
    return _dense(self, width, "out")(out)


def _conv_init(fan_out: int) -> nn.initializers.Initializer:
  """The authors' normal for convolutions; `fan_out` is of one group."""
  return nn.initializers.normal((2.0 / fan_out) ** 0.5)


def _dense(module: Any, width: int, name: str, use_bias: bool = True) -> layers.PointwiseConv:
  return layers.PointwiseConv(
    width, use_bias=use_bias, kernel_init=_INIT, dtype=module.dtype, name=name
  )


def _depthwise(module: Any, size: int, name: str) -> layers.DepthwiseConv:
  return layers.DepthwiseConv(
    (size, size),
    stride=1,
    padding=((size // 2, size // 2),) * 2,
    use_bias=True,
    kernel_init=_conv_init(size**2),
    dtype=module.dtype,
    name=name,
  )


def _batch_norm(module: Any, name: str) -> layers.BatchNorm:
  return layers.batch_norm(module, epsilon=_BATCH_NORM_EPSILON, unbiased_variance=True, name=name)


def _register_family() -> None:
  imagenet: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
  large: dict[str, Any] = {
    "depths": (4, 6, 28, 4),
    "widths": (96, 192, 384, 768),
    "mlp_ratios": (8.0, 6.0, 4.0, 2.0),
    "stem_kernel": 7,
    "layer_scale": 1e-4,
  }
  base = {**large, "depths": (4, 6, 28, 2), "widths": (64, 128, 256, 512), "layer_scale": None}
  counts = "AFeng-x/SMT: counts of its code"
  readme = f"{counts}, accuracy of its README"
  # The README's 21M fit one block in the last stage; every configuration has two.
  small = f"{readme}; the released file may have one block less in the last stage"
  quoted = f"{counts}; accuracy as RMT's paper (tables 1 and 9) quotes it"
  no_top1 = f"{counts}; 21,841 classes, no accuracy given"
  # name, arguments, drop path, input size, parameters, multiply-adds in 10^9, top-1, source
  table: tuple[tuple[Any, ...], ...] = (
    ("smt_t", {"depths": (2, 2, 8, 1)}, 0.1, 224, 11506536, 2.461, 82.2, readme),
    ("smt_s", {"depths": (3, 4, 18, 2)}, 0.2, 224, 22550952, 4.839, 83.7, small),
    ("smt_b", base, 0.3, 224, 32037352, 7.966, 84.3, readme),
    ("smt_l", large, 0.4, 224, 80620264, 17.907, 84.6, quoted),
    ("smt_l_22k", large | {"num_classes": 21841}, 0.1, 224, 96646993, 17.923, None, no_top1),
    ("smt_l_22k_ft_224", large, 0.1, 224, 80620264, 17.907, 87.1, readme),
    ("smt_l_22k_ft_384", large, 0.1, 384, 80620264, 55.061, 88.1, readme),
  )
  for name, arguments, drop_path, size, parameters, giga, top1, source in table:
    squash = size >= 384
    register(
      name,
      SMT,
      {**arguments, "drop_path_rate": drop_path},
      preprocessing=Preprocessing(
        image_size=size,
        crop_ratio=1.0 if squash else 0.875,
        interpolation="bicubic",
        resize="squash" if squash else "crop",
        **imagenet,
      ),
      published=Published(
        parameters=parameters, multiply_adds=round(giga * 1e9), top1=top1, source=source
      ),
    )


_register_family()
