"""DINO's contrastive denoising queries: true boxes, moved a little or too far, in fixed slots.

Zhang et al., "DINO", arXiv:2203.03605, section 3.3; follows the authors' `prepare_for_cdn`. There
are groups of 2 N slots, N being the most objects that a picture of the batch has: N positive ones,
whose boxes are to be found again, then N negative ones, which are to be nothing. The number of
groups falls as N grows. Here both are numbers on the device, and the slots, whose count is fixed,
take their places by arithmetic: what the groups do not fill is seen by nobody and has no loss.

Deviation: N is of the whole batch; the authors' is of each device's part.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class DenoisingDraws(NamedTuple):
  """Random numbers for P slots.

  Attributes:
    flip: `[B, P]`, uniform in [0, 1); below half the ratio of label noise the label is changed.
    labels: int `[B, P]`, the label that it then has.
    signs: bool `[B, P, 4]`, whether the side x1, y1, x2, y2 moves to larger numbers.
    distances: `[B, P, 4]`, uniform in [0, 1).
  """

  flip: jax.Array
  labels: jax.Array
  signs: jax.Array
  distances: jax.Array


class DenoisingQueries(NamedTuple):
  """What goes into the decoder, and what is to come out.

  Attributes:
    labels: int32 `[B, P]`, with noise.
    boxes: float32 `[B, P, 4]`, with noise: (centre x, centre y, width, height), the picture from 0
      to 1.
    filled: bool `[B, P]`, slots that hold an object; others have no content and a blank box.
    group: int32 `[P]`; queries see those of their own group and the matched ones.
    counted: bool `[P]`, slots of whole groups, whose classes have a loss, filled or not.
    positive: bool `[B, P]`, filled slots whose object is to be found.
    target: int32 `[B, P]`, the place of the slot's object among the true ones.
    num_groups: int32 scalar.
  """

  labels: jax.Array
  boxes: jax.Array
  filled: jax.Array
  group: jax.Array
  counted: jax.Array
  positive: jax.Array
  target: jax.Array
  num_groups: jax.Array


def num_denoising_slots(number: int, most_objects: int) -> int:
  """P, room for all groups of any batch.

  Args:
    number: pairs of queries that are asked for, the authors' dn_number.
    most_objects: G, slots of true objects.
  """
  if _few(number):
    return 2 * (2 * number) * most_objects
  return 2 * max(number, most_objects)


def draw_denoising(key: jax.Array, batch: int, slots: int, num_classes: int) -> DenoisingDraws:
  """Draws for `[batch, slots]`."""
  flip, labels, signs, distances = jax.random.split(key, 4)
  return DenoisingDraws(
    jax.random.uniform(flip, (batch, slots)),
    jax.random.randint(labels, (batch, slots), 0, num_classes),
    jax.random.bernoulli(signs, 0.5, (batch, slots, 4)),
    jax.random.uniform(distances, (batch, slots, 4)),
  )


def denoising_queries(
  boxes: jax.Array,
  labels: jax.Array,
  valid: jax.Array,
  draws: DenoisingDraws,
  *,
  number: int,
  label_noise: float,
  box_noise: float,
) -> DenoisingQueries:
  """Noised objects of a batch.

  Args:
    boxes: `[B, G, 4]`, (centre x, centre y, width, height), the picture from 0 to 1.
    labels: int `[B, G]`.
    valid: bool `[B, G]`; which slots come first does not matter.
    draws: for `num_denoising_slots(number, G)` slots.
    number: N times the groups is at most this, but for one group, which there is always. Below 50
      there are twice as many groups as this, as in the authors' code.
    label_noise: twice the part of labels that are drawn anew.
    box_noise: a side of a positive box moves by up to this part of half the box's size, of a
      negative one by more, up to twice that.

  Raises:
    ValueError: draws for another number of slots.
  """
  batch, room = labels.shape
  slots = num_denoising_slots(number, room)
  if tuple(draws.flip.shape) != (batch, slots):
    raise ValueError(
      f"denoising draws are of shape {list(draws.flip.shape)}; {[batch, slots]} was expected: "
      f"number {number} and {room} slots of objects make {slots} slots"
    )
  counts = jnp.sum(valid, axis=-1)
  most = jnp.max(counts)
  single = jnp.maximum(most, 1)
  groups = jnp.asarray(2 * number if _few(number) else jnp.maximum(number // single, 1), jnp.int32)
  slot = jnp.arange(slots)
  place = slot % single
  filled = (place < counts[:, None]) & (slot < 2 * groups * single)
  negative = slot // single % 2 == 1

  # Valid objects first, in their order.
  order = jnp.argsort(~valid, axis=-1, stable=True)
  target = jnp.take_along_axis(order, jnp.broadcast_to(place, (batch, slots)), axis=-1)
  own = jnp.take_along_axis(labels.astype(jnp.int32), target, axis=-1)
  noised = jnp.where(draws.flip < 0.5 * label_noise, draws.labels.astype(jnp.int32), own)
  true = jnp.take_along_axis(boxes.astype(jnp.float32), target[..., None], axis=1)
  return DenoisingQueries(
    labels=jnp.where(filled, noised, 0),
    boxes=_moved(true, draws, negative, box_noise),
    filled=filled,
    group=slot // (2 * single),
    counted=(slot < 2 * groups * single) & (most > 0),
    positive=filled & ~negative,
    target=target,
    num_groups=groups,
  )


def blocked_queries(group: jax.Array, num_matched: int) -> jax.Array:
  """Whom queries must not see: bool `[P + Q, P + Q]`, denoising ones first.

  Args:
    group: int `[P]`, of the denoising queries.
    num_matched: Q, the others, which see none of these and are seen by all.
  """
  total = group.shape[0] + num_matched
  everyone = jnp.full(total, -1, group.dtype).at[: group.shape[0]].set(group)
  return (everyone[None, :] >= 0) & (everyone[:, None] != everyone[None, :])


def _few(number: int) -> bool:
  return 2 * number < 100


def _moved(boxes: jax.Array, draws: DenoisingDraws, negative: jax.Array, scale: float) -> jax.Array:
  if not scale:
    return boxes
  half = boxes[..., 2:] / 2
  corners = jnp.concatenate([boxes[..., :2] - half, boxes[..., :2] + half], axis=-1)
  parts = jnp.where(draws.signs, 1.0, -1.0) * (draws.distances + negative[:, None])
  corners = corners + parts * jnp.concatenate([half, half], axis=-1) * scale
  corners = jnp.clip(corners, 0.0, 1.0)
  # Corners that have passed each other make a negative size, which counts as 0 later.
  return jnp.concatenate(
    [(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], axis=-1
  )
