"""Contrastive losses over the whole batch, of which no device holds the matrix of all pairs.

CLIP (arXiv:2103.00020, figure 3): the cross-entropy of each picture's row of similarities, and of
each text's column, halved. SigLIP (arXiv:2303.15343, algorithm 1): each pair by itself, a sigmoid.
MobileCLIP's distillation (arXiv:2311.17049, equation 3; apple/ml-mobileclip): instead of one right
answer a teacher's distribution over the batch, the softmax of its own similarities.

Features `[B, D]` of unit length go in, the mean over the batch comes out, float32 whatever they
are. `plain_softmax_loss` and `plain_sigmoid_loss` make the matrix `[B, B]`: the reference. The
others go around the ring of devices: each keeps its rows, the texts travel on with what is summed
about their columns, and of a block no more than `chunk` columns exist at once. The gradient is made
in the same passes, so that nothing of the blocks is kept for it.

The ring is the mesh of the surrounding `jax.set_mesh` (axes `data` and `fsdp` together, as batches
are split); where there is none, one device goes through the chunks.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")
# Columns of a block: 1,024 rows of them are 4 MiB.
CHUNK = 1024
TEACHER_SCALE = 100.0
_LOWEST = -1e30


class Teachers(NamedTuple):
  """Whose similarities say what is right.

  Attributes:
    images: `[B, T, E]`, unit length; T teachers, whose distributions are averaged.
    texts: `[B, T, E]`.
    scale: of their similarities.
  """

  images: jax.Array
  texts: jax.Array
  scale: float = TEACHER_SCALE


def softmax_loss(
  images: jax.Array,
  texts: jax.Array,
  scale: jax.Array,
  teachers: Teachers | None = None,
  *,
  chunk: int = CHUNK,
) -> jax.Array:
  """CLIP's loss, or with teachers MobileCLIP's: their soft answers in place of the right one.

  Args:
    images: `[B, D]`, unit length.
    texts: `[B, D]`; row i belongs to picture i.
    scale: of the similarities, a scalar.
    teachers: no gradient goes to them.
    chunk: most columns of a block at once.

  Returns:
    Float32 scalar.
  """
  run = functools.partial(_softmax_parts, chunk=chunk)
  given = () if teachers is None else (teachers.images, teachers.texts)
  run = functools.partial(run, teacher_scale=TEACHER_SCALE if teachers is None else teachers.scale)
  return _ring_loss(run, images, texts, (scale,), given)


def sigmoid_loss(
  images: jax.Array, texts: jax.Array, scale: jax.Array, bias: jax.Array, *, chunk: int = CHUNK
) -> jax.Array:
  """SigLIP's loss: over the batch's size, so that it is as large as its rows' sums.

  Args: as of `softmax_loss`; bias: a scalar, added to all similarities.
  """
  run = functools.partial(_sigmoid_parts, chunk=chunk)
  return _ring_loss(run, images, texts, (scale, bias), ())


def count_nearest(images: jax.Array, texts: jax.Array, *, chunk: int = CHUNK) -> jax.Array:
  """How many pictures' own texts are nearer to them than all others; float32 scalar.

  Args: as of `softmax_loss`. Ties, and what is not a number, count as wrong; no gradient.
  """
  images, texts = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (images, texts))
  ring = _surrounding_ring(len(images))

  def count(images: jax.Array, texts: jax.Array) -> jax.Array:
    own = jnp.sum(images * texts, axis=-1)

    def step(carry: Any, turn: jax.Array) -> Any:
      nearest, texts = carry

      def block(carry: Any, part: jax.Array) -> Any:
        nearest, first = carry
        similarities = _similarities(images, part)
        others = similarities - 4.0 * _diagonal(similarities.shape, first) * (turn == 0)
        return (jnp.maximum(nearest, jnp.max(others, axis=1)), first + len(part)), None

      begin = (nearest, jnp.zeros((), jnp.int32))
      (nearest, _), _ = jax.lax.scan(block, begin, _cut(texts, len(images), chunk))
      return (nearest, ring.turn(texts)), None

    begin = (jnp.full(own.shape, _LOWEST), texts)
    (nearest, _), _ = jax.lax.scan(step, begin, jnp.arange(ring.size))
    return ring.sum(jnp.sum((own > nearest).astype(jnp.float32)))

  row, whole = PartitionSpec(ring.axes), PartitionSpec()
  return ring.mapped(count, (row, row), whole)(images, texts)


def plain_softmax_loss(
  images: jax.Array, texts: jax.Array, scale: jax.Array, teachers: Teachers | None = None
) -> jax.Array:
  """The reference of `softmax_loss`, differentiated by JAX."""
  logits = scale * _similarities(images.astype(jnp.float32), texts.astype(jnp.float32))
  if teachers is None:
    rows = columns = jnp.eye(len(logits))
  else:
    pairs = zip(*(jnp.moveaxis(x.astype(jnp.float32), 1, 0) for x in teachers[:2]))
    theirs = jnp.stack([teachers.scale * _similarities(a, b) for a, b in pairs])
    rows = jax.lax.stop_gradient(jax.nn.softmax(theirs, axis=-1).mean(0))
    columns = jax.lax.stop_gradient(jax.nn.softmax(theirs, axis=-2).mean(0))
  of_images = -jnp.sum(rows * jax.nn.log_softmax(logits, axis=1), axis=1)
  of_texts = -jnp.sum(columns * jax.nn.log_softmax(logits, axis=0), axis=0)
  return (jnp.mean(of_images) + jnp.mean(of_texts)) / 2


def plain_sigmoid_loss(
  images: jax.Array, texts: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
  """The reference of `sigmoid_loss`, differentiated by JAX."""
  logits = scale * _similarities(images.astype(jnp.float32), texts.astype(jnp.float32)) + bias
  signs = 2.0 * jnp.eye(len(logits)) - 1.0
  return -jnp.sum(jax.nn.log_sigmoid(signs * logits)) / len(logits)


# What follows runs on each device with its own rows. `(loss, gradients)` of all devices' rows: the
# gradients of the own images and texts, and of the scalars summed over all.
_Parts = Callable[..., tuple[jax.Array, tuple[Any, ...]]]


class _Ring(NamedTuple):
  """The axes of the mesh around which texts travel; none for one device."""

  axes: tuple[str, ...]
  size: int

  def turn(self, tree: Any) -> Any:
    """What the device before has."""
    if self.size == 1:
      return tree
    pairs = [(i, (i + 1) % self.size) for i in range(self.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, pairs), tree)

  def sum(self, x: jax.Array) -> jax.Array:
    """Of all devices."""
    return jax.lax.psum(x, self.axes) if self.size > 1 else x

  def mapped(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
    """The function of each device's part as one of the whole."""
    if self.size == 1:
      return function
    # The sums over the ring are what makes results whole, which is not seen from their types.
    return jax.shard_map(
      function,
      in_specs=in_specs,
      out_specs=out_specs,
      axis_names=set(self.axes),
      check_vma=False,
    )


