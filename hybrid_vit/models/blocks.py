"""A row of blocks, one after the other: written out, or equal ones as the turns of one loop.

Written out, the compiler sees every block; in a loop (`jax.lax.scan`) one of each kind. The
compiler of TPUs is done in about two thirds of the time then, that of CPUs takes longer, and a step
takes longer too, since the loop stores what the backward pass needs in arrays of all blocks.
Parameters keep their places and names, "stage3_block0" and so on, and are put side by side for the
loop in every step. Where the loop deviates from blocks written out: drop path draws other masks
from the same key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Arguments = Mapping[str, Any]

# The one argument that may differ between the turns of a loop.
_RATE = "drop_path_rate"


def apply_blocks(
  network: Any,
  block_class: type[nn.Module],
  name: str,
  arguments: Sequence[Arguments],
  x: jax.Array,
  *static: Any,
  first: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Applies blocks, children of a network, within its compact method.

  The network's `remat` says whether each is recomputed in the backward pass, without a fresh key,
  so that drop path masks are the same in both passes; its `scan_blocks`, whether those of equal
  arguments and shapes, or that come again by turns as windows and shifted windows do, are the turns
  of a loop.

  Args:
    network: the module.
    block_class: called as `block(x, *static)`; the result has the shape and type of `x` where
      blocks are scanned.
    name: before the blocks' numbers.
    arguments: of each block.
    x: what the first block takes.
    *static: Python values that every block takes, no arrays.
    first: number of the first block.

  Returns:
    What the last block gives (`x` if there is none), and what each gives, by its name.
  """

  def call(block: Any, x: jax.Array) -> jax.Array:
    out: jax.Array = block(x, *static)
    return out

  lifted: Any = block_class
  if network.remat:
    lifted = nn.remat(block_class, static_argnums=tuple(range(2, 2 + len(static))))
  names = [f"{name}{first + i}" for i in range(len(arguments))]
  outputs: dict[str, jax.Array] = {}
  for start, period, turns in _rows(network, names, arguments):
    row = slice(start, start + period * turns)
    if turns > 1:
      own = names[row], arguments[row]
      found = scan_blocks(network, block_class, *own, period, x, call, network.remat)
      outputs |= zip(names[row], found)
      x = found[-1]
      continue
    for own_name, own_arguments in zip(names[row], arguments[row]):
      x = outputs[own_name] = call(lifted(**own_arguments, name=own_name), x)
  return x, outputs


def scan_blocks(
  network: nn.Module,
  block_class: type[nn.Module],
  names: Sequence[str],
  arguments: Sequence[Arguments],
  period: int,
  x: Any,
  call: Callable[[Any, Any], Any],
  remat: bool,
) -> list[Any]:
  """Blocks whose arguments come again after every `period` of them, as the turns of a loop.

  Args:
    network: whose parameters, batch statistics and random streams they take; not initializing.
    block_class: of all of them.
    names: of each.
    arguments: of each; a whole number of periods.
    period: blocks in a turn.
    x: a tree of arrays, what the first block takes; each gives the same shapes and types.
    call: `(block, x) → x`.
    remat: recompute each block in the backward pass.

  Returns:
    What each block gives.
  """
  trees = [{n: v[own] for n, v in network.variables.items() if own in v} for own in names]
  collections = {n for tree in trees for n in tree if n != "params"}
  mutable = [n for n in sorted(collections) if network.is_mutable_collection(n)]
  rates = [own.get(_RATE, 0.0) for own in arguments]
  draws = network.has_rng("dropout")

  def turn(x: Any, own: Any) -> tuple[Any, Any]:
    given = []
    for i, (tree, rate, key) in enumerate(own):

      def block(x: Any, tree: Any, rate: Any, key: Any, i: int = i) -> Any:
        # A rate that all share stays a number: 0 drops nothing, and costs nothing.
        own_rate = {_RATE: rate} if len(set(rates)) > 1 else {}
        label = f"{names[i]}_to_{names[i::period][-1]}"
        module: Any = block_class(**{**arguments[i], **own_rate}, parent=None, name=label)
        streams = {"dropout": key} if draws else {}
        return module.apply(tree, x, method=call, rngs=streams, mutable=mutable)

      form = jax.checkpoint(block, prevent_cse=False) if remat else block
      x, changed = form(x, tree, rate, key)
      given.append((x, changed))
    return x, given

  keys = jax.random.split(network.make_rng("dropout") if draws else jax.random.key(0), len(names))
  stacked = [
    jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees[i::period]) for i in range(period)
  ]
  own = [
    (stacked[i], jnp.asarray(rates[i::period], jnp.float32), keys[i::period]) for i in range(period)
  ]
  _, given = jax.lax.scan(turn, x, own)
  outputs = []
  for i, name in enumerate(names):
    out, changed = jax.tree.map(lambda leaf, turn=i // period: leaf[turn], given[i % period])
    for collection, value in changed.items():
      network.put_variable(collection, name, value)
    outputs.append(out)
  return outputs


def _rows(
  network: Any, names: Sequence[str], arguments: Sequence[Arguments]
) -> list[tuple[int, int, int]]:
  """(first, period, turns) of rows that scan, and of rows to write out, which have 1 turn."""
  if not network.scan_blocks or network.is_initializing():
    return [(0, len(names), 1)]
  kinds = [_kind(network, *own) for own in zip(names, arguments)]
  found, at = [], 0
  while at < len(kinds):
    best = (1, 1)
    for period in range(1, (len(kinds) - at) // 2 + 1):
      turns = 1
      while _comes_again(kinds[at:], period, turns):
        turns += 1
      # Of two that cover as much, the shorter period.
      if turns > 1 and period * turns > best[0] * best[1]:
        best = (period, turns)
    found.append((at, *best))
    at += best[0] * best[1]
  return found


def _comes_again(kinds: Sequence[Any], period: int, turns: int) -> bool:
  """Whether the first `period` of them stand behind so many turns again."""
  return kinds[period * turns : period * (turns + 1)] == kinds[:period]


def _kind(network: Any, name: str, arguments: Arguments) -> Any:
  """What is equal of blocks that may share a loop: arguments but the rate, shapes of variables."""
  own = {collection: tree[name] for collection, tree in network.variables.items() if name in tree}
  shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), own)
  return {n: value for n, value in arguments.items() if n != _RATE}, shapes
