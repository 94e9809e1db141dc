"""kMaX-DeepLab's set loss: one matching for all predictions, a PQ-like loss, and what helps it.

Yu et al., arXiv:2207.04044, section 4.1, whose terms are MaX-DeepLab's (arXiv:2012.00759, section
3.3 and appendix); follows the authors' PyTorch code, `SetCriterion` and `HungarianMatcher`. Targets
have fixed slots, of which some are valid, so that shapes are static; matching is on the device.
Everything is float32.

Deviations: semantic targets are made of the segments, the last one where two overlap, where the
authors read a map of their own; pixels are sampled no more often than there are some; a pixel is
void where no matched target has it, which theirs finds by the rounded sum of shared pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.heads.kmax_layers import resize_map
from hybrid_vit.ops.mask_forms import bitmaps, every_cell
from hybrid_vit.tasks.mask2former_losses import (
  SegmentTargets,
  check_targets,
  least_places,
  match_targets,
)

# Added to areas that are divided by; the least weight of a query in the loss.
_AREA_EPSILON = 1e-5
_LEAST_WEIGHT = 1e-5

# Of the classes' cross entropy: a query with a target, and one without.
_TARGET_WEIGHT, _VOID_WEIGHT = 0.75, 0.25

# Added to the logarithms by which pixels are sampled: void ones come last.
_VOID_LOGIT = -99999.0


class PixelDraws(NamedTuple):
  """Which pixels are compared, as places in the rows of a map laid one after the other.

  Attributes:
    contrast: int32 `[predictions, B, N]`.
    semantic: int32 `[B, M]`.
  """

  contrast: jax.Array
  semantic: jax.Array


@dataclasses.dataclass(frozen=True)
class KMaXLoss:
  """Weights and numbers of pixels, as published.

  Attributes:
    class_weight: of the classes' half of the PQ-like loss.
    dice_weight: of the masks' half.
    mask_weight: of the cross entropy over the queries of a pixel (mask id).
    contrast_weight: of the instance discrimination of pixels.
    semantic_weight: of the auxiliary semantic decoder.
    contrast_pixels: of a picture, for each prediction.
    contrast_exponent: of 1 / area, by which those are sampled.
    contrast_temperature: that products of pixel features are divided by.
    semantic_pixels: of a picture.
    semantic_exponent: of 1 / area, by which those are sampled.

  Raises:
    ValueError: no pixels, or a temperature that is not positive.
  """

  class_weight: float = 3.0
  dice_weight: float = 3.0
  mask_weight: float = 0.3
  contrast_weight: float = 1.0
  semantic_weight: float = 1.0
  contrast_pixels: int = 4096
  contrast_exponent: float = 1.5
  contrast_temperature: float = 0.3
  semantic_pixels: int = 4096
  semantic_exponent: float = 2.0

  def __post_init__(self) -> None:
    for name in ("contrast_pixels", "semantic_pixels"):
      if getattr(self, name) < 1:
        raise ValueError(f"{name} is {getattr(self, name)}; at least 1 was expected")
    if self.contrast_temperature <= 0:
      raise ValueError(f"contrast_temperature is {self.contrast_temperature}; above 0 was expected")


class QueryTargets(NamedTuple):
  """What each query has to answer, by the matching of the last prediction.

  Attributes:
    masks: float32 `[B, Q, h, w]`; a pixel of several targets is shared among them.
    labels: int32 `[B, Q]`, the number of classes for "no object".
    mask_weights: float32 `[B, Q]`, of the dice loss: the class's probability, 0 without a target.
    class_weights: float32 `[B, Q]`, of the class loss: the mask's similarity.
    void: bool `[B, h, w]`, pixels of no target.
    rarity: float32 `[B, h, w]`, the logarithm of how many times the map is larger than the target
      of each pixel.
  """

  masks: jax.Array
  labels: jax.Array
  mask_weights: jax.Array
  class_weights: jax.Array
  void: jax.Array
  rarity: jax.Array


def kmax_losses(
  answer: Mapping[str, Any],
  targets: SegmentTargets,
  settings: KMaXLoss,
  pixels: jax.Array | PixelDraws,
) -> dict[str, jax.Array]:
  """The weighted losses of all predictions, which share the matching of the last one.

  Args:
    answer: of the head: "class_logits" `[B, Q, K + 1]`, "mask_logits" `[B, Q, h, w]`,
      "pixel_features" `[B, h, w, D]`; "auxiliary", a list of the same at any size; in training
      "semantic_logits" `[B, h, w, K + 1]`.
    targets: what is there; masks of the size of "mask_logits", or so many times larger that every
      s-th row and column, from the first on, makes that size.
    settings: weights and numbers of pixels.
    pixels: a key to sample them with, or the places themselves, the auxiliary ones' first.

  Returns:
    "class", "dice", "mask" and "contrast", float32 `[predictions]`, the auxiliary ones first, and
    "semantic", `[1]`, where the answer has it. The loss is the sum of all.

  Raises:
    ValueError: targets that do not belong together or to the answer, or draws for another number
      of predictions.
  """
  predictions = [*answer.get("auxiliary", ()), answer]
  batch, _, height, width = answer["mask_logits"].shape
  check_targets(targets, batch)
  masks = _masks_at(targets, (height, width))
  wanted = query_targets(answer, targets, masks)
  count = len(predictions)
  if isinstance(pixels, PixelDraws):
    if len(pixels.contrast) != count:
      raise ValueError(f"pixels were drawn for {len(pixels.contrast)} predictions of {count}")
    draws = pixels
  else:
    draws = draw_pixels(pixels, wanted, settings, count)

  # Softmax, similarities of pixels: what is made of one prediction is made again in the backward
  # pass.
  @jax.checkpoint
  def losses_of(prediction: dict[str, jax.Array], places: jax.Array) -> dict[str, jax.Array]:
    logits, features = prediction["mask_logits"], prediction["pixel_features"]
    if logits.shape[2:] != (height, width):
      logits = _resized(logits.transpose(0, 2, 3, 1), (height, width)).transpose(0, 3, 1, 2)
      features = _resized(features, (height, width))
    return {
      "class": settings.class_weight * class_loss(prediction["class_logits"], wanted),
      "dice": settings.dice_weight * dice_loss(logits, wanted),
      "mask": settings.mask_weight * mask_loss(logits, wanted),
      "contrast": settings.contrast_weight * contrast_loss(features, wanted, places, settings),
    }

  names = ("class_logits", "mask_logits", "pixel_features")
  parts = [
    losses_of({name: prediction[name].astype(jnp.float32) for name in names}, draws.contrast[i])
    for i, prediction in enumerate(predictions)
  ]
  found = {name: jnp.stack([part[name] for part in parts]) for name in parts[0]}
  if "semantic_logits" in answer:
    truth = semantic_labels(targets, masks, answer["semantic_logits"].shape[-1] - 1)
    loss = semantic_loss(answer["semantic_logits"], truth, draws.semantic)
    found["semantic"] = settings.semantic_weight * loss[None]
  return found


def query_targets(
  prediction: Mapping[str, jax.Array], targets: SegmentTargets, masks: jax.Array
) -> QueryTargets:
  """Matches targets to queries and turns them into what each query has to answer.

  The best matching has the largest sum of mask similarity times class probability (paper of
  MaX-DeepLab, equation 9). Nothing has a gradient.

  Args:
    prediction: "class_logits" and "mask_logits" of the last one.
    targets: labels and which slots are valid.
    masks: float32 `[B, G, h, w]`, 0 in slots that are not.
  """
  logits, mask_logits = (
    lax.stop_gradient(prediction[f"{name}_logits"].astype(jnp.float32))
    for name in ("class", "mask")
  )
  queries, classes = logits.shape[1], logits.shape[2] - 1
  probability = jax.nn.softmax(mask_logits, axis=1)
  dice = _similarity(probability, masks)
  labels = jnp.clip(targets.labels.astype(jnp.int32), 0, classes - 1)
  of_class = jnp.take_along_axis(
    jax.nn.softmax(logits, axis=-1).transpose(0, 2, 1), labels[:, :, None], axis=1
  )
  query = match_targets(-dice * of_class, targets.valid)

  # The slot of each query, -1 for none; what has no query goes beyond the last, and is dropped.
  batch, slots = query.shape
  place = jnp.where(query < 0, queries, query)
  slot = jnp.full((batch, queries), -1, jnp.int32)
  numbers = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), place.shape)
  slot = slot.at[jnp.arange(batch)[:, None], place].set(numbers, mode="drop")
  matched, slot = slot >= 0, jnp.maximum(slot, 0)

  masks = jnp.take_along_axis(masks, slot[:, :, None, None], axis=1)
  masks = jnp.where(matched[:, :, None, None], masks, 0.0)
  covered = masks.sum(1, keepdims=True)
  void = covered[:, 0] < 1
  masks = masks / jnp.maximum(covered, 1.0)
  # Of the target that a query has: at its own place in both tables.
  own_dice, own_class = (
    jnp.take_along_axis(table.transpose(0, 2, 1), slot[:, :, None], axis=2)[..., 0]
    for table in (dice, of_class)
  )
  area = probability.sum((2, 3))
  in_void = jnp.sum(probability * void[:, None], axis=(2, 3)) / (area + _AREA_EPSILON)
  of_pixel = jnp.einsum("bqhw,bq->bhw", masks, masks.sum((2, 3)), precision=lax.Precision.HIGHEST)
  cells = masks.shape[2] * masks.shape[3]
  return QueryTargets(
    masks,
    jnp.where(matched, jnp.take_along_axis(labels, slot, axis=1), classes),
    jnp.where(matched, jnp.maximum(own_class, _LEAST_WEIGHT), 0.0),
    jnp.maximum(jnp.where(matched, own_dice, in_void), _LEAST_WEIGHT),
    void,
    jnp.log(cells / jnp.maximum(of_pixel, 1.0)),
  )


def class_loss(logits: jax.Array, wanted: QueryTargets) -> jax.Array:
  """Cross entropy of `[B, Q, K + 1]`, each query's weighted by how good its mask is."""
  logs = jax.nn.log_softmax(logits, axis=-1)
  losses = -jnp.take_along_axis(logs, wanted.labels[..., None], axis=-1)[..., 0]
  is_void = wanted.labels == logits.shape[-1] - 1
  weights = jnp.where(is_void, _VOID_WEIGHT, _TARGET_WEIGHT)
  return _mean_where_not_zero(losses * weights * wanted.class_weights)


