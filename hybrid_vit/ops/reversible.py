"""Reversible multi-level sequences: the backward pass rebuilds what the forward pass forgets.

A state of L maps goes through a chain of columns. Column i makes, one level after the other,

    new[j] = alpha[i][j] * old[j] + F[i][j](new[0 … j-1], old[j+1 … L-1])

(RevCol, arXiv:2212.11696, equations 1 to 3). Two levels and gains of 1 are RevNet and the reversible
transformers; a first level that looks at the last one is RevCol-H. Since old[j] follows from the
new maps and from the older maps of deeper levels, the deepest first, nothing but the last column's
maps has to be kept: activation memory does not grow with the number of columns. The price is one
more evaluation of each F.

The authors' code keeps the four maps of every column and rebuilds inside one column only, so that
theirs grows; the numbers are the same up to rounding.

Rounding is what is paid with besides: an error of old[j] is that of new[j] over alpha, and the next
column's grows from there. Hence the state is float32 whatever the levels compute in, and
`inverse_errors` measures it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Maps = tuple[jax.Array, ...]
# `(parameters, shared, new maps above, old maps below, key) → contribution`, of the map's shape.
Level = Callable[[Any, Any, Maps, Maps, jax.Array], jax.Array]
# (column, level) of a map that is wanted besides the last column's.
Tap = tuple[int, int]


def reversible_sequence(
  levels: Sequence[Sequence[Level]],
  parameters: Sequence[Sequence[Any]],
  alphas: Sequence[Sequence[jax.Array]],
  shared: Any,
  maps: Maps,
  key: jax.Array,
  taps: Sequence[Tap] = (),
) -> tuple[Maps, tuple[jax.Array, ...]]:
  """Runs a state through all columns; gradients without their activations.

  Args:
    levels: F of each column and level; pure. What it draws, it draws from its key, which is the same
      when it is evaluated again.
    parameters: of each column and level: a tree of arrays.
    alphas: gain of each column and level, broadcast against the map; none may be 0.
    shared: arrays that every level sees, such as a stem's map.
    maps: the state before the first column, one array a level, of any shapes; float32.
    key: folded with the number of column and level for each of them.
    taps: maps that are wanted besides: their gradients come in where they were made.

  Returns:
    The state after the last column, float32, and the tapped maps.

  Raises:
    ValueError: lists of unequal length, a map that is not float32, or a tap that is not there.
  """
  _check(levels, parameters, alphas, maps, taps)
  taps = tuple(taps)

  @jax.custom_vjp
  def run(parameters: Any, alphas: Any, shared: Any, maps: Maps, key: jax.Array) -> Any:
    return _forward(levels, parameters, alphas, shared, maps, key, taps)

  def forward(parameters: Any, alphas: Any, shared: Any, maps: Maps, key: jax.Array) -> Any:
    last, tapped = _forward(levels, parameters, alphas, shared, maps, key, taps)
    # Without the barrier XLA would recognise the last column's second evaluation as the first one,
    # and keep its inside from one to the other.
    return (last, tapped), (parameters, alphas, shared, jax.lax.optimization_barrier(last), key)

  def backward(kept: Any, gradients: Any) -> Any:
    parameters, alphas, shared, last, key = kept
    return (*_backward(levels, parameters, alphas, shared, last, key, taps, *gradients), None)

  run.defvjp(forward, backward)
  return run(tuple(map(tuple, parameters)), tuple(map(tuple, alphas)), shared, tuple(maps), key)


def plain_sequence(
  levels: Sequence[Sequence[Level]],
  parameters: Sequence[Sequence[Any]],
  alphas: Sequence[Sequence[jax.Array]],
  shared: Any,
  maps: Maps,
  key: jax.Array,
  taps: Sequence[Tap] = (),
) -> tuple[Maps, tuple[jax.Array, ...]]:
  """The reference form of `reversible_sequence`: the same, differentiated by JAX."""
  _check(levels, parameters, alphas, maps, taps)
  return _forward(levels, parameters, alphas, shared, tuple(maps), key, tuple(taps))


def inverse_errors(
  levels: Sequence[Sequence[Level]],
  parameters: Sequence[Sequence[Any]],
  alphas: Sequence[Sequence[jax.Array]],
  shared: Any,
  maps: Maps,
  key: jax.Array,
) -> jax.Array:
  """How far the rebuilt maps are from the true ones.

  Args: as of `reversible_sequence`.

  Returns:
    `[columns, levels]`, float32: of the state before each column, the norm of the difference over
    the norm of the true map.
  """
  _check(levels, parameters, alphas, maps, ())
  states = [tuple(maps)]
  for i, column in enumerate(levels):
    states.append(_column(column, parameters[i], alphas[i], shared, states[-1], key, i))
  new = jax.lax.optimization_barrier(states[-1])
  errors = []
  for i in reversed(range(len(levels))):
    old: list[jax.Array] = list(new)
    for j in reversed(range(len(new))):
      own = _key(key, i, j, len(new))
      out = levels[i][j](parameters[i][j], shared, new[:j], tuple(old[j + 1 :]), own)
      old[j] = (new[j] - out.astype(jnp.float32)) / alphas[i][j]
    new = tuple(old)
    errors.append(
      jnp.stack([jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in zip(new, states[i])])
    )
  return jnp.stack(errors[::-1])


def _forward(
  levels: Any, parameters: Any, alphas: Any, shared: Any, maps: Maps, key: Any, taps: Any
) -> tuple[Maps, tuple[jax.Array, ...]]:
  found = {}
  for i, column in enumerate(levels):
    maps = _column(column, parameters[i], alphas[i], shared, maps, key, i)
    found.update({(i, j): maps[j] for j in range(len(maps)) if (i, j) in taps})
  return maps, tuple(found[tap] for tap in taps)


def _column(
  column: Any, parameters: Any, alphas: Any, shared: Any, old: Maps, key: Any, number: int
) -> Maps:
  new: tuple[jax.Array, ...] = ()
  for j, level in enumerate(column):
    own = _key(key, number, j, len(column))
    out = level(parameters[j], shared, new, old[j + 1 :], own)
    new += (alphas[j] * old[j] + out.astype(jnp.float32),)
  return new


def _backward(
  levels: Any,
  parameters: Any,
  alphas: Any,
  shared: Any,
  new: Maps,
  key: Any,
  taps: Any,
  gradients: Any,
  tapped_gradients: Any,
) -> tuple[Any, Any, Any, Maps]:
  """Gradients of parameters, gains, the shared arrays and the first state, column by column."""
  gradient = list(gradients)
  of_parameters, of_alphas = [], []
  of_shared = jax.tree.map(jnp.zeros_like, shared)
  for i in reversed(range(len(levels))):
    for tap, own in zip(taps, tapped_gradients):
      if tap[0] == i:
        gradient[tap[1]] = gradient[tap[1]] + own
    old: list[jax.Array] = list(new)
    of_old: list[jax.Array | None] = [None] * len(new)
    column_parameters, column_alphas = [], []
    for j in reversed(range(len(new))):
      own_key = _key(key, i, j, len(new))
      # Again, and with it what its gradient needs: of this level alone.
      out, pull = jax.vjp(
        lambda p, s, above, below, j=j, own_key=own_key: levels[i][j](p, s, above, below, own_key),
        parameters[i][j],
        shared,
        tuple(new[:j]),
        tuple(old[j + 1 :]),
      )
      old[j] = (new[j] - out.astype(jnp.float32)) / alphas[i][j]
      own_parameters, own_shared, above, below = pull(gradient[j].astype(out.dtype))
      column_parameters.append(own_parameters)
      of_shared = jax.tree.map(jnp.add, of_shared, own_shared)
      for k, more in enumerate(above):
        gradient[k] = gradient[k] + more
      for k, more in enumerate(below, start=j + 1):
        of_old[k] = of_old[k] + more
      of_old[j] = alphas[i][j] * gradient[j]
      column_alphas.append(_sum_like(old[j] * gradient[j], alphas[i][j]))
    of_parameters.append(tuple(column_parameters[::-1]))
    of_alphas.append(tuple(column_alphas[::-1]))
    # One column after the other: a scheduler that ran ahead would hold several columns' maps.
    new, gradient, of_shared = jax.lax.optimization_barrier((tuple(old), of_old, of_shared))
    gradient = list(gradient)
  return tuple(of_parameters[::-1]), tuple(of_alphas[::-1]), of_shared, tuple(gradient)


def _key(key: jax.Array, column: int, level: int, num_levels: int) -> jax.Array:
  return jax.random.fold_in(key, column * num_levels + level)


def _sum_like(x: jax.Array, target: jax.Array) -> jax.Array:
  """Sums `x` over what `target` was broadcast along."""
  lead = x.ndim - target.ndim
  axes = tuple(range(lead)) + tuple(
    lead + k for k, size in enumerate(target.shape) if size == 1 and x.shape[lead + k] != 1
  )
  return x.sum(axes).reshape(target.shape)


def _check(levels: Any, parameters: Any, alphas: Any, maps: Any, taps: Any) -> None:
  if not len(levels) == len(parameters) == len(alphas):
    raise ValueError(
      f"{len(levels)} columns of levels, {len(parameters)} of parameters, {len(alphas)} of gains"
    )
  for i, (column, own, gains) in enumerate(zip(levels, parameters, alphas)):
    if not len(column) == len(own) == len(gains) == len(maps):
      raise ValueError(
        f"column {i} has {len(column)} levels, {len(own)} trees of parameters and {len(gains)} gains "
        f"for {len(maps)} maps"
      )
  for j, x in enumerate(maps):
    if x.dtype != jnp.float32:
      raise ValueError(f"map {j} is {x.dtype}; the state of a reversible sequence is float32")
  for i, j in taps:
    if not (0 <= i < len(levels) and 0 <= j < len(maps)):
      raise ValueError(f"no map at column {i}, level {j}, of {len(levels)} x {len(maps)}")
