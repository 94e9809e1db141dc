"""Windows of a feature map: cutting a map up, padded where need be, and putting it back."""

import jax
import jax.numpy as jnp
import numpy as np


def partition_windows(
  x: jax.Array, window: tuple[int, int], *, pad: bool = True
) -> tuple[jax.Array, np.ndarray | None]:
  """Cuts a map into windows that do not overlap, row by row.

  Args:
    x: `[B, H, W, C]`.
    window: (rows, columns) of a window.
    pad: fill the map with zeros below and to the right where the window does not divide it.

  Returns:
    windows `[B, N, rows * columns, C]`, and None or, where padding was needed, a constant bool mask
    `[N, rows * columns]` that is True at real cells. Every window holds at least one real cell.

  Raises:
    ValueError: where the window does not divide the map and `pad` is False.
  """
  batch, height, width, channels = x.shape
  rows, columns = window
  down, right = -height % rows, -width % columns
  if (down or right) and not pad:
    raise ValueError(
      f"a window of {rows}x{columns} does not divide a map of {height}x{width}; take a window that "
      "does, change the input size, or allow padding"
    )
  mask = None
  if down or right:
    x = jnp.pad(x, ((0, 0), (0, down), (0, right), (0, 0)))
    real = np.pad(np.ones((height, width), bool), ((0, down), (0, right)))
    cells = real.reshape((height + down) // rows, rows, (width + right) // columns, columns)
    mask = cells.transpose(0, 2, 1, 3).reshape(-1, rows * columns)
  n_rows, n_columns = (height + down) // rows, (width + right) // columns
  x = x.reshape(batch, n_rows, rows, n_columns, columns, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, n_rows * n_columns, rows * columns, channels), mask


def merge_windows(windows: jax.Array, window: tuple[int, int], size: tuple[int, int]) -> jax.Array:
  """Undoes `partition_windows`: `[B, N, rows * columns, C]` to `[B, H, W, C]` of `size` (H, W)."""
  rows, columns = window
  height, width = size
  n_rows, n_columns = -(-height // rows), -(-width // columns)
  batch, _, _, channels = windows.shape
  x = windows.reshape(batch, n_rows, n_columns, rows, columns, channels)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(batch, n_rows * rows, n_columns * columns, channels)[:, :height, :width]
