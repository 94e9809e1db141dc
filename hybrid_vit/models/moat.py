"""MOAT: mobile convolution and attention in one block.

Chenglin Yang et al., "MOAT: Alternating Mobile Convolution and Attention Brings Strong Vision
Models", ICLR 2023, arXiv:2210.01820. Follows the authors' TensorFlow code (deeplab2,
`model/pixel_encoder/moat.py`), with two differences: the position bias is trained (there, under
TensorFlow 2, it is fixed when the model is built), and windows that do not divide the map are
padded and masked (there they are an error).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.models import layers
from hybrid_vit.models.blocks import apply_blocks
from hybrid_vit.models.registry import (
  FeatureSpec,
  Preprocessing,
  Published,
  feature_pyramid,
  register,
)
from hybrid_vit.ops import windows as windows_op

# The authors' figures, written out for the reader: plain normal kernels, not truncated.
_INIT = nn.initializers.normal(0.02)
_BATCH_NORM_EPSILON = 1e-3

Size = tuple[int, int] | int


class MOAT(nn.Module):
  """The MOAT backbone with its classifier (paper, section 3).

  A call takes images `[B, H, W, 3]` of any size and returns logits `[B, num_classes]` in float32
  (None when `num_classes` is 0) and the endpoints: "stem", "stage1" to "stage4" (the raw sums;
  decoders that expect an activation apply GELU), "stage1_block0" and so on for every block, and
  "pre_logits" `[B, C]` (the mean over the map; with a classifier, after its layer norm).

  Attributes:
    stem_widths: of the 3x3 convolutions of the stem.
    depths: blocks of each stage.
    widths: channels of each stage.
    num_classes: 0 for no classifier: neither norm nor head.
    block_types: "mbconv" or "moat", for each stage.
    stem_stride: of the stem's first convolution.
    strides: of each stage's first block.
    expansion: width inside a block over the block's output width.
    se_ratio: width of squeeze-and-excitation over the block's output width, in "mbconv" stages;
      None for none.
    head_size: channels of an attention head.
    window_sizes: of attention, for each stage: (rows, columns), one number, or None for global.
    pad_windows: pad and mask windows that do not divide the map; when False they are an error.
    global_attention_at_end: the last block of each "moat" stage attends globally.
    position_bias: a trained table of relative positions in each attention.
    position_sizes: size of the map for which each stage's table is made, (rows, columns) or one
      number; other windows take the table resized.
    pool_size: window of the shortcut's average pooling: 2 for classification, 3 for dense tasks.
    output_activation: "none", or "gelu": `features` are the stages' maps after a GELU,
      "stage1_gelu" and so on, deeplab2's "res2" to "res5", which its decoders but kMaX-DeepLab's
      read.
    layer_norm_epsilon: of every layer norm.
    drop_path_rate: of the last block, were the ramp to reach it: block i of n has rate * i / n.
    batch_norm_momentum: of the running statistics; short trainings want less than the authors'.
    batch_norm_groups: groups of the batch with batch norm statistics of their own.
    remat: recompute each block in the backward pass instead of storing its inside.
    scan_blocks: equal blocks as the turns of a loop, see `models/blocks.py`.
    dtype: of the computation; parameters, softmax, norm statistics and pooling are float32.
  """

  stem_widths: tuple[int, ...]
  depths: tuple[int, ...]
  widths: tuple[int, ...]
  num_classes: int = 1000
  block_types: tuple[str, ...] = ("mbconv", "mbconv", "moat", "moat")
  stem_stride: int = 2
  strides: tuple[int, ...] = (2, 2, 2, 2)
  expansion: int = 4
  se_ratio: float | None = 0.25
  head_size: int = 32
  window_sizes: tuple[Size | None, ...] = (None, None, None, None)
  pad_windows: bool = True
  global_attention_at_end: bool = False
  position_bias: bool = True
  position_sizes: tuple[Size | None, ...] = (None, None, 14, 7)
  pool_size: int = 2
  output_activation: str = "none"
  layer_norm_epsilon: float = 1e-5
  drop_path_rate: float = 0.0
  batch_norm_momentum: float = 0.99
  batch_norm_groups: int = 1
  remat: bool = False
  scan_blocks: bool = False
  dtype: Any = jnp.float32

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The feature pyramid: name, stride and channels of each stage."""
    levels = feature_pyramid(self.widths, self.strides, first=self.stem_stride)
    if self.output_activation == "none":
      return levels
    return tuple(level._replace(name=f"{level.name}_gelu") for level in levels)

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    self._check()
    endpoints = {}
    x = Stem(
      self.stem_widths,
      self.stem_stride,
      self.batch_norm_momentum,
      self.batch_norm_groups,
      dtype=self.dtype,
      name="stem",
    )(images.astype(self.dtype), train)
    endpoints["stem"] = x

    index, total = 0, sum(self.depths)
    for stage, (block_type, depth, width) in enumerate(
      zip(self.block_types, self.depths, self.widths)
    ):
      attends = block_type == "moat"
      blocks: list[dict[str, Any]] = []
      for i in range(depth):
        last_is_global = self.global_attention_at_end and i == depth - 1
        window = None if last_is_global else self.window_sizes[stage]
        position_size = self.position_sizes[stage] if attends and self.position_bias else None
        blocks.append(
          {
            "width": width,
            "stride": self.strides[stage] if i == 0 else 1,
            "expansion": self.expansion,
            "pool_size": self.pool_size,
            "se_ratio": None if attends else self.se_ratio,
            "attends": attends,
            "head_size": self.head_size,
            "window": _pair(window),
            "pad_windows": self.pad_windows,
            "position_size": _pair(position_size),
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "drop_path_rate": self.drop_path_rate * index / total,
            "batch_norm_momentum": self.batch_norm_momentum,
            "batch_norm_groups": self.batch_norm_groups,
            "dtype": self.dtype,
          }
        )
        index += 1
      x, outputs = apply_blocks(self, Block, f"stage{stage + 1}_block", blocks, x, train)
      endpoints |= outputs
      endpoints[f"stage{stage + 1}"] = x
      if self.output_activation == "gelu":
        endpoints[f"stage{stage + 1}_gelu"] = layers.gelu(x)

    x = x.mean((1, 2), dtype=jnp.float32)
    logits = None
    if self.num_classes:
      # The classifier is float32 throughout: it is small, and logits are promised in float32.
      x = layers.layer_norm(self.layer_norm_epsilon, jnp.float32, "head_norm")(x)
      logits = nn.Dense(self.num_classes, kernel_init=_INIT, dtype=jnp.float32, name="head")(x)
    endpoints["pre_logits"] = x
    return logits, endpoints

  def _check(self) -> None:
    layers.check_stages(self, "widths", "block_types", "strides", "window_sizes", "position_sizes")
    if self.output_activation not in ("none", "gelu"):
      raise ValueError(
        f"MOAT: output_activation is {self.output_activation!r}; 'none' or 'gelu' was expected"
      )
    for i, block_type in enumerate(self.block_types):
      if block_type not in ("mbconv", "moat"):
        raise ValueError(f"MOAT: block_types has {block_type!r}; a stage is 'mbconv' or 'moat'")
      if block_type == "mbconv":
        continue
      if self.widths[i] % self.head_size:
        raise ValueError(
          f"MOAT: head_size {self.head_size} does not divide the width {self.widths[i]} of stage "
          f"{i + 1}"
        )
      if self.position_bias and not self.position_sizes[i]:
        raise ValueError(
          f"MOAT: position_sizes has no size for stage {i + 1}, whose blocks have a position bias"
        )


