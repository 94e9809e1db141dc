"""Mask2Former: queries that attend to where their own masks are, each one class and one mask.

Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", CVPR 2022,
arXiv:2112.01527; follows the authors' `MultiScaleMaskedTransformerDecoder` over the pixel decoder
of `mask2former_pixel_decoder`. For semantic, instance and panoptic segmentation alike.

Deviations: there is no dropout, whose rate is 0 in all published configurations; the decoder's
width is the pixel decoder's, so there is no projection between the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.heads.deformable import feed_forward
from hybrid_vit.heads.mask2former_pixel_decoder import PixelDecoder, flat_positions
from hybrid_vit.models import layers
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.resize import resize_bilinear

_NORM_EPSILON = 1e-5
_xavier_uniform = nn.initializers.xavier_uniform()
_NORMAL = nn.initializers.normal(1.0)

# Added to the logits of cells that a query must not see; no row is blocked whole.
_BLOCKED = -1e9


class Mask2Former(nn.Module):
  """The whole head (paper, figure 2).

  A call takes maps `[B, h, w, C]` and returns a dict of float32 arrays: "class_logits"
  `[B, Q, num_outputs + 1]`, the last for "no object"; "mask_logits" `[B, Q, h, w]` at the size of
  the finest map; and "auxiliary", a list of dicts of the same two, of the queries before the first
  layer and after each but the last.

  Attributes:
    features: the maps that it reads, the finest first; published: strides 4, 8, 16, 32.
    num_outputs: classes, without "no object".
    channels: of the pixel decoder and of the queries.
    mask_channels: of mask features and mask embeddings.
    num_queries: objects at most; published: 100, with Swin-L 200.
    num_heads: of all attention.
    encoder_layers: of deformable attention in the pixel decoder.
    encoder_hidden: width inside their feed-forward parts.
    encoder_points: that each of their heads samples on each map.
    decoder_layers: of masked attention; layer i reads map i, the coarsest first, and over again.
      (The authors' DEC_LAYERS is one more.)
    decoder_hidden: width inside their feed-forward parts.
    norm_groups: of the pixel decoder's group norms.
    sampling_method: of `deformable_attention`.
    remat: recompute each layer in the backward pass instead of storing its inside.
    dtype: of the computation; logits, softmax and norm statistics are float32.
  """

  features: tuple[FeatureSpec, ...]
  num_outputs: int
  channels: int = 256
  mask_channels: int = 256
  num_queries: int = 100
  num_heads: int = 8
  encoder_layers: int = 6
  encoder_hidden: int = 1024
  encoder_points: int = 4
  decoder_layers: int = 9
  decoder_hidden: int = 2048
  norm_groups: int = 32
  sampling_method: str = "gather"
  remat: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array], train: bool = False) -> dict[str, Any]:
    del train  # nothing differs
    pixels = PixelDecoder(
      self.features,
      self.channels,
      self.mask_channels,
      self.encoder_layers,
      self.encoder_hidden,
      self.num_heads,
      self.encoder_points,
      self.norm_groups,
      self.sampling_method,
      self.remat,
      self.dtype,
      name="pixel_decoder",
    )(endpoints)
    batch = pixels.mask_features.shape[0]
    keys, values = self._sources(pixels.levels)
    shape = (self.num_queries, self.channels)
    queries = self.param("query_features", _NORMAL, shape, jnp.float32)
    positions = self.param("query_positions", _NORMAL, shape, jnp.float32).astype(self.dtype)
    x = jnp.broadcast_to(queries.astype(self.dtype), (batch, *shape))

    predict = MaskPredictor(
      self.num_outputs, self.channels, self.mask_channels, self.dtype, name="predictor"
    )
    layer_class = nn.remat(DecoderLayer) if self.remat else DecoderLayer
    predictions = [predict(x, pixels.mask_features)]
    for i in range(self.decoder_layers):
      level = i % len(keys)
      blocked = blocked_cells(predictions[-1]["mask_logits"], pixels.levels[level].shape[1:3])
      x = layer_class(self.num_heads, self.decoder_hidden, self.dtype, name=f"decoder{i}")(
        x, positions, keys[level], values[level], blocked
      )
      predictions.append(predict(x, pixels.mask_features))
    return {**predictions[-1], "auxiliary": predictions[:-1]}

  def _sources(self, levels: tuple[jax.Array, ...]) -> tuple[list[jax.Array], list[jax.Array]]:
    """Of each map what queries look for, with positions, and what they take, `[B, h * w, C]`."""
    embeddings = self.param(
      "level_embedding", _NORMAL, (len(levels), self.channels), jnp.float32
    ).astype(self.dtype)
    keys, values = [], []
    for i, x in enumerate(levels):
      value = x.astype(self.dtype).reshape(x.shape[0], -1, self.channels) + embeddings[i]
      positions = flat_positions((x.shape[1], x.shape[2]), self.channels)
      values.append(value)
      keys.append(value + jnp.asarray(positions, self.dtype))
    return keys, values


def blocked_cells(mask_logits: jax.Array, size: Sequence[int]) -> jax.Array:
  """Which cells of a map each query must not see: those outside its mask (paper, equation 2).

  Args:
    mask_logits: `[B, Q, h, w]`.
    size: (height, width) of the map.

  Returns:
    bool `[B, Q, height * width]`; a query whose mask is empty there sees all. It has no gradient.
  """
  logits = lax.stop_gradient(mask_logits).transpose(0, 2, 3, 1)
  logits = resize_bilinear(logits, size, align_corners=False)
  blocked = jax.nn.sigmoid(logits) < 0.5
  blocked = blocked.reshape(blocked.shape[0], -1, blocked.shape[-1]).transpose(0, 2, 1)
  return blocked & ~blocked.all(-1, keepdims=True)


class MaskPredictor(nn.Module):
  """A class and a mask of each query: a mask is its embedding times the mask features."""

  num_outputs: int
  channels: int
  mask_channels: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask_features: jax.Array) -> dict[str, jax.Array]:
    """`[B, Q, C]` and `[B, h, w, mask_channels]` → the two kinds of logits."""
    x = layers.layer_norm(_NORM_EPSILON, self.dtype, "norm")(x)
    classes = layers.torch_dense(self.num_outputs + 1, self.channels, jnp.float32, "classifier")(x)
    for i in range(2):
      x = nn.relu(layers.torch_dense(self.channels, self.channels, self.dtype, f"embedding{i}")(x))
    x = layers.torch_dense(self.mask_channels, self.channels, self.dtype, "embedding2")(x)
    masks = jnp.einsum("bqc,bhwc->bqhw", x, mask_features, preferred_element_type=jnp.float32)
    return {"class_logits": classes, "mask_logits": masks}


class DecoderLayer(nn.Module):
  """Masked cross-attention, self-attention and a feed-forward part; a norm after each sum.

  Attributes:
    num_heads: of both attentions.
    hidden: width inside the feed-forward part.
    dtype: of the computation.
  """

  num_heads: int
  hidden: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    blocked: jax.Array,
  ) -> jax.Array:
    """One layer.

    Args:
      x: `[B, Q, C]`.
      positions: `[Q, C]`, added to what asks, and among queries to what is asked.
      keys: `[B, S, C]`.
      values: `[B, S, C]`.
      blocked: bool `[B, Q, S]`.

    Returns:
      `[B, Q, C]`.
    """
    bias = jnp.where(blocked, _BLOCKED, 0.0)[:, None]
    y = Attention(self.num_heads, self.dtype, name="cross_attention")(
      x + positions, keys, values, bias
    )
    x = self._norm("cross_norm")(x + y)
    asked = x + positions
    y = Attention(self.num_heads, self.dtype, name="self_attention")(asked, asked, x, None)
    x = self._norm("self_norm")(x + y)
    return self._norm("ffn_norm")(x + feed_forward(x, self.hidden, self.dtype))

  def _norm(self, name: str) -> layers.LayerNorm:
    return layers.layer_norm(_NORM_EPSILON, self.dtype, name)


class Attention(nn.Module):
  """Multi-head attention of three inputs; parameters `kernel` `[C, 3C]` of query, key and value.

  Attributes:
    num_heads: that divide the width.
    dtype: of the computation; logits and softmax are float32.

  Raises:
    ValueError: heads that do not divide the width.
  """

  num_heads: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None
  ) -> jax.Array:
    """`[B, Q, C]`, `[B, S, C]` twice and `[B, 1 or heads, Q, S]` → `[B, Q, C]`."""
    features = query.shape[-1]
    if features % self.num_heads:
      raise ValueError(f"{self.num_heads} heads do not divide a width of {features}")
    parts = _Projections(features, self.dtype, name="qkv")(query, key, value)
    shape = (self.num_heads, features // self.num_heads)
    heads = [x.reshape(*x.shape[:-1], *shape) for x in parts]
    out = layers.dot_product_attention(*heads, scale=shape[1] ** -0.5, bias=bias)
    return layers.PointwiseConv(
      features, kernel_init=_xavier_uniform, dtype=self.dtype, name="out"
    )(out.reshape(query.shape))


class _Projections(nn.Module):
  """Three inputs through a third of one matrix each, as in PyTorch's MultiheadAttention."""

  features: int
  dtype: Any

  @nn.compact
  def __call__(self, *inputs: jax.Array) -> list[jax.Array]:
    width = 3 * self.features
    kernel = self.param("kernel", _xavier_uniform, (inputs[0].shape[-1], width), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (width,), jnp.float32)
    kernels = jnp.split(kernel.astype(self.dtype), 3, axis=1)
    biases = jnp.split(bias.astype(self.dtype), 3)
    return [x.astype(self.dtype) @ k + b for x, k, b in zip(inputs, kernels, biases)]
