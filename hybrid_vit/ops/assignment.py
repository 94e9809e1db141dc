"""Which true box each anchor or proposal is trained on, and which of them are sampled.

Shapes are static: true boxes are padded, with flags. An assignment is int32 `[N]`: -1 ignored, 0
background, i + 1 true box i. The rules are mmdetection's `MaxIoUAssigner`, `ATSSAssigner`
(arXiv:1912.02424, algorithm 1) and `RandomSampler`; the matcher of torchvision and detectron2
differs in one, `low_quality`.

Deviation: among anchors equally far from a true box's centre ATSS takes the earlier; torch's order
is not defined.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.ops.boxes import pairwise_iou
from hybrid_vit.ops.top_places import top_places

IGNORED, BACKGROUND = -1, 0
LOW_QUALITY = ("none", "own", "best")


class Sample(NamedTuple):
  """Places drawn from an assignment: positives first, then negatives, then padding.

  Attributes:
    indices: int32 `[S]`, places in the assignment; 0 in the padding.
    positive: bool `[S]`.
    valid: bool `[S]`, all but the padding.
  """

  indices: jax.Array
  positive: jax.Array
  valid: jax.Array


def max_iou_assign(
  boxes: jax.Array,
  gt_boxes: jax.Array,
  gt_valid: jax.Array,
  *,
  positive_iou: float,
  negative_iou: float,
  min_positive_iou: float = 0.0,
  low_quality: str = "own",
  valid: jax.Array | None = None,
  ignore_boxes: jax.Array | None = None,
  ignore_valid: jax.Array | None = None,
  ignore_iof: float = -1.0,
  ignore_by_box: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """Assignment by largest IoU.

  Below `negative_iou` a box is background, from `positive_iou` it is its best true box's (the first
  of equals), in between ignored. Then every true box whose best IoU is at least `min_positive_iou`
  claims all boxes of that IoU.

  Args:
    boxes: `[N, 4]`.
    gt_boxes: `[G, 4]`.
    gt_valid: bool `[G]`.
    positive_iou: at least that is positive.
    negative_iou: below that is background.
    min_positive_iou: of a claim. With 0, a true box that nothing overlaps claims all that it does
      not overlap, as in the authors' codes.
    low_quality: "own": what a true box claims becomes its own, the last claim winning
      (mmdetection); "best": it becomes positive for the true box it overlaps most (torchvision,
      detectron2); "none": no claims.
    valid: bool `[N]`, boxes that take part; others are ignored and are nobody's best. All by
      default.
    ignore_boxes: `[K, 4]`, regions such as crowds; boxes within are ignored.
    ignore_valid: bool `[K]`; all by default.
    ignore_iof: boxes of which more than this part lies in a region are within; off if not above 0.
    ignore_by_box: that part is of the box's area, else of the region's.

  Returns:
    int32 `[N]`, the assignment, and `[N]`, each box's largest IoU with a true one (0 if there is
    none, -1 for what is not valid or lies within an ignored region).

  Raises:
    ValueError: another `low_quality`.
  """
  if low_quality not in LOW_QUALITY:
    raise ValueError(
      f"max_iou_assign: low_quality is {low_quality!r}; one of {', '.join(LOW_QUALITY)} was "
      "expected"
    )
  out = jnp.zeros(boxes.shape[0], bool) if valid is None else ~valid
  if ignore_boxes is not None and ignore_iof > 0:
    out |= _within(boxes, ignore_boxes, ignore_valid, ignore_by_box) > ignore_iof
  if not gt_boxes.shape[0]:
    return jnp.where(out, IGNORED, BACKGROUND), jnp.where(out, -1.0, 0.0)
  iou = pairwise_iou(gt_boxes, boxes)
  iou = jnp.where(gt_valid[:, None] & ~out, iou, -1)
  # Claims compare numbers of this table for equality: it must not be computed twice.
  iou = lax.optimization_barrier(iou)
  best, best_gt = jnp.max(iou, axis=0), jnp.argmax(iou, axis=0)
  largest = jnp.where(out, -1.0, jnp.maximum(best, 0))
  assigned = jnp.where((largest >= 0) & (largest < negative_iou), BACKGROUND, IGNORED)
  # A picture without true boxes has no positives, whatever the thresholds.
  positive = (best >= positive_iou) & (best >= 0)
  assigned = jnp.where(positive, best_gt + 1, assigned)
  assigned = jnp.where(~out & (best < 0), BACKGROUND, assigned)
  if low_quality != "none":
    own_best = jnp.max(iou, axis=1, keepdims=True)
    claims = (iou == own_best) & (own_best >= max(min_positive_iou, 0.0)) & gt_valid[:, None]
    order = jnp.arange(1, gt_boxes.shape[0] + 1)[:, None]
    last = jnp.max(jnp.where(claims, order, 0), axis=0)
    claimed = last if low_quality == "own" else jnp.where(last > 0, best_gt + 1, 0)
    assigned = jnp.where(claimed > 0, claimed, assigned)
  return assigned.astype(jnp.int32), largest


def atss_assign(
  anchors: jax.Array,
  level_counts: Sequence[int],
  gt_boxes: jax.Array,
  gt_valid: jax.Array,
  *,
  candidates: int = 9,
  valid: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Adaptive training sample selection.

  On each level the anchors nearest to a true box's centre are its candidates; positive are those
  whose IoU is at least the candidates' mean plus standard deviation (over n - 1), and whose centre
  lies more than 0.01 pixels inside the box. An anchor of several goes to the largest IoU.

  Args:
    anchors: `[N, 4]`, levels joined.
    level_counts: anchors of each level.
    gt_boxes: `[G, 4]`.
    gt_valid: bool `[G]`.
    candidates: on each level; all where it has fewer.
    valid: bool `[N]`, anchors that take part; others are ignored. All by default.

  Returns:
    int32 `[N]`, the assignment (nothing is ignored but what is not valid), and `[N]`, the IoU with
    the assigned box; 0 for background.

  Raises:
    ValueError: level counts that do not add up to N.
  """
  if sum(level_counts) != anchors.shape[0]:
    raise ValueError(
      f"atss_assign: levels of {list(level_counts)} anchors are {sum(level_counts)}; "
      f"{anchors.shape[0]} were expected"
    )
  size = anchors.shape[0]
  takes_part = jnp.ones(size, bool) if valid is None else valid
  if not gt_boxes.shape[0]:
    return jnp.where(takes_part, BACKGROUND, IGNORED), jnp.zeros(size)
  centres, gt_centres = (0.5 * (b[:, :2] + b[:, 2:]) for b in (anchors, gt_boxes))
  apart = jnp.sqrt(jnp.sum((centres - gt_centres[:, None]) ** 2, axis=-1))
  apart = jnp.where(takes_part, apart, jnp.inf)
  places, start = [], 0
  for count in level_counts:
    own = apart[:, start : start + count]
    places.append(start + top_places(-own, min(candidates, count)))
    start += count
  nearest = jnp.concatenate(places, axis=1)
  iou = pairwise_iou(gt_boxes, anchors)
  found = jnp.take_along_axis(iou, nearest, axis=1)
  there = takes_part[nearest]
  number = jnp.sum(there, axis=1, keepdims=True)
  mean = jnp.sum(jnp.where(there, found, 0), axis=1, keepdims=True) / number
  spread = jnp.sum(jnp.where(there, (found - mean) ** 2, 0), axis=1, keepdims=True)
  # One candidate has no deviation: its threshold is no number, and nothing reaches it.
  threshold = mean + jnp.sqrt(spread / (number - 1))
  x, y = centres[nearest, 0], centres[nearest, 1]
  left, top, right, bottom = (gt_boxes[:, i, None] for i in range(4))
  nearest_side = jnp.minimum(jnp.minimum(x - left, right - x), jnp.minimum(y - top, bottom - y))
  positive = (found >= threshold) & (nearest_side > 0.01) & there & gt_valid[:, None]
  rows = jnp.arange(gt_boxes.shape[0])[:, None]
  chosen = jnp.full(iou.shape, -jnp.inf).at[rows, nearest].set(jnp.where(positive, found, -jnp.inf))
  best, best_gt = jnp.max(chosen, axis=0), jnp.argmax(chosen, axis=0)
  assigned = jnp.where(best > -jnp.inf, best_gt + 1, BACKGROUND)
  assigned = jnp.where(takes_part, assigned, IGNORED)
  return assigned.astype(jnp.int32), jnp.where(best > -jnp.inf, best, 0)


