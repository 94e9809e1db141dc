"""DINO's set losses: predictions matched to objects, and noised objects found again.

Sparse R-CNN has the first of them, with terms of its own for boxes.

Zhang et al., arXiv:2203.03605; follows the authors' `SetCriterion` and `HungarianMatcher`, which
are those of Deformable DETR. Every decoder layer and the encoder's proposals are matched of their
own. All is float32; DINO's boxes are (centre x, centre y, width, height) with the picture from 0 to
1.

Deviation: the number of objects that losses are divided by is of the whole batch and at least 1;
the authors' is the mean of the devices' and at least 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.heads.detection_losses import sigmoid_focal
from hybrid_vit.heads.dino_denoising import DenoisingQueries
from hybrid_vit.ops.boxes import box_areas, centres_to_corners
from hybrid_vit.ops.matching import linear_assignment

# Of boxes that broadcast: distances summed over the coordinates, and generalised IoU.
BoxTerms = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
# The authors add it to unions and hulls, where `ops.boxes` has it as their least.
_AREA_EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class SetLossSettings:
  """Weights, as published.

  Attributes:
    class_cost: of the matching.
    l1_cost: likewise.
    giou_cost: likewise.
    class_weight: of the losses.
    l1_weight: likewise.
    giou_weight: likewise.
    alpha: of the focal loss and of the matching's cost of classes.
    gamma: likewise.
    log_epsilon: what the matching adds to probabilities before their logarithm.
  """

  class_cost: float = 2.0
  l1_cost: float = 5.0
  giou_cost: float = 2.0
  class_weight: float = 1.0
  l1_weight: float = 5.0
  giou_weight: float = 2.0
  alpha: float = 0.25
  gamma: float = 2.0
  log_epsilon: float = 1e-8


class BoxTargets(NamedTuple):
  """The true objects of a batch.

  Attributes:
    boxes: `[B, G, 4]`.
    labels: int `[B, G]`, 0 to K - 1.
    valid: bool `[B, G]`.
  """

  boxes: jax.Array
  labels: jax.Array
  valid: jax.Array


def centre_terms(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Sum of |d|, and generalised IoU, of boxes `[..., 4]` by centre and size: DINO's `BoxTerms`."""
  return jnp.sum(jnp.abs(first - second), axis=-1), _giou(first, second)


def set_losses(
  logits: jax.Array,
  boxes: jax.Array,
  targets: BoxTargets,
  settings: SetLossSettings,
  box_terms: BoxTerms = centre_terms,
) -> dict[str, jax.Array]:
  """Losses of several sets of predictions, each matched for itself, unweighted.

  Args:
    logits: `[..., B, Q, K]`.
    boxes: `[..., B, Q, 4]`.
    targets: what is there.
    settings: the costs, and the focal loss's figures.
    box_terms: by which boxes are compared.

  Returns:
    "class", "l1" and "giou", float32 `[...]`, sums over the batch divided by its objects.
  """
  logits, boxes = logits.astype(jnp.float32), boxes.astype(jnp.float32)
  query = match_queries(logits, boxes, targets, settings, box_terms)
  # [..., B, G, Q]: comparisons instead of a scatter.
  hit = query[..., None] == jnp.arange(logits.shape[-2])
  truth = jnp.max(jnp.where(hit, targets.labels[..., None], -1), axis=-2)
  found = jnp.take_along_axis(boxes, jnp.maximum(query, 0)[..., None], axis=-2)
  count = num_objects(targets)
  l1, giou = _box_losses(found, targets.boxes, query >= 0, box_terms)
  of_class = _class_loss(logits, truth, jnp.ones(logits.shape[-2], bool), settings)
  return {"class": of_class / count, "l1": l1 / count, "giou": giou / count}


def denoising_losses(
  logits: jax.Array,
  boxes: jax.Array,
  queries: DenoisingQueries,
  targets: BoxTargets,
  settings: SetLossSettings,
) -> dict[str, jax.Array]:
  """Losses of denoising queries, which know their objects, unweighted.

  Args:
    logits: `[..., B, P, K]`.
    boxes: `[..., B, P, 4]`.
    queries: what went in.
    targets: what is there.
    settings: the focal loss's figures.

  Returns:
    As `set_losses`; divided by the groups, too.
  """
  own = jnp.take_along_axis(targets.labels, queries.target, axis=-1)
  truth = jnp.where(queries.positive, own, -1)
  true_boxes = jnp.take_along_axis(targets.boxes, queries.target[..., None], axis=1)
  count = num_objects(targets) * queries.num_groups
  l1, giou = _box_losses(boxes.astype(jnp.float32), true_boxes, queries.positive, centre_terms)
  of_class = _class_loss(logits.astype(jnp.float32), truth, queries.counted, settings)
  return {"class": of_class / count, "l1": l1 / count, "giou": giou / count}