def dice_loss(mask_logits: jax.Array, wanted: QueryTargets) -> jax.Array:
  """Dice of softmax masks `[B, Q, h, w]`, each query's weighted by how sure its class is."""
  probability = jax.nn.softmax(mask_logits, axis=1)
  probability = jnp.where(wanted.void[:, None], 0.0, probability)
  shared = 2.0 * jnp.sum(probability * wanted.masks, axis=(2, 3))
  both = probability.sum((2, 3)) + wanted.masks.sum((2, 3))
  losses = (1.0 - (shared + 1.0) / (both + 1.0)) * wanted.mask_weights
  # A mean over all queries, of which most have no target, and the class loss's weight of the rest.
  return jnp.mean(losses) * _TARGET_WEIGHT


def mask_loss(mask_logits: jax.Array, wanted: QueryTargets) -> jax.Array:
  """Cross entropy over the queries of each pixel that is not void, of `[B, Q, h, w]`."""
  losses = -jnp.sum(wanted.masks * jax.nn.log_softmax(mask_logits, axis=1), axis=1)
  losses = jnp.where(wanted.void, 0.0, losses)
  return _mean_where_not_zero(losses.reshape(losses.shape[0], -1))


def contrast_loss(
  features: jax.Array, wanted: QueryTargets, places: jax.Array, settings: KMaXLoss
) -> jax.Array:
  """Instance discrimination: a pixel is to be like those of its own target.

  Args:
    features: `[B, h, w, D]`, of length 1.
    wanted: see `query_targets`.
    places: int32 `[B, N]`, see `PixelDraws`.
    settings: the temperature.
  """
  batch, queries = wanted.labels.shape
  features = jnp.take_along_axis(_rows(features), places[..., None], axis=1)
  masks = wanted.masks.reshape(batch, queries, -1)
  masks = jnp.take_along_axis(masks, places[:, None], axis=2)
  truth = jnp.einsum("bqk,bqj->bkj", masks, masks, precision=lax.Precision.HIGHEST)
  truth = truth / jnp.maximum(truth.sum(1, keepdims=True), 1.0)
  logits = jnp.einsum("bkd,bjd->bkj", features, features, precision=lax.Precision.HIGHEST)
  logs = jax.nn.log_softmax(logits / settings.contrast_temperature, axis=1)
  return _mean_where_not_zero(-jnp.sum(truth * logs, axis=1))


