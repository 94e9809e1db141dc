"""MCi: the convolution-attention image encoders of MobileCLIP, a FastViT with other figures.

Pavan Kumar Anasosalu Vasu et al., "MobileCLIP: Fast Image-Text Models through Multi-Modal
Reinforced Training", CVPR 2024, arXiv:2311.17049; the network is FastViT, ICCV 2023,
arXiv:2303.14189. Follows the authors' code (apple/ml-mobileclip, `mobileclip/models/mci.py`), with
one difference: with `head_bias` the head is a classifier (the authors' own linear head is applied
to a map, which cannot work; MobileCLIP replaces it).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.models import layers, mobileone
from hybrid_vit.models.blocks import apply_blocks
from hybrid_vit.models.registry import FeatureSpec, Preprocessing, Published, register

_HEAD_SIZE = 32


class MCi(nn.Module):
  """The MCi image encoder with its projection.

  A call takes images `[B, H, W, 3]` of any size and returns logits `[B, num_classes]` in float32
  (None when `num_classes` is 0): for CLIP the embedding, not normalised. Endpoints: "stem",
  "stage1" to "stage4", "stage1_block0" and so on, "stage2_downsample" before the blocks of a stage,
  "stage4_position" after the position convolution, "head_conv" (expanded map) and "pre_logits"
  `[B, C]`, its mean (see `head_expansion`).

  Attributes:
    depths: blocks of each stage.
    widths: channels of each stage; each a multiple of the one before.
    num_classes: width of the projection (the embedding's) or number of classes; 0 for none.
    mlp_ratios: hidden width of the MLPs over the stage's width.
    token_mixers: "repmixer" or "attention", for each stage.
    downsamples: whether the map is halved after each stage, the last excepted; where widths differ
      it is in any case.
    se_downsamples: squeeze-and-excitation in the step into each stage; the first is never used.
    position_kernel_sizes: of the depthwise position convolution before each stage's blocks; None
      for none.
    down_kernel_size: of the step into a stage.
    mixer_kernel_size: of RepMixer.
    mlp_kernel_size: of the depthwise convolution in each MLP.
    head_expansion: channels of the last convolution over the last stage's; None for no such
      convolution, as dense tasks do not read it.
    head_bias: a classifier's head, with a bias; False for CLIP's projection.
    layer_scale: where the residual branches' scales begin; None for no scales.
    reparameterized: each group of branches is one convolution; for variables out of
      `mobileone.reparameterize`.
    drop_path_rate: of the last block; the ramp over all blocks begins at 0.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with batch norm statistics of their own.
    remat: recompute each block in the backward pass instead of storing its inside.
    scan_blocks: equal blocks as the turns of a loop, see `models/blocks.py`.
    dtype: of the computation; parameters, softmax, norm statistics and pooling are float32.
  """

  depths: tuple[int, ...]
  widths: tuple[int, ...]
  num_classes: int = 512
  mlp_ratios: tuple[float, ...] = (3.0, 3.0, 3.0, 3.0)
  token_mixers: tuple[str, ...] = ("repmixer", "repmixer", "repmixer", "attention")
  downsamples: tuple[bool, ...] = (True, True, True, True)
  se_downsamples: tuple[bool, ...] = (False, False, True, True)
  position_kernel_sizes: tuple[int | None, ...] = (None, None, None, 7)
  down_kernel_size: int = 7
  mixer_kernel_size: int = 3
  mlp_kernel_size: int = 7
  head_expansion: float | None = 2.0
  head_bias: bool = False
  layer_scale: float | None = 1e-5
  reparameterized: bool = False
  drop_path_rate: float = 0.0
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  remat: bool = False
  scan_blocks: bool = False
  dtype: Any = jnp.float32

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The feature pyramid: name, stride and channels of each stage."""
    specs, stride = [], 4
    for i, width in enumerate(self.widths):
      stride *= 2 if self.has_downsample(i) else 1
      specs.append(FeatureSpec(f"stage{i + 1}", stride, width))
    return tuple(specs)

  def has_downsample(self, stage: int) -> bool:
    """Whether a step that halves the map comes before a stage, counted from 0."""
    if stage == 0:
      return False
    return self.downsamples[stage - 1] or self.widths[stage - 1] != self.widths[stage]

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    self._check()
    options = mobileone.Options(
      self.reparameterized, self.batch_norm_momentum, self.batch_norm_groups, self.dtype
    )
    endpoints = {}
    x = Stem(self.widths[0], options, name="stem")(images.astype(self.dtype), train)
    endpoints["stem"] = x

    mlp_kernel_size = (self.mlp_kernel_size, self.mlp_kernel_size)
    rates = layers.linear_drop_path_rates(self.drop_path_rate, self.depths)
    for stage, width in enumerate(self.widths):
      if self.has_downsample(stage):
        name = f"stage{stage + 1}_downsample"
        se = self.se_downsamples[stage]
        x = Downsample(width, self.down_kernel_size, se, options, name=name)(x, train)
        endpoints[name] = x
      kernel_size = self.position_kernel_sizes[stage]
      if kernel_size is not None:
        name = f"stage{stage + 1}_position"
        x = PositionConv(kernel_size, options, name=name)(x)
        endpoints[name] = x
      block: dict[str, Any] = {
        "mlp_ratio": self.mlp_ratios[stage],
        "mlp_kernel_size": mlp_kernel_size,
        "layer_scale": self.layer_scale,
        "options": options,
      }
      block_class: Any = AttentionBlock
      if self.token_mixers[stage] == "repmixer":
        block_class = mobileone.RepMixerBlock
        block["mixer_kernel_size"] = (self.mixer_kernel_size, self.mixer_kernel_size)
      blocks = [block | {"drop_path_rate": rate} for rate in rates[stage]]
      x, outputs = apply_blocks(self, block_class, f"stage{stage + 1}_block", blocks, x, train)
      endpoints |= outputs
      endpoints[f"stage{stage + 1}"] = x

    if self.head_expansion is not None:
      width = int(self.widths[-1] * self.head_expansion)
      x = mobileone.MobileOne(
        width, (3, 3), 1, self.widths[-1], options, se_width=int(width / 16), name="head_conv"
      )(x, train)
      endpoints["head_conv"] = x
    x = x.mean((1, 2), dtype=jnp.float32)
    endpoints["pre_logits"] = x
    logits = None
    if self.num_classes:
      # The head is float32 throughout: it is small, and logits are promised in float32.
      std = x.shape[-1] ** -0.5
      init = mobileone.LINEAR_INIT if self.head_bias else nn.initializers.normal(std)
      logits = nn.Dense(
        self.num_classes,
        use_bias=self.head_bias,
        kernel_init=init,
        dtype=jnp.float32,
        name="head",
      )(x)
    return logits, endpoints

  def _check(self) -> None:
    layers.check_stages(
      self,
      "widths",
      "mlp_ratios",
      "token_mixers",
      "downsamples",
      "se_downsamples",
      "position_kernel_sizes",
    )
    for i, (mixer, width) in enumerate(zip(self.token_mixers, self.widths)):
      if mixer not in ("repmixer", "attention"):
        raise ValueError(f"MCi: token_mixers has {mixer!r}; a stage's is 'repmixer' or 'attention'")
      if mixer == "attention" and width % _HEAD_SIZE:
        raise ValueError(
          f"MCi: the width {width} of stage {i + 1}, which attends, is no multiple of the heads' "
          f"{_HEAD_SIZE}"
        )
      if i and width % self.widths[i - 1]:
        raise ValueError(
          f"MCi: the width {width} of stage {i + 1} is no multiple of the {self.widths[i - 1]} of "
          f"the stage before"
        )


class Stem(nn.Module):
  """Three MobileOne blocks: 3x3 strided, 3x3 depthwise strided, 1x1."""

  width: int
  options: mobileone.Options

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    width, options = self.width, self.options
    x = mobileone.MobileOne(width, (3, 3), 2, 1, options, name="conv_0")(x, train)
    x = mobileone.MobileOne(width, (3, 3), 2, width, options, name="conv_1")(x, train)
    return mobileone.MobileOne(width, (1, 1), 1, 1, options, name="conv_2")(x, train)


class Downsample(nn.Module):
  """A large and a 3x3 grouped convolution of stride 2, added, then a 1x1 MobileOne block."""

  width: int
  kernel_size: int
  squeeze: bool
  options: mobileone.Options

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    groups, kernel_size = x.shape[-1], (self.kernel_size, self.kernel_size)
    if self.options.reparameterized:
      x = mobileone.merged_convolution(self.width, kernel_size, 2, groups, self)(x)
    else:

      def branch(size: tuple[int, int], name: str) -> jax.Array:
        return mobileone.ConvNorm(self.width, size, 2, groups, self.options, name=name)(x, train)

      x = branch(kernel_size, "large_branch") + branch((3, 3), "small_branch")
    if self.squeeze:
      # timm's rule: a quarter, rounded to a multiple of 8, at least 8.
      hidden = max(8, int(self.width * 0.25 + 4) // 8 * 8)
      x = mobileone.SqueezeExcitation(hidden, self.options.dtype, name="se")(x)
    x = layers.gelu(x)
    return mobileone.MobileOne(self.width, (1, 1), 1, 1, self.options, name="pointwise")(x, train)


class PositionConv(nn.Module):
  """Conditional position encoding: a depthwise convolution added to the map."""

  kernel_size: int
  options: mobileone.Options

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width, kernel_size = x.shape[-1], (self.kernel_size, self.kernel_size)
    if self.options.reparameterized:
      return mobileone.merged_convolution(width, kernel_size, 1, width, self)(x)
    return x + mobileone.Convolution(
      width,
      kernel_size,
      stride=1,
      groups=width,
      use_bias=True,
      kernel_init=layers.torch_conv_init,
      dtype=self.options.dtype,
      name="position_conv",
    )(x)


class AttentionBlock(nn.Module):
  """Batch norm and global attention, then the convolutional MLP, both residual and scaled."""

  mlp_ratio: float
  mlp_kernel_size: mobileone.Size
  layer_scale: float | None
  drop_path_rate: float
  options: mobileone.Options

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    y = mobileone.batch_norm(self.options, "norm")(x, train)
    y = self._scaled(Attention(self.options.dtype, name="token_mixer")(y), "layer_scale_1")
    x = x + layers.DropPath(self.drop_path_rate, name="drop_path_1")(y, train)
    hidden = int(self.mlp_ratio * x.shape[-1])
    y = mobileone.ConvMlp(hidden, self.mlp_kernel_size, self.options, name="mlp")(x, train)
    y = self._scaled(y, "layer_scale_2")
    return x + layers.DropPath(self.drop_path_rate, name="drop_path_2")(y, train)

  def _scaled(self, x: jax.Array, name: str) -> jax.Array:
    return x if self.layer_scale is None else layers.LayerScale(self.layer_scale, name=name)(x)


class Attention(nn.Module):
  """Multi-head attention over the whole map; no bias on query, key and value, no positions."""

  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` to the same shape."""
    batch, height, width, channels = x.shape
    qkv = layers.PointwiseConv(3 * channels, False, mobileone.LINEAR_INIT, self.dtype, name="qkv")(
      x
    )
    qkv = qkv.reshape(batch, height * width, 3 * channels)
    query, key, value = layers.split_heads(qkv, 3, channels // _HEAD_SIZE)
    layers.sow_attention(self, query, key, scale=_HEAD_SIZE**-0.5)
    y = layers.dot_product_attention(query, key, value, scale=_HEAD_SIZE**-0.5)
    y = y.reshape(x.shape)
    return layers.PointwiseConv(
      channels, kernel_init=mobileone.LINEAR_INIT, dtype=self.dtype, name="proj"
    )(y)


def _register_family() -> None:
  narrow, wide = (64, 128, 256, 512), (80, 160, 320, 640)
  # name, depths, widths, parameters with a 512-wide projection, multiply-adds, zero-shot top-1
  table: tuple[tuple[Any, ...], ...] = (
    ("mci0", (2, 6, 10, 2), narrow, 11406464, 2.42e9, 67.8),
    ("mci1", (4, 12, 20, 4), narrow, 21541120, 4.72e9, 72.6),
    ("mci2", (4, 12, 24, 4), wide, 35814720, 7.91e9, 74.4),
  )
  for name, depths, widths, parameters, multiply_adds, top1 in table:
    register(
      name,
      MCi,
      {"depths": depths, "widths": widths},
      preprocessing=Preprocessing(
        image_size=256,
        crop_ratio=1.0,
        interpolation="bilinear",
        # MobileCLIP's pictures are in [0, 1], not normalised.
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
      ),
      published=Published(
        parameters=parameters,
        multiply_adds=multiply_adds,
        top1=top1,
        source="apple/ml-mobileclip: parameters counted from the code, zero-shot top-1 of "
        f"MobileCLIP-S{name[-1]} from its README; multiply-adds from timm's benchmark tables",
      ),
    )


_register_family()