class Stem(nn.Module):
  """3x3 convolutions, the first one strided; batch norm and GELU after each but the last."""

  widths: tuple[int, ...]
  stride: int
  batch_norm_momentum: float
  batch_norm_groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    for i, width in enumerate(self.widths):
      x = layers.Conv(
        width,
        (3, 3),
        strides=self.stride if i == 0 else 1,
        padding="SAME",
        kernel_init=_INIT,
        dtype=self.dtype,
        name=f"conv_{i}",
      )(x)
      if i < len(self.widths) - 1:
        x = _batch_norm(self, f"norm_{i}")(x, train)
        x = layers.gelu(x)
    return x


class Block(nn.Module):
  """An inverted bottleneck, then either squeeze-and-excitation inside it or attention after it.

  The first is the paper's MBConv block, the second its MOAT block; attributes as in `MOAT`.
  """

  width: int
  stride: int
  expansion: int
  pool_size: int
  se_ratio: float | None
  attends: bool
  head_size: int
  window: tuple[int, int] | None
  pad_windows: bool
  position_size: tuple[int, int] | None
  layer_norm_epsilon: float
  drop_path_rate: float
  batch_norm_momentum: float
  batch_norm_groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    shortcut = x
    if self.stride > 1:
      shortcut = layers.average_pool_same(shortcut, self.pool_size, self.stride)
    if x.shape[-1] != self.width:
      shortcut = self._pointwise(self.width, True, "shortcut_conv")(shortcut)

    inner = self.expansion * self.width
    x = _batch_norm(self, "pre_norm")(x, train)
    x = layers.pointwise_conv_norm(
      x,
      train,
      self._pointwise(inner, False, "expand_conv"),
      _batch_norm(self, "expand_norm"),
      layers.gelu,
    )
    x = layers.DepthwiseConv(
      (3, 3),
      stride=self.stride,
      padding="SAME",
      use_bias=False,
      kernel_init=_INIT,
      dtype=self.dtype,
      name="depthwise_conv",
    )(x)
    x = layers.gelu(_batch_norm(self, "depthwise_norm")(x, train))
    if self.se_ratio is not None:
      x = SqueezeExcitation(max(1, int(self.se_ratio * self.width)), self.dtype, name="se")(x)
    x = self._pointwise(self.width, True, "shrink_conv")(x)
    x = shortcut + layers.DropPath(self.drop_path_rate, name="drop_path")(x, train)
    if not self.attends:
      return x

    y = layers.layer_norm(self.layer_norm_epsilon, self.dtype, "attention_norm")(x)
    y = Attention(
      self.head_size,
      self.window,
      self.pad_windows,
      self.position_size,
      self.dtype,
      name="attention",
    )(y)
    return x + layers.DropPath(self.drop_path_rate, name="attention_drop_path")(y, train)

  def _pointwise(self, width: int, use_bias: bool, name: str) -> layers.PointwiseConv:
    return layers.PointwiseConv(
      width, use_bias=use_bias, kernel_init=_INIT, dtype=self.dtype, name=name
    )


