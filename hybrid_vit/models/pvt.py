"""PVT: a pyramid of transformers whose attention reads a shrunken map.

Wenhai Wang et al., "Pyramid Vision Transformer: A Versatile Backbone for Dense Prediction without
Convolutions", ICCV 2021, arXiv:2102.12122. Follows the authors' PyTorch code (whai362/PVT,
`classification/pvt.py`), a baseline of the papers rebuilt here, with these differences:

* Position embeddings are resized wherever the map differs from the one they were made for; there,
  a map of another shape with the very number of cells of the first stage's goes unresized.
* Rows and columns that a patch does not fill are cut off, as there; where that leaves a map smaller
  than one cell of the reduction it is an error that says so.
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
  feature_pyramid,
  imagenet_preprocessing,
  register,
)

# The authors' draw, a plain normal (their cut lies at a hundred deviations); convolutions keep
# torch's default.
_INIT = nn.initializers.normal(0.02)
# Patch embeddings and reductions keep torch's default, the other norms have the authors' own.
_EMBEDDING_NORM_EPSILON = 1e-5
_NORM_EPSILON = 1e-6


class PVT(nn.Module):
  """The PVT backbone with its classifier (paper, section 3).

  A call takes images `[B, H, W, 3]` and returns logits `[B, num_classes]` in float32 (None when
  `num_classes` is 0) and the endpoints: "stem" (the first patch embedding), "stage1" to "stage4",
  "stage1_block0" and so on, all maps, and "pre_logits" `[B, C]` (the class token after the norm;
  without one the mean over the last map).

  Attributes:
    widths: channels of each stage.
    depths: blocks of each stage.
    num_heads: attention heads of each stage.
    mlp_ratios: hidden width of the MLP over the width, for each stage.
    reduction_ratios: side of the cells into which keys and values are pooled, for each stage.
    image_size: side of the square input that the position embeddings are made for.
    patch_sizes: side of a patch in each stage.
    num_classes: 0 for no classifier.
    class_token: in the last stage, for the classifier. The authors' dense code has none, nor the
      norm behind it; its last table of positions keeps the first row, which nothing reads then.
    qkv_bias: whether query, key and value have biases.
    drop_path_rate: of the last block; the first has 0, evenly between.
    remat: recompute each block in the backward pass instead of storing its inside.
    scan_blocks: equal blocks as the turns of a loop, see `models/blocks.py`.
    dtype: of the computation; parameters, softmax and norm statistics are float32.
  """

  widths: tuple[int, ...] = (64, 128, 320, 512)
  depths: tuple[int, ...] = (3, 4, 6, 3)
  num_heads: tuple[int, ...] = (1, 2, 5, 8)
  mlp_ratios: tuple[int, ...] = (8, 8, 4, 4)
  reduction_ratios: tuple[int, ...] = (8, 4, 2, 1)
  image_size: int = 224
  patch_sizes: tuple[int, ...] = (4, 2, 2, 2)
  num_classes: int = 1000
  class_token: bool = True
  qkv_bias: bool = True
  drop_path_rate: float = 0.0
  remat: bool = False
  scan_blocks: bool = False
  dtype: Any = jnp.float32

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The feature pyramid: name, stride and channels of each stage."""
    return feature_pyramid(self.widths, self.patch_sizes)

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    self._check(images.shape[1], images.shape[2])
    endpoints: dict[str, jax.Array] = {}
    rates = layers.linear_drop_path_rates(self.drop_path_rate, self.depths)
    x = images.astype(self.dtype)
    last = len(self.depths) - 1
    trained_side = self.image_size
    token = None
    for i, (patch, width) in enumerate(zip(self.patch_sizes, self.widths)):
      x = PatchEmbedding(width, patch, self.dtype, name="stem" if i == 0 else f"merge{i}")(x)
      if i == 0:
        endpoints["stem"] = x
      trained_side //= patch
      size = (x.shape[1], x.shape[2])
      tokens = x.reshape(x.shape[0], -1, width)
      has_token = self.class_token and i == last
      if has_token:
        token = self.param("class_token", _INIT, (1, 1, width), jnp.float32).astype(self.dtype)
        token = jnp.broadcast_to(token, (len(x), 1, width))
        tokens = jnp.concatenate([token, tokens], 1)
      positions = self.param(
        f"position_embedding{i + 1}",
        _INIT,
        (1, trained_side**2 + (i == last), width),
        jnp.float32,
      )
      if i == last and not has_token:
        positions = positions[:, 1:]
      tokens = tokens + resize_positions(positions, trained_side, size).astype(self.dtype)
      blocks = [
        {
          "num_heads": self.num_heads[i],
          "mlp_ratio": self.mlp_ratios[i],
          "reduction_ratio": self.reduction_ratios[i],
          "qkv_bias": self.qkv_bias,
          "drop_path_rate": rates[i][j],
          "dtype": self.dtype,
        }
        for j in range(self.depths[i])
      ]
      name = f"stage{i + 1}_block"
      tokens, outputs = apply_blocks(self, Block, name, blocks, tokens, size, train)
      for name, output in outputs.items():
        x = output[:, output.shape[1] - size[0] * size[1] :].reshape(len(x), *size, width)
        endpoints[name] = x
      endpoints[f"stage{i + 1}"] = x

    if self.class_token:
      # The norm is over each token alone: only the class token's is needed.
      x = layers.layer_norm(_NORM_EPSILON, jnp.float32, "norm")(tokens[:, 0])
    else:
      x = x.mean((1, 2), dtype=jnp.float32)
    endpoints["pre_logits"] = x
    if not self.num_classes:
      return None, endpoints
    head = nn.Dense(self.num_classes, kernel_init=_INIT, dtype=jnp.float32, name="head")
    return head(x), endpoints

  def _check(self, height: int, width: int) -> None:
    layers.check_stages(
      self, "widths", "num_heads", "mlp_ratios", "reduction_ratios", "patch_sizes"
    )
    if self.num_classes and not self.class_token:
      raise ValueError("PVT: a classifier (num_classes) needs class_token=True")
    stride = 1
    for i, (patch, ratio) in enumerate(zip(self.patch_sizes, self.reduction_ratios), start=1):
      stride *= patch
      if self.widths[i - 1] % self.num_heads[i - 1]:
        raise ValueError(
          f"PVT: {self.num_heads[i - 1]} heads do not divide the width {self.widths[i - 1]} of "
          f"stage {i}"
        )
      if min(height, width) // stride < ratio:
        raise ValueError(
          f"PVT: an image of {height}x{width} leaves a map of {height // stride}x{width // stride} "
          f"in stage {i}, smaller than its reduction of {ratio}: at least {stride * ratio} rows "
          "and columns are needed"
        )


