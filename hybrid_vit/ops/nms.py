"""Non-maximum suppression with static shapes: exactly what the greedy loop keeps.

The greedy loop takes boxes by falling score and drops every later one whose IoU with a kept one is
above the threshold. So a box is kept if no kept box before it overlaps it. That rule has one fixed
point; applying it to all boxes at once reaches it in as many rounds as the longest chain of boxes
that decide about each other, which are few, and each is one product of a vector and a table of
bits. Among equal scores the earlier box goes first. Suppression is strictly above the threshold, as
in torchvision, mmdetection and detectron2.

Soft-NMS (arXiv:1704.04503, section 3) lowers scores instead, one box after the other.

Deviation: classes are told apart by their numbers; the usual way adds an offset a class to the
boxes, which rounds their coordinates.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.ops.boxes import pairwise_iou
from hybrid_vit.ops.top_places import top_places

SOFT_METHODS = ("linear", "gaussian")
NMS_METHODS = ("hard", *SOFT_METHODS)


class SoftNMS(NamedTuple):
  """How `soft_nms` lowers scores, where it takes the place of `nms`; see there.

  Attributes:
    method: one of `SOFT_METHODS`.
    sigma: of "gaussian".
    min_score: boxes are dropped once below.
  """

  method: str
  sigma: float = 0.5
  min_score: float = 1e-3


class Detections(NamedTuple):
  """The boxes kept, by falling score; `valid` first, then padding of zeros.

  Attributes:
    boxes: `[D, 4]`.
    scores: `[D]`.
    labels: int32 `[D]`.
    indices: int32 `[D]`, the row of `boxes` that each came from.
    valid: bool `[D]`.
    truncated: bool `[]`, whether candidates beyond `max_candidates` were left out that might have
      been among these: never where all D are valid, and none of their scores was lowered below
      that of the last candidate.
  """

  boxes: jax.Array
  scores: jax.Array
  labels: jax.Array
  indices: jax.Array
  valid: jax.Array
  truncated: jax.Array


def nms(
  boxes: jax.Array,
  scores: jax.Array,
  threshold: float,
  valid: jax.Array | None = None,
  labels: jax.Array | None = None,
) -> jax.Array:
  """Which boxes greedy non-maximum suppression keeps.

  Args:
    boxes: `[N, 4]`.
    scores: `[N]`.
    threshold: IoU above which the later box is dropped.
    valid: bool `[N]`; others are not kept and suppress nothing. All by default.
    labels: int `[N]`: classes, or levels of a pyramid, that do not suppress each other. One by
      default.

  Returns:
    bool `[N]`, in the order of `boxes`.
  """
  count = boxes.shape[0]
  order = jnp.argsort(-scores, stable=True)
  ranked = boxes[order]
  suppresses = pairwise_iou(ranked, ranked) > threshold
  suppresses &= jnp.arange(count)[:, None] < jnp.arange(count)
  if labels is not None:
    suppresses &= labels[order][:, None] == labels[order]
  start = jnp.ones(count, bool) if valid is None else valid[order]

  def again(state):
    kept, _ = state
    found = start & ~jnp.any(suppresses & kept[:, None], axis=0)
    return found, jnp.any(found != kept)

  # The first round is outside: a loop under vmap runs for all until the last is done.
  kept, _ = lax.while_loop(lambda state: state[1], again, again((start, True)))
  return jnp.zeros(count, bool).at[order].set(kept)


def reference_nms(
  boxes: jax.Array,
  scores: jax.Array,
  threshold: float,
  valid: jax.Array | None = None,
  labels: jax.Array | None = None,
) -> jax.Array:
  """`nms` by the greedy loop itself: one step a box."""
  count = boxes.shape[0]
  order = jnp.argsort(-scores, stable=True)
  overlaps = pairwise_iou(boxes, boxes) > threshold
  if labels is not None:
    overlaps &= labels[:, None] == labels
  start = jnp.ones(count, bool) if valid is None else valid

  def step(i, kept):
    box = order[i]
    later = jnp.zeros(count, bool).at[order].set(jnp.arange(count) > i)
    return kept & ~(kept[box] & overlaps[box] & later)

  return lax.fori_loop(0, count, step, start)


def select_top(scores: jax.Array, kept: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
  """The kept boxes of highest score.

  Args:
    scores: `[N]`.
    kept: bool `[N]`.
    count: K, how many.

  Returns:
    int32 `[K]`, their places by falling score (the earlier first where equal), and bool `[K]`,
    which of them there are: those first.
  """
  size = scores.shape[0]
  ranked = jnp.where(kept, scores, -jnp.inf)
  indices = top_places(ranked, min(count, size))
  indices = jnp.pad(indices, (0, max(count - size, 0)))
  return indices, jnp.arange(count) < jnp.sum(kept)


def multiclass_nms(
  boxes: jax.Array,
  scores: jax.Array,
  *,
  score_threshold: float,
  iou_threshold: float,
  max_candidates: int,
  max_detections: int,
  valid: jax.Array | None = None,
  soft: SoftNMS | None = None,
) -> Detections:
  """A picture's detections: suppression in each class, then the best of all classes.

  Every class of every box above the score threshold is a candidate. The best `max_candidates` are
  enough for the exact answer unless they hold fewer than `max_detections` that are kept, or, with
  `soft`, too few whose scores stay above that of the last candidate.

  Args:
    boxes: `[N, 4]`, or `[N, C, 4]` with a box for each class.
    scores: `[N, C]`.
    score_threshold: candidates are strictly above.
    iou_threshold: of `nms`, or of `soft_nms`.
    max_candidates: K; time and memory go with its square.
    max_detections: D.
    valid: bool `[N]`, which boxes count; all by default.
    soft: lowers scores instead of dropping boxes; None for `nms`.

  Returns:
    `Detections` of D.
  """
  classes = scores.shape[1]
  flat = scores.reshape(-1)
  wanted = flat > score_threshold
  if valid is not None:
    wanted &= jnp.repeat(valid, classes)
  places, there = select_top(flat, wanted, max_candidates)
  indices, labels = places // classes, places % classes
  found = boxes[indices] if boxes.ndim == 2 else boxes.reshape(-1, 4)[places]
  best = flat[places]
  lowered, kept = suppress(found, best, iou_threshold, there, labels, soft)
  chosen, filled = select_top(lowered, kept, max_detections)
  # What was left out has no more than the last candidate's score, and only what is below that,
  # softly suppressed, might have had to stand behind it.
  enough = filled[-1] & (lowered[chosen[-1]] >= best[-1])
  blank = lambda rows: jnp.where(filled.reshape(-1, *[1] * (rows.ndim - 1)), rows[chosen], 0)  # noqa: E731
  return Detections(
    blank(found),
    blank(lowered),
    blank(labels),
    blank(indices),
    filled,
    (jnp.sum(wanted) > max_candidates) & ~enough,
  )


def suppress(
  boxes: jax.Array,
  scores: jax.Array,
  threshold: float,
  valid: jax.Array | None = None,
  labels: jax.Array | None = None,
  soft: SoftNMS | None = None,
) -> tuple[jax.Array, jax.Array]:
  """`nms`, or `soft_nms` where `soft` is given: scores `[N]`, bool `[N]` of what is kept."""
  if soft is None:
    return scores, nms(boxes, scores, threshold, valid, labels)
  lowered = soft_nms(
    boxes, scores, method=soft.method, iou_threshold=threshold, sigma=soft.sigma,
    min_score=soft.min_score, valid=valid, labels=labels,
  )  # fmt: skip
  return lowered, lowered > 0


def soft_or_none(method: str, sigma: float, min_score: float) -> SoftNMS | None:
  """A detector's settings of suppression: None for "hard".

  Raises:
    ValueError: another method than `NMS_METHODS`, or a sigma that is not above 0.
  """
  if method not in NMS_METHODS:
    raise ValueError(f"nms_method is {method!r}; one of {', '.join(NMS_METHODS)} was expected")
  if sigma <= 0:
    raise ValueError(f"nms_sigma is {sigma}; a number above 0 was expected")
  return None if method == "hard" else SoftNMS(method, sigma, min_score)


def soft_nms(
  boxes: jax.Array,
  scores: jax.Array,
  *,
  method: str = "linear",
  iou_threshold: float = 0.3,
  sigma: float = 0.5,
  min_score: float = 1e-3,
  valid: jax.Array | None = None,
  labels: jax.Array | None = None,
) -> jax.Array:
  """Scores after soft suppression: the best box left lowers those of all that it overlaps.

  Args:
    boxes: `[N, 4]`.
    scores: `[N]`, not negative.
    method: "linear": a score times 1 - IoU where IoU >= `iou_threshold`; "gaussian": times
      exp(-IoU^2 / sigma) everywhere.
    iou_threshold: of "linear".
    sigma: of "gaussian".
    min_score: boxes are dropped once below.
    valid: bool `[N]`; all by default.
    labels: int `[N]`, classes that leave each other alone; one by default.

  Returns:
    `[N]` in the order of `boxes`; 0 for what was dropped or is not valid.

  Raises:
    ValueError: another method.
  """
  if method not in SOFT_METHODS:
    raise ValueError(
      f"soft_nms: method is {method!r}; one of {', '.join(SOFT_METHODS)} was expected"
    )
  # The loop indexes by its own numbers, which NumPy's arrays do not take.
  boxes, scores = jnp.asarray(boxes), jnp.asarray(scores)
  labels = labels if labels is None else jnp.asarray(labels)
  count = boxes.shape[0]
  start = scores if valid is None else jnp.where(valid, scores, -1)

  def step(state):
    left, final = state
    best = jnp.argmax(left)
    iou = pairwise_iou(boxes[best][None], boxes)[0]
    if labels is not None:
      iou = jnp.where(labels == labels[best], iou, 0)
    if method == "linear":
      weight = jnp.where(iou >= iou_threshold, 1 - iou, 1)
    else:
      weight = jnp.exp(-(iou**2) / sigma)
    final = final.at[best].set(left[best])
    return (left * weight).at[best].set(-1), final

  # Scores only fall: once the best is below, all are.
  floor = max(min_score, 0.0)
  _, final = lax.while_loop(
    lambda state: jnp.max(state[0]) >= floor, step, (start, jnp.zeros(count, scores.dtype))
  )
  return final
