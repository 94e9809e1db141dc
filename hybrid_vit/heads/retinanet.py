"""RetinaNet: class and box of every anchor, trained with the focal loss.

Tsung-Yi Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv:1708.02002, as
mmdetection's `RetinaHead` has it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.heads.dense_detection import (
  NORMAL,
  PRIOR_BIAS,
  DenseDetector,
  DenseSettings,
  dense_parts,
  towers,
)
from hybrid_vit.heads.detection_losses import sigmoid_focal, smooth_l1
from hybrid_vit.heads.detectors import register_without_masks
from hybrid_vit.models.layers import Conv
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.anchors import octave_scales
from hybrid_vit.ops.assignment import max_iou_assign
from hybrid_vit.ops.boxes import encode_boxes


@dataclasses.dataclass(frozen=True)
class RetinaNetSettings(DenseSettings):
  """Numbers of RetinaNet; the defaults are mmdetection's.

  Attributes:
    anchor_scales: three an octave.
    positive_iou: of `max_iou_assign`, and so are the next three.
    negative_iou: likewise.
    min_positive_iou: likewise.
    low_quality: likewise.
    beta: of the smooth L1 on offsets; 0 is L1.
  """

  anchor_scales: tuple[float, ...] = octave_scales()
  positive_iou: float = 0.5
  negative_iou: float = 0.4
  min_positive_iou: float = 0.0
  low_quality: str = "own"
  beta: float = 0.0


class RetinaHead(nn.Module):
  """Two towers of convolutions, shared by the levels, for classes and for boxes.

  Attributes:
    features: the levels that it reads, all of one width.
    num_classes: K, without background.
    num_anchors: A, of a cell.
    num_convs: of each tower.
    channels: of the towers.
    dtype: of their computation; what comes out is computed in float32.
  """

  features: tuple[FeatureSpec, ...]
  num_classes: int
  num_anchors: int = 9
  num_convs: int = 4
  channels: int = 256
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, maps: Mapping[str, jax.Array], train: bool = False
  ) -> dict[str, list[jax.Array]]:
    """Maps → of each level "classes" `[B, h, w, A K]` and "deltas" `[B, h, w, 4 A]`, by anchors."""
    del train
    pad = ((1, 1), (1, 1))
    prior = nn.initializers.constant(PRIOR_BIAS)
    classes = Conv(self.num_anchors * self.num_classes, (3, 3), padding=pad, kernel_init=NORMAL,
                      bias_init=prior, name="classifier")  # fmt: skip
    deltas = Conv(4 * self.num_anchors, (3, 3), padding=pad, kernel_init=NORMAL, name="deltas")
    both = towers(self, maps)
    return {"classes": [classes(x) for x, _ in both], "deltas": [deltas(y) for _, y in both]}


class RetinaNet(DenseDetector):
  """RetinaNet; see `DenseDetector`. Losses: "class" and "box"."""

  settings: RetinaNetSettings = RetinaNetSettings()

  def losses(
    self, maps: Mapping[str, jax.Array], targets: Any, sizes: jax.Array, *, train: bool = True
  ) -> dict[str, jax.Array]:
    """The focal loss over all anchors that are not ignored, and L1 over the positives' offsets.

    Both are divided by the number of positives, a picture's counting as one at least.
    """
    s, batch = self.settings, sizes.shape[0]
    found = self.head(maps, train)
    anchors = jnp.concatenate(self.anchors(maps))
    logits = jnp.concatenate(
      [x.reshape(batch, -1, self.head.num_classes) for x in found["classes"]], axis=1
    )
    deltas = jnp.concatenate([x.reshape(batch, -1, 4) for x in found["deltas"]], axis=1)

    def one(logits, deltas, usable, gt_boxes, gt_labels, gt_valid):
      assigned, _ = max_iou_assign(
        anchors, gt_boxes, gt_valid, positive_iou=s.positive_iou, negative_iou=s.negative_iou,
        min_positive_iou=s.min_positive_iou, low_quality=s.low_quality, valid=usable,
      )  # fmt: skip
      positive, gt = assigned > 0, jnp.maximum(assigned - 1, 0)
      wanted, focal = class_loss(logits, positive, gt, gt_boxes, gt_labels, s)
      focal = jnp.sum(jnp.where(assigned[:, None] >= 0, focal, 0))
      apart = smooth_l1(deltas, encode_boxes(anchors, wanted, stds=s.stds, eps=1e-6), s.beta)
      apart = jnp.sum(jnp.where(positive[:, None], apart, 0))
      return focal, apart, jnp.maximum(jnp.sum(positive), 1)

    focal, apart, count = jax.vmap(one)(
      logits, deltas, self.usable(maps, sizes), targets["boxes"], targets["labels"],
      targets["valid"],
    )  # fmt: skip
    total = jnp.sum(count)
    return {"class": jnp.sum(focal) / total, "box": s.box_weight * jnp.sum(apart) / total}


def class_loss(
  logits: jax.Array,
  positive: jax.Array,
  gt: jax.Array,
  gt_boxes: jax.Array,
  gt_labels: jax.Array,
  settings: DenseSettings,
) -> tuple[jax.Array, jax.Array]:
  """(each anchor's true box `[N, 4]`, focal loss `[N, K]`) of one picture.

  Args:
    logits: `[N, K]`.
    positive: bool `[N]`.
    gt: int `[N]`, which true box a positive has.
    gt_boxes: `[G, 4]`.
    gt_labels: int `[G]`.
    settings: of the focal loss.
  """
  if gt_boxes.shape[0]:
    boxes, labels = gt_boxes[gt], gt_labels[gt]
  else:
    boxes, labels = jnp.zeros((gt.shape[0], 4)), gt
  # A row of zeros for background.
  wanted = jax.nn.one_hot(jnp.where(positive, labels, -1), logits.shape[-1])
  return boxes, sigmoid_focal(logits, wanted, settings.alpha, settings.gamma)


def create_retinanet(
  backbone: nn.Module,
  num_classes: int,
  *,
  neck: Mapping[str, Any] | None = None,
  head: Mapping[str, Any] | None = None,
  settings: RetinaNetSettings | None = None,
  batch_norm_groups: int | None = None,
) -> RetinaNet:
  """RetinaNet on a backbone.

  Args:
    backbone: with `features`; built with `num_classes=0`.
    num_classes: K, without background.
    neck: {"name": as registered, further attributes}; by default FPN over strides from 8 on, with
      two levels more from the backbone's coarsest map.
    head: attributes of `RetinaHead`.
    settings: `RetinaNetSettings()` by default.
    batch_norm_groups: of batch norms; None for what the backbone has.

  Raises:
    ValueError: an unknown neck, or attribute of it.
  """
  settings = RetinaNetSettings() if settings is None else settings
  made, shared = dense_parts(backbone, neck, "on_input", batch_norm_groups)
  own = {"num_anchors": settings.num_anchors, "channels": made.outputs[0].channels, **shared}
  made_head = RetinaHead(made.outputs, num_classes, **{**own, **(head or {})})
  return RetinaNet(backbone, made, made_head, settings)


register_without_masks("retinanet", create_retinanet, RetinaNetSettings)