class PatchEmbedding(nn.Module):
  """Patches that do not overlap, each through one matrix, then a layer norm: a smaller map."""

  width: int
  patch_size: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = layers.Conv(
      self.width,
      (self.patch_size, self.patch_size),
      strides=self.patch_size,
      padding="VALID",
      kernel_init=layers.torch_conv_init,
      bias_init=layers.torch_bias_init(self.patch_size**2 * x.shape[-1]),
      dtype=self.dtype,
      name="projection",
    )(x)
    return layers.layer_norm(_EMBEDDING_NORM_EPSILON, self.dtype, "norm")(x)


class Block(nn.Module):
  """Attention over a shrunken map, then an MLP, each after a norm and beside a shortcut."""

  num_heads: int
  mlp_ratio: int
  reduction_ratio: int
  qkv_bias: bool
  drop_path_rate: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, size: tuple[int, int], train: bool) -> jax.Array:
    """Tokens `[B, N, C]` of a map of `size` (H, W), a class token before them or not."""
    y = layers.layer_norm(_NORM_EPSILON, self.dtype, "norm1")(x)
    y = SpatialReductionAttention(
      self.num_heads, self.reduction_ratio, self.qkv_bias, self.dtype, name="attention"
    )(y, size)
    x = x + layers.DropPath(self.drop_path_rate, name="drop_path1")(y, train)
    y = layers.layer_norm(_NORM_EPSILON, self.dtype, "norm2")(x)
    y = _dense(self.mlp_ratio * x.shape[-1], True, self.dtype, "fc1")(y)
    y = _dense(x.shape[-1], True, self.dtype, "fc2")(layers.gelu(y))
    return x + layers.DropPath(self.drop_path_rate, name="drop_path2")(y, train)


