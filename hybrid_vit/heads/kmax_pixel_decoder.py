"""kMaX-DeepLab's pixel decoder: axial attention on the coarse maps, bottlenecks on the fine ones.

Yu et al., "k-means Mask Transformer", ECCV 2022, arXiv:2207.04044, section 3.3; axial blocks are
those of Axial-DeepLab, arXiv:2003.07853. Follows the authors' `kMaXPixelDecoder`.

Deviations: there is no drop path here, whose rate is 0 in all published configurations; relative
positions are looked up for the map at hand, where the authors' network is built for one size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.heads.kmax_layers import (
  BATCH_NORM_MOMENTUM,
  norm,
  normed_conv,
  resize_map,
  truncated_normal,
)
from hybrid_vit.models import layers
from hybrid_vit.models.registry import FeatureSpec

_NORM_EPSILON = 1e-6
BLOCK_TYPES = ("axial", "bottleneck")

# Cells of the longest row or column whose distances the tables of positions hold.
MAX_SPAN = 255

# A block's result is so many times wider than its stage's channels, an axial value twice as wide.
_EXPANSION, _VALUE_EXPANSION = 4, 2


class PixelDecoder(nn.Module):
  """Maps of a backbone to wider ones of the same sizes.

  Attributes:
    features: the maps that it reads, the finest first.
    channels: of each stage, the coarsest first; a stage's map has four times as many.
    depths: blocks of each stage.
    block_types: "axial" or "bottleneck" of each stage.
    num_heads: of the axial attention.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    remat: recompute each block in the backward pass instead of storing its inside.
    dtype: of the computation; norm statistics and softmax are float32.
  """

  features: tuple[FeatureSpec, ...]
  channels: tuple[int, ...] = (512, 256, 128, 64)
  depths: tuple[int, ...] = (1, 5, 1, 1)
  block_types: tuple[str, ...] = ("axial", "axial", "bottleneck", "bottleneck")
  num_heads: int = 8
  batch_norm_momentum: float = BATCH_NORM_MOMENTUM
  batch_norm_groups: int = 1
  remat: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, endpoints: Mapping[str, jax.Array], train: bool = False
  ) -> tuple[jax.Array, ...]:
    """Reads `endpoints[f.name]`, `[B, h, w, C]` → `[B, h, w, 4 * channels]`, the coarsest first.

    Raises:
      ValueError: settings that do not belong to the maps, or a map too large for axial attention.
    """
    self._check()
    found: list[jax.Array] = []
    block_class = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
    for i, feature in enumerate(self.features[::-1]):
      skip = layers.layer_norm(_NORM_EPSILON, self.dtype, f"norm{i}")(endpoints[feature.name])
      x = self._fuse(found[-1], skip, i, train) if found else skip
      for j in range(self.depths[i]):
        x = block_class(
          self.channels[i],
          self.block_types[i],
          self.num_heads,
          self.batch_norm_momentum,
          self.batch_norm_groups,
          self.dtype,
          name=f"stage{i}_block{j}",
        )(x, train)
      found.append(x)
    return tuple(found)

  def _fuse(self, low: jax.Array, high: jax.Array, stage: int, train: bool) -> jax.Array:
    """The coarser map, brought to the finer one's size, plus that one; each to the channels."""
    channels = self.channels[stage]
    side = low.shape[2]
    parts = []
    for name, x in (("low", low), ("high", high)):
      if x.shape[-1] != channels:
        name = f"fuse{stage}_{name}"
        x = normed_conv(self, channels, 1, name, activation=False)(layers.gelu(x), train)
      parts.append(x)
    return resize_map(parts[0], high.shape[1:3], side) + parts[1]

  def _check(self) -> None:
    stages = len(self.features)
    for name in ("channels", "depths", "block_types"):
      values = getattr(self, name)
      if len(values) != stages:
        raise ValueError(
          f"kmax: {name} has {len(values)} values, {values}, for {stages} maps: one of each was "
          "expected, the coarsest first"
        )
    for kind in self.block_types:
      if kind not in BLOCK_TYPES:
        raise ValueError(f"kmax: a block of type {kind!r}; {' or '.join(BLOCK_TYPES)} was expected")