def _surrounding_ring(batch: int) -> _Ring:
  mesh = jax.sharding.get_abstract_mesh()
  sizes = {name: mesh.shape[name] for name in BATCH_AXES if dict(mesh.shape).get(name, 1) > 1}
  size = math.prod(sizes.values())
  if batch % size:
    raise ValueError(
      f"contrastive loss: a batch of {batch} is not split evenly over {size} devices "
      f"({', '.join(sizes)})"
    )
  return _Ring(tuple(sizes), size)


def _ring_loss(
  run: _Parts,
  images: jax.Array,
  texts: jax.Array,
  scalars: tuple[jax.Array, ...],
  given: tuple[jax.Array, ...],
) -> jax.Array:
  """The loss as a function of features and scalars; `given` has no gradient."""
  batch = images.shape[0]
  if texts.shape != images.shape:
    raise ValueError(
      f"contrastive loss: images {images.shape} and texts {texts.shape}; as many of both, and as "
      "wide, were expected"
    )
  ring = _surrounding_ring(batch)

  def parts(images: Any, texts: Any, scalars: Any, given: Any) -> Any:
    return run(ring, batch, images, texts, scalars, given)

  row, whole = PartitionSpec(ring.axes), PartitionSpec()
  specs = ((row, row, whole, row), (whole, (row, row, whole)))
  parts = ring.mapped(parts, *specs)

  @jax.custom_vjp
  def loss(images: Any, texts: Any, scalars: Any) -> Any:
    return parts(images, texts, scalars, given)[0]

  def forward(images: Any, texts: Any, scalars: Any) -> Any:
    return parts(images, texts, scalars, given)

  def backward(gradients: Any, cotangent: Any) -> Any:
    return jax.tree.map(lambda g: g * cotangent, gradients)

  loss.defvjp(forward, backward)
  given = tuple(jax.lax.stop_gradient(x.astype(jnp.float32)) for x in given)
  scalars = tuple(jnp.asarray(x, jnp.float32) for x in scalars)
  return loss(images.astype(jnp.float32), texts.astype(jnp.float32), scalars)


