"""Sparse R-CNN over any backbone of the registry: learned proposals, refined by dynamic heads.

Peize Sun et al., "Sparse R-CNN: End-to-End Object Detection with Learnable Proposals", CVPR 2021,
arXiv:2011.12450, as mmdetection's `SparseRCNN` has it. backbone → neck → stages, each of which
pools the features of N boxes, filters them by weights made of the box's own vector, and moves the
box. Predictions are matched to objects one to one, and nothing is suppressed.

Deviations: the number of objects that losses are divided by is of the whole batch and at least 1
(mmdetection's is the mean of the devices', plus the least float); boxes are compared as parts of
their pictures, of which no union of areas counts as less than 1e-12 (there, 1e-6 pixels). There is
no dropout, whose rate is 0 in all published configurations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.heads.batch_norm_groups import groups_of, with_groups
from hybrid_vit.heads.deformable import feed_forward, feed_forward_dense
from hybrid_vit.heads.dense_detection import PRIOR_BIAS, dense_parts
from hybrid_vit.heads.detectors import register_without_masks
from hybrid_vit.heads.dino import numbered, picture_sides, top_detections
from hybrid_vit.heads.dino_losses import (
  BoxTargets,
  SetLossSettings,
  set_losses,
  weighted_losses,
)
from hybrid_vit.heads.layers import check_levels
from hybrid_vit.heads.mask2former import Attention
from hybrid_vit.heads.rcnn import Targets
from hybrid_vit.models import layers
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.boxes import centres_to_corners, decode_boxes, elementwise_giou
from hybrid_vit.ops.roi_align import pyramid_roi_align

_NORM_EPSILON = 1e-5
_LEAST_AREA = 1e-12
_XAVIER = nn.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class SparseRCNNSettings(SetLossSettings):
  """All that is not a layer; the defaults are mmdetection's.

  Attributes:
    detections: D, so many of a picture; None for as many as proposals.
  """

  class_weight: float = 2.0
  log_epsilon: float = 1e-12
  detections: int | None = None


class SparsePredictions(NamedTuple):
  """What the stages answer.

  Attributes:
    logits: `[S, B, N, K]` of the S stages.
    boxes: `[S, B, N, 4]` in pixels, not clipped. Gradients reach a stage's own layers and, in the
      first, the learned boxes.
  """

  logits: jax.Array
  boxes: jax.Array


class DynamicConv(nn.Module):
  """Two 1x1 convolutions of pooled features whose kernels are made of the box's vector.

  Attributes:
    hidden: channels between the two.
    dtype: of the computation.
  """

  hidden: int = 64
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, pooled: jax.Array) -> jax.Array:
    """Vectors `[..., C]` and features `[..., P, P, C]` → `[..., C]`."""
    *batch, channels = x.shape
    size = channels * self.hidden
    kernels = feed_forward_dense(2 * size, channels, self.dtype, "kernels")(x)
    first = kernels[..., :size].reshape(*batch, channels, self.hidden)
    second = kernels[..., size:].reshape(*batch, self.hidden, channels)
    y = pooled.astype(self.dtype).reshape(*batch, -1, channels)
    y = nn.relu(self._norm("norm_in")(y @ first))
    y = nn.relu(self._norm("norm_out")(y @ second))
    y = y.reshape(*batch, -1)
    y = feed_forward_dense(channels, y.shape[-1], self.dtype, "fc")(y)
    return nn.relu(self._norm("fc_norm")(y))

  def _norm(self, name: str) -> layers.LayerNorm:
    return layers.layer_norm(_NORM_EPSILON, self.dtype, name)


class DynamicStage(nn.Module):
  """One stage's head (paper, figure 3): boxes attend to each other, then each to its own features.

  Attributes:
    num_classes: K.
    num_heads: of the attention among boxes.
    hidden: width inside the feed-forward part.
    dynamic_hidden: of `DynamicConv`.
    num_class_fcs: linear layers before the classes.
    num_box_fcs: linear layers before the offsets.
    dtype: of the computation; what comes out is computed in float32.
  """

  num_classes: int
  num_heads: int = 8
  hidden: int = 2048
  dynamic_hidden: int = 64
  num_class_fcs: int = 1
  num_box_fcs: int = 3
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, pooled: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Vectors `[B, N, C]` and features `[B, N, P, P, C]` → logits, offsets, and the next vectors.

    Returns:
      float32 `[B, N, K]` and `[B, N, 4]`; `[B, N, C]`.
    """
    x = x.astype(self.dtype)
    y = Attention(self.num_heads, self.dtype, name="self_attention")(x, x, x, None)
    x = self._norm("self_norm")(x + y)
    y = DynamicConv(self.dynamic_hidden, self.dtype, name="interaction")(x, pooled)
    x = self._norm("interaction_norm")(x + y)
    x = self._norm("ffn_norm")(x + feed_forward(x, self.hidden, self.dtype))
    of_class = self._tower(x, "class", self.num_class_fcs)
    of_box = self._tower(x, "box", self.num_box_fcs)
    prior = nn.initializers.constant(PRIOR_BIAS)
    logits = layers.PointwiseConv(
      self.num_classes, kernel_init=_XAVIER, bias_init=prior, name="classifier"
    )(of_class)
    return logits, feed_forward_dense(4, x.shape[-1], jnp.float32, "deltas")(of_box), x

  def _tower(self, x: jax.Array, kind: str, count: int) -> jax.Array:
    for i in range(count):
      x = layers.PointwiseConv(
        x.shape[-1], use_bias=False, kernel_init=_XAVIER, dtype=self.dtype, name=f"{kind}_fc{i}"
      )(x)
      x = nn.relu(self._norm(f"{kind}_norm{i}")(x))
    return x.astype(jnp.float32)

  def _norm(self, name: str) -> layers.LayerNorm:
    return layers.layer_norm(_NORM_EPSILON, self.dtype, name)


