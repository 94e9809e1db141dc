"""kMaX-DeepLab: cluster centres that gather the pixels of which each is the nearest, as k-means.

Yu et al., "k-means Mask Transformer", ECCV 2022, arXiv:2207.04044; follows the authors' PyTorch
code, `kMaXTransformerDecoder` over the pixel decoder of `kmax_pixel_decoder`. For semantic,
instance and panoptic segmentation alike; MOAT's authors' code has it as its panoptic decoder. It
norms the maps itself, so that it takes a backbone's plain ones.

Deviations: auxiliary answers keep the sizes of their maps, and the loss resizes them as the authors
do in the network.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.heads.kmax_layers import (
  BATCH_NORM_MOMENTUM,
  depthwise_pair,
  head_norm,
  norm,
  normed_conv,
  truncated_normal,
)
from hybrid_vit.heads.kmax_pixel_decoder import PixelDecoder
from hybrid_vit.heads.kmax_semantic import SemanticDecoder
from hybrid_vit.heads.layers import check_levels
from hybrid_vit.models import layers
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.attention import softmax

# Of pixel features' lengths, which are divided by.
_LENGTH_EPSILON = 1e-12

# At first a query is "no object" with this probability.
_VOID_PROBABILITY = 0.9


class KMaX(nn.Module):
  """The whole head (paper, figure 2).

  A call takes maps `[B, h, w, C]` and returns a dict of float32 arrays: "class_logits"
  `[B, Q, num_outputs + 1]`, the last for "no object"; "mask_logits" `[B, Q, h, w]` at the size of
  the finest map, a softmax over queries; "pixel_features" `[B, h, w, mask_channels]` of length 1;
  and "auxiliary", a list of dicts of the same three, of each layer at the size of its map. In
  training there is "semantic_logits", too, `[B, h, w, num_outputs + 1]`.

  Attributes:
    features: the maps that it reads, the finest first; published: strides 4, 8, 16, 32.
    num_outputs: classes, without "no object".
    channels: of the queries.
    mask_channels: of pixel features and mask kernels.
    num_queries: objects at most.
    num_heads: of all attention.
    pixel_channels: see `PixelDecoder.channels`.
    pixel_depths: see `PixelDecoder.depths`.
    pixel_blocks: see `PixelDecoder.block_types`.
    decoder_layers: of the transformer on each map but the finest, the coarsest first.
    decoder_hidden: width inside their feed-forward parts.
    drop_path_rate: of each of a layer's three branches; published on COCO: 0.2.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    remat: recompute each block and layer in the backward pass instead of storing its inside.
    dtype: of the computation; logits, softmax and norm statistics are float32.
  """

  features: tuple[FeatureSpec, ...]
  num_outputs: int
  channels: int = 256
  mask_channels: int = 128
  num_queries: int = 128
  num_heads: int = 8
  pixel_channels: tuple[int, ...] = (512, 256, 128, 64)
  pixel_depths: tuple[int, ...] = (1, 5, 1, 1)
  pixel_blocks: tuple[str, ...] = ("axial", "axial", "bottleneck", "bottleneck")
  decoder_layers: tuple[int, ...] = (2, 2, 2)
  decoder_hidden: int = 2048
  drop_path_rate: float = 0.0
  batch_norm_momentum: float = BATCH_NORM_MOMENTUM
  batch_norm_groups: int = 1
  remat: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array], train: bool = False) -> dict[str, Any]:
    check_levels("kmax", self.features, 4, 4)
    shared = {
      "num_heads": self.num_heads,
      "batch_norm_momentum": self.batch_norm_momentum,
      "batch_norm_groups": self.batch_norm_groups,
      "remat": self.remat,
      "dtype": self.dtype,
    }
    maps = PixelDecoder(
      self.features,
      self.pixel_channels,
      self.pixel_depths,
      self.pixel_blocks,
      name="pixel_decoder",
      **shared,
    )(endpoints, train)
    answer = ClusterDecoder(
      self.num_outputs,
      self.channels,
      self.mask_channels,
      self.num_queries,
      self.decoder_layers,
      self.decoder_hidden,
      self.drop_path_rate,
      name="decoder",
      **shared,
    )(maps, train)
    if train or self.is_initializing():
      answer["semantic_logits"] = SemanticDecoder(
        (*self.features[:2], self.features[-1]),
        self.num_outputs + 1,
        batch_norm_momentum=self.batch_norm_momentum,
        batch_norm_groups=self.batch_norm_groups,
        dtype=self.dtype,
        name="semantic_decoder",
      )(endpoints, train)
    return answer


class ClusterDecoder(nn.Module):
  """The transformer over the pixel decoder's maps; attributes as of `KMaX`.

  A call takes maps `[B, h, w, C]`, the coarsest first, of which layers read all but the last, and
  the final prediction the last one.
  """

  num_outputs: int
  channels: int = 256
  mask_channels: int = 128
  num_queries: int = 128
  decoder_layers: tuple[int, ...] = (2, 2, 2)
  decoder_hidden: int = 2048
  drop_path_rate: float = 0.0
  num_heads: int = 8
  batch_norm_momentum: float = BATCH_NORM_MOMENTUM
  batch_norm_groups: int = 1
  remat: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, maps: tuple[jax.Array, ...], train: bool = False) -> dict[str, Any]:
    if len(self.decoder_layers) != len(maps) - 1:
      raise ValueError(
        f"kmax: decoder_layers is {self.decoder_layers} for {len(maps)} maps: one number for each "
        "but the finest was expected"
      )
    shape = (self.num_queries, self.channels)
    centers = self.param("cluster_centers", truncated_normal(1.0), shape, jnp.float32)
    x = jnp.broadcast_to(centers.astype(self.dtype), (maps[0].shape[0], *shape))
    layer_class = nn.remat(ClusterLayer, static_argnums=(3,)) if self.remat else ClusterLayer
    places = [m for m, count in zip(maps, self.decoder_layers) for _ in range(count)]
    auxiliary = []
    for i, pixels in enumerate(places):
      x, prediction = layer_class(
        self.num_outputs,
        self.mask_channels,
        self.num_heads,
        self.decoder_hidden,
        self.drop_path_rate,
        self.batch_norm_momentum,
        self.batch_norm_groups,
        self.dtype,
        name=f"layer{i}",
      )(x, pixels, train)
      auxiliary.append(prediction)
    of_class = normed_conv(self, self.channels, 1, "class_projection")(x, train)
    of_mask = normed_conv(self, self.channels, 1, "mask_projection")(x, train)
    answer = _predictor(self, self.channels)(of_class, of_mask, maps[-1], train)
    return {**answer, "auxiliary": auxiliary}


class ClusterLayer(nn.Module):
  """One step of k-means, self-attention of the centres and a feed-forward part.

  Attributes:
    num_outputs: classes, without "no object".
    mask_channels: of pixel features and mask kernels.
    num_heads: of the self-attention.
    hidden: width inside the feed-forward part.
    drop_path_rate: of each of the three branches.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation.
  """

  num_outputs: int
  mask_channels: int
  num_heads: int
  hidden: int
  drop_path_rate: float = 0.0
  batch_norm_momentum: float = BATCH_NORM_MOMENTUM
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, pixels: jax.Array, train: bool
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`[B, Q, C]` and `[B, h, w, D]` → `[B, Q, C]` and the prediction that it clustered by."""
    channels = x.shape[-1]
    pixels = normed_conv(self, channels, 1, "pixel_projection")(layers.gelu(pixels), train)
    queries = normed_conv(self, channels, 1, "query_projection")(x, train)
    prediction = _predictor(self, channels)(queries, queries, pixels, train)

    values = normed_conv(
      self, channels, 1, "pixel_value", activation=False, kernel_init=self._narrow(channels)
    )(pixels, train)
    y = gathered(prediction["mask_logits"], values).astype(self.dtype)
    y = norm(self, "update_norm")(y, train)
    x = x + self._branch(y, "update", train)

    y = self._self_attention(queries, train)
    x = layers.gelu(x + self._branch(y, "attention", train))

    y = normed_conv(self, self.hidden, 1, "fc1")(x, train)
    return layers.gelu(x + self._branch(y, "fc2", train, channels)), prediction

  def _self_attention(self, queries: jax.Array, train: bool) -> jax.Array:
    """Attention whose logits batch norm scales instead of the width; keys are half as wide."""
    channels = queries.shape[-1]
    if channels % (2 * self.num_heads):
      raise ValueError(f"kmax: twice {self.num_heads} heads do not divide a width of {channels}")
    qkv = normed_conv(
      self, 2 * channels, 1, "qkv", activation=False, kernel_init=self._narrow(channels)
    )(queries, train)
    q, k, v = (
      part.reshape(*part.shape[:2], self.num_heads, -1)
      for part in jnp.split(qkv, (channels // 2, channels), axis=-1)
    )
    logits = head_norm(self, jnp.einsum("bqhd,bkhd->bhqk", q, k), "similarity_norm", train)
    weights = softmax(logits.astype(jnp.float32), self.dtype)
    y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(queries.shape)
    return layers.gelu(norm(self, "retrieved_norm")(y, train))

  def _branch(self, y: jax.Array, name: str, train: bool, features: int | None = None) -> jax.Array:
    """A last projection, whose norm begins at 0, and drop path."""
    features = y.shape[-1] if features is None else features
    y = normed_conv(self, features, 1, name, activation=False, scale_init=0.0)(y, train)
    return layers.DropPath(self.drop_path_rate, name=f"{name}_drop_path")(y, train)

  def _narrow(self, channels: int) -> layers.Initializer:
    return truncated_normal(channels**-0.5)


def gathered(mask_logits: jax.Array, values: jax.Array) -> jax.Array:
  """The k-means step: sums of the pixels that belong to each centre (paper, equation 6).

  Args:
    mask_logits: `[B, Q, h, w]`; a pixel belongs to the query of its highest one, which has no
      gradient.
    values: `[B, h, w, C]`.

  Returns:
    float32 `[B, Q, C]`.
  """
  owner = jnp.argmax(lax.stop_gradient(mask_logits), axis=1)
  owned = jax.nn.one_hot(owner, mask_logits.shape[1], axis=1, dtype=jnp.float32)
  # Not in half precision: a sum is over thousands of pixels.
  return jnp.einsum(
    "bqhw,bhwc->bqc", owned, values.astype(jnp.float32), precision=lax.Precision.HIGHEST
  )


class Predictor(nn.Module):
  """Classes of queries, and masks: products of their kernels with features of pixels.

  Attributes:
    num_outputs: classes, without "no object".
    channels: between the pixels' convolutions.
    mask_channels: of pixel features and mask kernels.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation; the answers are float32.
  """

  num_outputs: int
  channels: int
  mask_channels: int
  batch_norm_momentum: float = BATCH_NORM_MOMENTUM
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, of_class: jax.Array, of_mask: jax.Array, pixels: jax.Array, train: bool
  ) -> dict[str, jax.Array]:
    """`[B, Q, C]` twice and `[B, h, w, D]` → class and mask logits, and pixel features."""
    x = depthwise_pair(self, pixels, self.channels, ("pixel_depthwise", "pixel_hidden"), train)
    x = normed_conv(
      self,
      self.mask_channels,
      1,
      "pixel_feature",
      activation=False,
      use_bias=True,
      kernel_init=truncated_normal(0.01),
    )(x, train).astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    pixel_features = x * lax.rsqrt(jnp.maximum(squares, _LENGTH_EPSILON**2))

    classes = layers.PointwiseConv(
      self.num_outputs + 1,
      kernel_init=truncated_normal(0.01),
      dtype=jnp.float32,
      name="classifier",
    )(of_class)
    prior = math.log(self.num_outputs * _VOID_PROBABILITY / (1.0 - _VOID_PROBABILITY))
    classes = classes.at[..., -1].add(prior)

    kernels = normed_conv(self, self.mask_channels, 1, "mask_kernel", activation=False)(
      of_mask, train
    )
    masks = jnp.einsum(
      "bhwc,bqc->bqhw",
      pixel_features.astype(self.dtype),
      kernels,
      preferred_element_type=jnp.float32,
    )
    # One channel: the same scale and shift for all queries.
    mask_norm = norm(self, "mask_norm", scale_init=0.1, dtype=jnp.float32)
    masks = mask_norm(masks[..., None], train)[..., 0]
    return {"class_logits": classes, "mask_logits": masks, "pixel_features": pixel_features}


def _predictor(module: Any, channels: int) -> Predictor:
  """The predictor of a decoder or of one of its layers."""
  return Predictor(
    module.num_outputs,
    channels,
    module.mask_channels,
    module.batch_norm_momentum,
    module.batch_norm_groups,
    module.dtype,
    name="predictor",
  )