def random_sample(
  key: jax.Array,
  assigned: jax.Array,
  count: int,
  positive_fraction: float,
  negatives_per_positive: float = -1.0,
) -> Sample:
  """A uniform draw of positives and negatives without replacement.

  At most int(count * fraction) positives; negatives fill up what is left, so that fewer than
  `count` come out only where there are too few.

  Args:
    key: of JAX's generators.
    assigned: int `[N]`, an assignment.
    count: S.
    positive_fraction: largest part of positives.
    negatives_per_positive: at most so many negatives for each positive (or for one, if there is
      none); no limit below 0.

  Returns:
    `Sample` of S.
  """
  size = assigned.shape[0]
  # Whole numbers of 31 bits: floats would be equal so often that the earlier place gains.
  lots = (jax.random.bits(key, (size,), jnp.uint32) >> 1).astype(jnp.int32)

  def draw(wanted, most):
    places = top_places(jnp.where(wanted, lots, -1), min(most, size))
    places = jnp.pad(places, (0, max(most - size, 0)))
    return places, jnp.minimum(jnp.sum(wanted), most)

  most = int(count * positive_fraction)
  positives, found = draw(assigned > 0, most)
  negatives, others = draw(assigned == BACKGROUND, count)
  others = jnp.minimum(others, count - found)
  if negatives_per_positive >= 0:
    limit = (negatives_per_positive * jnp.maximum(found, 1)).astype(jnp.int32)
    others = jnp.minimum(others, limit)
  slots = jnp.arange(count)
  positive = slots < found
  valid = slots < found + others
  indices = jnp.where(
    positive,
    jnp.pad(positives, (0, count - most)),
    negatives[jnp.clip(slots - found, 0, count - 1)],
  )
  return Sample(jnp.where(valid, indices, 0), positive, valid)


def _within(boxes, regions, regions_valid, by_box) -> jax.Array:
  """Largest part of each box in a region, or of a region in it, `[N]`."""
  if not regions.shape[0]:
    return jnp.zeros(boxes.shape[0])
  part = pairwise_iou(boxes, regions, "iof") if by_box else pairwise_iou(regions, boxes, "iof").T
  if regions_valid is not None:
    part = jnp.where(regions_valid, part, 0)
  return jnp.max(part, axis=1)