class SparseHead(nn.Module):
  """Learned boxes and vectors, and the stages that refine them.

  Attributes:
    features: the levels that boxes are pooled from, all of one width.
    num_outputs: K, classes.
    num_proposals: N; published: 100 and 300.
    num_stages: S.
    num_heads: of `DynamicStage`, and so are the next four.
    hidden: likewise.
    dynamic_hidden: likewise.
    num_class_fcs: likewise.
    num_box_fcs: likewise.
    pool_size: P, side of a box's features.
    sampling_ratio: of `roi_align`; 0 is adaptive.
    finest_scale: of `roi_levels`.
    stds: of the offsets.
    remat: recompute each stage in the backward pass instead of storing its inside.
    dtype: of the computation; logits and boxes are float32.
  """

  features: tuple[FeatureSpec, ...]
  num_outputs: int
  num_proposals: int = 100
  num_stages: int = 6
  num_heads: int = 8
  hidden: int = 2048
  dynamic_hidden: int = 64
  num_class_fcs: int = 1
  num_box_fcs: int = 3
  pool_size: int = 7
  sampling_ratio: int = 2
  finest_scale: float = 56.0
  stds: tuple[float, float, float, float] = (0.5, 0.5, 1.0, 1.0)
  remat: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, maps: Mapping[str, jax.Array], sizes: jax.Array) -> SparsePredictions:
    """Maps `[B, h, w, C]` of the features, and the pictures' (height, width) `[B, 2]`."""
    check_levels("sparse_rcnn", self.features, 1)
    batch, width = sizes.shape[0], self.features[0].channels
    # All begin as the whole picture.
    own = self.param("proposal_boxes", _whole_pictures, (self.num_proposals, 4), jnp.float32)
    vectors = self.param(
      "proposal_features", nn.initializers.normal(1.0), (self.num_proposals, width), jnp.float32
    )
    boxes = centres_to_corners(own) * picture_sides(sizes)
    x = jnp.broadcast_to(vectors, (batch, *vectors.shape))
    pyramid = [maps[level.name].astype(self.dtype) for level in self.features]
    stage_class = nn.remat(DynamicStage) if self.remat else DynamicStage
    logits, answers = [], []
    for i in range(self.num_stages):
      pooled = pyramid_roi_align(
        pyramid, boxes, output_size=self.pool_size,
        strides=[level.stride for level in self.features], sampling_ratio=self.sampling_ratio,
        aligned=True, finest_scale=self.finest_scale,
      )  # fmt: skip
      of_class, deltas, x = stage_class(
        self.num_outputs, self.num_heads, self.hidden, self.dynamic_hidden, self.num_class_fcs,
        self.num_box_fcs, self.dtype, name=f"stage{i}",
      )(x, pooled)  # fmt: skip
      found = decode_boxes(boxes, deltas, stds=self.stds, two_sided=True)
      logits.append(of_class)
      answers.append(found)
      boxes = lax.stop_gradient(found)
    return SparsePredictions(jnp.stack(logits), jnp.stack(answers))


_PARTS = ("backbone", "neck")


