"""Tables of positions brought to another size in the middle of a training, moments and all.

Where phases have networks whose tables differ in shape, a state is converted on entering a phase:
the table, its average, and the optimizer's moments of it, each bilinear with half-pixel centres and
no antialiasing, as EfficientTrain does it. (A second moment stays non-negative so.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_vit.models.vitdet import RELATIVE_TABLES
from hybrid_vit.sharding import path_name


def resize_tables(tree: Any, shapes: Any) -> Any:
  """A tree with the shapes of another one, its tables of positions resized; pure.

  Args:
    tree: variables, a whole state, or any part of one; a leaf is known by the last name of its path
      ("position_bias" in the parameters as in the moments).
    shapes: the same tree with the shapes that are wanted.

  Raises:
    ValueError: another structure, or a leaf of another shape that is no table of positions.
  """
  structures: list[Any] = [jax.tree.structure(tree), jax.tree.structure(shapes)]
  if structures[0] != structures[1]:
    raise ValueError("phases must have the same parameters: only tables of positions may differ")

  def fit(path: Any, leaf: Any, wanted: Any) -> Any:
    if leaf.shape == wanted.shape:
      return leaf
    name = path_name(path)
    resize = _TABLES.get(name.rpartition("/")[2])
    if resize is None or leaf.ndim != len(wanted.shape):
      raise ValueError(
        f"{name!r} is {tuple(leaf.shape)} in one phase and {tuple(wanted.shape)} in the next: only "
        f"tables of positions are resized ({', '.join(_TABLES)})"
      )
    return resize(leaf, tuple(wanted.shape)).astype(leaf.dtype)

  return jax.tree_util.tree_map_with_path(fit, tree, shapes)


def _relative(table: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """`[heads, H, W]`."""
  if table.shape[0] != shape[0]:
    raise ValueError(f"a table of {table.shape[0]} heads is not one of {shape[0]}")
  return _bilinear(table, shape)


def _grid(table: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """`[t + n * n, C]`, t tokens before a square grid: the same before and after, 0 or 1."""
  sides = [math.isqrt(length) for length in (table.shape[0], shape[0])]
  tokens = [length - side**2 for length, side in zip((table.shape[0], shape[0]), sides)]
  if tokens[0] != tokens[1] or tokens[0] > 1 or table.shape[1] != shape[1]:
    raise ValueError(
      f"positions {tuple(table.shape)} and {shape} are not those of two squares, as wide each"
    )
  first, channels = tokens[0], shape[1]
  grid = table[first:].reshape(sides[0], sides[0], channels)
  grid = _bilinear(grid, (sides[1], sides[1], channels))
  return jnp.concatenate([table[:first], grid.reshape(-1, channels)])


def _bilinear(table: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  # Along equal sides nothing is done. Highest: a table is small, and its moments are, too.
  return jax.image.resize(
    table, shape, "bilinear", antialias=False, precision=jax.lax.Precision.HIGHEST
  )


_TABLES: Mapping[str, Callable[[jax.Array, tuple[int, ...]], jax.Array]] = {
  "position_bias": _relative,
  "position_table": _relative,
  "position_embedding": _grid,
  "position_sequence": _bilinear,
  **dict.fromkeys(RELATIVE_TABLES, _bilinear),
}