def _softmax_parts(
  ring: _Ring,
  batch: int,
  images: jax.Array,
  texts: jax.Array,
  scalars: tuple[jax.Array],
  given: tuple[jax.Array, ...],
  *,
  chunk: int,
  teacher_scale: float,
) -> tuple[jax.Array, tuple[Any, ...]]:
  (scale,) = scalars
  rows, columns = _normalizers(ring, images, texts, scale, chunk)
  theirs: list[tuple[jax.Array, ...]] = []
  for k in range(given[0].shape[1] if given else 0):
    a, b = given[0][:, k], given[1][:, k]
    theirs.append((a, b, *_normalizers(ring, a, b, teacher_scale, chunk)))
  count = len(images)
  # Travelling: what belongs to the columns. Teachers' rows stay, their columns go.
  travelling: dict[str, Any] = {
    "texts": texts,
    "columns": columns,
    "gradient": jnp.zeros_like(texts),
    "teachers": [(b, below) for _, b, _, below in theirs],
  }
  # Of each row by itself: the sums of all are large, and their difference would be rounding.
  value = rows + columns

  def step(carry: Any, turn: jax.Array) -> Any:
    value, of_images, of_scale, travelling = carry
    parts = _cut({k: v for k, v in travelling.items() if k != "gradient"}, count, chunk)

    def block(carry: Any, part: Any) -> Any:
      value, of_images, of_scale, first = carry
      similarities = _similarities(images, part["texts"])
      logits = scale * similarities
      target: Any = jnp.zeros_like(logits)
      if theirs:
        for (a, _, left, _), (b, below) in zip(theirs, part["teachers"]):
          own = teacher_scale * _similarities(a, b)
          target += jnp.exp(own - left[:, None]) + jnp.exp(own - below)
        target /= len(theirs)
      else:
        target = 2.0 * _diagonal(logits.shape, first) * (turn == 0)
      wrong = jnp.exp(logits - rows[:, None]) + jnp.exp(logits - part["columns"]) - target
      value -= jnp.sum(target * logits, axis=1)
      of_scale += jnp.sum(wrong * similarities)
      of_images += scale * _product(wrong, part["texts"])
      of_texts = scale * _product(wrong.T, images)
      return (value, of_images, of_scale, first + len(part["texts"])), of_texts

    begin = (value, of_images, of_scale, jnp.zeros((), jnp.int32))
    (value, of_images, of_scale, _), of_texts = jax.lax.scan(block, begin, parts)
    more = travelling["gradient"] + of_texts.reshape(travelling["gradient"].shape)
    return (value, of_images, of_scale, ring.turn({**travelling, "gradient": more})), None

  zero = jnp.zeros((), jnp.float32)
  begin = (value, jnp.zeros_like(images), zero, travelling)
  (value, of_images, of_scale, travelling), _ = jax.lax.scan(step, begin, jnp.arange(ring.size))
  half = 0.5 / batch
  return half * ring.sum(jnp.sum(value)), (
    half * of_images,
    half * travelling["gradient"],
    (half * ring.sum(of_scale),),
  )


