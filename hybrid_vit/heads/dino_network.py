"""DINO's network over a pyramid: encoder, selection of queries, decoder.

Zhang et al., "DINO", arXiv:2203.03605; follows the authors' `DINO` and `DeformableTransformer`.

Deviations: there is no dropout, whose rate is 0 in all published configurations. The encoder's
heads begin with draws of their own, not as copies of the decoder's. The encoder's box head is
computed for chosen cells alone, and its class head has a gradient there alone: what it answers for
others is compared and no more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.heads.deformable import DeformableEncoderLayer, feed_forward_dense
from hybrid_vit.heads.dino_denoising import DenoisingQueries, blocked_queries
from hybrid_vit.heads.dino_layers import (
  NORM_EPSILON,
  BoxHead,
  DINODecoderLayer,
  cell_proposals,
  class_head,
  filled_cells,
  inverse_sigmoid,
  padding_cells,
  picture_centres,
  picture_parts,
)
from hybrid_vit.heads.layers import check_levels
from hybrid_vit.heads.sine_positions import box_sine_positions, padded_sine_positions
from hybrid_vit.models import layers
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.top_places import top_places

_xavier_uniform = nn.initializers.xavier_uniform()
_NORMAL = nn.initializers.normal(1.0)
_BOX_TEMPERATURE = 10000.0
# Added to the logits of queries that must not be seen; each sees itself.
_BLOCKED = -1e9


class DINOPredictions(NamedTuple):
  """What the network answers; boxes are (centre x, centre y, width, height), the picture 0 to 1.

  Attributes:
    logits: `[L, B, N, K]` of the decoder's L layers; the P denoising queries come first, then the
      Q matched ones.
    boxes: `[L, B, N, 4]`, whose gradient reaches the layer before ("look forward twice").
    references: `[L + 1, B, N, 4]`, boxes before each layer and after the last.
    encoder_logits: `[B, Q, K]` of the chosen cells.
    encoder_boxes: `[B, Q, 4]`.
  """

  logits: jax.Array
  boxes: jax.Array
  references: jax.Array
  encoder_logits: jax.Array
  encoder_boxes: jax.Array


class _Pyramid(NamedTuple):
  """All cells, level-major."""

  tokens: jax.Array  # [B, S, C]
  positions: jax.Array  # [B, S, C]
  shapes: tuple[tuple[int, int], ...]
  padding: jax.Array  # bool [B, S]
  centres: jax.Array  # [B, S, 2]
  parts: jax.Array  # [B, L, 2]


class DINONetwork(nn.Module):
  """The detector without its backbone (paper, figure 2).

  Attributes:
    features: the maps that it reads, the finest first; published: strides 8, 16, 32 (4-scale), or
      4 to 32 (5-scale).
    num_outputs: K, classes.
    num_levels: maps of the pyramid; those beyond `features` come by convolutions of stride 2, the
      first from the coarsest of them.
    channels: of everything inside.
    num_queries: Q, objects at most.
    num_heads: of all attention.
    num_points: places that each head samples on each map.
    encoder_layers: of deformable attention.
    decoder_layers: L.
    hidden: width inside the feed-forward parts.
    num_labels: rows of the table of noised labels; None for K + 1, as published.
    shared_heads: the decoder's layers have one class head and one box head (the authors'), or each
      its own (detrex).
    norm_groups: of the group norms.
    position_temperature: of the cells' positions; 10,000 in detrex.
    position_offset: likewise; -0.5 in detrex.
    reference_eps: of `inverse_sigmoid`.
    sampling_method: of `deformable_attention`.
    remat: recompute each layer in the backward pass instead of storing its inside.
    dtype: of the computation; boxes, logits, softmax and norm statistics are float32.
  """

  features: tuple[FeatureSpec, ...]
  num_outputs: int
  num_levels: int = 4
  channels: int = 256
  num_queries: int = 900
  num_heads: int = 8
  num_points: int = 4
  encoder_layers: int = 6
  decoder_layers: int = 6
  hidden: int = 2048
  num_labels: int | None = None
  shared_heads: bool = True
  norm_groups: int = 32
  position_temperature: float = 20.0
  position_offset: float = 0.0
  reference_eps: float = 1e-3
  sampling_method: str = "gather"
  remat: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    endpoints: Mapping[str, jax.Array],
    sizes: jax.Array,
    canvas: tuple[int, int],
    denoising: DenoisingQueries | None = None,
  ) -> DINOPredictions:
    """Predicts.

    Args:
      endpoints: `[B, h, w, C]` by the names of `features`.
      sizes: int `[B, 2]`, (height, width) of each picture without its padding.
      canvas: (height, width) of the padded pictures.
      denoising: further queries, or None.

    Raises:
      ValueError: fewer levels than features, cells than queries, or rows of labels than classes.
    """
    pyramid = self._pyramid(endpoints, sizes, canvas)
    memory = self._encode(pyramid)
    encoder_logits, chosen = self._choose(memory, pyramid)
    batch = memory.shape[0]
    shape = (self.num_queries, self.channels)
    contents = self.param("query_features", _xavier_uniform, shape, jnp.float32)
    x = jnp.broadcast_to(contents, (batch, *shape))
    reference = jax.nn.sigmoid(lax.stop_gradient(chosen))
    bias = None
    rows = self.num_outputs + 1 if self.num_labels is None else self.num_labels
    if rows < self.num_outputs:
      raise ValueError(f"dino: {rows} rows of noised labels for {self.num_outputs} classes")
    table = self.param("label_embedding", _NORMAL, (rows, self.channels), jnp.float32)
    if denoising is not None:
      filled = denoising.filled[..., None]
      x = jnp.concatenate([jnp.where(filled, table[denoising.labels], 0.0), x], axis=1)
      # A slot without an object has the logits 0.
      blank = jnp.where(filled, inverse_sigmoid(denoising.boxes, self.reference_eps), 0.0)
      reference = jnp.concatenate([jax.nn.sigmoid(blank), reference], axis=1)
      blocked = blocked_queries(denoising.group, self.num_queries)
      bias = jnp.where(blocked, _BLOCKED, 0.0)[None, None]
    return DINOPredictions(
      *self._decode(x.astype(self.dtype), reference, memory, pyramid, bias),
      encoder_logits,
      jax.nn.sigmoid(chosen),
    )

  def _pyramid(self, endpoints, sizes, canvas) -> _Pyramid:
    check_levels("dino", self.features, 1, self.num_levels)
    maps = [endpoints[f.name] for f in self.features]
    levels = [self._projected(x, i, 1) for i, x in enumerate(maps)]
    for i in range(len(maps), self.num_levels):
      levels.append(self._projected(maps[-1] if i == len(maps) else levels[-1], i, 3))
    shapes = tuple((x.shape[1], x.shape[2]) for x in levels)
    filled = [filled_cells(shape, sizes, canvas) for shape in shapes]
    embeddings = self.param(
      "level_embedding", _NORMAL, (self.num_levels, self.channels), jnp.float32
    )
    positions = [
      padded_sine_positions(
        shape,
        count,
        self.channels,
        temperature=self.position_temperature,
        offset=self.position_offset,
      ).reshape(sizes.shape[0], -1, self.channels)
      + embeddings[i]
      for i, (shape, count) in enumerate(zip(shapes, filled))
    ]
    flat = [x.reshape(x.shape[0], -1, self.channels) for x in levels]
    return _Pyramid(
      jnp.concatenate(flat, axis=1),
      jnp.concatenate(positions, axis=1),
      shapes,
      padding_cells(shapes, filled),
      picture_centres(shapes, filled),
      picture_parts(shapes, filled),
    )

  def _projected(self, x: jax.Array, level: int, size: int) -> jax.Array:
    pad, stride = (0, 1) if size == 1 else (1, 2)
    x = layers.Conv(
      self.channels,
      (size, size),
      strides=(stride, stride),
      padding=((pad, pad), (pad, pad)),
      kernel_init=_xavier_uniform,
      dtype=self.dtype,
      name=f"projection{level}",
    )(x)
    return nn.GroupNorm(
      self.norm_groups,
      epsilon=NORM_EPSILON,
      use_fast_variance=False,
      dtype=self.dtype,
      name=f"projection{level}_norm",
    )(x)

  def _encode(self, pyramid: _Pyramid) -> jax.Array:
    layer_class = DeformableEncoderLayer
    if self.remat:
      layer_class = nn.remat(layer_class, static_argnums=(4,))  # the sizes
    reference = pyramid.centres[:, :, None] * pyramid.parts[:, None]
    x = pyramid.tokens
    for i in range(self.encoder_layers):
      x = layer_class(
        self.hidden,
        self.num_heads,
        self.num_points,
        self.sampling_method,
        self.dtype,
        name=f"encoder{i}",
      )(x, pyramid.positions, reference, pyramid.shapes, pyramid.padding)
    return x

  def _choose(self, memory: jax.Array, pyramid: _Pyramid) -> tuple[jax.Array, jax.Array]:
    """(class logits `[B, Q, K]`, boxes before the sigmoid `[B, Q, 4]`) of the best cells."""
    cells = memory.shape[1]
    if cells < self.num_queries:
      sizes = ", ".join(f"{height} x {width}" for height, width in pyramid.shapes)
      raise ValueError(
        f"dino: {self.num_queries} queries are chosen among {cells} cells (maps of {sizes}); "
        "larger pictures or fewer queries were expected"
      )
    proposals, usable = cell_proposals(pyramid.centres, pyramid.shapes, pyramid.padding)
    dense = feed_forward_dense(self.channels, self.channels, self.dtype, "proposal")
    norm = layers.layer_norm(NORM_EPSILON, self.dtype, "proposal_norm")
    classify = class_head(self.num_outputs, "encoder_classifier")
    usable_memory = jnp.where(usable[..., None], memory, jnp.zeros((), memory.dtype))
    scores = jnp.max(classify(norm(dense(lax.stop_gradient(usable_memory)))), axis=-1)
    places = top_places(scores, self.num_queries)
    best = jnp.take_along_axis(usable_memory, places[..., None], axis=1)
    best = norm(dense(best))
    deltas = BoxHead(self.channels, self.dtype, name="encoder_boxes")(best)
    own = jnp.take_along_axis(proposals, places[..., None], axis=1)
    return classify(best), deltas + own

  def _decode(
    self,
    x: jax.Array,
    reference: jax.Array,
    memory: jax.Array,
    pyramid: _Pyramid,
    bias: jax.Array | None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(logits, boxes, references) of all layers."""
    layer_class = DINODecoderLayer
    if self.remat:
      layer_class = nn.remat(layer_class, static_argnums=(5,))  # the sizes
    heads = [
      (class_head(self.num_outputs, f"classifier{i}"),
       BoxHead(self.channels, self.dtype, name=f"boxes{i}"))
      for i in range(1 if self.shared_heads else self.decoder_layers)
    ]  # fmt: skip
    heads = heads * self.decoder_layers if self.shared_heads else heads
    norm = layers.layer_norm(NORM_EPSILON, self.dtype, "decoder_norm")
    position_layers = [
      feed_forward_dense(self.channels, fan_in, self.dtype, f"query_position{i}")
      for i, fan_in in enumerate((2 * self.channels, self.channels))
    ]
    parts = jnp.concatenate([pyramid.parts, pyramid.parts], axis=-1)[:, None]
    references = [reference]
    logits, boxes = [], []
    for i, (classify, box_head) in enumerate(heads):
      # What a layer reads is detached; what its box is counted from for the loss is not.
      before, fixed = references[-1], lax.stop_gradient(references[-1])
      on_maps = fixed[:, :, None] * parts
      sines = box_sine_positions(on_maps[:, :, 0], self.channels // 2, temperature=_BOX_TEMPERATURE)
      positions = position_layers[1](nn.relu(position_layers[0](sines)))
      x = layer_class(
        self.hidden,
        self.num_heads,
        self.num_points,
        self.sampling_method,
        self.dtype,
        name=f"decoder{i}",
      )(x, positions, on_maps, memory, pyramid.shapes, pyramid.padding, bias)
      after = box_head(x) + inverse_sigmoid(fixed, self.reference_eps)
      references.append(jax.nn.sigmoid(after))
      normed = norm(x)
      logits.append(classify(normed))
      box = box_head(normed) + inverse_sigmoid(before, self.reference_eps)
      boxes.append(jax.nn.sigmoid(box))
    return jnp.stack(logits), jnp.stack(boxes), jnp.stack(references)
