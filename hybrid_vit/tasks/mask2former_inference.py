"""Segments of Mask2Former's answers: semantic, instance and panoptic.

Cheng et al., arXiv:2112.01527, appendix, and MaskFormer, arXiv:2107.06278, section 3.4; the rules
are those of the authors' `maskformer_model.py`. Masks are first taken to the picture's own size by
`restore_size`. Semantic scores are computed on the device for a batch; instances and panoptic
segments, whose number is not known before, in NumPy for one picture.

Deviations: where the authors' top-k leaves equal scores in any order, the lower query and the lower
class come first. Instances are sorted by their final scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hybrid_vit.ops.resize import resize_bilinear

# The authors add it to the area that a mask's mean score is divided by.
_AREA_EPSILON = 1e-6


class Instances(NamedTuple):
  """Instances of a picture, the highest score first.

  Attributes:
    scores: float32 `[N]`, of the class times the mean over the mask.
    classes: int `[N]`.
    masks: bool `[N, H, W]`.
    queries: int `[N]`, which query each came of; one query may make several.
  """

  scores: np.ndarray
  classes: np.ndarray
  masks: np.ndarray
  queries: np.ndarray


@dataclasses.dataclass(frozen=True)
class Segment:
  """One entry of a panoptic map: its id there, from 1, its class, and whether this is a thing."""

  id: int
  category: int
  is_thing: bool


def restore_size(
  maps: jax.Array,
  input_size: Sequence[int],
  picture_size: Sequence[int],
  size: Sequence[int],
  *,
  align_corners: bool = False,
) -> jax.Array:
  """Takes maps of the padded input to the picture's own size, bilinear.

  The authors do so with mask logits; in semantic segmentation alone (ADE20K, Cityscapes) with
  semantic scores, whose masks were resized to the input alone.

  Args:
    maps: `[B, h, w, C]`, of any size, of the whole input.
    input_size: (height, width) of the input with its padding.
    picture_size: of the picture within it, at the upper left.
    size: of the picture before it was resized.
    align_corners: of both resizings; Mask2Former has none.

  Returns:
    `[B, *size, C]`.
  """
  maps = resize_bilinear(maps, input_size, align_corners=align_corners)
  maps = maps[:, : picture_size[0], : picture_size[1]]
  return resize_bilinear(maps, size, align_corners=align_corners)


def semantic_scores(class_logits: jax.Array, masks: jax.Array) -> jax.Array:
  """Scores of classes in each pixel; the highest is its class.

  Args:
    class_logits: `[B, Q, K + 1]`.
    masks: mask logits `[B, H, W, Q]`.

  Returns:
    float32 `[B, H, W, K]`: sums over queries of the class's probability times the mask's.
  """
  classes = jax.nn.softmax(class_logits.astype(jnp.float32), axis=-1)[..., :-1]
  masks = jax.nn.sigmoid(masks.astype(jnp.float32))
  return jnp.einsum("bhwq,bqk->bhwk", masks, classes, precision=lax.Precision.HIGHEST)


def instances(
  class_logits: np.ndarray,
  masks: np.ndarray,
  *,
  max_instances: int = 100,
  things: Collection[int] | None = None,
) -> Instances:
  """Instances of one picture: the pairs of a query and a class with the highest probabilities.

  Args:
    class_logits: `[Q, K + 1]`.
    masks: mask logits `[H, W, Q]`, or what gives them one query at a time, as `masks[..., q]`.
    max_instances: pairs that are taken.
    things: classes that may be instances; others are dropped from the pairs that were taken. None
      for all.
  """

  def scored(query: int) -> tuple[np.ndarray, np.ndarray]:
    logits = np.asarray(masks[..., query], np.float32)
    return logits > 0, _sigmoid(logits)

  return best_pairs(class_logits, scored, masks.shape[:2], max_instances, things)


def best_pairs(
  class_logits: np.ndarray,
  scored: Callable[[int], tuple[np.ndarray, np.ndarray]],
  size: Sequence[int],
  max_instances: int,
  things: Collection[int] | None,
) -> Instances:
  """`instances` for any rule of masks.

  Args:
    class_logits: `[Q, K + 1]`.
    scored: from a query to its mask, bool `[H, W]`, and its score in each pixel, float32.
    size: (H, W).
    max_instances: see `instances`; so is `things`.
    things: classes that may be instances.
  """
  probabilities = softmax(class_logits)[:, :-1]
  classes_count = probabilities.shape[1]
  order = np.argsort(-probabilities.reshape(-1), kind="stable")[:max_instances]
  queries, classes = order // classes_count, order % classes_count
  if things is not None:
    kept = np.isin(classes, list(things))
    queries, classes = queries[kept], classes[kept]
  inside = np.zeros((len(queries), *size), bool)
  means = np.zeros(len(queries), np.float32)
  # One at a time: hundreds of masks of a large picture do not fit in memory.
  for i, query in enumerate(queries.tolist()):
    inside[i], score = scored(query)
    total = np.sum(score[inside[i]], dtype=np.float32)
    means[i] = total / (np.float32(inside[i].sum()) + np.float32(_AREA_EPSILON))
  scores = probabilities[queries, classes] * means
  order = np.argsort(-scores, kind="stable")
  return Instances(scores[order], classes[order], inside[order], queries[order])


def panoptic_segments(
  class_logits: np.ndarray,
  masks: np.ndarray,
  *,
  things: Collection[int],
  object_threshold: float = 0.8,
  overlap_threshold: float = 0.8,
) -> tuple[np.ndarray, list[Segment]]:
  """Segments of one picture that do not overlap.

  Each pixel belongs to the query with the highest class probability times mask probability. A
  segment is what a query owns of its own mask; it counts where the query owns enough of it. Stuff
  of one class is one segment.

  Args:
    class_logits: `[Q, K + 1]`.
    masks: mask logits `[H, W, Q]`, or what gives them one query at a time, as `masks[..., q]`.
    things: classes that are countable; all others are stuff.
    object_threshold: a query's class probability has to be above it.
    overlap_threshold: least part of its mask that a query owns.

  Returns:
    (int32 `[H, W]` of ids, 0 for none; the segments by id).
  """
  probabilities = softmax(class_logits)
  best, classes = probabilities.max(-1), probabilities.argmax(-1)
  kept = (classes != probabilities.shape[-1] - 1) & (best > object_threshold)
  found = np.zeros(masks.shape[:2], np.int32)
  segments: list[Segment] = []
  if not kept.any():
    return found, segments
  best, classes = best[kept], classes[kept]
  owners, inside = _owners(masks, np.flatnonzero(kept), best)
  stuff: dict[int, int] = {}
  for k, category in enumerate(classes.tolist()):
    owned, whole = owners == k, inside[k]
    own = owned & whole
    # The part is of all that it owns, also outside its mask: so have the authors.
    if not own.any() or owned.sum() / whole.sum() < overlap_threshold:
      continue
    is_thing = category in things
    number = len(segments) + 1
    if not is_thing and category in stuff:
      number = stuff[category]
    else:
      segments.append(Segment(number, category, is_thing))
      if not is_thing:
        stuff[category] = number
    found[own] = number
  return found, segments


def _owners(
  masks: np.ndarray, queries: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
  """Whose weighted probability is the highest in each pixel, and the mask of each of some queries.

  One at a time, as `instances`. Returns int32 `[H, W]`, places in `queries`, the first of equal
  ones; and bool `[H, W]` of each.
  """
  owners = np.zeros(masks.shape[:2], np.int32)
  highest = np.full(masks.shape[:2], -1, np.float32)
  inside = []
  for k, query in enumerate(queries.tolist()):
    scores = _sigmoid(np.asarray(masks[..., query], np.float32))
    inside.append(scores >= 0.5)
    weighted = weights[k] * scores
    higher = weighted > highest
    owners[higher], highest[higher] = k, weighted[higher]
  return owners, inside


def softmax(logits: np.ndarray) -> np.ndarray:
  """Over the last axis, float32."""
  x = np.asarray(logits, np.float32)
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def _sigmoid(x: np.ndarray) -> np.ndarray:
  e = np.exp(-np.abs(x))
  return np.where(x >= 0, np.float32(1), e) / (np.float32(1) + e)
