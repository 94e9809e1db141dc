"""AdaBins: depth as a mean of bin centres that are chosen for each picture.

Shariq Farooq Bhat et al., "AdaBins: Depth Estimation Using Adaptive Bins", CVPR 2021,
arXiv:2011.14141, section 3; checked against shariqfarooq123/AdaBins
(`models/unet_adaptive_bins.py`) and the layers of its mini-ViT.

Differences:
- The decoder is made for any feature pyramid instead of EfficientNet-B5's five maps: a 1x1
  convolution of the coarsest to `decoder_channels` (512, the authors' 2,048), without the padding
  that theirs has, then the same upsampling blocks, each of half the width, up to the finest map and
  on, without skips, to `stride` 2, the paper's h = H / 2.
- `queries="tokens"` for maps with too few patches: the kernels of the range attention maps and the
  bin widths come from trained tokens before the patches, not from the first 129 patches.
- Attention weights are not dropped in training; the rest of the transformer layer is. Its layers
  begin each with a draw of their own (the authors' are copies of one).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.heads.depth_layers import check_depth_head, conv
from hybrid_vit.heads.layers import check_levels
from hybrid_vit.heads.registry import register_head
from hybrid_vit.models.layers import (
  Conv,
  PointwiseConv,
  batch_norm,
  dot_product_attention,
  layer_norm,
  split_heads,
  torch_bias_init,
  torch_conv_init,
  torch_dense,
)
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.resize import resize_bilinear

_BATCH_NORM_EPSILON = 1e-5
_LAYER_NORM_EPSILON = 1e-5
_SLOPE = 0.01
_LEAST_WIDTH = 0.1
_REGRESSOR_WIDTH = 256
QUERIES = ("patches", "tokens")


@register_head("adabins")
class AdaBins(nn.Module):
  """Depth in metres between two bounds, at `stride`.

  Attributes:
    features: the levels, the finest first, each at least as fine as the next.
    num_outputs: 1.
    min_depth: metres, the first bin's near edge.
    max_depth: metres, the last bin's far edge; 10 for NYU Depth v2, 80 for KITTI.
    num_bins: of each picture.
    stride: of the result; the finest map's over a power of 2.
    decoder_channels: of the coarsest level; half as many after each step.
    channels: of the decoded map, the tokens and the range attention maps' kernels.
    patch_size: of the mini-ViT, in cells of the decoded map; what does not fill a patch is left
      out.
    num_layers: of the mini-ViT.
    num_heads: of its attention.
    mlp_channels: of its layers' hidden layer.
    num_queries: range attention maps.
    num_positions: rows of the position table, which the patches take in order.
    queries: "patches", the transformer's first token gives the bins and the next `num_queries` the
      kernels, as published, or "tokens", trained ones.
    dropout_rate: in the mini-ViT.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the decoder and the mini-ViT; bins, probabilities and depths are float32.

  Raises (in a call):
    ValueError: bounds that are not 0 <= min_depth < max_depth, an unknown kind of queries, a stride
      that halving does not reach, more patches than positions, fewer than the queries need, or what
      `check_depth_head` raises.
  """

  features: tuple[FeatureSpec, ...]
  num_outputs: int = 1
  min_depth: float = 1e-3
  max_depth: float = 10.0
  num_bins: int = 256
  stride: int = 2
  decoder_channels: int = 512
  channels: int = 128
  patch_size: int = 16
  num_layers: int = 4
  num_heads: int = 4
  mlp_channels: int = 1024
  num_queries: int = 128
  num_positions: int = 500
  queries: str = "patches"
  dropout_rate: float = 0.1
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, endpoints: Mapping[str, jax.Array], train: bool = False, *, with_bins: bool = False
  ) -> Any:
    """Maps `[B, h, w, C]` → float32 `[B, H', W', 1]`.

    With `with_bins` a pair: the depth, and the bins' centres `[B, num_bins]`, increasing, for the
    chamfer loss (equation 5).
    """
    self._check()
    x = self._decoded(endpoints, train)
    tokens = self._tokens(x, train)
    # Equations 1 and 2: widths of no bin vanish, and they sum to the whole range.
    y = tokens[:, 0]
    for i, width in enumerate((_REGRESSOR_WIDTH, _REGRESSOR_WIDTH, self.num_bins)):
      y = _leaky(y) if i else y
      y = torch_dense(width, y.shape[-1], self.dtype, f"regressor{i}")(y)
    widths = nn.relu(y.astype(jnp.float32)) + _LEAST_WIDTH
    widths = widths / widths.sum(-1, keepdims=True) * (self.max_depth - self.min_depth)
    centres = self.min_depth + jnp.cumsum(widths, -1) - widths / 2
    # Range attention maps, and the hybrid regression of equation 3.
    kernels = tokens[:, 1 : 1 + self.num_queries]
    x = _conv(self.channels, 3, "attention_conv", x, self.dtype)
    maps = jnp.einsum("bhwc,bqc->bhwq", x, kernels, preferred_element_type=jnp.float32)
    self.sow("intermediates", "range_attention", maps)
    scores = torch_dense(self.num_bins, maps.shape[-1], jnp.float32, "bins")(maps)
    probabilities = jax.nn.softmax(scores, axis=-1)
    depth = jnp.einsum("bhwn,bn->bhw", probabilities, centres, precision=jax.lax.Precision.HIGHEST)
    # A mean of centres lies between them but for rounding.
    depth = jnp.clip(depth, self.min_depth, self.max_depth)[..., None]
    return (depth, centres) if with_bins else depth

  def _decoded(self, endpoints: Mapping[str, jax.Array], train: bool) -> jax.Array:
    """Upsampling with skips to the finest map, on to `stride`, and to `channels`."""
    maps = [endpoints[f.name].astype(self.dtype) for f in reversed(self.features)]
    width = self.decoder_channels
    x = torch_dense(width, maps[0].shape[-1], self.dtype, "bottleneck")(maps[0])
    for i, skip in enumerate(maps[1:]):
      x = resize_bilinear(x, skip.shape[1:3], align_corners=True)
      width = max(width // 2, 1)
      x = self._block(jnp.concatenate([x, skip], axis=-1), width, train, f"up{i}")
    for i in range((self.features[0].stride // self.stride).bit_length() - 1):
      x = resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=True)
      width = max(width // 2, 1)
      x = self._block(x, width, train, f"up{len(maps) - 1 + i}")
    return _conv(self.channels, 3, "decoded", x, self.dtype)

  def _block(self, x: jax.Array, width: int, train: bool, name: str) -> jax.Array:
    for j in range(2):
      x = _conv(width, 3, f"{name}_conv{j}", x, self.dtype)
      norm = batch_norm(
        self, epsilon=_BATCH_NORM_EPSILON, unbiased_variance=True, name=f"{name}_norm{j}"
      )
      x = _leaky(norm(x, train))
    return x

  def _tokens(self, x: jax.Array, train: bool) -> jax.Array:
    """The mini-ViT (section 3.3): `[B, h, w, C]` → `[B, N, C]`, the bins' token first."""
    size = self.patch_size
    rows, columns = (n // size for n in x.shape[1:3])
    needed = self.num_queries + 1
    if self.queries == "patches" and rows * columns < needed:
      raise ValueError(
        f"adabins: a decoded map of {x.shape[1]} x {x.shape[2]} has {rows * columns} patches of "
        f"{size} x {size}; {self.num_queries} queries need {needed}: take queries='tokens', or "
        "another patch_size, num_queries or stride"
      )
    if not 0 < rows * columns <= self.num_positions:
      raise ValueError(
        f"adabins: a decoded map of {x.shape[1]} x {x.shape[2]} has {rows * columns} patches of "
        f"{size} x {size}; 1 to num_positions={self.num_positions} were expected"
      )
    patches = Conv(
      self.channels,
      (size, size),
      strides=size,
      padding="VALID",
      kernel_init=torch_conv_init,
      bias_init=torch_bias_init(size**2 * x.shape[-1]),
      dtype=self.dtype,
      name="patches",
    )(x)
    tokens = patches.reshape(x.shape[0], rows * columns, self.channels)
    init = nn.initializers.uniform(1.0)
    table = self.param("positions", init, (self.num_positions, self.channels), jnp.float32)
    tokens = tokens + table[: rows * columns].astype(self.dtype)
    if self.queries == "tokens":
      trained = self.param("query_tokens", init, (needed, self.channels), jnp.float32)
      trained = jnp.broadcast_to(trained.astype(self.dtype), (x.shape[0], *trained.shape))
      tokens = jnp.concatenate([trained, tokens], axis=1)
    for i in range(self.num_layers):
      tokens = TransformerLayer(
        self.num_heads, self.mlp_channels, self.dropout_rate, self.dtype, name=f"layer{i}"
      )(tokens, train)
    return tokens

  def _check(self) -> None:
    check_depth_head("adabins", self)
    check_levels("adabins", self.features, 1)
    if not 0 <= self.min_depth < self.max_depth:
      raise ValueError(
        f"adabins: depths from {self.min_depth:g} to {self.max_depth:g} m; 0 <= min_depth < "
        "max_depth was expected"
      )
    if self.queries not in QUERIES:
      raise ValueError(f"adabins: queries is {self.queries!r}; one of {QUERIES} was expected")
    finest = self.features[0].stride
    times, rest = divmod(finest, self.stride) if self.stride > 0 else (0, 1)
    if rest or times < 1 or times & (times - 1):
      raise ValueError(
        f"adabins: stride is {self.stride}; the finest map's, {finest}, over a power of 2 was "
        "expected"
      )
    if self.channels % self.num_heads:
      raise ValueError(f"adabins: {self.num_heads} heads do not divide {self.channels} channels")


class TransformerLayer(nn.Module):
  """PyTorch's `TransformerEncoderLayer`: norms behind the sums, ReLU in the MLP.

  Attributes:
    num_heads: of attention.
    hidden: width of the MLP.
    dropout_rate: behind attention, ReLU and MLP.
    dtype: of the computation.
  """

  num_heads: int
  hidden: int
  dropout_rate: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[B, N, C]` to the same shape."""
    channels = x.shape[-1]
    size = channels // self.num_heads
    # PyTorch's bound for the three projections as one matrix, and no bias at the start.
    xavier = nn.initializers.xavier_uniform()
    qkv = PointwiseConv(3 * channels, kernel_init=xavier, dtype=self.dtype, name="qkv")(x)
    query, key, value = split_heads(qkv, 3, self.num_heads)
    y = dot_product_attention(query, key, value, scale=size**-0.5).reshape(x.shape)
    y = PointwiseConv(channels, kernel_init=torch_conv_init, dtype=self.dtype, name="proj")(y)
    x = layer_norm(_LAYER_NORM_EPSILON, self.dtype, "attention_norm")(x + self._dropped(y, train))
    y = self._dropped(nn.relu(torch_dense(self.hidden, channels, self.dtype, "fc1")(x)), train)
    y = self._dropped(torch_dense(channels, self.hidden, self.dtype, "fc2")(y), train)
    return layer_norm(_LAYER_NORM_EPSILON, self.dtype, "mlp_norm")(x + y)

  def _dropped(self, x: jax.Array, train: bool) -> jax.Array:
    return nn.Dropout(self.dropout_rate, deterministic=not train)(x)


def _leaky(x: jax.Array) -> jax.Array:
  return nn.leaky_relu(x, _SLOPE)


def _conv(features: int, size: int, name: str, x: jax.Array, dtype: Any) -> jax.Array:
  """A convolution that begins as PyTorch's."""
  bias_init = torch_bias_init(size**2 * x.shape[-1])
  return conv(features, size, name, kernel_init=torch_conv_init, bias_init=bias_init, dtype=dtype)(
    x
  )
