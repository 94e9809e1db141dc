"""ATSS: one anchor a cell, positives chosen by the statistics of their overlaps, and a centerness.

Shifeng Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive
Training Sample Selection", CVPR 2020, arXiv:1912.02424, as mmdetection's `ATSSHead` has it.
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
from hybrid_vit.heads.detection_losses import binary_cross_entropy
from hybrid_vit.heads.detectors import register_without_masks
from hybrid_vit.heads.retinanet import class_loss
from hybrid_vit.models.layers import Conv
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.assignment import atss_assign
from hybrid_vit.ops.boxes import decode_boxes, elementwise_giou


@dataclasses.dataclass(frozen=True)
class ATSSSettings(DenseSettings):
  """Numbers of ATSS; the defaults are mmdetection's.

  Attributes:
    candidates_per_level: of `atss_assign`.
    centerness_weight: of its loss.
  """

  anchor_ratios: tuple[float, ...] = (1.0,)
  stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2)
  box_weight: float = 2.0
  nms: float = 0.6
  candidates_per_level: int = 9
  centerness_weight: float = 1.0


class Scale(nn.Module):
  """Multiplies by one number that is learned."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Any shape, float32."""
    return x * self.param("scale", nn.initializers.ones, (), jnp.float32)


class ATSSHead(nn.Module):
  """Two towers with group norm, shared by the levels; offsets times a number of each level.

  Attributes:
    features: the levels that it reads, all of one width.
    num_classes: K, without background.
    num_convs: of each tower.
    channels: of the towers.
    norm_groups: of the group norms.
    num_anchors: A, of a cell.
    dtype: of the towers' computation; what comes out is computed in float32.
  """

  features: tuple[FeatureSpec, ...]
  num_classes: int
  num_convs: int = 4
  channels: int = 256
  norm_groups: int = 32
  num_anchors: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, maps: Mapping[str, jax.Array], train: bool = False
  ) -> dict[str, list[jax.Array]]:
    """Maps → of each level "classes" `[B, h, w, A K]`, "deltas" (4 A) and "centerness" (A)."""
    del train

    def conv(width: int, name: str, bias: float = 0.0) -> nn.Conv:
      init = nn.initializers.constant(bias)
      pad = ((1, 1), (1, 1))
      return Conv(width, (3, 3), padding=pad, kernel_init=NORMAL, bias_init=init, name=name)

    classes = conv(self.num_anchors * self.num_classes, "classifier", PRIOR_BIAS)
    deltas, centerness = conv(4 * self.num_anchors, "deltas"), conv(self.num_anchors, "centerness")
    both = towers(self, maps, self.norm_groups)
    return {
      "classes": [classes(x) for x, _ in both],
      "deltas": [Scale(name=f"scale{i}")(deltas(y)) for i, (_, y) in enumerate(both)],
      "centerness": [centerness(y) for _, y in both],
    }


class ATSS(DenseDetector):
  """ATSS; see `DenseDetector`. Losses: "class", "box" and "centerness"."""

  settings: ATSSSettings = ATSSSettings()

  def losses(
    self, maps: Mapping[str, jax.Array], targets: Any, sizes: jax.Array, *, train: bool = True
  ) -> dict[str, jax.Array]:
    """Focal loss over all anchors; of the positives generalised IoU and the centerness's entropy.

    The first and the last are divided by the number of positives, a picture's counting as one at
    least; the box loss is a mean weighted by the true centerness, whose sum counts as one at least.
    """
    s, batch = self.settings, sizes.shape[0]
    found = self.head(maps, train)
    levels = self.anchors(maps)
    anchors = jnp.concatenate(levels)
    logits, deltas, centerness = (
      jnp.concatenate([x.reshape(batch, -1, width) for x in found[name]], axis=1)
      for name, width in (("classes", self.head.num_classes), ("deltas", 4), ("centerness", 1))
    )

    def one(logits, deltas, centerness, usable, gt_boxes, gt_labels, gt_valid):
      assigned, _ = atss_assign(
        anchors, [len(own) for own in levels], gt_boxes, gt_valid,
        candidates=s.candidates_per_level, valid=usable,
      )  # fmt: skip
      positive, gt = assigned > 0, jnp.maximum(assigned - 1, 0)
      wanted, focal = class_loss(logits, positive, gt, gt_boxes, gt_labels, s)
      focal = jnp.sum(jnp.where(assigned[:, None] >= 0, focal, 0))
      true = jnp.where(positive, centerness_of(anchors, wanted), 0)
      boxes = decode_boxes(anchors, deltas, stds=s.stds, two_sided=s.two_sided_clamp)
      apart = jnp.sum(jnp.where(positive, true * (1 - elementwise_giou(boxes, wanted)), 0))
      entropy = binary_cross_entropy(centerness[:, 0], true)
      entropy = jnp.sum(jnp.where(positive, entropy, 0))
      return focal, apart, entropy, jnp.sum(true), jnp.maximum(jnp.sum(positive), 1)

    sums = jax.vmap(one)(
      logits, deltas, centerness, self.usable(maps, sizes), targets["boxes"], targets["labels"],
      targets["valid"],
    )  # fmt: skip
    focal, apart, entropy, weight, count = map(jnp.sum, sums)
    return {
      "class": focal / count,
      "box": s.box_weight * apart / jnp.maximum(weight, 1.0),
      "centerness": s.centerness_weight * entropy / count,
    }


def centerness_of(anchors: jax.Array, boxes: jax.Array) -> jax.Array:
  """How central anchors' centres lie in boxes, both `[N, 4]`: `[N]`, 0 outside.

  sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)), the distances to
  the box's sides (arXiv:1904.01355, equation 3).
  """
  centre = 0.5 * (anchors[:, :2] + anchors[:, 2:])
  near = jnp.minimum(centre - boxes[:, :2], boxes[:, 2:] - centre)
  far = jnp.maximum(centre - boxes[:, :2], boxes[:, 2:] - centre)
  inside = jnp.all(near > 0, axis=-1)
  ratio = jnp.where(inside[:, None], near, 0) / jnp.where(inside[:, None], far, 1)
  return jnp.sqrt(ratio[:, 0] * ratio[:, 1])


def create_atss(
  backbone: nn.Module,
  num_classes: int,
  *,
  neck: Mapping[str, Any] | None = None,
  head: Mapping[str, Any] | None = None,
  settings: ATSSSettings | None = None,
  batch_norm_groups: int | None = None,
) -> ATSS:
  """ATSS on a backbone.

  Args:
    backbone: with `features`; built with `num_classes=0`.
    num_classes: K, without background.
    neck: {"name": as registered, further attributes}; by default FPN over strides from 8 on, with
      two levels more from its own coarsest map.
    head: attributes of `ATSSHead`.
    settings: `ATSSSettings()` by default.
    batch_norm_groups: of batch norms; None for what the backbone has.

  Raises:
    ValueError: an unknown neck, or attribute of it.
  """
  settings = ATSSSettings() if settings is None else settings
  made, shared = dense_parts(backbone, neck, "on_output", batch_norm_groups)
  own = {"num_anchors": settings.num_anchors, "channels": made.outputs[0].channels, **shared}
  made_head = ATSSHead(made.outputs, num_classes, **{**own, **(head or {})})
  return ATSS(backbone, made, made_head, settings)


register_without_masks("atss", create_atss, ATSSSettings)
