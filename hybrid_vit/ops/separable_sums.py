"""Weighted sums of rectangles of cells, the weights being those of rows times those of columns.

What bilinear pooling of boxes is. One cell of every bin is read and added at a time, so that
reading and adding are one loop and no copy of what was read is stored, forward or backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# Boxes that go together where their rectangles differ: fewer mean more loops, more mean that all
# wait for the largest.
_TOGETHER = 32


class Taps(NamedTuple):
  """Cells of an axis that each bin of each box reads.

  Attributes:
    cells: int32 `[T, B, R, bins]`, on the map.
    weights: float32 `[T, B, R, bins]`.
    needed: int32 `[B, R]`, how many of the T a box needs, or None for all of them.
  """

  cells: jax.Array
  weights: jax.Array
  needed: jax.Array | None = None


def separable_sums(
  maps: jax.Array, offset: jax.Array, width: jax.Array, rows: Taps, columns: Taps
) -> jax.Array:
  """Sums cells of maps over each bin.

  Args:
    maps: `[B, S, C]`, cells of all maps, each row by row.
    offset: int32 `[B, R]`, where the map of each box begins.
    width: int32 `[B, R]`, its columns.
    rows: of P bins.
    columns: of Q bins.

  Returns:
    float32 `[B, R, P, Q, C]`. Only the maps have a gradient.
  """
  return _sums(maps, (offset, width, rows, columns))


@jax.custom_vjp
def _sums(maps: jax.Array, geometry: Any) -> jax.Array:
  def part(own: Any) -> jax.Array:
    return _of_part(maps, own)

  if geometry[2].needed is None:
    return part(geometry)
  order = _by_work(geometry)
  parts = _parts(geometry, order)
  found = lax.map(part, parts)
  found = jnp.moveaxis(found, 0, 1).reshape(maps.shape[0], -1, *found.shape[3:])
  found = found[:, : order.shape[1]]
  return _rows_of(found, jnp.argsort(order, axis=1))


def _sums_forward(maps: jax.Array, geometry: Any) -> Any:
  return _sums(maps, geometry), (maps, geometry)


def _sums_backward(kept: Any, gradient: jax.Array) -> Any:
  maps, geometry = kept
  total = jnp.zeros(maps.shape, jnp.float32)
  if geometry[2].needed is None:
    total = _add_part(total, geometry, gradient)
  else:
    order = _by_work(geometry)
    parts = (_parts(geometry, order), _split(_rows_of(gradient, order), 1))
    total, _ = lax.scan(lambda total, own: (_add_part(total, *own), None), total, parts)
  return total.astype(maps.dtype), None


_sums.defvjp(_sums_forward, _sums_backward)


def _of_part(maps: jax.Array, geometry: Any) -> jax.Array:
  def add(k: jax.Array, total: jax.Array) -> jax.Array:
    index, factor = _tap(geometry, k)
    taken = jax.vmap(lambda m, i: m.at[i].get(mode="promise_in_bounds"))(maps, index)
    return total + taken.astype(jnp.float32) * factor[..., None]

  _, _, rows, columns = geometry
  shape = (*rows.cells.shape[1:], columns.cells.shape[-1], maps.shape[-1])
  return lax.fori_loop(0, _number(geometry), add, jnp.zeros(shape, jnp.float32))


def _add_part(total: jax.Array, geometry: Any, gradient: jax.Array) -> jax.Array:
  gradient = gradient.astype(jnp.float32)

  def add(k: jax.Array, total: jax.Array) -> jax.Array:
    index, factor = _tap(geometry, k)
    update = jax.vmap(lambda t, i, u: t.at[i].add(u, mode="promise_in_bounds"))
    return update(total, index, factor[..., None] * gradient)

  return lax.fori_loop(0, _number(geometry), add, total)


def _number(geometry: Any) -> Any:
  _, _, rows, columns = geometry
  return _most(rows) * _most(columns)


def _most(taps: Taps) -> Any:
  return taps.cells.shape[0] if taps.needed is None else jnp.max(taps.needed, initial=0)


def _tap(geometry: Any, k: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Places in the maps and weights `[B, r, P, Q]` of the k-th cell of every bin."""
  offset, width, rows, columns = geometry
  across = jnp.maximum(_most(columns), 1)
  y, v = (lax.dynamic_index_in_dim(x, k // across, 0, False) for x in rows[:2])
  x, u = (lax.dynamic_index_in_dim(x, k % across, 0, False) for x in columns[:2])
  first = offset[..., None] + y * width[..., None]
  return first[..., :, None] + x[..., None, :], v[..., :, None] * u[..., None, :]


def _by_work(geometry: Any) -> jax.Array:
  _, _, rows, columns = geometry
  return jnp.argsort(rows.needed * columns.needed, axis=1)


def _rows_of(x: jax.Array, order: jax.Array) -> jax.Array:
  return jax.vmap(lambda own, places: own[places])(x, order)


def _parts(geometry: Any, order: jax.Array) -> Any:
  """`[B, R]` everywhere to `[parts, B, r]`, in another order of boxes."""
  in_taps = jax.vmap(_rows_of, (0, None))
  offset, width, rows, columns = geometry
  taps = [
    Taps(
      _split(in_taps(own.cells, order), 2),
      _split(in_taps(own.weights, order), 2),
      _split(_rows_of(own.needed, order), 1),
    )
    for own in (rows, columns)
  ]
  return _split(_rows_of(offset, order), 1), _split(_rows_of(width, order), 1), *taps


def _split(x: jax.Array, axis: int) -> jax.Array:
  """The boxes' axis in parts, which come first; zeros, which need no cell, fill the last one."""
  boxes = x.shape[axis]
  size = min(_TOGETHER, boxes)
  parts = -(-boxes // size)
  missing = parts * size - boxes
  x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
  x = x.reshape(*x.shape[:axis], parts, size, *x.shape[axis + 1 :])
  return jnp.moveaxis(x, axis, 0)
