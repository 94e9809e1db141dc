"""Exact bipartite matching on the device, with static shapes.

The least costly assignment by shortest augmenting paths (Jonker and Volgenant, 1987, in the form of
Crouse, "On implementing 2D rectangular assignment algorithms", 2016, which scipy's
`linear_sum_assignment` has, too), for set losses: DETR's, DINO's and Mask2Former's.

Sums of costs and prices are float32, scipy's float64: of two assignments whose costs agree in all
of float32's digits either may be found.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_FREE = -1


def linear_assignment(
  cost: jax.Array, row_valid: jax.Array | None = None, column_valid: jax.Array | None = None
) -> jax.Array:
  """Assigns rows to columns, each to one, so that the sum of their costs is the least.

  All valid rows are assigned, or where valid columns are fewer, all of these. Time grows with the
  valid rows, so the side with fewer (targets, not queries) should be the rows.

  Args:
    cost: `[..., N, M]`. What is infinite or no number costs more than everything else together.
    row_valid: bool `[..., N]`; None for all.
    column_valid: bool `[..., M]`; None for all.

  Returns:
    int32 `[..., N]`: the column of each row, -1 for none. Nothing has a gradient.
  """
  *batch, rows, columns = cost.shape
  cost = lax.stop_gradient(cost).astype(jnp.float32).reshape(-1, rows, columns)
  count = cost.shape[0]
  # Where rows are more than columns, the rest of them take columns that cost nothing. There are
  # exactly as many of these as are missing, so that every true column is taken.
  spare = max(rows - columns, 0) if column_valid is None else rows
  valid_rows = _mask(row_valid, (count, rows))
  valid_columns = _mask(column_valid, (count, columns))
  missing = valid_rows.sum(-1) - valid_columns.sum(-1)
  cost = _finite(cost, valid_rows[:, :, None] & valid_columns[:, None])
  cost = jnp.pad(cost, ((0, 0), (0, 0), (0, spare)))
  valid_columns = jnp.concatenate([valid_columns, jnp.arange(spare) < missing[:, None]], axis=-1)
  found = jax.vmap(_solve)(cost, valid_rows, valid_columns)
  return jnp.where(found < columns, found, _FREE).reshape(*batch, rows)


class _Assignment(NamedTuple):
  """What is assigned so far, and the prices that prove it the least costly."""

  row_prices: jax.Array  # [N]
  column_prices: jax.Array  # [M]
  column_of: jax.Array  # [N]
  row_of: jax.Array  # [M]


class _Search(NamedTuple):
  """Dijkstra's search for the shortest way from a row to a free column."""

  row: jax.Array  # whose columns come next
  distance: jax.Array  # of `row`
  distances: jax.Array  # [M], the shortest known
  through: jax.Array  # [M], the row before the column on that way
  rows_seen: jax.Array  # bool [N]
  columns_seen: jax.Array  # bool [M]
  found: jax.Array  # the free column, or -1
  steps: jax.Array


def _mask(mask: jax.Array | None, shape: tuple[int, int]) -> jax.Array:
  return jnp.ones(shape, bool) if mask is None else mask.astype(bool).reshape(shape)


def _finite(cost: jax.Array, counts: jax.Array) -> jax.Array:
  """`[B, N, M]` whose entries that are no numbers are dearer than N others."""
  known = jnp.isfinite(cost) & counts
  highest = jnp.max(cost, axis=(1, 2), keepdims=True, initial=-jnp.inf, where=known)
  lowest = jnp.min(cost, axis=(1, 2), keepdims=True, initial=jnp.inf, where=known)
  some = known.any((1, 2), keepdims=True)
  dear = jnp.where(some, highest + cost.shape[1] * (highest - lowest) + 1.0, 0.0)
  return jnp.where(jnp.isfinite(cost), cost, dear)


def _solve(cost: jax.Array, row_valid: jax.Array, column_valid: jax.Array) -> jax.Array:
  """One problem: `[N, M]`, valid columns being no fewer than valid rows → int32 `[N]`."""
  rows, columns = cost.shape
  start = _Assignment(
    jnp.zeros(rows),
    jnp.zeros(columns),
    jnp.full(rows, _FREE, jnp.int32),
    jnp.full(columns, _FREE, jnp.int32),
  )

  def assign_row(row: jax.Array, now: _Assignment) -> _Assignment:
    search = _shortest_way(cost, row, row_valid[row], column_valid, now)
    return _take_way(row, row_valid[row], now, search)

  return lax.fori_loop(0, rows, assign_row, start).column_of


def _shortest_way(
  cost: jax.Array,
  row: jax.Array,
  asked: jax.Array,
  column_valid: jax.Array,
  now: _Assignment,
) -> _Search:
  rows, columns = cost.shape

  def step(s: _Search) -> _Search:
    reduced = s.distance + cost[s.row] - now.row_prices[s.row] - now.column_prices
    open_columns = column_valid & ~s.columns_seen
    nearer = open_columns & (reduced < s.distances)
    distances = jnp.where(nearer, reduced, s.distances)
    through = jnp.where(nearer, s.row, s.through)
    left = jnp.where(open_columns, distances, jnp.inf)
    nearest = left.min()
    # Of columns equally near a free one ends the search.
    candidates = open_columns & (left == nearest)
    free = candidates & (now.row_of == _FREE)
    ends = free.any()
    column = jnp.argmax(jnp.where(ends, free, candidates)).astype(jnp.int32)
    return _Search(
      row=jnp.where(ends, s.row, now.row_of[column]),
      distance=nearest,
      distances=distances,
      through=through,
      rows_seen=s.rows_seen.at[s.row].set(True),
      columns_seen=s.columns_seen.at[column].set(True),
      found=jnp.where(ends, column, _FREE),
      steps=s.steps + 1,
    )

  return lax.while_loop(
    lambda s: asked & (s.found == _FREE) & (s.steps < columns),
    step,
    _Search(
      row=jnp.asarray(row, jnp.int32),
      distance=jnp.zeros(()),
      distances=jnp.full(columns, jnp.inf),
      through=jnp.full(columns, _FREE, jnp.int32),
      rows_seen=jnp.zeros(rows, bool),
      columns_seen=jnp.zeros(columns, bool),
      found=jnp.asarray(_FREE, jnp.int32),
      steps=jnp.zeros((), jnp.int32),
    ),
  )


def _take_way(row: jax.Array, asked: jax.Array, now: _Assignment, search: _Search) -> _Assignment:
  """Prices of what was seen change by how much nearer it was than the end; the way is taken."""
  # The row that the search began at has no column yet.
  own = jnp.where(now.column_of == _FREE, 0.0, search.distances[now.column_of])
  rise = jnp.where(search.rows_seen, search.distance - own, 0.0)
  fall = jnp.where(search.columns_seen, search.distance - search.distances, 0.0)

  def back(state):
    column, column_of, row_of, _ = state
    before = search.through[column]
    following = column_of[before]
    ends = before == row
    return following, column_of.at[before].set(column), row_of.at[column].set(before), ~ends

  _, column_of, row_of, _ = lax.while_loop(
    lambda state: state[3],
    back,
    (search.found, now.column_of, now.row_of, asked & (search.found != _FREE)),
  )
  return _Assignment(
    now.row_prices + jnp.where(asked, rise, 0.0),
    now.column_prices - jnp.where(asked, fall, 0.0),
    column_of,
    row_of,
  )
