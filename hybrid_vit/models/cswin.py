"""CSWin: attention in horizontal and vertical stripes side by side.

Xiaoyi Dong et al., "CSWin Transformer: A General Vision Transformer Backbone with Cross-Shaped
Windows", CVPR 2022, arXiv:2107.00652. Follows the authors' PyTorch code
(microsoft/CSWin-Transformer, `models/cswin.py`), a baseline of the papers rebuilt here, with these
differences:

* Inputs of any size: stripes that do not divide the map are padded with zeros on both sides after
  the projection, unmasked, as the authors' segmentation backbone does; the classification code
  knows its one size only.
* A stage before the last attends globally where its map is no larger than one stripe in the
  authors' classification code, with parameters of another shape; here it keeps its two directions.
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
  output_pyramid,
  register,
)
from hybrid_vit.ops import windows as windows_op

# The authors' draw, a plain normal (their cut lies at a hundred deviations); convolutions keep
# torch's default.
_INIT = nn.initializers.normal(0.02)
_NORM_EPSILON = 1e-5


class CSWin(nn.Module):
  """The CSWin backbone with its classifier (paper, section 3).

  A call takes images `[B, H, W, 3]` and returns logits `[B, num_classes]` in float32 (None when
  `num_classes` is 0) and the endpoints: "stem", "stage1" to "stage4", "stage1_block0" and so on,
  "stage1_norm" and so on (see `output_norms`), and "pre_logits" `[B, C]` (the mean over the
  normalised map; with norms of the outputs and no classifier there is no such norm, and it is over
  the map as it is).

  Attributes:
    width: channels of the first stage; each further stage has twice as many.
    depths: blocks of each stage.
    num_heads: attention heads of each stage, half of them for each direction before the last.
    stripe_widths: of the stripes of each stage; the last stage attends globally.
    mlp_ratio: hidden width of the MLP over the width.
    num_classes: 0 for no classifier.
    output_norms: stages, counted from 1, whose output has a layer norm beside the trunk;
      `features` then names these outputs alone. For dense tasks.
    drop_path_rate: of the last block; the first has 0, evenly between.
    remat: recompute each block in the backward pass instead of storing its inside.
    scan_blocks: equal blocks as the turns of a loop, see `models/blocks.py`.
    dtype: of the computation; parameters, softmax and norm statistics are float32.
  """

  width: int
  depths: tuple[int, ...]
  num_heads: tuple[int, ...]
  stripe_widths: tuple[int, ...] = (1, 2, 7, 7)
  mlp_ratio: int = 4
  num_classes: int = 1000
  output_norms: tuple[int, ...] = ()
  drop_path_rate: float = 0.0
  remat: bool = False
  scan_blocks: bool = False
  dtype: Any = jnp.float32

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The feature pyramid: name, stride and channels of each stage."""
    return output_pyramid(self._pyramid(), self.output_norms)

  def _pyramid(self) -> tuple[FeatureSpec, ...]:
    stages = range(len(self.depths))
    return tuple(FeatureSpec(f"stage{i + 1}", 4 * 2**i, self.width * 2**i) for i in stages)

  def at_size(self, size: int, made_for: int) -> dict[str, Any]:
    """Arguments of the same network for square pictures of another size.

    Stripes as wide as the last stage's map stay so; no parameter's shape depends on them.
    """
    stride = self._pyramid()[-1].stride
    last, new = made_for // stride, max(size // stride, 1)
    first, rest = self.stripe_widths[:2], self.stripe_widths[2:]
    return {"stripe_widths": (*first, *(new if w == last else w for w in rest))}

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    self._check()
    endpoints: dict[str, jax.Array] = {}
    rates = layers.linear_drop_path_rates(self.drop_path_rate, self.depths)
    x = images.astype(self.dtype)
    for i, depth in enumerate(self.depths):
      kernel, stride, pad = (7, 4, 2) if i == 0 else (3, 2, 1)
      scope = "stem" if i == 0 else f"merge{i}"
      x = ConvEmbedding(self.width * 2**i, kernel, stride, pad, self.dtype, name=scope)(x)
      if i == 0:
        endpoints["stem"] = x
      blocks = [
        {
          "num_heads": self.num_heads[i],
          "stripe_width": None if i == len(self.depths) - 1 else self.stripe_widths[i],
          "mlp_ratio": self.mlp_ratio,
          "drop_path_rate": rates[i][j],
          "dtype": self.dtype,
        }
        for j in range(depth)
      ]
      x, outputs = apply_blocks(self, Block, f"stage{i + 1}_block", blocks, x, train)
      endpoints |= outputs
      endpoints[f"stage{i + 1}"] = x
      if i + 1 in self.output_norms:
        name = f"stage{i + 1}_norm"
        endpoints[name] = layers.layer_norm(_NORM_EPSILON, self.dtype, name)(x)
    if self.num_classes or not self.output_norms:
      x = layers.layer_norm(_NORM_EPSILON, jnp.float32, "norm")(x)
    x = x.mean((1, 2), dtype=jnp.float32)
    endpoints["pre_logits"] = x
    if not self.num_classes:
      return None, endpoints
    head = nn.Dense(self.num_classes, kernel_init=_INIT, dtype=jnp.float32, name="head")
    return head(x), endpoints

  def _check(self) -> None:
    stages = len(self.depths)
    layers.check_stages(self, "num_heads", "stripe_widths")
    layers.check_output_norms(self)
    for i, heads in enumerate(self.num_heads):
      width = self.width * 2**i
      if width % heads or (heads % 2 and i < stages - 1):
        raise ValueError(
          f"CSWin: stage {i + 1} of width {width} has {heads} heads; they must divide the width "
          "and, before the last stage, be even"
        )


