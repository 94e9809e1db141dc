"""Segments of kMaX-DeepLab's answers: semantic, instance and panoptic.

Yu et al., arXiv:2207.04044, section 4.1, after MaX-DeepLab (arXiv:2012.00759, section 3.4); the
rules are those of the authors' `kmax_model.py`. Masks are a softmax over queries. They are first
taken to the picture's own size by `restore_size`; functions are called as those of
`mask2former_inference`.

Deviations: of equal scores the lower query comes first. Instances are sorted by their final scores.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hybrid_vit.tasks import mask2former_inference
from hybrid_vit.tasks.mask2former_inference import Instances, Segment, best_pairs, softmax

# A pixel belongs to a query's mask above it.
_PIXEL_THRESHOLD = 0.4


def restore_size(
  maps: jax.Array, input_size: Sequence[int], picture_size: Sequence[int], size: Sequence[int]
) -> jax.Array:
  """`mask2former_inference.restore_size`, with corners aligned where the input's width is odd."""
  return mask2former_inference.restore_size(
    maps, input_size, picture_size, size, align_corners=aligns_corners(input_size[1])
  )


def aligns_corners(width: int) -> bool:
  """Whether maps of an input of that width are resized with aligned corners."""
  return width % 2 == 1


def semantic_scores(class_logits: jax.Array, masks: jax.Array) -> jax.Array:
  """Scores of classes in each pixel; the highest is its class.

  Args:
    class_logits: `[B, Q, K + 1]`.
    masks: mask logits `[B, H, W, Q]`.

  Returns:
    float32 `[B, H, W, K]`: sums over queries of the class's probability times the mask's.
  """
  classes = jax.nn.softmax(class_logits.astype(jnp.float32), axis=-1)[..., :-1]
  masks = jax.nn.softmax(masks.astype(jnp.float32), axis=-1)
  return jnp.einsum("bhwq,bqk->bhwk", masks, classes, precision=lax.Precision.HIGHEST)


def instances(
  class_logits: np.ndarray,
  masks: np.ndarray,
  *,
  max_instances: int = 100,
  things: Collection[int] | None = None,
  pixel_threshold: float = _PIXEL_THRESHOLD,
) -> Instances:
  """Instances of one picture: the pairs of a query and a class with the highest probabilities.

  Args:
    class_logits: `[Q, K + 1]`.
    masks: mask logits `[H, W, Q]`, or what gives them one query at a time, as `masks[..., q]`.
    max_instances: pairs that are taken.
    things: classes that may be instances; others are dropped from the pairs that were taken. None
      for all.
    pixel_threshold: a mask's probability has to be above it.
  """
  probabilities = _Probabilities(masks)

  def scored(query: int) -> tuple[np.ndarray, np.ndarray]:
    score = probabilities.of(query)
    return score > pixel_threshold, score

  return best_pairs(class_logits, scored, masks.shape[:2], max_instances, things)


def panoptic_segments(
  class_logits: np.ndarray,
  masks: np.ndarray,
  *,
  things: Collection[int],
  thing_threshold: float = 0.7,
  stuff_threshold: float = 0.5,
  pixel_threshold: float = _PIXEL_THRESHOLD,
  overlap_threshold: float = 0.8,
) -> tuple[np.ndarray, list[Segment]]:
  """Segments of one picture that do not overlap.

  Queries paint their masks one after the other, those of the highest class probability times mean
  mask probability first, where nothing is yet. One counts where enough of its mask is left. Stuff
  of one class is one segment.

  Args:
    class_logits: `[Q, K + 1]`; "no object" is never a query's class.
    masks: mask logits `[H, W, Q]`, or what gives them one query at a time, as `masks[..., q]`.
    things: classes that are countable; all others are stuff.
    thing_threshold: a thing's class probability has to be above it; published for COCO, so is the
      next; for ADE20K and Cityscapes see the authors' configurations.
    stuff_threshold: stuff's class probability has to be above it.
    pixel_threshold: a mask's probability has to be above it.
    overlap_threshold: more than this part of its mask has to be left.

  Returns:
    (int32 `[H, W]` of ids, 0 for none; the segments by id).
  """
  probabilities = softmax(class_logits)[:, :-1]
  best, classes = probabilities.max(-1), probabilities.argmax(-1)
  is_things = np.isin(classes, list(things))
  kept = np.flatnonzero(best > np.where(is_things, thing_threshold, stuff_threshold))
  found = np.zeros(masks.shape[:2], np.int32)
  segments: list[Segment] = []
  if not len(kept):
    return found, segments
  mask_scores = _Probabilities(masks)
  inside, means = [], np.zeros(len(kept), np.float32)
  for i, query in enumerate(kept.tolist()):
    score = mask_scores.of(query)
    inside.append(score > pixel_threshold)
    total = np.sum(score[inside[i]], dtype=np.float32)
    means[i] = total / np.float32(max(inside[i].sum(), 1))
  stuff: dict[int, int] = {}
  for i in np.argsort(-best[kept] * means, kind="stable").tolist():
    category, is_thing = int(classes[kept[i]]), bool(is_things[kept[i]])
    own = inside[i]
    free = own & (found == 0)
    if free.sum() <= own.sum() * overlap_threshold:
      continue
    number = stuff.get(category) if not is_thing else None
    if number is None:
      number = len(segments) + 1
      segments.append(Segment(number, category, is_thing))
      if not is_thing:
        stuff[category] = number
    found[free] = number
  return found, segments


class _Probabilities:
  """The softmax over queries of each pixel, one query at a time: masks are asked for twice.

  All masks of a large picture do not fit in memory.
  """

  def __init__(self, masks: np.ndarray):
    self._masks = masks
    self._highest = self._logits(0)
    self._total = np.ones_like(self._highest)
    for query in range(1, masks.shape[-1]):
      logits = self._logits(query)
      highest = np.maximum(self._highest, logits)
      self._total *= np.exp(self._highest - highest)
      self._total += np.exp(logits - highest)
      self._highest = highest

  def of(self, query: int) -> np.ndarray:
    """float32 `[H, W]`."""
    return np.exp(self._logits(query) - self._highest) / self._total

  def _logits(self, query: int) -> np.ndarray:
    return np.asarray(self._masks[..., query], np.float32)