def semantic_loss(logits: jax.Array, labels: jax.Array, places: jax.Array) -> jax.Array:
  """Cross entropy of `[B, h, w, K + 1]` at `places`, `[B, M]`; label K is ignored.

  Raises:
    ValueError: labels of another size.
  """
  if logits.shape[:3] != labels.shape:
    raise ValueError(
      f"semantic logits are {list(logits.shape[1:3])} cells and masks {list(labels.shape[1:])}: "
      "the same size was expected"
    )
  logits = jnp.take_along_axis(_rows(logits.astype(jnp.float32)), places[..., None], axis=1)
  labels = jnp.take_along_axis(labels.reshape(labels.shape[0], -1), places, axis=1)
  logs = jax.nn.log_softmax(logits, axis=-1)
  losses = -jnp.take_along_axis(logs, labels[..., None], axis=-1)[..., 0]
  return _mean_where_not_zero(jnp.where(labels == logits.shape[-1] - 1, 0.0, losses))


def semantic_labels(targets: SegmentTargets, masks: jax.Array, num_classes: int) -> jax.Array:
  """The class of each pixel of `[B, G, h, w]`, int32 `[B, h, w]`, `num_classes` for none."""
  slots = masks.shape[1]
  numbers = jnp.arange(1, slots + 1)[None, :, None, None]
  last = jnp.max(jnp.where(masks > 0, numbers, 0), axis=1)
  labels = jnp.pad(targets.labels.astype(jnp.int32), ((0, 0), (1, 0)), constant_values=num_classes)
  return jnp.take_along_axis(labels, last.reshape(last.shape[0], -1), axis=1).reshape(last.shape)


