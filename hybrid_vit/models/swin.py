"""Swin: attention in windows that shift by half a window from block to block.

Ze Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", ICCV 2021,
arXiv:2103.14030. Follows the authors' PyTorch code (microsoft/Swin-Transformer,
`models/swin_transformer.py`), a baseline of the papers rebuilt here, with these differences:

* Any size is taken: images, and maps before a merging, are padded with zeros at the right and the
  bottom, and so are maps that windows do not divide (as the authors' detection code does; their
  classification code takes only sizes that divide). Such zeros attend and are attended to.
* The table of relative positions always has the size of `window_size`. On a map smaller than that
  the window shrinks to the map, as in the classification code, and takes the table resized by the
  rule by which the authors fit a checkpoint's table to another window: bicubic, without
  antialiasing. With `shrink_windows=False` such a map is padded, as in the detection code.
* Absolute position embeddings, which no published network has, are left out.
* Linear layers begin as a plain normal, which is what the authors' truncation at a hundred standard
  deviations is.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.models import layers
from hybrid_vit.models.blocks import apply_blocks
from hybrid_vit.models.positions import resize_grid
from hybrid_vit.models.registry import (
  FeatureSpec,
  Published,
  imagenet_preprocessing,
  output_pyramid,
  register,
)
from hybrid_vit.ops import windows as windows_op

_INIT = nn.initializers.normal(0.02)
_NORM_EPSILON = 1e-5

# What the authors add to the logits of two cells that only the shift has brought together.
_MASKED = -100.0


class Swin(nn.Module):
  """The Swin backbone with its classifier (paper, section 3).

  A call takes images `[B, H, W, 3]` of any size and returns logits `[B, num_classes]` in float32
  (None when `num_classes` is 0) and the endpoints: "stem" (the patch embedding), "stage2_merging"
  and so on (what a stage's first block reads), "stage1" to "stage4", "stage1_block0" and so on,
  "stage1_norm" and so on (see `output_norms`), all maps, and "pre_logits" `[B, C]` (the mean over
  the map; with a classifier, over the normed one).

  Attributes:
    width: channels of the first stage; each further one has twice as many.
    depths: blocks of each stage.
    num_heads: attention heads of each stage.
    num_classes: 0 for no classifier: neither norm nor head.
    window_size: side of a window.
    patch_size: side of the patches that the stem embeds.
    mlp_ratio: hidden width of the MLP over the width.
    qkv_bias: whether query, key and value have biases.
    shrink_windows: where a side of the map is no longer than a window, the window becomes no larger
      than the map and is not shifted; else the map is padded to a window, which shifts as any
      other: for dense tasks.
    output_norms: stages, counted from 1, whose output has a layer norm beside the trunk;
      `features` then names these outputs alone. For dense tasks.
    drop_path_rate: of the last block; the first has 0, evenly between.
    remat: recompute each block in the backward pass instead of storing its inside.
    scan_blocks: equal blocks as the turns of a loop, see `models/blocks.py`.
    dtype: of the computation; parameters, softmax and norm statistics are float32.
  """

  width: int = 96
  depths: tuple[int, ...] = (2, 2, 6, 2)
  num_heads: tuple[int, ...] = (3, 6, 12, 24)
  num_classes: int = 1000
  window_size: int = 7
  patch_size: int = 4
  mlp_ratio: float = 4.0
  qkv_bias: bool = True
  shrink_windows: bool = True
  output_norms: tuple[int, ...] = ()
  drop_path_rate: float = 0.0
  remat: bool = False
  scan_blocks: bool = False
  dtype: Any = jnp.float32

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The feature pyramid: name, stride and channels of each stage."""
    pyramid = [
      FeatureSpec(f"stage{i + 1}", self.patch_size * 2**i, self.width * 2**i)
      for i in range(len(self.depths))
    ]
    return output_pyramid(pyramid, self.output_norms)

  def at_size(self, size: int, made_for: int) -> dict[str, Any]:
    """Arguments of the same network for square pictures of another size: as many windows."""
    window, rest = divmod(self.window_size * size, made_for)
    return {} if rest or not window else {"window_size": window}

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    self._check()
    endpoints = {}
    rates = layers.linear_drop_path_rates(self.drop_path_rate, self.depths)
    x = images.astype(self.dtype)
    x = PatchEmbedding(self.width, self.patch_size, self.dtype, name="stem")(x)
    endpoints["stem"] = x
    for stage, depth in enumerate(self.depths):
      if stage:
        name = f"stage{stage + 1}_merging"
        x = PatchMerging(self.dtype, name=name)(x)
        endpoints[name] = x
      blocks = [
        {
          "num_heads": self.num_heads[stage],
          "window_size": self.window_size,
          "shifted": i % 2 == 1,
          "mlp_ratio": self.mlp_ratio,
          "qkv_bias": self.qkv_bias,
          "shrink_windows": self.shrink_windows,
          "drop_path_rate": rates[stage][i],
          "dtype": self.dtype,
        }
        for i in range(depth)
      ]
      x, outputs = apply_blocks(self, Block, f"stage{stage + 1}_block", blocks, x, train)
      endpoints |= outputs
      endpoints[f"stage{stage + 1}"] = x
      if stage + 1 in self.output_norms:
        name = f"stage{stage + 1}_norm"
        endpoints[name] = layers.layer_norm(_NORM_EPSILON, self.dtype, name)(x)

    logits = None
    if self.num_classes:
      # The classifier is float32 throughout: it is small, and logits are promised in float32.
      x = layers.layer_norm(_NORM_EPSILON, jnp.float32, "head_norm")(x)
    x = x.mean((1, 2), dtype=jnp.float32)
    endpoints["pre_logits"] = x
    if self.num_classes:
      logits = nn.Dense(self.num_classes, kernel_init=_INIT, dtype=jnp.float32, name="head")(x)
    return logits, endpoints

  def _check(self) -> None:
    layers.check_stages(self, "num_heads")
    layers.check_output_norms(self)
    for i, heads in enumerate(self.num_heads):
      if (self.width * 2**i) % heads:
        raise ValueError(
          f"Swin: {heads} heads do not divide the width {self.width * 2**i} of stage {i + 1}"
        )


class PatchEmbedding(nn.Module):
  """Patches that do not overlap, each through one matrix, then a layer norm."""

  width: int
  patch_size: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = _pad_to_multiple(x, self.patch_size)
    x = layers.Conv(
      self.width,
      (self.patch_size, self.patch_size),
      strides=self.patch_size,
      padding="VALID",
      kernel_init=layers.torch_conv_init,
      bias_init=layers.torch_bias_init(self.patch_size**2 * x.shape[-1]),
      dtype=self.dtype,
      name="conv",
    )(x)
    return layers.layer_norm(_NORM_EPSILON, self.dtype, "norm")(x)


class PatchMerging(nn.Module):
  """Four neighbouring cells side by side, a layer norm, and one matrix to twice the width."""

  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    x = _pad_to_multiple(x, 2)
    # Upper left, lower left, upper right, lower right.
    x = jnp.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], axis=-1)
    x = layers.layer_norm(_NORM_EPSILON, self.dtype, "norm")(x)
    return _dense(2 * channels, False, self.dtype, "reduction")(x)