class SqueezeExcitation(nn.Module):
  """Scales the channels by a sigmoid of two dense layers over the mean of the map."""

  hidden: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = x.mean((1, 2), keepdims=True, dtype=jnp.float32).astype(self.dtype)
    y = layers.Dense(self.hidden, kernel_init=_INIT, dtype=self.dtype, name="reduce")(y)
    y = nn.swish(y)
    y = layers.Dense(x.shape[-1], kernel_init=_INIT, dtype=self.dtype, name="expand")(y)
    return x * nn.sigmoid(y)


class Attention(nn.Module):
  """Multi-head attention over windows of a map or the whole map, with a relative position bias.

  Attributes:
    head_size: channels of a head.
    window: (rows, columns), or None for the whole map.
    pad_windows: see `MOAT`.
    position_size: (rows, columns) for which the table is made; None for no position bias.
    dtype: of the computation; logits, bias and softmax are float32.
  """

  head_size: int
  window: tuple[int, int] | None
  pad_windows: bool
  position_size: tuple[int, int] | None
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` to the same shape."""
    size, channels = x.shape[1:3], x.shape[-1]
    window = self.window or (size[0], size[1])
    heads = channels // self.head_size
    tokens, mask = windows_op.partition_windows(x, window, pad=self.pad_windows)

    def project(name: str) -> jax.Array:  # [B, N, tokens, heads, head_size]
      dense = layers.DenseGeneral(
        (heads, self.head_size), kernel_init=_INIT, dtype=self.dtype, name=name
      )
      return dense(tokens)

    query, key, value = project("query"), project("key"), project("value")
    bias: Any = None
    if self.position_size is not None:
      rows, columns = self.position_size
      shape = (heads, 2 * rows - 1, 2 * columns - 1)
      table = self.param("position_table", _INIT, shape, jnp.float32)
      table = layers.resize_relative_table(table, (2 * window[0] - 1, 2 * window[1] - 1))
      bias = layers.relative_position_bias(table, window)
    if mask is not None:
      shown = 0.0 if bias is None else bias
      bias = jnp.where(mask[:, None, None, :], shown, jnp.finfo(jnp.float32).min)
    layers.sow_attention(self, query, key, scale=self.head_size**-0.5, bias=bias)
    out = layers.dot_product_attention(query, key, value, scale=self.head_size**-0.5, bias=bias)
    out = layers.DenseGeneral(
      channels, axis=(-2, -1), kernel_init=_INIT, dtype=self.dtype, name="out"
    )(out)
    return windows_op.merge_windows(out, window, (size[0], size[1]))


def _pair(size: Size | None) -> tuple[int, int] | None:
  return (size, size) if isinstance(size, int) else size


def _batch_norm(module: Any, name: str) -> layers.BatchNorm:
  return layers.batch_norm(module, epsilon=_BATCH_NORM_EPSILON, unbiased_variance=False, name=name)


def _register_family() -> None:
  imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
  symmetric = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
  source = "deeplab2, moat_imagenet_pretrained_checkpoints.md and the counts in its tests"
  short, middle, long = (2, 3, 7, 2), (2, 6, 14, 2), (2, 12, 28, 2)
  # name, stem width, depths, first width, drop path, input size, then with and without position
  # bias: parameters, multiply-adds in 10^9, top-1
  table: tuple[tuple[Any, ...], ...] = (
    ("tiny_moat_0", 32, short, 32, 0.0, 256, (3355348, 1.1, 76.6), (3332232, 1.1, 76.0)),
    ("tiny_moat_1", 40, short, 40, 0.0, 256, (5122895, 1.6, 79.2), (5094000, 1.6, 78.9)),
    ("tiny_moat_2", 56, short, 56, 0.0, 256, (9772741, 3.0, 81.7), (9732288, 3.0, 81.3)),
    ("tiny_moat_3", 80, short, 80, 0.1, 256, (19534390, 6.0, 83.3), (19476600, 6.0, 83.0)),
    ("moat_0", 64, short, 96, 0.2, 224, (27846892, 5.7, 83.3), (27777544, 5.7, 83.0)),
    ("moat_1", 64, middle, 96, 0.3, 224, (41598448, 9.1, 84.2), (41467864, 9.1, 84.1)),
    ("moat_2", 128, middle, 128, 0.3, 384, (73422408, 54.3, 87.5), (73248296, 53.8, 87.2)),
    ("moat_3", 160, long, 160, 0.6, 512, (189958040, 271.0, 88.4), (189536280, 266.1, 88.2)),
    ("moat_4", 256, long, 256, 0.7, 512, (483214184, 648.5, 89.1), (482539368, 640.6, 88.9)),
  )
  for name, stem, depths, width, drop_path, size, *figures in table:
    for position_bias, (parameters, giga, top1) in zip((True, False), figures):
      fine_tuned = size >= 384
      register(
        name if position_bias else f"{name}_no_pe",
        MOAT,
        {
          "stem_widths": (stem, stem),
          "depths": depths,
          "widths": tuple(width * 2**i for i in range(4)),
          "drop_path_rate": drop_path,
          "position_bias": position_bias,
        },
        preprocessing=Preprocessing(
          image_size=size,
          crop_ratio=1.0 if fine_tuned else 0.875,
          interpolation="bicubic",
          resize="squash" if fine_tuned else "crop",
          **(symmetric if fine_tuned else imagenet),
        ),
        published=Published(
          parameters=parameters,
          multiply_adds=round(giga * 1e9),
          top1=top1,
          source=source + ("; ImageNet-22K, then 1K" if fine_tuned else "; ImageNet-1K"),
        ),
      )


_register_family()