def _sigmoid_parts(
  ring: _Ring,
  batch: int,
  images: jax.Array,
  texts: jax.Array,
  scalars: tuple[jax.Array, jax.Array],
  given: tuple[jax.Array, ...],
  *,
  chunk: int,
) -> tuple[jax.Array, tuple[Any, ...]]:
  del given
  scale, bias = scalars
  count = len(images)

  def step(carry: Any, turn: jax.Array) -> Any:
    sums, of_images, travelling = carry

    def block(carry: Any, part: Any) -> Any:
      (value, of_scale, of_bias), of_images, first = carry
      similarities = _similarities(images, part)
      signs = 2.0 * _diagonal(similarities.shape, first) * (turn == 0) - 1.0
      logits = signs * (scale * similarities + bias)
      wrong = -signs * jax.nn.sigmoid(-logits)
      sums = (
        value - jnp.sum(jax.nn.log_sigmoid(logits)),
        of_scale + jnp.sum(wrong * similarities),
        of_bias + jnp.sum(wrong),
      )
      of_images += scale * _product(wrong, part)
      return (sums, of_images, first + len(part)), scale * _product(wrong.T, images)

    begin = (sums, of_images, jnp.zeros((), jnp.int32))
    (sums, of_images, _), more = jax.lax.scan(block, begin, _cut(travelling[0], count, chunk))
    travelling = (travelling[0], travelling[1] + more.reshape(travelling[1].shape))
    return (sums, of_images, ring.turn(travelling)), None

  zero = jnp.zeros((), jnp.float32)
  begin = ((zero, zero, zero), jnp.zeros_like(images), (texts, jnp.zeros_like(texts)))
  (sums, of_images, travelling), _ = jax.lax.scan(step, begin, jnp.arange(ring.size))
  value, of_scale, of_bias = (ring.sum(x) / batch for x in sums)
  return value, (of_images / batch, travelling[1] / batch, (of_scale, of_bias))


def _normalizers(
  ring: _Ring, images: jax.Array, texts: jax.Array, scale: Any, chunk: int
) -> tuple[jax.Array, jax.Array]:
  """log-sum-exp of each own row, over all texts, and of each own text's column, over all images."""
  count = len(images)
  lowest, none = jnp.full((count,), _LOWEST), jnp.zeros((count,))

  def step(carry: Any, _: Any) -> Any:
    own, travelling = carry

    def block(own: Any, part: Any) -> Any:
      text, theirs = part
      logits = scale * _similarities(images, text)
      return _added(own, logits, 1), _added(theirs, logits, 0)

    own, theirs = jax.lax.scan(block, own, _cut(travelling, count, chunk))
    travelling = (travelling[0], jax.tree.map(lambda x: x.reshape(count), theirs))
    return (own, ring.turn(travelling)), None

  begin = ((lowest, none), (texts, (lowest, none)))
  (own, (_, theirs)), _ = jax.lax.scan(step, begin, None, length=ring.size)
  return own[0] + jnp.log(own[1]), theirs[0] + jnp.log(theirs[1])


def _added(sums: tuple[jax.Array, jax.Array], logits: jax.Array, axis: int) -> Any:
  """(maximum, sum of exponentials below it) with the logits along an axis taken in."""
  most = jnp.maximum(sums[0], jnp.max(logits, axis))
  new = jnp.sum(jnp.exp(logits - jnp.expand_dims(most, axis)), axis)
  return most, sums[1] * jnp.exp(sums[0] - most) + new


def _similarities(a: jax.Array, b: jax.Array) -> jax.Array:
  # Highest: on accelerators a product of float32 is else one of bfloat16.
  return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _diagonal(shape: tuple[int, ...], first: jax.Array) -> jax.Array:
  """1 where a column, the first of which is number `first`, has its row's number."""
  rows, columns = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
  return (rows == columns + first).astype(jnp.float32)


def _cut(tree: Any, count: int, chunk: int) -> Any:
  """Leaves `[count, …]` → `[pieces, at most chunk, …]`, evenly.

  Raises:
    ValueError: a count of so few divisors that pieces would be a quarter of that and less, each a
      step of its own.
  """
  size = next(n for n in range(min(chunk, count), 0, -1) if count % n == 0)
  if 4 * size <= min(chunk, count):
    raise ValueError(
      f"contrastive loss: {count} rows of a device fall into equal pieces of {size} at most, where "
      f"up to {chunk} were wanted: choose a batch size with more divisors"
    )
  return jax.tree.map(lambda x: x.reshape(count // size, size, *x.shape[1:]), tree)
