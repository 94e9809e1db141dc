"""CvT: a transformer whose tokens and whose queries, keys and values come from convolutions.

Haiping Wu et al., "CvT: Introducing Convolutions to Vision Transformers", ICCV 2021,
arXiv:2103.15808. Follows the authors' PyTorch code (microsoft/CvT, `lib/models/cls_cvt.py`), which
differs from the paper's reading in two things that the released weights depend on: attention is
scaled by the whole width to the power -0.5, not by a head's, and the MLP has QuickGELU. Differences
from that code:

* The projection "linear" works (there it crashes), as the paper's table 8 needs it.
* The query's convolution always keeps the size of the map: another stride or padding cannot be
  added to the shortcut.
* A batch of one keeps its axis, and a network without classifier can be built.
* Linear layers begin as a plain normal, which is what the authors' truncation at a hundred standard
  deviations is; the alternative Xavier draw, which no published network uses, is left out.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.models import layers
from hybrid_vit.models.blocks import apply_blocks
from hybrid_vit.models.registry import (
  FeatureSpec,
  Published,
  feature_pyramid,
  imagenet_preprocessing,
  register,
)

_INIT = nn.initializers.normal(0.02)
_NORM_EPSILON = 1e-5  # of layer norms and batch norms

_PROJECTIONS = ("dw_bn", "avg", "linear")
_PER_STAGE = (
  "widths",
  "num_heads",
  "patch_sizes",
  "strides",
  "paddings",
  "mlp_ratios",
  "qkv_bias",
  "class_tokens",
  "projections",
  "kernel_sizes",
  "kv_strides",
  "kv_paddings",
)


class CvT(nn.Module):
  """The CvT backbone with its classifier (paper, section 3).

  A call takes images `[B, H, W, 3]` and returns logits `[B, num_classes]` in float32 (None when
  `num_classes` is 0) and the endpoints: "stem", "stage2_embed", "stage3_embed" (the token
  embeddings), "stage1" to "stage3", "stage1_block0" and so on, all maps without the class token;
  "stage3_class_token" `[B, 1, C]` where there is one; "pre_logits" `[B, C]` (the last stage's
  class token, or the mean over its map; with a classifier, normed). A side of H pixels gives
  floor((H - 3) / 4) + 1 cells in stage 1, and half of that, rounded up, in each further one.

  Attributes:
    widths: channels of each stage.
    depths: blocks of each stage.
    num_heads: attention heads of each stage.
    num_classes: 0 for no classifier: neither norm nor head.
    patch_sizes: kernel of each stage's token embedding.
    strides: of each stage's token embedding.
    paddings: zeros on every side of the map, in each stage's token embedding.
    mlp_ratios: hidden width of the MLP over the width, for each stage.
    qkv_bias: whether query, key and value have biases, for each stage.
    class_tokens: whether a stage has a class token; the next stage does not see it.
    projections: what a stage does before the matrices of query, key and value: "dw_bn" (depthwise
      convolution and batch norm), "avg" (average pooling of keys and values alone) or "linear"
      (nothing).
    kernel_sizes: of these projections; odd where the query is convolved.
    kv_strides: of the keys' and values' projection.
    kv_paddings: of the keys' and values' projection.
    drop_path_rate: of the last block of the last stage, linear from 0 in its first block; earlier
      stages have none. With one rate for each stage, the same within each.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with batch norm statistics of their own.
    remat: recompute each block in the backward pass instead of storing its inside.
    scan_blocks: equal blocks as the turns of a loop, see `models/blocks.py`.
    dtype: of the computation; parameters, softmax and norm statistics are float32.
  """

  widths: tuple[int, ...] = (64, 192, 384)
  depths: tuple[int, ...] = (1, 2, 10)
  num_heads: tuple[int, ...] = (1, 3, 6)
  num_classes: int = 1000
  patch_sizes: tuple[int, ...] = (7, 3, 3)
  strides: tuple[int, ...] = (4, 2, 2)
  paddings: tuple[int, ...] = (2, 1, 1)
  mlp_ratios: tuple[float, ...] = (4.0, 4.0, 4.0)
  qkv_bias: tuple[bool, ...] = (True, True, True)
  class_tokens: tuple[bool, ...] = (False, False, True)
  projections: tuple[str, ...] = ("dw_bn", "dw_bn", "dw_bn")
  kernel_sizes: tuple[int, ...] = (3, 3, 3)
  kv_strides: tuple[int, ...] = (2, 2, 2)
  kv_paddings: tuple[int, ...] = (1, 1, 1)
  drop_path_rate: float | tuple[float, ...] = 0.0
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  remat: bool = False
  scan_blocks: bool = False
  dtype: Any = jnp.float32

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The feature pyramid: name, stride and channels of each stage."""
    return feature_pyramid(self.widths, self.strides)

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    self._check((images.shape[1], images.shape[2]))
    endpoints = {}
    x, token = images.astype(self.dtype), None
    for stage, (depth, rates) in enumerate(zip(self.depths, self._drop_path_rates())):
      name = "stem" if stage == 0 else f"stage{stage + 1}_embed"
      has_token = self.class_tokens[stage]
      x, token = TokenEmbedding(
        self.widths[stage],
        self.patch_sizes[stage],
        self.strides[stage],
        self.paddings[stage],
        has_token,
        self.dtype,
        name=name,
      )(x)
      endpoints[name] = x
      shape, size = x.shape, (x.shape[1], x.shape[2])
      tokens = x.reshape(shape[0], -1, shape[-1])
      if token is not None:
        tokens = jnp.concatenate([token, tokens], axis=1)
      blocks = [
        {
          "size": size,
          "num_heads": self.num_heads[stage],
          "mlp_ratio": self.mlp_ratios[stage],
          "qkv_bias": self.qkv_bias[stage],
          "projection": self.projections[stage],
          "kernel_size": self.kernel_sizes[stage],
          "kv_stride": self.kv_strides[stage],
          "kv_padding": self.kv_paddings[stage],
          "drop_path_rate": rates[i],
          "batch_norm_momentum": self.batch_norm_momentum,
          "batch_norm_groups": self.batch_norm_groups,
          "dtype": self.dtype,
        }
        for i in range(depth)
      ]
      name = f"stage{stage + 1}_block"
      tokens, outputs = apply_blocks(self, Block, name, blocks, tokens, train)
      for name, output in outputs.items():
        endpoints[name] = output[:, int(has_token) :].reshape(shape)
      x = tokens[:, int(has_token) :].reshape(shape)
      endpoints[f"stage{stage + 1}"] = x
      if has_token:
        token = tokens[:, :1]
        endpoints[f"stage{stage + 1}_class_token"] = token

    last = x.reshape(x.shape[0], -1, x.shape[-1]) if token is None else token
    if not self.num_classes:
      endpoints["pre_logits"] = last.mean(1, dtype=jnp.float32)
      return None, endpoints
    # The classifier is float32 throughout: it is small, and logits are promised in float32.
    x = layers.layer_norm(_NORM_EPSILON, jnp.float32, "head_norm")(last).mean(1)
    endpoints["pre_logits"] = x
    head = nn.Dense(
      self.num_classes,
      kernel_init=_INIT,
      bias_init=layers.torch_bias_init(x.shape[-1]),
      dtype=jnp.float32,
      name="head",
    )
    return head(x), endpoints

  def _drop_path_rates(self) -> list[tuple[float, ...]]:
    """For each stage its blocks' rates."""
    rates = self.drop_path_rate
    if not isinstance(rates, tuple):
      rates = (0.0,) * (len(self.depths) - 1) + (rates,)
    return [
      layers.linear_drop_path_rates(rate, (depth,))[0] for rate, depth in zip(rates, self.depths)
    ]

  def _check(self, size: tuple[int, int]) -> None:
    stages = len(self.depths)
    names = _PER_STAGE + (("drop_path_rate",) if isinstance(self.drop_path_rate, tuple) else ())
    layers.check_stages(self, *names)
    rows, columns = size
    for i in range(stages):
      kernel, padding, step = self.patch_sizes[i], self.paddings[i], self.strides[i]
      if min(rows, columns) + 2 * padding < kernel:
        raise ValueError(
          f"CvT: an image of {size[0]}x{size[1]} leaves a map of {rows}x{columns} before stage "
          f"{i + 1}, whose embedding needs at least {kernel - 2 * padding} rows and columns"
        )
      rows, columns = ((n + 2 * padding - kernel) // step + 1 for n in (rows, columns))
      if self.projections[i] not in _PROJECTIONS:
        raise ValueError(
          f"CvT: projections has {self.projections[i]!r}; a stage takes one of "
          f"{', '.join(_PROJECTIONS)}"
        )
      if self.projections[i] == "dw_bn" and self.kernel_sizes[i] % 2 == 0:
        raise ValueError(
          f"CvT: kernel_sizes has {self.kernel_sizes[i]} for stage {i + 1}; only an odd kernel "
          "keeps the size of the query's map"
        )
      if self.widths[i] % self.num_heads[i]:
        raise ValueError(
          f"CvT: {self.num_heads[i]} heads do not divide the width {self.widths[i]} of stage "
          f"{i + 1}"
        )


class TokenEmbedding(nn.Module):
  """A strided convolution whose patches overlap, then a layer norm (paper, section 3.1).

  Gives the map and, where the stage has one, the class token `[B, 1, C]`.
  """

  width: int
  patch_size: int
  stride: int
  padding: int
  class_token: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    x = layers.Conv(
      self.width,
      (self.patch_size, self.patch_size),
      strides=self.stride,
      padding=self.padding,
      kernel_init=layers.torch_conv_init,
      bias_init=layers.torch_bias_init(self.patch_size**2 * x.shape[-1]),
      dtype=self.dtype,
      name="conv",
    )(x)
    x = layers.layer_norm(_NORM_EPSILON, self.dtype, "norm")(x)
    if not self.class_token:
      return x, None
    token = self.param("class_token", _INIT, (1, 1, self.width), jnp.float32).astype(self.dtype)
    return x, jnp.broadcast_to(token, (x.shape[0], 1, self.width))


class Block(nn.Module):
  """Convolutional attention, then an MLP, each after a norm and beside a shortcut.

  Attributes as in `CvT`, those of one stage; `size` is (H, W) of the map.
  """

  size: tuple[int, int]
  num_heads: int
  mlp_ratio: float
  qkv_bias: bool
  projection: str
  kernel_size: int
  kv_stride: int
  kv_padding: int
  drop_path_rate: float
  batch_norm_momentum: float
  batch_norm_groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Tokens `[B, N, C]`: the cells of the map row by row, behind a class token or not."""
    width = x.shape[-1]
    y = layers.layer_norm(_NORM_EPSILON, self.dtype, "norm1")(x)
    y = Attention(
      size=self.size,
      num_heads=self.num_heads,
      qkv_bias=self.qkv_bias,
      projection=self.projection,
      kernel_size=self.kernel_size,
      kv_stride=self.kv_stride,
      kv_padding=self.kv_padding,
      batch_norm_momentum=self.batch_norm_momentum,
      batch_norm_groups=self.batch_norm_groups,
      dtype=self.dtype,
      name="attention",
    )(y, train)
    x = x + layers.DropPath(self.drop_path_rate, name="drop_path1")(y, train)
    y = layers.layer_norm(_NORM_EPSILON, self.dtype, "norm2")(x)
    y = _dense(int(width * self.mlp_ratio), True, self.dtype, "fc1")(y)
    y = _dense(width, True, self.dtype, "fc2")(layers.quick_gelu(y))
    return x + layers.DropPath(self.drop_path_rate, name="drop_path2")(y, train)


class Attention(nn.Module):
  """Attention whose queries, keys and values are projected on the map first (section 3.2)."""

  size: tuple[int, int]
  num_heads: int
  qkv_bias: bool
  projection: str
  kernel_size: int
  kv_stride: int
  kv_padding: int
  batch_norm_momentum: float
  batch_norm_groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Tokens `[B, N, C]` as in `Block`; a class token is neither convolved nor batch-normed."""
    batch, count, channels = x.shape
    before = count - self.size[0] * self.size[1]
    token, image = x[:, :before], x[:, before:].reshape(batch, *self.size, channels)

    def heads(name: str, projected: jax.Array) -> jax.Array:  # [B, tokens, heads, head width]
      tokens = jnp.concatenate([token, projected.reshape(batch, -1, channels)], axis=1)
      tokens = _dense(channels, self.qkv_bias, self.dtype, name)(tokens)
      return tokens.reshape(batch, -1, self.num_heads, channels // self.num_heads)

    def key_or_value(name: str) -> jax.Array:
      if self.projection == "dw_bn":
        return self._convolve(name, image, self.kv_stride, self.kv_padding, train)
      if self.projection == "avg":
        return average_pool_ceil(image, self.kernel_size, self.kv_stride, self.kv_padding)
      return image

    query = image
    if self.projection == "dw_bn":
      query = self._convolve("query", image, 1, self.kernel_size // 2, train)
    query, key, value = (
      heads("query", query),
      heads("key", key_or_value("key")),
      heads("value", key_or_value("value")),
    )
    layers.sow_attention(self, query, key, scale=channels**-0.5)
    out = layers.dot_product_attention(query, key, value, scale=channels**-0.5)
    return _dense(channels, True, self.dtype, "out")(out.reshape(batch, count, channels))

  def _convolve(
    self, name: str, image: jax.Array, stride: int, padding: int, train: bool
  ) -> jax.Array:
    image = layers.DepthwiseConv(
      (self.kernel_size, self.kernel_size),
      stride=stride,
      padding=((padding, padding), (padding, padding)),
      use_bias=False,
      kernel_init=layers.torch_conv_init,
      dtype=self.dtype,
      name=f"{name}_conv",
    )(image)
    return layers.batch_norm(
      self, epsilon=_NORM_EPSILON, unbiased_variance=True, name=f"{name}_norm"
    )(image, train)


def average_pool_ceil(x: jax.Array, window: int, stride: int, padding: int) -> jax.Array:
  """Averages windows of `[B, H, W, C]`, a last window that overhangs the padded map included.

  The zeros of the padding count in the mean; what lies beyond them, under an overhanging window,
  does not (torch's `AvgPool2d` with `ceil_mode`). Sums in float32 and keeps the dtype of `x`.
  """
  pads, ends, counts = [], [], []
  for n in x.shape[1:3]:
    cells = -(-(n + 2 * padding - window) // stride) + 1
    if (cells - 1) * stride >= n + padding:  # it would begin in the padding on the far side
      cells -= 1
    end = (cells - 1) * stride + 1
    pads.append((padding, max(0, end - 1 + window - n - padding)))
    ends.append(end)
    start = np.arange(cells) * stride - padding
    counts.append(np.minimum(start + window, n + padding) - start)
  padded = jnp.pad(x.astype(jnp.float32), ((0, 0), *pads, (0, 0)))
  total: Any = 0.0
  for i in range(window):
    for j in range(window):
      total = total + padded[:, i : i + ends[0] : stride, j : j + ends[1] : stride]
  count = np.outer(counts[0], counts[1]).astype(np.float32)[None, :, :, None]
  return (total / count).astype(x.dtype)


def _dense(features: int, use_bias: bool, dtype: Any, name: str) -> layers.PointwiseConv:
  return layers.PointwiseConv(
    features, use_bias=use_bias, kernel_init=_INIT, dtype=dtype, name=name
  )


def _register_family() -> None:
  cvt_13 = {"depths": (1, 2, 10), "drop_path_rate": 0.1}
  cvt_21 = {"depths": (1, 4, 16), "drop_path_rate": 0.1}
  cvt_w24 = {
    "widths": (192, 768, 1024),
    "depths": (2, 2, 20),
    "num_heads": (3, 12, 16),
    "drop_path_rate": 0.3,
  }
  only_1k, after_22k = "ImageNet-1K", "ImageNet-22K, then 1K"
  # name, arguments, input size, parameters, multiply-adds in 10^9, top-1, data
  table: tuple[tuple[Any, ...], ...] = (
    ("cvt_13", cvt_13, 224, 19997480, 4.5, 81.6, only_1k),
    ("cvt_21", cvt_21, 224, 31622696, 7.1, 82.5, only_1k),
    ("cvt_13_384", cvt_13, 384, 19997480, 16.3, 83.0, only_1k),
    ("cvt_21_384", cvt_21, 384, 31622696, 24.9, 83.3, only_1k),
    ("cvt_13_384_22kto1k", cvt_13, 384, 19997480, 16.3, 83.3, after_22k),
    ("cvt_21_384_22kto1k", cvt_21, 384, 31622696, 24.9, 84.9, after_22k),
    ("cvt_w24_384_22kto1k", cvt_w24, 384, 277196392, 193.2, 87.7, after_22k),
  )
  for name, arguments, size, parameters, giga, top1, data in table:
    register(
      name,
      CvT,
      arguments,
      preprocessing=imagenet_preprocessing(size),
      published=Published(
        parameters=parameters,
        multiply_adds=round(giga * 1e9),
        top1=top1,
        source=f"paper, table 3; the count of parameters from the authors' code; {data}",
      ),
    )


_register_family()
