"""The layers of deformable attention that detectors and Mask2Former share.

Zhu et al., "Deformable DETR", arXiv:2010.04159, sections 4.1 and A.2, as the authors' code has them
(`MSDeformAttn`, `DeformableTransformerEncoderLayer`), which Mask2Former, DINO and detrex copied.

Offsets and attention weights are float32 whatever the compute type: a place on a map of 200 cells
needs more bits than bfloat16 has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.models import layers
from hybrid_vit.ops.deformable_attention import SpatialShapes, deformable_attention

_NORM_EPSILON = 1e-5
_xavier_uniform = nn.initializers.xavier_uniform()


class DeformableAttention(nn.Module):
  """Each query samples `num_points` places on every map, around its reference point.

  Attributes:
    features: width of queries, values and result.
    num_heads: each has `features / num_heads` channels and places of its own.
    num_levels: maps.
    num_points: places on each map.
    method: of `deformable_attention`.
    dtype: of the computation but for the places.
  """

  features: int
  num_heads: int = 8
  num_levels: int = 4
  num_points: int = 4
  method: str = "gather"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    query: jax.Array,
    reference: jax.Array,
    value: jax.Array,
    spatial_shapes: SpatialShapes,
    padding_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Attends.

    Args:
      query: `[B, Q, features]`.
      reference: `[B or 1, Q, L, 2]`, (x, y) with the map from 0 to 1, or `[B or 1, Q, L, 4]`, boxes
        (centre x, centre y, width, height), whose offsets are in halves of the box over
        `num_points`.
      value: `[B, S, features]`, the maps' cells, level-major.
      spatial_shapes: (height, width) of each map.
      padding_mask: bool `[B, S]`, true for cells that are padding and count as 0.

    Returns:
      `[B, Q, features]`.

    Raises:
      ValueError: heads that do not divide the width, maps that are not `num_levels`, or a reference
        of other than 2 or 4 numbers.
    """
    self._check(reference, spatial_shapes)
    batch, queries, _ = query.shape
    heads, levels, points = self.num_heads, self.num_levels, self.num_points
    value = self._dense(self.features, "value", _xavier_uniform)(value)
    if padding_mask is not None:
      value = jnp.where(padding_mask[..., None], jnp.zeros((), value.dtype), value)
    value = value.reshape(batch, -1, heads, self.features // heads)

    exact = query.astype(jnp.float32)
    zeros = nn.initializers.zeros
    count = heads * levels * points
    offsets = layers.Dense(
      2 * count, kernel_init=zeros, bias_init=self._offset_init, dtype=jnp.float32, name="offsets"
    )(exact).reshape(batch, queries, heads, levels, points, 2)
    weights = layers.Dense(count, kernel_init=zeros, dtype=jnp.float32, name="weights")(exact)
    weights = jax.nn.softmax(weights.reshape(batch, queries, heads, -1), axis=-1)
    weights = weights.reshape(batch, queries, heads, levels, points)

    reference = reference.astype(jnp.float32)[:, :, None, :, None]
    if reference.shape[-1] == 2:
      sizes = np.array([(width, height) for height, width in spatial_shapes], np.float32)
      locations = reference + offsets / sizes[:, None]
    else:
      locations = reference[..., :2] + offsets / points * reference[..., 2:] * 0.5
    out = deformable_attention(value, spatial_shapes, locations, weights, method=self.method)
    return self._dense(self.features, "out", _xavier_uniform)(out.reshape(batch, queries, -1))

  def _dense(self, features: int, name: str, init: layers.Initializer) -> layers.PointwiseConv:
    return layers.PointwiseConv(features, kernel_init=init, dtype=self.dtype, name=name)

  def _offset_init(self, key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Head m looks along direction m of M, point p at p + 1 cells' distance (section A.2)."""
    del key
    angles = 2 * math.pi * np.arange(self.num_heads) / self.num_heads
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    directions = directions / np.abs(directions).max(-1, keepdims=True)
    steps = np.arange(1, self.num_points + 1)
    grid = directions[:, None, None] * steps[:, None]
    grid = np.broadcast_to(grid, (self.num_heads, self.num_levels, self.num_points, 2))
    return jnp.asarray(grid.reshape(shape), dtype)

  def _check(self, reference: jax.Array, spatial_shapes: SpatialShapes) -> None:
    if self.features % self.num_heads:
      raise ValueError(
        f"DeformableAttention: {self.num_heads} heads do not divide a width of {self.features}"
      )
    if len(spatial_shapes) != self.num_levels or reference.shape[2] != self.num_levels:
      raise ValueError(
        f"DeformableAttention is made for {self.num_levels} maps; spatial_shapes names "
        f"{len(spatial_shapes)} and the reference points {reference.shape[2]}"
      )
    if reference.shape[-1] not in (2, 4):
      raise ValueError(
        f"reference points have {reference.shape[-1]} numbers; (x, y) or (x, y, width, height) "
        "was expected"
      )


class DeformableEncoderLayer(nn.Module):
  """Tokens of a pyramid attend to the pyramid, then a feed-forward part; a norm after each.

  Attributes:
    hidden: width inside the feed-forward part.
    num_heads: of the attention.
    num_points: places on each map.
    method: of `deformable_attention`.
    dtype: of the computation.
  """

  hidden: int
  num_heads: int = 8
  num_points: int = 4
  method: str = "gather"
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    positions: jax.Array,
    reference: jax.Array,
    spatial_shapes: SpatialShapes,
    padding_mask: jax.Array | None = None,
  ) -> jax.Array:
    """`[B, S, C]` to the same shape.

    Args:
      x: the maps' cells, level-major.
      positions: `[B or 1, S, C]`, added to what asks and not to what answers.
      reference: `[B or 1, S, L, 2]`, see `cell_centres`.
      spatial_shapes: (height, width) of each map.
      padding_mask: bool `[B, S]`, true for padding.
    """
    y = DeformableAttention(
      x.shape[-1],
      self.num_heads,
      len(spatial_shapes),
      self.num_points,
      self.method,
      self.dtype,
      name="attention",
    )(x + positions.astype(x.dtype), reference, x, spatial_shapes, padding_mask)
    x = layers.layer_norm(_NORM_EPSILON, self.dtype, "norm1")(x + y)
    y = feed_forward(x, self.hidden, self.dtype)
    return layers.layer_norm(_NORM_EPSILON, self.dtype, "norm2")(x + y)


def feed_forward(x: jax.Array, hidden: int, dtype: Any) -> jax.Array:
  """`[B, N, C]` through `hidden` and ReLU to the same shape, in the module that calls it."""
  features = x.shape[-1]
  y = nn.relu(feed_forward_dense(hidden, features, dtype, "fc1")(x))
  return feed_forward_dense(features, hidden, dtype, "fc2")(y)


def feed_forward_dense(
  features: int, fan_in: int, dtype: Any, name: str | None
) -> layers.PointwiseConv:
  """A matrix that begins as Xavier has it, uniform, with the bias that PyTorch gives it."""
  return layers.PointwiseConv(
    features,
    kernel_init=_xavier_uniform,
    bias_init=layers.torch_bias_init(fan_in),
    dtype=dtype,
    name=name,
  )


def cell_centres(spatial_shapes: SpatialShapes) -> np.ndarray:
  """Reference points of all cells of a pyramid on each of its maps, float32 `[1, S, L, 2]`.

  The centre (x, y) of cell (i, j) is ((j + 0.5) / width, (i + 0.5) / height), the same place on
  every map: pictures fill their maps.
  """
  centres = []
  for height, width in spatial_shapes:
    y, x = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width,
                       indexing="ij")  # fmt: skip
    centres.append(np.stack([x, y], axis=-1).reshape(-1, 2))
  found = np.concatenate(centres)[None, :, None]
  shape = (1, found.shape[1], len(spatial_shapes), 2)
  return np.broadcast_to(found, shape).astype(np.float32)
