"""Multi-scale deformable attention: weighted sums of a few sampled places on each map of a pyramid.

Zhu et al., "Deformable DETR", arXiv:2010.04159, equation 3, with the sampling of the authors' CUDA
code (`MSDeformAttn`): bilinear, cell centres at (i + 0.5) / n, zeros outside the map. All maps lie
in one sequence of tokens, map by map ("level-major"), each row by row.

`by_gathers` reads the four neighbours of every place. `by_products` writes each query's samples as
one dense row over the map's cells, an outer product of a row of the height and one of the width,
and multiplies by the values: many more multiply-adds but no gather and no scatter; queries are
taken in chunks, so that these rows do not fill the memory. By a TPU's compiler that takes ten times
the gathers' cycles (docs/results/operations), so "gather" is the default everywhere. Both make
their insides anew in the backward pass. Places, weights and sums are float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.ops.point_sampling import cell_before, four_neighbours

METHODS = ("gather", "product")

SpatialShapes = Sequence[tuple[int, int]]

# Rows of `by_products` that are in memory at once, over all heads and pictures of a batch.
_ROW_NUMBERS = 1 << 27
# Rows that `by_gathers` adds in one loop: more would be faster by little and compile for longer.
_UNROLL = 4


def deformable_attention(
  value: jax.Array,
  spatial_shapes: SpatialShapes,
  locations: jax.Array,
  weights: jax.Array,
  *,
  method: str = "gather",
) -> jax.Array:
  """Sums sampled values.

  Args:
    value: `[B, S, M, D]`, M heads; S is the sum of the maps' cells.
    spatial_shapes: (height, width) of each map, in their order in `value`.
    locations: float32 `[B, Q, M, L, P, 2]`, (x, y) with the map from 0 to 1; any numbers.
    weights: `[B, Q, M, L, P]`.
    method: one of `METHODS`.

  Returns:
    `[B, Q, M, D]` of the dtype of `value`.

  Raises:
    ValueError: an unknown method, maps that are not S cells, or locations of other maps.
  """
  check_shapes(value, spatial_shapes, locations, weights)
  if method not in METHODS:
    raise ValueError(f"method is {method!r}; one of {', '.join(METHODS)} was expected")
  run = by_gathers if method == "gather" else by_products
  return run(value, spatial_shapes, locations, weights)


def by_gathers(
  value: jax.Array, spatial_shapes: SpatialShapes, locations: jax.Array, weights: jax.Array
) -> jax.Array:
  """`deformable_attention` by gathers of four neighbours."""
  batch, tokens, heads, channels = value.shape
  queries = locations.shape[1]
  # A gathered row is D numbers side by side; heads lie one behind the other.
  rows = value.transpose(0, 2, 1, 3).reshape(batch, heads * tokens, channels)
  places = locations.transpose(0, 2, 1, 3, 4, 5)
  weights = weights.transpose(0, 2, 1, 3, 4).astype(jnp.float32)
  first = jnp.arange(heads)[:, None, None] * tokens
  indices, factors = [], []
  for level, size in enumerate(spatial_shapes):
    for index, part in four_neighbours(places[..., level, :, :], size):
      indices.append(index + first)
      factors.append(part * weights[..., level, :])
    first = first + math.prod(size)
  index, factor = (
    jnp.concatenate(x, axis=-1).reshape(batch, heads * queries, -1) for x in (indices, factors)
  )
  out = jax.vmap(_weighted_rows)(rows, index, factor)
  out = out.reshape(batch, heads, queries, channels).transpose(0, 2, 1, 3)
  return out.astype(value.dtype)


def by_products(
  value: jax.Array, spatial_shapes: SpatialShapes, locations: jax.Array, weights: jax.Array
) -> jax.Array:
  """`deformable_attention` by matrix products, map by map and in chunks of queries."""
  batch, tokens, heads, _ = value.shape
  queries = locations.shape[1]
  chunk = max(min(_ROW_NUMBERS // (batch * heads * tokens), queries), 1)
  chunks = -(-queries // chunk)
  missing = chunks * chunk - queries

  def chunked(x: jax.Array) -> jax.Array:  # [B, Q, ...] -> [chunks, B, chunk, ...]
    x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, chunks, chunk, *x.shape[2:]), 1, 0)

  def run(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    total = jnp.zeros((), jnp.float32)
    start = 0
    for level, (height, width) in enumerate(spatial_shapes):
      cells = lax.slice_in_dim(value, start, start + height * width, axis=1)
      start += height * width
      total = total + _multiplied(
        cells, pair[0][:, :, :, level], pair[1][:, :, :, level], (height, width)
      )
    return total

  if chunks == 1:
    out = run((locations, weights))
  else:
    out = lax.map(run, (chunked(locations), chunked(weights)))
    out = jnp.moveaxis(out, 0, 1).reshape(batch, chunks * chunk, *out.shape[3:])[:, :queries]
  return out.astype(value.dtype)


def check_shapes(
  value: jax.Array, spatial_shapes: SpatialShapes, locations: jax.Array, weights: jax.Array
) -> None:
  """What the arguments of `deformable_attention` have to agree in.

  Raises:
    ValueError: they do not.
  """
  cells = sum(math.prod(shape) for shape in spatial_shapes)
  if value.shape[1] != cells:
    sizes = ", ".join(f"{height} x {width}" for height, width in spatial_shapes)
    raise ValueError(f"value has {value.shape[1]} tokens, and maps of {sizes} have {cells}")
  if locations.shape[3] != len(spatial_shapes):
    raise ValueError(
      f"locations are on {locations.shape[3]} maps, and spatial_shapes names {len(spatial_shapes)}"
    )
  if locations.shape != (*weights.shape, 2):
    raise ValueError(
      f"locations {list(locations.shape)} do not belong to weights {list(weights.shape)}: the same "
      "and a last axis of 2 was expected"
    )


@jax.custom_vjp
def _weighted_rows(rows: jax.Array, index: jax.Array, factor: jax.Array) -> jax.Array:
  """Sums of K rows each: `[R, D]`, `[N, K]` within the rows, `[N, K]` → float32 `[N, D]`.

  One row at a time, so that reading and adding are one loop and nothing is stored between. Autodiff
  would store all rows; and one scatter of all is slower than K scatters.
  """

  def one(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    return total + _rows_at(rows, pair[0]) * pair[1][:, None], None

  start = jnp.zeros((index.shape[0], rows.shape[1]), jnp.float32)
  return lax.scan(one, start, (index.T, factor.T), unroll=_UNROLL)[0]


def _rows_at(rows: jax.Array, index: jax.Array) -> jax.Array:
  return rows.at[index].get(mode="promise_in_bounds").astype(jnp.float32)


def _weighted_rows_forward(rows: jax.Array, index: jax.Array, factor: jax.Array) -> Any:
  return _weighted_rows(rows, index, factor), (rows, index, factor)


def _weighted_rows_backward(kept: Any, gradient: jax.Array) -> Any:
  rows, index, factor = kept

  def one(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    at, part = pair
    of_factor = jnp.sum(_rows_at(rows, at) * gradient, axis=-1)
    return total.at[at].add(part[:, None] * gradient, mode="promise_in_bounds"), of_factor

  of_rows, of_factor = lax.scan(one, jnp.zeros(rows.shape, jnp.float32), (index.T, factor.T))
  return of_rows.astype(rows.dtype), None, of_factor.T


_weighted_rows.defvjp(_weighted_rows_forward, _weighted_rows_backward)


def _hats(place: jax.Array, length: int) -> jax.Array:
  """`[...]` → float32 `[..., length]`: each cell's part in the sample at a place."""
  low, part = cell_before(place, length)
  apart = jnp.arange(length) - low[..., None]
  part = part[..., None]
  return jnp.where(apart == 0, 1.0 - part, 0.0) + jnp.where(apart == 1, part, 0.0)


def _multiplied(
  cells: jax.Array, locations: jax.Array, weights: jax.Array, size: tuple[int, int]
) -> jax.Array:
  """One map: `[B, S, M, D]`, `[B, Q, M, P, 2]`, `[B, Q, M, P]` → float32 `[B, Q, M, D]`."""

  @jax.checkpoint
  def run(cells: jax.Array, locations: jax.Array, weights: jax.Array) -> jax.Array:
    rows = _hats(locations[..., 1], size[0]) * weights[..., None].astype(jnp.float32)
    columns = _hats(locations[..., 0], size[1])
    dense = jnp.einsum("bqmph,bqmpw->bmqhw", rows, columns, precision=lax.Precision.HIGHEST)
    dense = dense.reshape(*dense.shape[:3], -1).astype(cells.dtype)
    # Half-precision values have exact products; float32 ones are asked for in full.
    precision = lax.Precision.HIGHEST if cells.dtype == jnp.float32 else None
    return jnp.einsum(
      "bmqs,bsmd->bqmd", dense, cells, precision=precision, preferred_element_type=jnp.float32
    )

  return run(cells, locations, weights)
