"""Mask2Former's set loss: queries matched to targets, masks compared at a few thousand points.

Cheng et al., arXiv:2112.01527, sections 3.3 and 4.1; follows the authors' `SetCriterion` and
`HungarianMatcher`. Targets have fixed slots, of which some are valid, so that shapes are static;
matching is on the device. Everything is float32.

Deviations: with several devices the class loss is a mean over the whole batch, not of the devices'
means; and the number of masks is counted over all devices and at least 1, where the authors' has at
least 1 on each. The matching's costs are not cut at 1e10.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.ops.mask_forms import LabelMasks, Masks, sample_any_masks
from hybrid_vit.ops.matching import linear_assignment
from hybrid_vit.ops.point_sampling import sample_masks, sample_points
from hybrid_vit.ops.top_places import top_places


class SegmentTargets(NamedTuple):
  """The segments of a batch of pictures, in G slots each.

  Attributes:
    labels: int32 `[B, G]`, classes from 0.
    masks: `[B, G, H, W]`, 0 or 1 of any type, over the whole input; any size, since points are
      relative; or one of the smaller forms of `ops.mask_forms`.
    valid: bool `[B, G]`, which slots hold one.
  """

  labels: jax.Array
  masks: Masks
  valid: jax.Array


class PointDraws(NamedTuple):
  """Uniform random places (x, y) in [0, 1] for one prediction.

  Attributes:
    matching: `[B, points, 2]`, the same for all queries and targets of a picture.
    candidates: `[B, G, candidates, 2]`, of which the least certain are taken.
    others: `[B, G, points - important, 2]`, taken as they are.
  """

  matching: jax.Array
  candidates: jax.Array
  others: jax.Array


@dataclasses.dataclass(frozen=True)
class Mask2FormerLoss:
  """Weights and numbers of points, as published.

  Attributes:
    class_weight: of the classes' loss, and in the matching's cost; so are the next two.
    mask_weight: of the binary cross entropy of points.
    dice_weight: of the dice loss of points.
    no_object_weight: of queries without a target within the classes' loss.
    num_points: of a mask.
    oversampling: candidates over `num_points`.
    important_part: of `num_points`, which are the least certain candidates.

  Raises:
    ValueError: fewer candidates than are to be taken of them, or no points.
  """

  class_weight: float = 2.0
  mask_weight: float = 5.0
  dice_weight: float = 5.0
  no_object_weight: float = 0.1
  num_points: int = 12544
  oversampling: float = 3.0
  important_part: float = 0.75

  def __post_init__(self) -> None:
    if self.num_points < 1 or not 0 <= self.important_part <= 1:
      raise ValueError(
        f"num_points is {self.num_points} and important_part {self.important_part}; at least 1 and "
        "from 0 to 1 were expected"
      )
    if self.num_candidates < self.num_important:
      raise ValueError(
        f"oversampling is {self.oversampling}: {self.num_candidates} candidates for "
        f"{self.num_important} points"
      )

  @property
  def num_candidates(self) -> int:
    """Places of which the least certain are taken."""
    return int(self.num_points * self.oversampling)

  @property
  def num_important(self) -> int:
    """How many of the candidates are taken."""
    return int(self.important_part * self.num_points)


def mask2former_losses(
  answer: Mapping[str, Any],
  targets: SegmentTargets,
  settings: Mask2FormerLoss,
  points: jax.Array | PointDraws,
) -> dict[str, jax.Array]:
  """The weighted losses of all predictions, each with a matching of its own.

  Args:
    answer: of the head: "class_logits" `[B, Q, K + 1]`, "mask_logits" `[B, Q, h, w]`, and
      "auxiliary", a list of such pairs.
    targets: what is there.
    settings: weights and numbers of points.
    points: a key to draw them with, or the places themselves, each array with a first axis of
      predictions, the auxiliary ones first.

  Returns:
    "class", "mask" and "dice", float32 `[predictions]`, the auxiliary ones first. The loss is the
    sum of all.

  Raises:
    ValueError: targets that do not belong together, or draws for another number of predictions.
  """
  predictions = [*answer.get("auxiliary", ()), answer]
  check_targets(targets, predictions[-1]["class_logits"].shape[0])
  source: Any = points
  if isinstance(points, PointDraws):
    if len(points.matching) != len(predictions):
      raise ValueError(
        f"points were drawn for {len(points.matching)} predictions of {len(predictions)}"
      )
  else:
    source = jax.random.split(points, len(predictions))
  shape = (targets.labels.shape[0], targets.labels.shape[1])
  stacked = {
    name: jnp.stack([prediction[name] for prediction in predictions])
    for name in ("class_logits", "mask_logits")
  }

  def costs_of(pair: tuple[dict[str, jax.Array], Any]) -> jax.Array:
    matching = _drawn(pair[1], shape, settings).matching
    return matching_costs(pair[0], targets, matching, settings)

  # Places and samples are made again in the backward pass: those of ten predictions would not fit.
  @jax.checkpoint
  def losses_of(triple: tuple[dict[str, jax.Array], Any, jax.Array]) -> dict[str, jax.Array]:
    prediction, source, query = triple
    draws = _drawn(source, shape, settings)
    mask, dice = _point_losses(prediction["mask_logits"], targets, query, draws, settings)
    return {
      "class": settings.class_weight
      * class_loss(prediction["class_logits"], targets, query, settings),
      "mask": settings.mask_weight * mask,
      "dice": settings.dice_weight * dice,
    }

  # One after the other, so that one is compiled and in memory; all are matched at once.
  costs = lax.map(costs_of, (lax.stop_gradient(stacked), source))
  queries = match_targets(costs, targets.valid)
  return lax.map(losses_of, (stacked, source, queries))


def draw_points(key: jax.Array, shape: tuple[int, int], settings: Mask2FormerLoss) -> PointDraws:
  """The places of one prediction for `shape` = (pictures, slots of targets)."""
  batch, slots = shape
  counts = (
    (batch, settings.num_points),
    (batch, slots, settings.num_candidates),
    (batch, slots, settings.num_points - settings.num_important),
  )
  keys = jax.random.split(key, 3)
  return PointDraws(*(jax.random.uniform(k, (*count, 2)) for k, count in zip(keys, counts)))


def matching_costs(
  prediction: Mapping[str, jax.Array],
  targets: SegmentTargets,
  points: jax.Array,
  settings: Mask2FormerLoss,
) -> jax.Array:
  """What it costs to give a target to a query, float32 `[B, G, Q]`, without a gradient.

  Args:
    prediction: "class_logits" and "mask_logits".
    targets: what is there.
    points: `[B, N, 2]`, see `PointDraws.matching`.
    settings: the weights.
  """
  classes, masks = (lax.stop_gradient(prediction[f"{k}_logits"]) for k in ("class", "mask"))
  classes = jax.nn.softmax(classes.astype(jnp.float32), axis=-1)
  labels = jnp.clip(targets.labels, 0, classes.shape[-1] - 1)
  of_class = -jnp.take_along_axis(classes.transpose(0, 2, 1), labels[:, :, None], axis=1)
  logits = sample_points(masks.transpose(0, 2, 3, 1), points)  # [B, N, Q]
  truth = sample_any_masks(targets.masks, points[:, None])  # [B, G, N]
  product = functools.partial(jnp.einsum, "bgn,bnq->bgq", precision=lax.Precision.HIGHEST)
  # -t log s(x) - (1 - t) log(1 - s(x)) = log(1 + exp(x)) - t x
  of_mask = jax.nn.softplus(logits).sum(1)[:, None] - product(truth, logits)
  of_mask = of_mask / points.shape[1]
  probability = jax.nn.sigmoid(logits)
  shared = 2.0 * product(truth, probability)
  both = truth.sum(-1)[:, :, None] + probability.sum(1)[:, None]
  of_dice = 1.0 - (shared + 1.0) / (both + 1.0)
  return (
    settings.class_weight * of_class
    + settings.mask_weight * of_mask
    + settings.dice_weight * of_dice
  )


def match_targets(costs: jax.Array, valid: jax.Array) -> jax.Array:
  """The query of each target at the least cost: `[..., B, G, Q]` → int32 `[..., B, G]`.

  It is -1 where a slot is not valid, or where queries are fewer than targets.
  """
  return linear_assignment(costs, jnp.broadcast_to(valid, costs.shape[:-1]))


def class_loss(
  logits: jax.Array, targets: SegmentTargets, query: jax.Array, settings: Mask2FormerLoss
) -> jax.Array:
  """Cross entropy of all queries, a mean weighted by their true classes' weights.

  Args:
    logits: `[B, Q, K + 1]`.
    targets: what is there.
    query: int32 `[B, G]`, of `match_targets`.
    settings: the weight of "no object".
  """
  batch, queries, classes = logits.shape
  truth = jnp.full((batch, queries), classes - 1, jnp.int32)
  # What has no query goes beyond the last, where it is dropped.
  place = jnp.where(query < 0, queries, query)
  truth = truth.at[jnp.arange(batch)[:, None], place].set(
    targets.labels.astype(jnp.int32), mode="drop"
  )
  logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
  losses = -jnp.take_along_axis(logs, truth[..., None], axis=-1)[..., 0]
  weights = jnp.where(truth == classes - 1, settings.no_object_weight, 1.0)
  return jnp.sum(weights * losses) / jnp.sum(weights)


def semantic_targets(
  labels: jax.Array, num_classes: int, max_targets: int | None = None
) -> SegmentTargets:
  """One segment of each class that a picture has; the map itself says where they are.

  Args:
    labels: int `[B, H, W]`; what is no class from 0 to `num_classes` - 1 belongs to no segment.
    num_classes: K.
    max_targets: slots; None for K. Where a picture has more classes, those of the fewest pixels
      are left out.
  """
  slots = min(num_classes if max_targets is None else max_targets, num_classes)
  every = jnp.arange(num_classes)[None, :, None]
  # Comparisons, which fuse with their sum: counting by a scatter is slow on a TPU.
  counts = (labels.reshape(labels.shape[0], 1, -1) == every).sum(-1)
  classes = top_places(counts, slots)
  valid = jnp.take_along_axis(counts, classes, axis=1) > 0
  classes = classes.astype(jnp.int32)
  return SegmentTargets(classes, LabelMasks(labels, classes), valid)


def least_places(x: jax.Array, count: int) -> jax.Array:
  """Where the `count` least numbers of each row are: float `[..., N]` → int32 `[..., count]`.

  Of equal ones the first come first.
  """
  return top_places(-x, count)


def check_targets(targets: SegmentTargets, batch: int) -> None:
  """Raises ValueError for targets that do not belong together, or to another number of pictures."""
  shape = tuple(targets.labels.shape)
  if shape != tuple(targets.valid.shape) or shape != tuple(targets.masks.shape[:2]):
    raise ValueError(
      f"labels {list(shape)}, valid {list(targets.valid.shape)} and masks "
      f"{list(targets.masks.shape)} do not belong together: [B, G], [B, G] and [B, G, H, W] were "
      "expected"
    )
  if shape[0] != batch:
    raise ValueError(f"targets are of {shape[0]} pictures, and the answer of {batch}")


def _drawn(source: Any, shape: tuple[int, int], settings: Mask2FormerLoss) -> PointDraws:
  return source if isinstance(source, PointDraws) else draw_points(source, shape, settings)


def _point_losses(
  mask_logits: jax.Array,
  targets: SegmentTargets,
  query: jax.Array,
  draws: PointDraws,
  settings: Mask2FormerLoss,
) -> tuple[jax.Array, jax.Array]:
  """Binary cross entropy and dice of the matched pairs, sums over pairs per target."""
  paired = targets.valid & (query >= 0)
  masks = jnp.take_along_axis(mask_logits, jnp.maximum(query, 0)[:, :, None, None], axis=1)
  places = _uncertain_points(lax.stop_gradient(masks), draws, settings)
  logits = sample_masks(masks, places)
  truth = sample_any_masks(targets.masks, places)
  entropy = jnp.mean(jax.nn.softplus(logits) - truth * logits, axis=-1)
  probability = jax.nn.sigmoid(logits)
  shared = 2.0 * jnp.sum(probability * truth, axis=-1)
  dice = 1.0 - (shared + 1.0) / (jnp.sum(probability, -1) + jnp.sum(truth, -1) + 1.0)
  count = jnp.maximum(targets.valid.sum(), 1).astype(jnp.float32)
  entropy, dice = (jnp.sum(jnp.where(paired, x, 0.0)) / count for x in (entropy, dice))
  return entropy, dice


def _uncertain_points(masks: jax.Array, draws: PointDraws, settings: Mask2FormerLoss) -> jax.Array:
  """The candidates nearest to a mask's border, and the others: `[B, G, num_points, 2]`."""
  certainty = jnp.abs(sample_masks(masks, draws.candidates))
  chosen = least_places(certainty, settings.num_important)
  important = jnp.take_along_axis(draws.candidates, chosen[..., None], axis=2)
  return jnp.concatenate([important, draws.others], axis=2)
