"""Layers of DINO that are not Deformable DETR's own, and the geometry of padded pyramids.

Zhang et al., "DINO", arXiv:2203.03605; follows the authors' code (IDEA-Research/DINO).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.heads.deformable import DeformableAttention, feed_forward
from hybrid_vit.heads.dense_detection import PRIOR_BIAS
from hybrid_vit.heads.mask2former import Attention
from hybrid_vit.models import layers
from hybrid_vit.ops.deformable_attention import SpatialShapes

NORM_EPSILON = 1e-5
# Sides of proposals on the finest level, of the picture; twice that on each coarser one.
_PROPOSAL_SIDE = 0.05
_PROPOSAL_RANGE = (0.01, 0.99)


class DINODecoderLayer(nn.Module):
  """Queries attend to each other, then to the pyramid around their boxes, then a feed-forward part.

  Attributes:
    hidden: width inside the feed-forward part.
    num_heads: of both attentions.
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
    memory: jax.Array,
    spatial_shapes: SpatialShapes,
    padding_mask: jax.Array,
    bias: jax.Array | None,
  ) -> jax.Array:
    """`[B, N, C]` to the same shape.

    Args:
      x: contents of the queries.
      positions: `[B, N, C]`, of their boxes.
      reference: float32 `[B, N, L, 4]`, the boxes on each map.
      memory: `[B, S, C]`, the maps' cells, level-major.
      spatial_shapes: (height, width) of each map.
      padding_mask: bool `[B, S]`, true for padding.
      bias: `[1, 1, N, N]`, added to the logits among queries.
    """
    features = x.shape[-1]
    asked = x + positions
    y = Attention(self.num_heads, self.dtype, name="self_attention")(asked, asked, x, bias)
    x = self._norm("self_norm")(x + y)
    y = DeformableAttention(
      features,
      self.num_heads,
      len(spatial_shapes),
      self.num_points,
      self.method,
      self.dtype,
      name="cross_attention",
    )(x + positions, reference, memory, spatial_shapes, padding_mask)
    x = self._norm("cross_norm")(x + y)
    return self._norm("ffn_norm")(x + feed_forward(x, self.hidden, self.dtype))

  def _norm(self, name: str) -> layers.LayerNorm:
    return layers.layer_norm(NORM_EPSILON, self.dtype, name)


class BoxHead(nn.Module):
  """Three linear layers to what boxes change by, before the sigmoid; it begins with no change."""

  channels: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[..., C]` → float32 `[..., 4]`."""
    for i in range(2):
      x = nn.relu(layers.torch_dense(self.channels, x.shape[-1], self.dtype, f"fc{i}")(x))
    zeros = nn.initializers.zeros
    return layers.PointwiseConv(4, kernel_init=zeros, dtype=jnp.float32, name="fc2")(x)


def class_head(num_classes: int, name: str) -> layers.PointwiseConv:
  """`[..., C]` → float32 logits `[..., K]`, which begin at a probability of 0.01."""
  return layers.PointwiseConv(
    num_classes,
    kernel_init=layers.torch_conv_init,
    bias_init=nn.initializers.constant(PRIOR_BIAS),
    dtype=jnp.float32,
    name=name,
  )


def inverse_sigmoid(x: jax.Array, eps: float) -> jax.Array:
  """log(x / (1 - x)) of x, cut to [0, 1], with neither part below `eps`."""
  x = jnp.clip(x, 0.0, 1.0)
  return jnp.log(jnp.maximum(x, eps) / jnp.maximum(1 - x, eps))


def filled_cells(shape: tuple[int, int], sizes: jax.Array, canvas: tuple[int, int]) -> jax.Array:
  """Rows and columns of a map that pictures fill, int32 `[B, 2]`, at least 1.

  A cell counts as its first pixel's row and column do: nearest down-sampling of the padding mask
  as PyTorch has it.

  Args:
    shape: (height, width) of the map.
    sizes: int `[B, 2]`, of the pictures.
    canvas: (height, width) of the padded pictures.
  """
  counts = []
  for axis, (cells, pixels) in enumerate(zip(shape, canvas)):
    step = np.float32(pixels) / np.float32(cells)
    first = np.minimum(np.floor(np.arange(cells, dtype=np.float32) * step), pixels - 1)
    counts.append(jnp.sum(jnp.asarray(first) < sizes[:, axis, None], axis=-1))
  return jnp.maximum(jnp.stack(counts, axis=-1), 1).astype(jnp.int32)


def padding_cells(shapes: SpatialShapes, filled: Sequence[jax.Array]) -> jax.Array:
  """Which cells of a pyramid are padding, bool `[B, S]`, from `filled_cells` of each level."""
  masks = []
  for (height, width), count in zip(shapes, filled):
    rows = jnp.arange(height) >= count[:, 0, None]
    columns = jnp.arange(width) >= count[:, 1, None]
    masks.append((rows[:, :, None] | columns[:, None, :]).reshape(count.shape[0], -1))
  return jnp.concatenate(masks, axis=1)


def picture_parts(shapes: SpatialShapes, filled: Sequence[jax.Array]) -> jax.Array:
  """(x, y) part of each map that the pictures fill, float32 `[B, L, 2]`."""
  parts = [count / jnp.array(shape, jnp.float32) for shape, count in zip(shapes, filled)]
  return jnp.stack(parts, axis=1)[..., ::-1]


def picture_centres(shapes: SpatialShapes, filled: Sequence[jax.Array]) -> jax.Array:
  """Centres (x, y) of all cells with the picture from 0 to 1, float32 `[B, S, 2]`."""
  centres = []
  for (height, width), count in zip(shapes, filled):
    y = (jnp.arange(height) + 0.5) / count[:, 0, None]
    x = (jnp.arange(width) + 0.5) / count[:, 1, None]
    both = jnp.broadcast_arrays(x[:, None, :], y[:, :, None])
    centres.append(jnp.stack(both, axis=-1).reshape(count.shape[0], -1, 2))
  return jnp.concatenate(centres, axis=1)


def cell_proposals(
  centres: jax.Array, shapes: SpatialShapes, padding: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """A box on each cell, before the sigmoid, and which are of use (Deformable DETR, section A.4).

  Args:
    centres: `[B, S, 2]`, see `picture_centres`.
    shapes: (height, width) of each map.
    padding: bool `[B, S]`.

  Returns:
    (float32 `[B, S, 4]`, infinite where of no use; bool `[B, S]`).
  """
  sides = np.concatenate(
    [
      np.full((height * width, 2), _PROPOSAL_SIDE * 2.0**level, np.float32)
      for level, (height, width) in enumerate(shapes)
    ]
  )
  boxes = jnp.concatenate([centres, jnp.broadcast_to(sides, centres.shape)], axis=-1)
  low, high = _PROPOSAL_RANGE
  usable = jnp.all((boxes > low) & (boxes < high), axis=-1) & ~padding
  inside = jnp.where(usable[..., None], boxes, 0.5)
  return jnp.where(usable[..., None], jnp.log(inside / (1 - inside)), jnp.inf), usable
