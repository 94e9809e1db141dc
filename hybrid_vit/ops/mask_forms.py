"""Masks of a batch in fewer bytes than a byte a pixel, read at points without being unpacked.

Of 100 segments of a picture of 1024 x 1024 the bitmaps are 105 MB. Where segments do not overlap,
one map of their numbers says the same in 4.2 MB, and reading all of them at a point is reading one
number; where they do, a bit a pixel is 13 MB.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hybrid_vit.ops.point_sampling import four_neighbours, sample_masks

_BITS = 8


class LabelMasks(NamedTuple):
  """Masks that do not overlap: mask g is where the map has the number of g.

  Attributes:
    map: int `[B, H, W]`.
    numbers: int `[B, G]`.
  """

  map: jax.Array
  numbers: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """`[B, G, H, W]`."""
    return (*self.numbers.shape, *self.map.shape[1:])


class PackedMasks(NamedTuple):
  """Masks of a bit a pixel, eight of a row in a byte, the first in the highest bit.

  Attributes:
    bits: uint8 `[B, G, H, W / 8]`, as `numpy.packbits` makes them along the last axis.
  """

  bits: jax.Array

  @property
  def shape(self) -> tuple[int, ...]:
    """`[B, G, H, W]`."""
    return (*self.bits.shape[:-1], _BITS * self.bits.shape[-1])


# An array `[B, G, H, W]` of zeros and ones of any type, or one of the forms above.
Masks: TypeAlias = jax.Array | LabelMasks | PackedMasks


def sample_any_masks(masks: Masks, points: jax.Array) -> jax.Array:
  """`point_sampling.sample_masks` of masks in any form.

  Args:
    masks: `[B, G, H, W]`.
    points: float32 `[B, G or 1, N, 2]`.

  Returns:
    float32 `[B, G, N]`, from 0 to 1.
  """
  if isinstance(masks, LabelMasks):
    return _sampled_labels(masks, points)
  if isinstance(masks, PackedMasks):
    return _sampled_bits(masks, points)
  return sample_masks(masks, points)


def bitmaps(masks: Masks) -> jax.Array:
  """Masks in any form as uint8 `[B, G, H, W]`."""
  if isinstance(masks, LabelMasks):
    found = masks.map[:, None] == masks.numbers[:, :, None, None]
    return found.astype(jnp.uint8)
  if isinstance(masks, PackedMasks):
    return jnp.unpackbits(masks.bits, axis=-1)
  return jnp.asarray(masks).astype(jnp.uint8)


def every_cell(masks: Masks, steps: tuple[int, int]) -> Masks:
  """Every s-th row and column of masks in any form, from the first on.

  Only what is left is unpacked: bits are read of the rows that stay.

  Args:
    masks: `[B, G, H, W]`.
    steps: of rows and of columns, at least 1.
  """
  down, right = steps
  if isinstance(masks, LabelMasks):
    return masks._replace(map=masks.map[:, ::down, ::right])
  if isinstance(masks, PackedMasks):
    return bitmaps(PackedMasks(masks.bits[:, :, ::down]))[..., ::right]
  return masks[:, :, ::down, ::right]


def _sampled_labels(masks: LabelMasks, points: jax.Array) -> jax.Array:
  batch, count, height, width = masks.shape
  flat = masks.map.reshape(batch, 1, -1)
  total = jnp.zeros((), jnp.float32)
  # Points that all masks share are read once.
  for index, part in four_neighbours(points, (height, width)):
    found = jnp.take_along_axis(flat, index.reshape(batch, 1, -1), axis=2, mode="clip")
    inside = found.reshape(index.shape) == masks.numbers[:, :, None]
    total = total + jnp.where(inside, part, 0.0)
  return jnp.broadcast_to(total, (batch, count, points.shape[2]))


def _sampled_bits(masks: PackedMasks, points: jax.Array) -> jax.Array:
  batch, count, height, width = masks.shape
  flat = masks.bits.reshape(batch, count, -1)
  total = jnp.zeros((), jnp.float32)
  for index, part in four_neighbours(points, (height, width)):
    index = jnp.broadcast_to(index, (batch, count, index.shape[-1]))
    # Rows are whole bytes, so that a pixel's number is that of its bit.
    found = jnp.take_along_axis(flat, index // _BITS, axis=2, mode="clip")
    bit = (found >> (_BITS - 1 - index % _BITS).astype(jnp.uint8)) & 1
    total = total + bit.astype(jnp.float32) * part
  return total
