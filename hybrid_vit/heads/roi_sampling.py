"""Which proposals of a picture a stage of R-CNN is trained on, and on what.

As mmdetection has it: proposals are matched first, then the true boxes join them, each as its own.
detectron2 and torchvision match both together, which comes to the same where no two true boxes are
equal: there, both take the first one's class.

Deviation: padding repeats what was drawn, in turn, instead of being absent, so that a batch norm
over a stage's sample has about the figures of what was drawn. Losses do not count it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.ops.assignment import IGNORED, Sample, max_iou_assign, random_sample


class RoISample(NamedTuple):
  """Boxes that a stage is trained on: the positives first if they were drawn, padding last.

  Attributes:
    boxes: `[..., S, 4]`.
    labels: int32 `[..., S]`, classes; their number for background.
    gt: int32 `[..., S]`, which true box each is trained on; 0 for background.
    gt_boxes: `[..., S, 4]`, that box; zeros for background.
    positive: bool `[..., S]`.
    valid: bool `[..., S]`, what losses count.
    added: bool `[..., S]`, true boxes that joined the proposals.
  """

  boxes: jax.Array
  labels: jax.Array
  gt: jax.Array
  gt_boxes: jax.Array
  positive: jax.Array
  valid: jax.Array
  added: jax.Array


def sample_rois(
  key: jax.Array,
  boxes: jax.Array,
  valid: jax.Array,
  gt_boxes: jax.Array,
  gt_labels: jax.Array,
  gt_valid: jax.Array,
  *,
  num_classes: int,
  iou: float,
  low_quality: str,
  samples: int,
  positive_fraction: float,
  add_gt: bool = True,
) -> RoISample:
  """Draws from a picture's proposals.

  Args:
    key: of the draw.
    boxes: `[P, 4]`; they get no gradient.
    valid: bool `[P]`.
    gt_boxes: `[G, 4]`.
    gt_labels: int `[G]`.
    gt_valid: bool `[G]`.
    num_classes: K, without background.
    iou: from which a proposal is positive, below background.
    low_quality: of `max_iou_assign`, with `iou` as the least.
    samples: S.
    positive_fraction: at most so much of S is positive.
    add_gt: whether true boxes join the proposals.

  Returns:
    `RoISample` of S boxes.
  """
  boxes = lax.stop_gradient(boxes)
  assigned = _assign(boxes, valid, gt_boxes, gt_valid, iou, low_quality)
  added = jnp.zeros(boxes.shape[0], bool)
  if add_gt and gt_boxes.shape[0]:
    own = jnp.where(gt_valid, jnp.arange(1, gt_boxes.shape[0] + 1), IGNORED)
    boxes = jnp.concatenate([gt_boxes.astype(boxes.dtype), boxes])
    assigned = jnp.concatenate([own.astype(assigned.dtype), assigned])
    added = jnp.concatenate([gt_valid, added])
  drawn = random_sample(key, assigned, samples, positive_fraction)
  places = _repeated(drawn)
  return _sampled(boxes, assigned, added, places, drawn, gt_boxes, gt_labels, num_classes)


def match_rois(
  boxes: jax.Array,
  valid: jax.Array,
  gt_boxes: jax.Array,
  gt_labels: jax.Array,
  gt_valid: jax.Array,
  *,
  num_classes: int,
  iou: float,
) -> RoISample:
  """All of a picture's boxes in their order, matched by IoU; arguments as in `sample_rois`."""
  boxes = lax.stop_gradient(boxes)
  assigned = _assign(boxes, valid, gt_boxes, gt_valid, iou, "none")
  places = jnp.arange(boxes.shape[0])
  drawn = Sample(places, assigned > 0, valid)
  added = jnp.zeros(boxes.shape[0], bool)
  return _sampled(boxes, assigned, added, places, drawn, gt_boxes, gt_labels, num_classes)


def _assign(boxes, valid, gt_boxes, gt_valid, iou, low_quality) -> jax.Array:
  return max_iou_assign(
    boxes, gt_boxes, gt_valid, positive_iou=iou, negative_iou=iou, min_positive_iou=iou,
    low_quality=low_quality, valid=valid,
  )[0]  # fmt: skip


def _repeated(drawn: Sample) -> jax.Array:
  """Places with the padding filled by what was drawn, in turn."""
  slots = jnp.arange(drawn.indices.shape[0])
  return drawn.indices[slots % jnp.maximum(jnp.sum(drawn.valid), 1)]


def _sampled(boxes, assigned, added, places, drawn, gt_boxes, gt_labels, num_classes) -> RoISample:
  gt = jnp.where(drawn.positive, assigned[places] - 1, 0)
  if gt_boxes.shape[0]:
    own_boxes, own_labels = gt_boxes[gt].astype(boxes.dtype), gt_labels[gt]
  else:
    own_boxes, own_labels = jnp.zeros_like(boxes[places]), jnp.zeros_like(gt)
  return RoISample(
    boxes[places],
    jnp.where(drawn.positive, own_labels, num_classes).astype(jnp.int32),
    gt,
    jnp.where(drawn.positive[:, None], own_boxes, 0),
    drawn.positive,
    drawn.valid,
    added[places] & drawn.valid,
  )
