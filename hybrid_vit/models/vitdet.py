"""What ViTDet changes in a plain transformer's attention: windows, and relative positions.

Yanghao Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022,
arXiv:2203.16527, section 3, as detectron2's `ViT` has it. Most blocks attend within windows that do
not shift, a few globally. Relative positions are decomposed into rows and columns (Yanghao Li et
al., "MViTv2", CVPR 2022, arXiv:2112.01526, section 4.1). `models.dense.vitdet_arguments` makes the
networks of `models.vit` so.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.models import positions
from hybrid_vit.ops.windows import merge_windows, partition_windows

# Tables of a block, of the distances between rows and between columns.
RELATIVE_TABLES = ("relative_rows", "relative_columns")


@dataclasses.dataclass(frozen=True)
class Reach:
  """What the cells of a map attend to.

  Attributes:
    grid: (rows, columns) of the map.
    window: side of the windows within which they do; 0 for the whole map.
    relative_size: side of the map or window that the tables of relative positions are made for; 0
      for none. Other sizes take them resized.
  """

  grid: tuple[int, int]
  window: int
  relative_size: int

  @property
  def size(self) -> tuple[int, int]:
    """(rows, columns) that attend to each other."""
    return (self.window, self.window) if self.window else self.grid

  def split(self, x: jax.Array) -> jax.Array:
    """`[B, rows * columns, C]` → `[B, n, L, C]`, n windows of L cells.

    Zeros fill up the last windows, and attend and are attended to as other cells are.
    """
    if not self.window:
      return x[:, None]
    return partition_windows(x.reshape(x.shape[0], *self.grid, x.shape[-1]), self.size)[0]

  def join(self, x: jax.Array) -> jax.Array:
    """Undoes `split`."""
    if not self.window:
      return x[:, 0]
    return merge_windows(x, self.size, self.grid).reshape(x.shape[0], -1, x.shape[-1])


def relative_bias(
  query: jax.Array, rows: jax.Array, columns: jax.Array, size: tuple[int, int]
) -> jax.Array:
  """What decomposed relative positions add to the logits.

  A query times the table's entry for its row's distance to the key's, and for its column's. The
  query is not scaled, as the logits' is.

  Args:
    query: `[..., L, heads, D]`, of L = h * w cells.
    rows: table `[2n - 1, D]` of the distances -(n - 1) to n - 1 from key to query; resized where n
      is not h (linear, half-pixel centres, no antialiasing).
    columns: the same, for w.
    size: (h, w).

  Returns:
    float32 `[..., heads, L, L]`, queries before keys.
  """
  *batch, _, heads, width = query.shape
  query = query.reshape(*batch, *size, heads, width)
  by_row, by_column = (
    positions.resize_sequence(table, 2 * n - 1)[_distances(n)].astype(query.dtype)
    for table, n in zip((rows, columns), size)
  )
  of_rows = jnp.einsum("...yxnd,ykd->...nyxk", query, by_row, preferred_element_type=jnp.float32)
  of_columns = jnp.einsum(
    "...yxnd,xkd->...nyxk", query, by_column, preferred_element_type=jnp.float32
  )
  cells = size[0] * size[1]
  bias = of_rows[..., :, None] + of_columns[..., None, :]
  return bias.reshape(*batch, heads, cells, cells)


def check_reach(network: Any) -> None:
  """A `VisionTransformer`'s windows, global blocks and relative positions go together.

  Raises:
    ValueError: for the first thing that does not.
  """
  name = type(network).__name__
  if network.class_token and (network.window_size or network.relative_size):
    raise ValueError(
      f"{name}: window_size and relative_size are of patches alone; they need class_token=False"
    )
  if network.global_blocks and not network.window_size:
    raise ValueError(f"{name}: global_blocks need a window_size, in which the other blocks attend")
  absent = [i for i in network.global_blocks if not 0 <= i < network.depth]
  if absent:
    raise ValueError(
      f"{name}: global_blocks names block {absent[0]}; the blocks are 0 to {network.depth - 1}"
    )


def _distances(n: int) -> np.ndarray:
  """Place in a table of each query's distance from each key, int `[n, n]`."""
  return np.arange(n)[:, None] - np.arange(n)[None, :] + n - 1