def draw_pixels(
  key: jax.Array, wanted: QueryTargets, settings: KMaXLoss, predictions: int
) -> PixelDraws:
  """Samples pixels without putting back, those of small targets oftener, void ones last."""
  cells = wanted.rarity.shape[1] * wanted.rarity.shape[2]
  keys = jax.random.split(key, predictions + 1)

  def drawn(key: jax.Array, exponent: float, count: int) -> jax.Array:
    logits = exponent * wanted.rarity + jnp.where(wanted.void, _VOID_LOGIT, 0.0)
    logits = logits.reshape(logits.shape[0], -1)
    # The highest sums with Gumbel noise are a sample of the softmax.
    return least_places(-logits - jax.random.gumbel(key, logits.shape), min(count, cells))

  contrast = [
    drawn(k, settings.contrast_exponent, settings.contrast_pixels) for k in keys[:predictions]
  ]
  semantic = drawn(keys[predictions], settings.semantic_exponent, settings.semantic_pixels)
  return PixelDraws(jnp.stack(contrast), semantic)


def _masks_at(targets: SegmentTargets, size: tuple[int, int]) -> jax.Array:
  """Masks as float32 `[B, G, *size]`, 0 in slots that are not valid."""
  shape = targets.masks.shape
  steps = []
  for old, new in zip(shape[2:], size):
    step = (old - 1) // (new - 1) if new > 1 else old
    if not step or -(-old // step) != new:
      raise ValueError(
        f"masks of {list(shape[2:])} pixels for mask logits of {list(size)}: the same size was "
        "expected, or every s-th row and column making it"
      )
    steps.append(step)
  masks = bitmaps(every_cell(targets.masks, (steps[0], steps[1])))
  return jnp.where(targets.valid[:, :, None, None], masks.astype(jnp.float32), 0.0)


def _resized(x: jax.Array, size: tuple[int, int]) -> jax.Array:
  return resize_map(x, size, size[0])


def _similarity(probability: jax.Array, masks: jax.Array) -> jax.Array:
  """Dice of softmax masks `[B, Q, h, w]` with targets `[B, G, h, w]`, without void: `[B, G, Q]`."""
  probability = probability * jnp.any(masks > 0, axis=1, keepdims=True)
  shared = jnp.einsum("bghw,bqhw->bgq", masks, probability, precision=lax.Precision.HIGHEST)
  both = masks.sum((2, 3))[:, :, None] + probability.sum((2, 3))[:, None]
  return shared / (both / 2.0 + _AREA_EPSILON)


def _rows(x: jax.Array) -> jax.Array:
  """`[B, h, w, C]` → `[B, h * w, C]`."""
  return x.reshape(x.shape[0], -1, x.shape[-1])


def _mean_where_not_zero(losses: jax.Array) -> jax.Array:
  """For each picture a mean over what is not 0, `[B, N]`; the mean of those."""
  count = jnp.maximum(jnp.sum(losses != 0, axis=-1), 1)
  return jnp.mean(losses.sum(-1) / count)