class SparseRCNN(nn.Module):
  """The detector. Its parameters lie under "backbone", "neck" and "head".

  Attributes:
    backbone: of the registry's contract, without a head.
    neck: between backbone and head.
    head: over the neck's levels.
    settings: all that is not a layer.
  """

  backbone: nn.Module
  neck: nn.Module
  head: SparseHead
  settings: SparseRCNNSettings = SparseRCNNSettings()

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The levels that the head reads."""
    return self.head.features

  @property
  def batch_norm_groups(self) -> int:
    """See `heads.batch_norm_groups`."""
    return groups_of(self, *_PARTS)

  def with_batch_norm_groups(self, groups: int) -> SparseRCNN:
    """See `heads.batch_norm_groups`."""
    return with_groups(self, groups, *_PARTS)

  def __call__(
    self,
    images: jax.Array,
    train: bool = False,
    targets: Targets | None = None,
    key: jax.Array | None = None,
    sizes: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    """Losses of a batch, or its detections.

    Args:
      images: `[B, H, W, 3]`, padded below and to the right.
      train: of dropped paths and batch norm.
      targets: what is there, masks not read; without them, detections come out.
      key: not read: nothing is sampled.
      sizes: int `[B, 2]`, (height, width) of each picture without its padding; all of it by
        default.

    Returns:
      With targets float32 scalars, whose sum is to be minimised: "class0", "l1_0", "giou0" of the
      first stage and so on. Else float32 "boxes" `[B, D, 4]`, which may stand out of the picture,
      by falling "scores" `[B, D]`, int32 "labels" `[B, D]`, and bool "valid" `[B, D]`, all true.
    """
    del key
    _, endpoints = self.backbone(images, train=train)
    maps = self.neck(endpoints, train)
    if sizes is None:
      sizes = jnp.broadcast_to(jnp.array(images.shape[1:3]), (images.shape[0], 2))
    return self.detect(maps, sizes) if targets is None else self.losses(maps, targets, sizes)

  def losses(
    self, maps: Mapping[str, jax.Array], targets: Targets, sizes: jax.Array
  ) -> dict[str, jax.Array]:
    """Losses on a pyramid, all stages' alike: see `__call__`."""
    return sparse_losses(self.head(maps, sizes), targets, sizes, self.settings)

  def detect(self, maps: Mapping[str, jax.Array], sizes: jax.Array) -> dict[str, jax.Array]:
    """Detections on a pyramid, of the last stage: see `__call__`."""
    found, count = self.head(maps, sizes), self.settings.detections
    count = self.head.num_proposals if count is None else count
    return top_detections(found.logits[-1], found.boxes[-1], count)


def sparse_losses(
  found: SparsePredictions, targets: Targets, sizes: jax.Array, settings: SetLossSettings
) -> dict[str, jax.Array]:
  """All weighted losses by name: see `SparseRCNN.__call__`.

  The focal loss, the L1 distance of corners as parts of the picture, and 1 - generalised IoU, each
  stage matched for itself by the same three.
  """
  sides = picture_sides(sizes)
  valid = jnp.asarray(targets["valid"], bool)
  true = jnp.asarray(targets["boxes"], jnp.float32) / sides
  wanted = BoxTargets(
    jnp.where(valid[..., None], true, 0.0), jnp.asarray(targets["labels"], jnp.int32), valid
  )
  losses = set_losses(found.logits, found.boxes / sides, wanted, settings, corner_terms)
  answer = {}
  for i in range(found.logits.shape[0]):
    for name, value in weighted_losses(losses, settings).items():
      answer[numbered(name, i)] = value[i]
  return answer


def corner_terms(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sum of |d|, and generalised IoU, of boxes `[..., 4]` by their corners: see `BoxTerms`."""
  distance = jnp.sum(jnp.abs(first - second), axis=-1)
  return distance, elementwise_giou(first, second, eps=_LEAST_AREA)


def create_sparse_rcnn(
  backbone: nn.Module,
  num_classes: int,
  *,
  neck: Mapping[str, Any] | None = None,
  head: Mapping[str, Any] | None = None,
  settings: SparseRCNNSettings | None = None,
  batch_norm_groups: int | None = None,
) -> SparseRCNN:
  """Sparse R-CNN on a backbone.

  Args:
    backbone: with `features`; built with `num_classes=0`.
    num_classes: K.
    neck: {"name": as registered, further attributes}; FPN without further levels by default.
    head: attributes of `SparseHead`, such as `num_proposals`.
    settings: `SparseRCNNSettings()` by default.
    batch_norm_groups: of the neck's batch norms; None for what the backbone has.

  Raises:
    ValueError: an unknown neck, or attribute of it.
  """
  settings = SparseRCNNSettings() if settings is None else settings
  made, shared = dense_parts(backbone, neck or {"name": "fpn"}, "none", batch_norm_groups)
  made_head = SparseHead(made.outputs, num_classes, **{**shared, **(head or {})})
  return SparseRCNN(backbone, made, made_head, settings)


def _whole_pictures(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  """(centre x, centre y, width, height), the picture from 0 to 1."""
  del key
  return jnp.broadcast_to(jnp.array([0.5, 0.5, 1.0, 1.0], dtype), shape)


register_without_masks("sparse_rcnn", create_sparse_rcnn, SparseRCNNSettings)