class ConvEmbedding(nn.Module):
  """A strided convolution with padding on both sides, then a layer norm: a smaller map."""

  width: int
  kernel_size: int
  stride: int
  padding: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = layers.Conv(
      self.width,
      (self.kernel_size, self.kernel_size),
      strides=self.stride,
      padding=((self.padding, self.padding),) * 2,
      kernel_init=layers.torch_conv_init,
      bias_init=layers.torch_bias_init(self.kernel_size**2 * x.shape[-1]),
      dtype=self.dtype,
      name="conv",
    )(x)
    return layers.layer_norm(_NORM_EPSILON, self.dtype, "norm")(x)


class Block(nn.Module):
  """Attention in stripes, then an MLP, each after a norm and beside a shortcut."""

  num_heads: int
  stripe_width: int | None
  mlp_ratio: int
  drop_path_rate: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[B, H, W, C]` to the same shape; `stripe_width` None attends over the whole map."""
    _, height, width, channels = x.shape
    y = layers.layer_norm(_NORM_EPSILON, self.dtype, "norm1")(x)
    qkv = jnp.split(_dense(3 * channels, self.dtype, "qkv")(y), 3, axis=-1)
    if self.stripe_width is None:
      attend = StripeAttention(self.num_heads, (height, width), self.dtype, name="attention0")
      y = attend(*qkv)
    else:
      vertical, horizontal = zip(*(jnp.split(part, 2, axis=-1) for part in qkv))
      windows = ((height, self.stripe_width), (self.stripe_width, width))
      y = jnp.concatenate(
        [
          StripeAttention(self.num_heads // 2, window, self.dtype, name=f"attention{i}")(*parts)
          for i, (window, parts) in enumerate(zip(windows, (vertical, horizontal)))
        ],
        axis=-1,
      )
    y = _dense(channels, self.dtype, "out")(y)
    x = x + layers.DropPath(self.drop_path_rate, name="drop_path1")(y, train)
    y = layers.layer_norm(_NORM_EPSILON, self.dtype, "norm2")(x)
    y = layers.gelu(_dense(self.mlp_ratio * channels, self.dtype, "fc1")(y))
    y = _dense(channels, self.dtype, "fc2")(y)
    return x + layers.DropPath(self.drop_path_rate, name="drop_path2")(y, train)


class StripeAttention(nn.Module):
  """Attention inside windows, plus a 3x3 depthwise convolution of the values in each (LePE).

  Attributes:
    num_heads: attention heads.
    window: (rows, columns) of a window; the map is padded with zeros, half on either side.
    dtype: of the computation.
  """

  num_heads: int
  window: tuple[int, int]
  dtype: Any

  @nn.compact
  def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Maps `[B, H, W, C]` to one of the same shape."""
    batch, height, width, channels = value.shape
    rows, columns = self.window
    down, right = -height % rows, -width % columns
    top, left = down // 2, right // 2
    pads = ((0, 0), (top, down - top), (left, right - left), (0, 0))
    query, key, value = (
      windows_op.partition_windows(jnp.pad(x, pads), self.window, pad=False)[0]
      for x in (query, key, value)
    )
    windows, tokens = value.shape[1:3]
    heads = (self.num_heads, channels // self.num_heads)
    query, key, by_head = (x.reshape(batch, windows, tokens, *heads) for x in (query, key, value))
    layers.sow_attention(self, query, key, scale=heads[1] ** -0.5)
    out = layers.dot_product_attention(query, key, by_head, scale=heads[1] ** -0.5)
    position = layers.DepthwiseConv(
      (3, 3),
      stride=1,
      padding=((1, 1), (1, 1)),
      use_bias=True,
      kernel_init=layers.torch_conv_init,
      dtype=self.dtype,
      name="position_conv",
    )(value.reshape(batch * windows, rows, columns, channels))
    out = out.reshape(value.shape) + position.reshape(value.shape)
    out = windows_op.merge_windows(out, self.window, (height + down, width + right))
    return out[:, top : top + height, left : left + width]


def _dense(features: int, dtype: Any, name: str) -> layers.PointwiseConv:
  return layers.PointwiseConv(features, kernel_init=_INIT, dtype=dtype, name=name)


def _register_family() -> None:
  short, long = (1, 2, 21, 1), (2, 4, 32, 2)
  few, many, most = (2, 4, 8, 16), (4, 8, 16, 32), (6, 12, 24, 24)
  narrow, wide = (1, 2, 7, 7), (1, 2, 12, 12)
  # name, width, depths, heads, stripes, drop path, size, parameters, multiply-adds in 10^9, top-1
  table: tuple[tuple[Any, ...], ...] = (
    ("cswin_tiny", 64, short, few, narrow, 0.2, 224, 22320552, 4.3, 82.8),
    ("cswin_small", 64, long, few, narrow, 0.4, 224, 34643304, 6.9, 83.6),
    ("cswin_base", 96, long, many, narrow, 0.5, 224, 77382184, 15.0, 84.2),
    ("cswin_base_384", 96, long, many, wide, 0.7, 384, 77382184, 47.0, 85.5),
    ("cswin_large", 144, long, most, narrow, 0.2, 224, 173262664, 31.5, 86.5),
    ("cswin_large_384", 144, long, most, wide, 0.2, 384, 173262664, 96.8, 87.5),
  )
  for name, width, depths, heads, stripes, drop_path, size, parameters, giga, top1 in table:
    register(
      name,
      CSWin,
      {
        "width": width,
        "depths": depths,
        "num_heads": heads,
        "stripe_widths": stripes,
        "drop_path_rate": drop_path,
      },
      preprocessing=Preprocessing(
        image_size=size,
        crop_ratio=0.9 if size == 224 else 1.0,
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
      ),
      published=Published(
        parameters=parameters,
        multiply_adds=round(giga * 1e9),
        top1=top1,
        source="microsoft/CSWin-Transformer; "
        + ("ImageNet-22K, then 1K" if "large" in name else "ImageNet-1K"),
      ),
    )


_register_family()
