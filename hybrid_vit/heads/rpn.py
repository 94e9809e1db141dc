"""The region proposal network: which anchors hold an object, and where it lies.

Shaoqing Ren et al., "Faster R-CNN", NeurIPS 2015, arXiv:1506.01497, section 3, over the levels of a
pyramid (arXiv:1612.03144, section 4.1), as mmdetection, detectron2 and torchvision have it. One
head reads all levels; proposals of a level do not suppress those of another.

Deviation from mmdetection 2: boxes that clipping leaves without area are no proposals (as in
detectron2 and mmdetection 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hybrid_vit.heads.detection_losses import binary_cross_entropy, smooth_l1
from hybrid_vit.heads.layers import check_levels
from hybrid_vit.models.layers import Conv
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.assignment import max_iou_assign, random_sample
from hybrid_vit.ops.boxes import decode_boxes, encode_boxes
from hybrid_vit.ops.nms import nms, select_top
from hybrid_vit.ops.top_places import top_places

NORMALISERS = ("sampled", "fixed")
# Offsets of padded boxes, whose sides are 0, must be finite.
_LEAST_SIDE = 1e-6


class Proposals(NamedTuple):
  """Boxes that may hold an object, by falling score; padding of zeros behind.

  Attributes:
    boxes: float32 `[B, P, 4]`.
    scores: float32 `[B, P]`, logits of objectness.
    valid: bool `[B, P]`.
  """

  boxes: jax.Array
  scores: jax.Array
  valid: jax.Array


class RPNHead(nn.Module):
  """3x3 convolutions with ReLU, then objectness and offsets, the same for each level.

  Attributes:
    features: the levels that it reads, the finest first, all of one width.
    num_anchors: A, of a cell.
    num_convs: 1; ViTDet has 2.
    channels: of the convolutions.
    dtype: of their computation; what comes out is computed in float32.
  """

  features: tuple[FeatureSpec, ...]
  num_anchors: int = 3
  num_convs: int = 1
  channels: int = 256
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, maps: Mapping[str, jax.Array], train: bool = False
  ) -> tuple[list[jax.Array], list[jax.Array]]:
    """Maps → of each level logits `[B, h, w, A]` and offsets `[B, h, w, 4 A]`, by anchors."""
    del train
    check_levels("rpn", self.features, 1)
    normal = nn.initializers.normal(0.01)
    convs = [
      Conv(
        self.channels, (3, 3), padding=((1, 1), (1, 1)), kernel_init=normal, dtype=self.dtype,
        name=f"conv{i}",
      )
      for i in range(self.num_convs)
    ]  # fmt: skip
    objectness, deltas = (
      Conv(width, (1, 1), kernel_init=normal, dtype=jnp.float32, name=name)
      for name, width in (("objectness", self.num_anchors), ("deltas", 4 * self.num_anchors))
    )
    found = []
    for level in self.features:
      x = maps[level.name].astype(self.dtype)
      for conv in convs:
        x = nn.relu(conv(x))
      found.append((objectness(x), deltas(x)))
    return [level[0] for level in found], [level[1] for level in found]


def propose(
  objectness: Sequence[jax.Array],
  deltas: Sequence[jax.Array],
  anchors: Sequence[np.ndarray | jax.Array],
  sizes: jax.Array,
  *,
  most_before: int,
  most_after: int,
  iou_threshold: float = 0.7,
  min_size: float = 0.0,
  two_sided: bool = True,
) -> Proposals:
  """The best boxes of all levels. They carry no gradient.

  Args:
    objectness: of each level `[B, h, w, A]`, logits.
    deltas: of each level `[B, h, w, 4 A]`.
    anchors: of each level `[h w A, 4]`.
    sizes: `[B, 2]`, (height, width) of each picture, to which boxes are clipped.
    most_before: so many of each level, the best, go into suppression.
    most_after: P, so many come out, of all levels together.
    iou_threshold: of the suppression, which is within each level.
    min_size: both sides must be larger.
    two_sided: of `decode_boxes`.
  """

  def one(objectness, deltas, size):
    boxes, scores, kept = [], [], []
    for logits, offsets, own in zip(objectness, deltas, anchors):
      logits = logits.reshape(-1)
      places = top_places(logits, min(most_before, logits.shape[0]))
      best = logits[places]
      offsets = offsets.reshape(-1, 4)[places]
      found = decode_boxes(jnp.asarray(own)[places], offsets, two_sided=two_sided, size=size)
      there = jnp.all(found[:, 2:] - found[:, :2] > min_size, axis=-1)
      boxes.append(found)
      scores.append(best)
      kept.append(nms(found, best, iou_threshold, there))
    all_boxes, all_scores, all_kept = map(jnp.concatenate, (boxes, scores, kept))
    places, valid = select_top(all_scores, all_kept, most_after)
    return Proposals(
      jnp.where(valid[:, None], all_boxes[places], 0),
      jnp.where(valid, all_scores[places], 0),
      valid,
    )

  objectness, deltas = lax.stop_gradient(
    jax.tree.map(lambda x: x.astype(jnp.float32), (list(objectness), list(deltas)))
  )
  return jax.vmap(one)(objectness, deltas, sizes)


def rpn_losses(
  objectness: Sequence[jax.Array],
  deltas: Sequence[jax.Array],
  anchors: Sequence[np.ndarray | jax.Array],
  usable: jax.Array | None,
  gt_boxes: jax.Array,
  gt_valid: jax.Array,
  key: jax.Array,
  *,
  positive_iou: float = 0.7,
  negative_iou: float = 0.3,
  min_positive_iou: float = 0.3,
  low_quality: str = "own",
  samples: int = 256,
  positive_fraction: float = 0.5,
  beta: float = 0.0,
  normaliser: str = "sampled",
) -> dict[str, jax.Array]:
  """The losses of objectness and of offsets, over a sample of each picture's anchors.

  Args:
    objectness: as in `propose`, and so are the next two.
    deltas: likewise.
    anchors: likewise.
    usable: bool `[B, N]`, which anchors may be trained; None for all.
    gt_boxes: `[B, G, 4]`.
    gt_valid: bool `[B, G]`.
    key: of the samples.
    positive_iou: of `max_iou_assign`, and so are the next three.
    negative_iou: likewise.
    min_positive_iou: likewise.
    low_quality: likewise.
    samples: of a picture.
    positive_fraction: at most so much of them is positive.
    beta: of `smooth_l1`; 0 is L1.
    normaliser: what both sums are divided by: "sampled", how many were sampled in the batch, a
      picture's positives, and its negatives, counting as one at least (mmdetection; torchvision
      but for that); "fixed": samples times pictures, whatever was found (detectron2).

  Returns:
    "rpn_class" and "rpn_box", float32 scalars.

  Raises:
    ValueError: another normaliser.
  """
  if normaliser not in NORMALISERS:
    raise ValueError(
      f"rpn_losses: normaliser is {normaliser!r}; one of {', '.join(NORMALISERS)} was expected"
    )
  batch = gt_boxes.shape[0]
  logits = jnp.concatenate([x.reshape(batch, -1) for x in objectness], axis=1)
  offsets = jnp.concatenate([x.reshape(batch, -1, 4) for x in deltas], axis=1)
  boxes = jnp.concatenate([jnp.asarray(own) for own in anchors])
  if usable is None:
    usable = jnp.ones(logits.shape, bool)

  def one(key, logits, offsets, usable, gt_boxes, gt_valid):
    assigned, _ = max_iou_assign(
      boxes, gt_boxes, gt_valid, positive_iou=positive_iou, negative_iou=negative_iou,
      min_positive_iou=min_positive_iou, low_quality=low_quality, valid=usable,
    )  # fmt: skip
    sample = random_sample(key, assigned, samples, positive_fraction)
    chosen = boxes[sample.indices]
    entropy = binary_cross_entropy(logits[sample.indices], sample.positive)
    own = _rows(gt_boxes, assigned[sample.indices] - 1)
    wanted = encode_boxes(chosen, own, eps=_LEAST_SIDE)
    apart = jnp.sum(smooth_l1(offsets[sample.indices], wanted, beta), axis=-1)
    positives = jnp.sum(sample.positive)
    negatives = jnp.sum(sample.valid) - positives
    return (
      jnp.sum(jnp.where(sample.valid, entropy, 0)),
      jnp.sum(jnp.where(sample.positive, apart, 0)),
      jnp.maximum(positives, 1) + jnp.maximum(negatives, 1),
    )

  keys = jax.random.split(key, batch)
  class_sums, box_sums, counts = jax.vmap(one)(keys, logits, offsets, usable, gt_boxes, gt_valid)
  count = jnp.sum(counts) if normaliser == "sampled" else samples * batch
  return {"rpn_class": jnp.sum(class_sums) / count, "rpn_box": jnp.sum(box_sums) / count}


def _rows(gt_boxes: jax.Array, indices: jax.Array) -> jax.Array:
  """True boxes by number, zeros where there are none at all."""
  if not gt_boxes.shape[0]:
    return jnp.zeros((*indices.shape, 4))
  return gt_boxes[jnp.maximum(indices, 0)]