class Block(nn.Module):
  """GELU, a 1x1 convolution, axial attention or a 3x3 one, a 1x1 one, plus the shortcut.

  Attributes:
    channels: of the stage; the result has four times as many.
    block_type: "axial" or "bottleneck".
    num_heads: of the axial attention.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation.
  """

  channels: int
  block_type: str
  num_heads: int
  batch_norm_momentum: float
  batch_norm_groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[B, h, w, C]` → `[B, h, w, 4 * channels]`."""
    x = shortcut = layers.gelu(x)
    features = _EXPANSION * self.channels
    if x.shape[-1] != features:
      shortcut = normed_conv(self, features, 1, "shortcut", activation=False)(x, train)
    if self.block_type == "axial":
      x = normed_conv(self, 2 * self.channels, 1, "conv1")(x, train)
      x = self._axial(self._axial(x, 1, "height", train), 2, "width", train)
      x = layers.gelu(x)
    else:
      x = normed_conv(self, self.channels, 1, "conv1")(x, train)
      x = normed_conv(self, self.channels, 3, "conv2")(x, train)
    # The branch begins at zero.
    x = normed_conv(self, features, 1, "conv3", activation=False, scale_init=0.0)(x, train)
    return x + shortcut

  def _axial(self, x: jax.Array, axis: int, name: str, train: bool) -> jax.Array:
    return AxialAttention(
      self.channels,
      self.num_heads,
      axis,
      self.batch_norm_momentum,
      self.batch_norm_groups,
      self.dtype,
      name=name,
    )(x, train)


class AxialAttention(nn.Module):
  """Attention within each column or row, with learnt relative positions of query, key and value.

  Attributes:
    channels: of queries and keys; values and the result have twice as many.
    num_heads: that divide them.
    axis: 1 for columns, 2 for rows.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation; the softmax is float32.
  """

  channels: int
  num_heads: int
  axis: int
  batch_norm_momentum: float
  batch_norm_groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[B, h, w, C]` → `[B, h, w, 2 * channels]`.

    Raises:
      ValueError: heads that do not divide the channels, or a side beyond `MAX_SPAN`.
    """
    if self.channels % self.num_heads:
      raise ValueError(f"kmax: {self.num_heads} heads do not divide {self.channels} channels")
    if x.shape[self.axis] > MAX_SPAN:
      raise ValueError(
        f"kmax: axial attention over {x.shape[self.axis]} cells; tables of positions hold "
        f"{MAX_SPAN} at most: a smaller picture, or a bottleneck on this map, was expected"
      )
    # Lines are [B * lines, L, C]: a batch norm's groups stay groups of pictures.
    x = x if self.axis == 2 else x.swapaxes(1, 2)
    lines, length = x.shape[:2], x.shape[2]
    x = x.reshape(-1, length, x.shape[-1])
    heads, values = self.num_heads, _VALUE_EXPANSION * self.channels
    qkv = layers.PointwiseConv(
      2 * self.channels + values,
      use_bias=False,
      kernel_init=truncated_normal(x.shape[-1] ** -0.5),
      dtype=self.dtype,
      name="qkv",
    )(x)
    qkv = norm(self, "qkv_norm")(qkv, train)
    q, k, v = (
      part.reshape(*part.shape[:2], heads, -1)
      for part in jnp.split(qkv, (self.channels, 2 * self.channels), axis=-1)
    )
    query_positions, key_positions, value_positions = (
      self._positions(f"{name}_positions", part.shape[-1], length)
      for name, part in (("query", q), ("key", k), ("value", v))
    )
    similarity = jnp.concatenate(
      [
        jnp.einsum("blhd,bmhd->bhlm", q, k),
        jnp.einsum("blhd,dlm->bhlm", q, query_positions),
        jnp.einsum("bmhd,dlm->bhlm", k, key_positions),
      ],
      axis=1,
    )
    similarity = jnp.moveaxis(similarity, 1, -1)
    logits = norm(self, "similarity_norm")(similarity, train).astype(jnp.float32)
    logits = logits.reshape(*logits.shape[:-1], 3, heads).sum(-2)
    weights = jax.nn.softmax(logits, axis=2).astype(self.dtype)
    retrieved = [
      jnp.einsum("blmh,bmhd->blhd", weights, v),
      jnp.einsum("blmh,dlm->blhd", weights, value_positions),
    ]
    # The batch norm's channels: first those of the contents, then those of the positions.
    x = jnp.concatenate([part.reshape(-1, length, values) for part in retrieved], axis=-1)
    x = norm(self, "retrieved_norm")(x, train)
    x = (x[..., :values] + x[..., values:]).reshape(*lines, length, values)
    return x if self.axis == 2 else x.swapaxes(1, 2)

  def _positions(self, name: str, features: int, length: int) -> jax.Array:
    """Entries of a table by distance, key minus query: `[features, length, length]`."""
    table = self.param(name, truncated_normal(1.0), (2 * MAX_SPAN - 1, features), jnp.float32)
    near = table[MAX_SPAN - length : MAX_SPAN + length - 1].astype(self.dtype)
    return layers.relative_position_bias(near.T[:, None], (1, length))