class SpatialReductionAttention(nn.Module):
  """Attention whose keys and values come from cells of `reduction_ratio` squared (paper, eq. 2)."""

  num_heads: int
  reduction_ratio: int
  qkv_bias: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, size: tuple[int, int]) -> jax.Array:
    batch, tokens, channels = x.shape
    heads = (self.num_heads, channels // self.num_heads)
    query = _dense(channels, self.qkv_bias, self.dtype, "query")(x)
    source, ratio = x, self.reduction_ratio
    if ratio > 1:
      source = layers.Conv(
        channels,
        (ratio, ratio),
        strides=ratio,
        padding="VALID",
        kernel_init=layers.torch_conv_init,
        bias_init=layers.torch_bias_init(ratio**2 * channels),
        dtype=self.dtype,
        name="reduction",
      )(x.reshape(batch, *size, channels)).reshape(batch, -1, channels)
      source = layers.layer_norm(_EMBEDDING_NORM_EPSILON, self.dtype, "reduction_norm")(source)
    key_value = _dense(2 * channels, self.qkv_bias, self.dtype, "key_value")(source)
    key, value = layers.split_heads(key_value, 2, heads[0])
    query = query.reshape(batch, tokens, *heads)
    layers.sow_attention(self, query, key, scale=heads[1] ** -0.5)
    out = layers.dot_product_attention(query, key, value, scale=heads[1] ** -0.5)
    return _dense(channels, True, self.dtype, "out")(out.reshape(batch, tokens, channels))


def resize_positions(table: jax.Array, side: int, size: tuple[int, int]) -> jax.Array:
  """Position embeddings `[1, N, C]` of a square map of `side` for a map of `size` (H, W).

  Bilinear with half-pixel centres, no antialiasing. One row more than the map's cells is the class
  token's, which comes first and stays.
  """
  if size == (side, side):
    return table
  extra = table.shape[1] - side * side
  grid = table[:, extra:].reshape(1, side, side, -1)
  shape = (1, *size, table.shape[-1])
  grid = jax.image.resize(grid, shape, method="bilinear", antialias=False)
  return jnp.concatenate([table[:, :extra], grid.reshape(1, -1, table.shape[-1])], 1)


def _dense(features: int, use_bias: bool, dtype: Any, name: str) -> layers.PointwiseConv:
  return layers.PointwiseConv(
    features, use_bias=use_bias, kernel_init=_INIT, dtype=dtype, name=name
  )


def _register_family() -> None:
  # name, depths, drop path (the authors' configurations), parameters, multiply-adds in 10^9, top-1
  table: tuple[tuple[Any, ...], ...] = (
    ("pvt_tiny", (2, 2, 2, 2), 0.1, 13229288, 1.9, 75.1),
    ("pvt_small", (3, 4, 6, 3), 0.1, 24485864, 3.8, 79.8),
    ("pvt_medium", (3, 4, 18, 3), 0.3, 44208104, 6.7, 81.2),
    ("pvt_large", (3, 8, 27, 3), 0.3, 61369320, 9.8, 81.7),
  )
  for name, depths, drop_path, parameters, giga, top1 in table:
    register(
      name,
      PVT,
      {"depths": depths, "drop_path_rate": drop_path},
      preprocessing=imagenet_preprocessing(224),
      published=Published(
        parameters=parameters,
        multiply_adds=round(giga * 1e9),
        top1=top1,
        source="paper, table 2; whai362/PVT; ImageNet-1K",
      ),
    )


_register_family()