def match_queries(
  logits: jax.Array,
  boxes: jax.Array,
  targets: BoxTargets,
  settings: SetLossSettings,
  box_terms: BoxTerms = centre_terms,
) -> jax.Array:
  """The query of each object at the least cost, int32 `[..., B, G]`, -1 for none."""
  costs = matching_costs(logits, boxes, targets, settings, box_terms)
  valid = jnp.broadcast_to(targets.valid, costs.shape[:-1])
  # All axes become one there; with the batch in front each device keeps its part.
  found = linear_assignment(jnp.moveaxis(costs, -3, 0), jnp.moveaxis(valid, -2, 0))
  return jnp.moveaxis(found, 0, -2)


def matching_costs(
  logits: jax.Array,
  boxes: jax.Array,
  targets: BoxTargets,
  settings: SetLossSettings,
  box_terms: BoxTerms = centre_terms,
) -> jax.Array:
  """What it costs to give an object to a query, float32 `[..., B, G, Q]`, without a gradient.

  Args:
    logits: `[..., B, Q, K]`.
    boxes: `[..., B, Q, 4]`.
    targets: what is there.
    settings: the weights.
    box_terms: by which boxes are compared.
  """
  s = settings
  logits, boxes = lax.stop_gradient((logits, boxes))
  p = jax.nn.sigmoid(logits.astype(jnp.float32))
  negative = (1 - s.alpha) * p**s.gamma * -jnp.log(1 - p + s.log_epsilon)
  positive = s.alpha * (1 - p) ** s.gamma * -jnp.log(p + s.log_epsilon)
  chosen = jax.nn.one_hot(targets.labels, p.shape[-1])
  of_class = jnp.einsum(
    "bgk,...bqk->...bgq", chosen, positive - negative, precision=lax.Precision.HIGHEST
  )
  theirs, ours = targets.boxes[:, :, None], boxes[..., None, :, :]
  of_l1, giou = box_terms(theirs, ours)
  return s.class_cost * of_class + s.l1_cost * of_l1 - s.giou_cost * giou


def weighted_losses(
  losses: dict[str, jax.Array], settings: SetLossSettings
) -> dict[str, jax.Array]:
  """The same, each times its weight."""
  return {name: getattr(settings, f"{name}_weight") * value for name, value in losses.items()}


def num_objects(targets: BoxTargets) -> jax.Array:
  """How many there are in the batch, at least 1, float32."""
  return jnp.maximum(jnp.sum(targets.valid), 1).astype(jnp.float32)


def _class_loss(
  logits: jax.Array, truth: jax.Array, counted: jax.Array, settings: SetLossSettings
) -> jax.Array:
  """`[..., B, N, K]`, int `[..., B, N]` with -1 for nothing, and bool `[N]` → `[...]`."""
  wanted = truth[..., None] == jnp.arange(logits.shape[-1])
  losses = sigmoid_focal(logits, wanted, settings.alpha, settings.gamma)
  return jnp.sum(jnp.where(counted[:, None], losses, 0.0), axis=(-3, -2, -1))


def _box_losses(
  found: jax.Array, true: jax.Array, there: jax.Array, box_terms: BoxTerms
) -> tuple[jax.Array, jax.Array]:
  """Sums over `[..., B, N, 4]` where bool `[..., B, N]`: |d|, and 1 - GIoU."""
  l1, giou = box_terms(found, true)
  return tuple(jnp.sum(jnp.where(there, x, 0.0), axis=(-2, -1)) for x in (l1, 1 - giou))  # type: ignore[return-value]


def _giou(first: jax.Array, second: jax.Array) -> jax.Array:
  """Generalised IoU (arXiv:1902.09630) of boxes `[..., 4]` that broadcast."""
  a, b = centres_to_corners(first), centres_to_corners(second)
  shared = jnp.maximum(jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2]), 0)
  hull = jnp.maximum(jnp.maximum(a[..., 2:], b[..., 2:]) - jnp.minimum(a[..., :2], b[..., :2]), 0)
  intersection, around = shared[..., 0] * shared[..., 1], hull[..., 0] * hull[..., 1]
  union = box_areas(a) + box_areas(b) - intersection
  iou = intersection / (union + _AREA_EPSILON)
  return iou - (around - union) / (around + _AREA_EPSILON)