class Block(nn.Module):
  """Attention in windows, then an MLP, each after a norm and beside a shortcut (paper, eq. 3)."""

  num_heads: int
  window_size: int
  shifted: bool
  mlp_ratio: float
  qkv_bias: bool
  shrink_windows: bool
  drop_path_rate: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[B, H, W, C]` to the same shape."""
    y = layers.layer_norm(_NORM_EPSILON, self.dtype, "norm1")(x)
    y = WindowAttention(
      self.num_heads,
      self.window_size,
      self.shifted,
      self.qkv_bias,
      self.shrink_windows,
      self.dtype,
      name="attention",
    )(y)
    x = x + layers.DropPath(self.drop_path_rate, name="drop_path1")(y, train)
    y = layers.layer_norm(_NORM_EPSILON, self.dtype, "norm2")(x)
    y = _dense(int(x.shape[-1] * self.mlp_ratio), True, self.dtype, "fc1")(y)
    y = _dense(x.shape[-1], True, self.dtype, "fc2")(layers.gelu(y))
    return x + layers.DropPath(self.drop_path_rate, name="drop_path2")(y, train)


class WindowAttention(nn.Module):
  """Attention within windows, with a bias for each relative position (paper, eq. 4).

  Attributes:
    num_heads: of the attention.
    window_size: side of a window, and what the table of relative positions is made for.
    shifted: the map is rolled by half a window before, and rolled back after; cells that were not
      neighbours before do not attend to each other.
    qkv_bias: whether query, key and value have biases.
    shrink_windows: see `Swin`.
    dtype: of the computation; logits, bias and softmax are float32.
  """

  num_heads: int
  window_size: int
  shifted: bool
  qkv_bias: bool
  shrink_windows: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    size, channels = (x.shape[1], x.shape[2]), x.shape[-1]
    side, shifts = self.window_size, self.shifted
    if self.shrink_windows and min(size) <= side:
      side, shifts = min(size), False
    shift = side // 2 if shifts else 0
    table_side = 2 * self.window_size - 1
    table = self.param(
      "position_bias", _INIT, (self.num_heads, table_side, table_side), jnp.float32
    )
    table = resize_bicubic_table(table, (2 * side - 1, 2 * side - 1))
    bias = layers.relative_position_bias(table, (side, side))

    x = _pad_to_multiple(x, side)
    padded = (x.shape[1], x.shape[2])
    if shift:
      x = jnp.roll(x, (-shift, -shift), axis=(1, 2))
      bias = bias + shift_mask(padded, side, shift)[:, None]
    tokens, _ = windows_op.partition_windows(x, (side, side))
    qkv = _dense(3 * channels, self.qkv_bias, self.dtype, "qkv")(tokens)
    query, key, value = layers.split_heads(qkv, 3, self.num_heads)
    scale = (channels // self.num_heads) ** -0.5
    layers.sow_attention(self, query, key, scale=scale, bias=bias)
    out = layers.dot_product_attention(query, key, value, scale=scale, bias=bias)
    out = _dense(channels, True, self.dtype, "out")(out.reshape(tokens.shape))
    x = windows_op.merge_windows(out, (side, side), padded)
    if shift:
      x = jnp.roll(x, (shift, shift), axis=(1, 2))
    return x[:, : size[0], : size[1]]


def shift_mask(size: tuple[int, int], window: int, shift: int) -> np.ndarray:
  """Added to the logits `[windows, queries, keys]` of a map of `size` that was rolled by `shift`.

  0 between cells that were on the same side of the map's edge before, else -100 (as the authors
  have it: nearly, but not wholly, out).
  """

  def part(n: int) -> np.ndarray:
    cells = np.arange(n)
    return (cells >= n - window).astype(int) + (cells >= n - shift)

  parts = 3 * part(size[0])[:, None] + part(size[1])[None]
  parts = parts.reshape(size[0] // window, window, size[1] // window, window)
  parts = parts.transpose(0, 2, 1, 3).reshape(-1, window * window)
  return np.where(parts[:, :, None] == parts[:, None], 0.0, _MASKED).astype(np.float32)


def resize_bicubic_table(table: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resizes a table of relative positions `[heads, H, W]`, bicubic as `resize_grid`."""
  heads, *made = table.shape
  if tuple(made) == tuple(size):
    return table
  grid = resize_grid(table.reshape(heads, -1).T, (made[0], made[1]), size)
  return grid.T.reshape(heads, *size)


def _pad_to_multiple(x: jax.Array, n: int) -> jax.Array:
  """Zeros at the bottom and the right of `[B, H, W, C]`."""
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % n), (0, -x.shape[2] % n), (0, 0)))


def _dense(features: int, use_bias: bool, dtype: Any, name: str) -> layers.PointwiseConv:
  return layers.PointwiseConv(
    features, use_bias=use_bias, kernel_init=_INIT, dtype=dtype, name=name
  )


def _register_family() -> None:
  deep = (2, 2, 18, 2)
  tiny: dict[str, Any] = {"drop_path_rate": 0.2}
  small: dict[str, Any] = {"depths": deep, "drop_path_rate": 0.3}
  base = {"width": 128, "depths": deep, "num_heads": (4, 8, 16, 32)}
  large = {"width": 192, "depths": deep, "num_heads": (6, 12, 24, 48)}
  # Drop path by the authors' configurations: of base 0.5 from scratch, 0.2 on 22K and after.
  tiny_22k, small_22k = tiny | {"drop_path_rate": 0.1}, small | {"drop_path_rate": 0.2}
  base_1k, base_22k = base | {"drop_path_rate": 0.5}, base | {"drop_path_rate": 0.2}
  large_22k = large | {"drop_path_rate": 0.2}
  window_12, head_22k = {"window_size": 12}, {"num_classes": 21841}
  on_1k, on_22k, after_22k = "ImageNet-1K", "ImageNet-22K", "ImageNet-22K, then 1K"
  # name, arguments, input size, parameters, multiply-adds in 10^9, top-1, data
  table: tuple[tuple[Any, ...], ...] = (
    ("swin_tiny", tiny, 224, 28288354, 4.5, 81.3, on_1k),
    ("swin_small", small, 224, 49606258, 8.7, 83.0, on_1k),
    ("swin_base", base_1k, 224, 87768224, 15.4, 83.5, on_1k),
    ("swin_base_384", base_1k | window_12, 384, 87903584, 47.0, 84.5, on_1k),
    ("swin_tiny_22k", tiny_22k | head_22k, 224, 44315083, None, None, on_22k),
    ("swin_small_22k", small_22k | head_22k, 224, 65632987, None, None, on_22k),
    ("swin_base_22k", base_22k | head_22k, 224, 109130249, None, None, on_22k),
    ("swin_base_384_22k", base_22k | head_22k | window_12, 384, 109265609, None, None, on_22k),
    ("swin_large_22k", large_22k | head_22k, 224, 228565093, None, None, on_22k),
    ("swin_large_384_22k", large_22k | head_22k | window_12, 384, 228768133, None, None, on_22k),
    ("swin_tiny_22kto1k", tiny_22k, 224, 28288354, 4.5, 80.9, after_22k),
    ("swin_small_22kto1k", small_22k, 224, 49606258, 8.7, 83.2, after_22k),
    ("swin_base_22kto1k", base_22k, 224, 87768224, 15.4, 85.2, after_22k),
    ("swin_base_384_22kto1k", base_22k | window_12, 384, 87903584, 47.0, 86.4, after_22k),
    ("swin_large_22kto1k", large_22k, 224, 196532476, 34.5, 86.3, after_22k),
    ("swin_large_384_22kto1k", large_22k | window_12, 384, 196735516, 103.9, 87.3, after_22k),
  )
  for name, arguments, size, parameters, giga, top1, data in table:
    register(
      name,
      Swin,
      arguments,
      preprocessing=imagenet_preprocessing(size),
      published=Published(
        parameters=parameters,
        multiply_adds=giga and round(giga * 1e9),
        top1=top1,
        source=f"paper, table 1, and the authors' model hub for what is not in it; {data}",
      ),
    )


_register_family()
