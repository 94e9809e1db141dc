"""Reversible multi-level sequences: the backward pass rebuilds what the forward pass forgets.

A state of L maps goes through a chain of columns. Column i makes, one level after the other,

    new[j] = alpha[i][j] * old[j] + F[i][j](new[0 … j-1], old[j+1 … L-1])

(RevCol, arXiv:2212.11696, equations 1 to 3). Two levels and gains of 1 are RevNet and the
reversible transformers; a first level that looks at the last one is RevCol-H. Since old[j] follows
from the new maps and from the older maps of deeper levels, the deepest first, nothing but the last
column's maps has to be kept: activation memory does not grow with the number of columns. The price
is one more evaluation of each F.

The authors' code keeps the four maps of every column and rebuilds inside one column only, so that
theirs grows; the numbers are the same up to rounding.

Rounding is what is paid with besides: an error of old[j] is that of new[j] over alpha, and through
F it reaches the other levels. With four levels and gains of 1/2 it grows about eightfold a column:
after 15 columns nothing of a float32 state is left. Hence the state is float32 whatever the levels
compute in, `inverse_errors` measures what is lost, and `keep_every` keeps the maps of some columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
  keep_every: int | None = None,
  scan: bool = False,
) -> tuple[Maps, tuple[jax.Array, ...]]:
  """Runs a state through all columns; gradients without their activations.

  Args:
    levels: F of each column and level; pure. What it draws, it draws from its key, which is the
      same when it is evaluated again.
    parameters: of each column and level: a tree of arrays.
    alphas: gain of each column and level, broadcast against the map; none may be 0.
    shared: arrays that every level sees, such as a stem's map.
    maps: the state before the first column, one array a level, of any shapes; float32.
    key: folded with the number of column and level for each of them.
    taps: maps that are wanted besides: their gradients come in where they were made.
    keep_every: number of columns after which the maps are kept and rebuilding starts afresh; None
      to keep those of the last column alone.
    scan: columns as the turns of a loop, of which one is compiled; their levels are those of the
      first one, and so are the shapes of their parameters.

  Returns:
    The state after the last column, float32, and the tapped maps.

  Raises:
    ValueError: lists of unequal length, a map that is not float32, a tap that is not there,
      `keep_every` below 1, or to be scanned, and columns have different functions.
  """
  _check(levels, parameters, alphas, maps, taps)
  if keep_every is not None and keep_every < 1:
    raise ValueError(f"keep_every is {keep_every}; at least 1 was expected, or None")
  length = keep_every or len(levels)
  if scan and any(column != levels[0] for column in levels):
    raise ValueError("columns to be scanned have the same functions; some of these have others")
  maps = tuple(maps)
  found: dict[Tap, jax.Array] = {}
  ends: Sequence[int] = range(length, len(levels) + length, length)
  if scan:  # the columns that are left over are a shorter loop
    ends = sorted({len(levels) - len(levels) % length, len(levels)} - {0})
  first = 0
  for end in ends:
    part = slice(first, end)
    own = tuple(tap for tap in taps if first <= tap[0] < end)
    arguments = parameters[part], alphas[part], shared, maps, key, own, first
    if scan:
      maps, tapped = _scanned_parts(levels[0], *arguments, min(length, end - first))
    else:
      maps, tapped = _reversible_part(levels[part], *arguments)
    found.update(zip(own, tapped))
    first = end
  return maps, tuple(found[tap] for tap in taps)


def _reversible_part(
  levels: Any,
  parameters: Any,
  alphas: Any,
  shared: Any,
  maps: Maps,
  key: Any,
  taps: Any,
  first: int,
) -> tuple[Maps, tuple[jax.Array, ...]]:
  """Columns whose backward pass is given the last maps alone; the first is number `first`."""

  @jax.custom_vjp
  def run(parameters: Any, alphas: Any, shared: Any, maps: Maps, key: jax.Array) -> Any:
    return _forward(levels, parameters, alphas, shared, maps, key, taps, first)

  def forward(parameters: Any, alphas: Any, shared: Any, maps: Maps, key: jax.Array) -> Any:
    last, tapped = _forward(levels, parameters, alphas, shared, maps, key, taps, first)
    # Without the barrier XLA would recognise the last column's second evaluation as the first one,
    # and keep its inside from one to the other.
    return (last, tapped), (parameters, alphas, shared, jax.lax.optimization_barrier(last), key)

  def backward(kept: Any, gradients: Any) -> Any:
    parameters, alphas, shared, last, key = kept
    return (
      *_backward(levels, parameters, alphas, shared, last, key, taps, first, *gradients),
      None,
    )

  run.defvjp(forward, backward)
  return run(tuple(map(tuple, parameters)), tuple(map(tuple, alphas)), shared, tuple(maps), key)


def _scanned_parts(
  column: Any,
  parameters: Any,
  alphas: Any,
  shared: Any,
  maps: Maps,
  key: Any,
  taps: Any,
  first: int,
  length: int,
) -> tuple[Maps, tuple[jax.Array, ...]]:
  """Parts of `length` equal columns each, as `_reversible_part`, in a loop of loops."""
  shape = (len(parameters) // length, length)
  numbers = first + np.arange(len(parameters)).reshape(shape)
  tapped_levels = sorted({j for _, j in taps})

  def place(tap: Tap) -> tuple[int, int, int]:
    """Which of the tapped levels, which part, which of its columns."""
    return (tapped_levels.index(tap[1]), *divmod(tap[0] - first, length))

  @jax.custom_vjp
  def run(parameters: Any, alphas: Any, shared: Any, maps: Maps, key: jax.Array) -> Any:
    return forward(parameters, alphas, shared, maps, key)[0]

  def forward(parameters: Any, alphas: Any, shared: Any, maps: Maps, key: jax.Array) -> Any:
    def turn(maps: Maps, own: Any) -> tuple[Maps, Any]:
      own_parameters, own_alphas, number = own
      new = _column(column, own_parameters, own_alphas, shared, maps, key, number)
      return new, [new[j] for j in tapped_levels]

    def part(maps: Maps, own: Any) -> tuple[Maps, Any]:
      maps, found = jax.lax.scan(turn, maps, own)
      return maps, (maps, found)

    last, (kept, found) = jax.lax.scan(part, maps, (parameters, alphas, numbers))
    tapped = tuple(found[j][i, k] for j, i, k in map(place, taps))
    return (last, tapped), (parameters, alphas, shared, kept, key)

  def backward(kept: Any, gradients: Any) -> Any:
    parameters, alphas, shared, states, key = kept
    gradient, of_taps = gradients
    more = [jnp.zeros((*shape, *gradient[j].shape), jnp.float32) for j in tapped_levels]
    for tap, own in zip(taps, of_taps):
      j, i, k = place(tap)
      more[j] = more[j].at[i, k].add(own)

    def turn(carry: Any, own: Any) -> tuple[Any, Any]:
      new, gradient, of_shared = carry
      own_parameters, own_alphas, number, own_more = own
      gradient = list(gradient)
      for j, of_tap in zip(tapped_levels, own_more):
        gradient[j] = gradient[j] + of_tap
      keys = [_key(key, number, j, len(new)) for j in range(len(new))]
      old, gradient, of_shared, *of_own = _undo_column(
        column, own_parameters, own_alphas, shared, new, tuple(gradient), of_shared, keys
      )
      return (old, gradient, of_shared), of_own

    def part(carry: Any, own: Any) -> tuple[Any, Any]:
      state, *columns = own
      (_, *carry), found = jax.lax.scan(turn, (state, *carry), columns, reverse=True)
      return tuple(carry), found

    of_shared = jax.tree.map(jnp.zeros_like, shared)
    own = (states, parameters, alphas, numbers, more)
    (gradient, of_shared), found = jax.lax.scan(part, (gradient, of_shared), own, reverse=True)
    return (*found, of_shared, gradient, None)

  run.defvjp(forward, backward)

  def stack(trees: Any) -> Any:
    trees = [tuple(tree) for tree in trees]
    return jax.tree.map(lambda *x: jnp.stack(x).reshape(*shape, *x[0].shape), *trees)

  return run(stack(parameters), stack(alphas), shared, tuple(maps), key)


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
  return _forward(levels, parameters, alphas, shared, tuple(maps), key, tuple(taps), 0)


def inverse_errors(
  levels: Sequence[Sequence[Level]],
  parameters: Sequence[Sequence[Any]],
  alphas: Sequence[Sequence[jax.Array]],
  shared: Any,
  maps: Maps,
  key: jax.Array,
  keep_every: int | None = None,
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
  errors = []
  new = jax.lax.optimization_barrier(states[-1])
  for i in reversed(range(len(levels))):
    if keep_every and (i + 1) % keep_every == 0:
      new = jax.lax.optimization_barrier(states[i + 1])
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
  levels: Any,
  parameters: Any,
  alphas: Any,
  shared: Any,
  maps: Maps,
  key: Any,
  taps: Any,
  first: int,
) -> tuple[Maps, tuple[jax.Array, ...]]:
  found = {}
  for i, column in enumerate(levels):
    maps = _column(column, parameters[i], alphas[i], shared, maps, key, first + i)
    found.update({(first + i, j): maps[j] for j in range(len(maps)) if (first + i, j) in taps})
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
  first: int,
  gradients: Any,
  tapped_gradients: Any,
) -> tuple[Any, Any, Any, Maps]:
  """Gradients of parameters, gains, the shared arrays and the first state, column by column."""
  gradient = list(gradients)
  of_parameters, of_alphas = [], []
  of_shared = jax.tree.map(jnp.zeros_like, shared)
  for i in reversed(range(len(levels))):
    for tap, own in zip(taps, tapped_gradients):
      if tap[0] == first + i:
        gradient[tap[1]] = gradient[tap[1]] + own
    keys = [_key(key, first + i, j, len(new)) for j in range(len(new))]
    undo = functools.partial(_undo_column, levels[i])
    arguments = (parameters[i], alphas[i], shared, new, tuple(gradient), of_shared, keys)
    new, gradient, of_shared, own_parameters, own_alphas = _as_one(undo, arguments, new[0])
    gradient = list(gradient)
    of_parameters.append(own_parameters)
    of_alphas.append(own_alphas)
  return tuple(of_parameters[::-1]), tuple(of_alphas[::-1]), of_shared, tuple(gradient)


def _undo_column(
  column: Any,
  parameters: Any,
  alphas: Any,
  shared: Any,
  new: Maps,
  gradients: Maps,
  of_shared: Any,
  keys: Any,
) -> tuple[Maps, Maps, Any, Any, Any]:
  """The maps before a column, their gradients, and those of all that went into it."""
  gradient = list(gradients)
  old: list[Any] = list(new)
  of_old: list[Any] = [None] * len(new)
  of_parameters: list[Any] = [None] * len(new)
  of_alphas: list[Any] = [None] * len(new)
  for j in reversed(range(len(new))):

    def evaluate(p: Any, s: Any, above: Any, below: Any, j: int = j) -> Any:
      return column[j](p, s, above, below, keys[j])

    # Again, and with it what its gradient needs: of this level alone.
    out, pull = jax.vjp(evaluate, parameters[j], shared, tuple(new[:j]), tuple(old[j + 1 :]))
    old[j] = (new[j] - out.astype(jnp.float32)) / alphas[j]
    of_parameters[j], own_shared, above, below = pull(gradient[j].astype(out.dtype))
    of_shared = jax.tree.map(jnp.add, of_shared, own_shared)
    for k, more in enumerate(above):
      gradient[k] = gradient[k] + more
    for k, more in enumerate(below, start=j + 1):
      of_old[k] = of_old[k] + more
    of_old[j] = alphas[j] * gradient[j]
    of_alphas[j] = _sum_like(old[j] * gradient[j], alphas[j])
  return tuple(old), tuple(of_old), of_shared, tuple(of_parameters), tuple(of_alphas)


def _as_one(function: Any, arguments: Any, witness: jax.Array) -> Any:
  """`function(*arguments)`, done whole before anything else is.

  A scheduler that put off the gradients of parameters, or rebuilt further columns ahead of them,
  would hold several columns' insides. XLA for CPUs drops barriers before it schedules, but what
  stands in a conditional is one instruction: there a NaN in `witness` gives NaN without computing.
  """

  def barrier(arguments: Any, witness: jax.Array) -> Any:
    return jax.lax.optimization_barrier(function(*jax.lax.optimization_barrier(arguments)))

  def conditional(arguments: Any, witness: jax.Array) -> Any:
    shapes = jax.eval_shape(function, *arguments)

    def nothing(*_: Any) -> Any:
      return jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), shapes)

    return jax.lax.cond(jnp.isnan(witness[(0,) * witness.ndim]), nothing, function, *arguments)

  return jax.lax.platform_dependent(arguments, witness, cpu=conditional, default=barrier)


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
        f"column {i} has {len(column)} levels, {len(own)} trees of parameters and {len(gains)} "
        f"gains for {len(maps)} maps"
      )
  for j, x in enumerate(maps):
    if x.dtype != jnp.float32:
      raise ValueError(f"map {j} is {x.dtype}; the state of a reversible sequence is float32")
  for i, j in taps:
    if not (0 <= i < len(levels) and 0 <= j < len(maps)):
      raise ValueError(f"no map at column {i}, level {j}, of {len(levels)} x {len(maps)}")
