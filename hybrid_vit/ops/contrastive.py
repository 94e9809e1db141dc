"""Losses of image–text pairs over the global batch: softmax (CLIP), sigmoid (SigLIP), distillation.

Each has a plain reference form that holds the B x B similarities, and a chunked form of the same
signature that holds B / n x min(B / n, chunk) of them on each of n devices, backwards too: rows
stay where they are, columns go around the ring of the devices that split the batch (`ppermute`),
the log-sum-exp is kept online, and each block is computed again for its gradient
(`jax.checkpoint`). The mesh is the surrounding one (`jax.set_mesh`); without one, or where it does
not divide the batch, one scan over chunks of columns does it.

Features are L2-normalised by the caller, [B, D]; row i of the one belongs to row i of the other.
Logits, statistics and losses are float32 whatever the features are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hybrid_vit.sharding import BATCH_AXES

# The scale of the teachers' similarities (MobileCLIP's training code).
TEACHER_SCALE = 100.0
DEFAULT_CHUNK = 512
# Below every logit, and finite: the difference of two is no NaN.
_LOWEST = -1e30


def softmax_loss(
  image: jax.Array, text: jax.Array, scale: jax.Array, *, chunk: int = DEFAULT_CHUNK
) -> jax.Array:
  """CLIP's loss (InfoNCE), the mean of both directions (Radford et al. 2021, Figure 3); chunked.

  Args:
    image: [B, D], L2-normalised.
    text: [B, D], L2-normalised.
    scale: scalar, factor of the cosines.
    chunk: columns of a block at most.

  Returns:
    Scalar float32, mean over the batch.

  Raises:
    ValueError: features of unequal shapes.
  """
  _check_pairs(image, text)
  sums = _over_ring(_softmax_rows, ((image,), (text,)), (scale,), chunk, both=True)
  return sums / (2 * len(image))


def softmax_loss_plain(image: jax.Array, text: jax.Array, scale: jax.Array) -> jax.Array:
  """As `softmax_loss`, with the whole matrix."""
  _check_pairs(image, text)
  logits = scale * similarities(image, text)
  rows = jax.nn.logsumexp(logits, axis=1) + jax.nn.logsumexp(logits, axis=0)
  return jnp.mean(rows - 2 * jnp.diagonal(logits)) / 2


def sigmoid_loss(
  image: jax.Array,
  text: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  *,
  chunk: int = DEFAULT_CHUNK,
) -> jax.Array:
  """SigLIP's loss: every pair of the batch is right or wrong by itself; chunked.

  The sum over all B x B pairs divided by B (Zhai et al. 2023, Algorithm 1).

  Args:
    image: [B, D], L2-normalised.
    text: [B, D], L2-normalised.
    scale: scalar, factor of the cosines.
    bias: scalar, added to the logits.
    chunk: columns of a block at most.

  Returns:
    Scalar float32.

  Raises:
    ValueError: features of unequal shapes.
  """
  _check_pairs(image, text)
  sums = _over_ring(_sigmoid_rows, ((image,), (text,)), (scale, bias), chunk, both=False)
  return sums / len(image)


def sigmoid_loss_plain(
  image: jax.Array, text: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
  """As `sigmoid_loss`, with the whole matrix."""
  _check_pairs(image, text)
  logits = scale * similarities(image, text) + bias
  signs = 2 * jnp.eye(len(image), dtype=jnp.float32) - 1
  return jnp.sum(jax.nn.softplus(-signs * logits)) / len(image)


def distillation_loss(
  image: jax.Array,
  text: jax.Array,
  scale: jax.Array,
  image_teacher: jax.Array,
  text_teacher: jax.Array,
  *,
  chunk: int = DEFAULT_CHUNK,
) -> jax.Array:
  """Cross-entropy of the student's similarities against the teachers'; chunked.

  Targets are each teacher's row softmax at scale `TEACHER_SCALE`, averaged over teachers after the
  softmax; the mean of both directions (MobileCLIP, Vasu et al. 2024, equation 3). The teachers
  get no gradient.

  Args:
    image: [B, D], L2-normalised.
    text: [B, D], L2-normalised.
    scale: scalar, factor of the student's cosines.
    image_teacher: [B, T, E], of T teachers, L2-normalised.
    text_teacher: [B, T, E], L2-normalised.
    chunk: columns of a block at most.

  Returns:
    Scalar float32, mean over the batch.

  Raises:
    ValueError: features of unequal shapes.
  """
  _check_pairs(image, text)
  _check_pairs(image_teacher, text_teacher)
  image_teacher, text_teacher = jax.lax.stop_gradient((image_teacher, text_teacher))
  pairs = ((image, image_teacher), (text, text_teacher))
  return _over_ring(_distillation_rows, pairs, (scale,), chunk, both=True) / (2 * len(image))


def distillation_loss_plain(
  image: jax.Array,
  text: jax.Array,
  scale: jax.Array,
  image_teacher: jax.Array,
  text_teacher: jax.Array,
) -> jax.Array:
  """As `distillation_loss`, with the whole matrices."""
  _check_pairs(image, text)
  _check_pairs(image_teacher, text_teacher)
  logits = scale * similarities(image, text)
  teachers = jax.lax.stop_gradient(TEACHER_SCALE * _teacher_cosines(image_teacher, text_teacher))

  def direction(logits: jax.Array, teachers: jax.Array) -> jax.Array:
    targets = jnp.mean(jax.nn.softmax(teachers, axis=-1), axis=0)
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits, axis=-1), axis=-1))

  return (direction(logits, teachers) + direction(logits.T, jnp.swapaxes(teachers, 1, 2))) / 2


def similarities(rows: jax.Array, columns: jax.Array) -> jax.Array:
  """Inner products [R, D] x [C, D] → [R, C], float32."""
  return jnp.einsum(
    "id,jd->ij",
    rows.astype(jnp.float32),
    columns.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )


def _teacher_cosines(rows: jax.Array, columns: jax.Array) -> jax.Array:
  """[R, T, E] x [C, T, E] → [T, R, C], float32."""
  return jnp.einsum(
    "ite,jte->tij",
    rows.astype(jnp.float32),
    columns.astype(jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )


def _check_pairs(image: jax.Array, text: jax.Array) -> None:
  if image.shape != text.shape:
    raise ValueError(
      f"features of images {image.shape} and of texts {text.shape}: rows in pairs, of one width, "
      "are needed"
    )


# A fold takes the rows here and gives sums over rows of the loss, as (start, step, finish):
#   start(rows) → carry; step(carry, columns, offset) → carry, with the place of the first column
#   among all, relative to the rows' first; finish(carry) → scalar.
_Fold = tuple[Any, Callable[[Any, Any, jax.Array], Any], Callable[[Any], jax.Array]]


def _online(
  highest: jax.Array, sums: tuple[jax.Array, ...], logits: jax.Array, *weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  """Adds a block to sums of exp(logit - highest), of weights 1, and `weights`, over columns."""
  # The maximum only keeps the numbers small: the result does not depend on it.
  higher = jnp.maximum(highest, jnp.max(jax.lax.stop_gradient(logits), axis=-1))
  old, new = jnp.exp(highest - higher), jnp.exp(logits - higher[..., None])
  parts = (new, *(new * weight for weight in weights))
  return higher, tuple(s * old + jnp.sum(part, axis=-1) for s, part in zip(sums, parts))


def _own(block: jax.Array, offset: jax.Array) -> jax.Array:
  """[R, C] bool: where a row meets its own column."""
  rows, columns = block.shape
  return jnp.arange(rows)[:, None] == jnp.arange(columns)[None] + offset


def _softmax_rows(rows: Any, scale: jax.Array) -> _Fold:
  (features,) = rows
  zeros = _zeros(features)

  def step(carry: Any, columns: Any, offset: jax.Array) -> Any:
    highest, sums, own = carry
    logits = scale * similarities(features, columns[0])
    highest, sums = _online(highest, sums, logits)
    return highest, sums, own + jnp.sum(jnp.where(_own(logits, offset), logits, 0.0), axis=1)

  def finish(carry: Any) -> jax.Array:
    highest, (total,), own = carry
    return jnp.sum(highest + jnp.log(total) - own)

  return (zeros + _LOWEST, (zeros,), zeros), step, finish


def _sigmoid_rows(rows: Any, scale: jax.Array, bias: jax.Array) -> _Fold:
  (features,) = rows

  def step(carry: jax.Array, columns: Any, offset: jax.Array) -> jax.Array:
    logits = scale * similarities(features, columns[0]) + bias
    signed = jnp.where(_own(logits, offset), -logits, logits)
    return carry + jnp.sum(jax.nn.softplus(signed), axis=1)

  return _zeros(features), step, jnp.sum


def _distillation_rows(rows: Any, scale: jax.Array) -> _Fold:
  features, teacher = rows
  zeros = _zeros(features)
  each = jnp.broadcast_to(zeros, (teacher.shape[1], len(zeros)))

  def step(carry: Any, columns: Any, offset: jax.Array) -> Any:
    del offset
    student, teachers = carry
    logits = scale * similarities(features, columns[0])
    targets = jax.lax.stop_gradient(TEACHER_SCALE * _teacher_cosines(teacher, columns[1]))
    return _online(*student, logits), _online(*teachers, targets, logits)

  def finish(carry: Any) -> jax.Array:
    (highest, (total,)), (_, (weights, weighted)) = carry
    return jnp.sum(highest + jnp.log(total) - jnp.mean(weighted / weights, axis=0))

  return ((zeros + _LOWEST, (zeros,)), (each + _LOWEST, (each, each))), step, finish


def _zeros(features: jax.Array) -> jax.Array:
  """[R] float32, that vary over the mesh as the features do."""
  return jax.lax.stop_gradient(features[:, 0]).astype(jnp.float32) * 0.0


def _over_ring(fold: Any, pairs: Any, scalars: Any, chunk: int, both: bool) -> jax.Array:
  """The sum over all rows of a loss, of rows against all columns; and of columns against rows."""
  size = len(pairs[0][0])
  shape = jax.sharding.get_abstract_mesh().shape
  shards = math.prod(shape.get(axis, 1) for axis in BATCH_AXES)
  scalars = tuple(jnp.asarray(scalar, jnp.float32) for scalar in scalars)
  directions = (pairs, pairs[::-1]) if both else (pairs,)

  def local(pairs_of_directions: Any, scalars: Any, shards: int) -> jax.Array:
    return sum(
      _around(fold, rows, columns, scalars, chunk, shards) for rows, columns in pairs_of_directions
    )

  if shards == 1 or size % shards:
    return local(directions, scalars, 1)

  def sharded(pairs_of_directions: Any, scalars: Any) -> jax.Array:
    return jax.lax.psum(local(pairs_of_directions, scalars, shards), BATCH_AXES)

  batch, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
  return jax.shard_map(sharded, in_specs=(batch, whole), out_specs=whole)(directions, scalars)


def _around(fold: Any, rows: Any, columns: Any, scalars: Any, chunk: int, shards: int) -> jax.Array:
  """The sum over the rows here, against the columns of all devices."""
  size = len(rows[0])
  start, step, finish = fold(rows, *scalars)
  width = next(k for k in range(min(chunk, size), 0, -1) if size % k == 0)
  place = jax.lax.axis_index(BATCH_AXES) if shards > 1 else 0

  def block(carry: Any, columns: Any, first: Any) -> Any:
    """All chunks of the columns of one device, that are `first` and after."""
    if width == size:
      return jax.checkpoint(step)(carry, columns, first)
    chunks = jax.tree.map(lambda x: x.reshape(size // width, width, *x.shape[1:]), columns)
    offsets = first + width * jnp.arange(size // width)
    body = jax.checkpoint(lambda carry, given: (step(carry, *given), None))
    return jax.lax.scan(body, carry, (chunks, offsets))[0]

  if shards == 1:
    return finish(block(start, columns, 0))

  def turn(state: Any, k: jax.Array) -> Any:
    carry, columns = state
    # After k turns, the columns of the device k places before are here.
    carry = block(carry, columns, ((place - k) % shards - place) * size)
    ring = [(source, (source + 1) % shards) for source in range(shards)]
    return (carry, jax.lax.ppermute(columns, BATCH_AXES, ring)), None

  (carry, _), _ = jax.lax.scan(turn, (start, columns), jnp.arange(shards))
  return finish(carry)
