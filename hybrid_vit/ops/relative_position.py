"""Relative position bias of attention among a window's cells: one signature, two forms.

By the TPU compiler's own cycles (v5e, float32), with the gradient: of windows of 14 x 14 and 12
heads 0.43 M by repetition, 0.10 M by slices; of 32 x 32 and 32 heads, as in fine-tuning at 512
pixels, 23.5 and 2.5 M, which every block pays in every step. Rows of 2n numbers cut into rows of
2n - 1 have every register filled anew; slices move the whole row of a query's keys. On CPUs slices
take half of the time and five times as long to compile, a second for each block of 14 x 14.
"""

import jax
import jax.numpy as jnp

from hybrid_vit.ops.platforms import target_platform

FORMS = ("repetition", "slices")


def relative_position_bias(
  table: jax.Array, window: tuple[int, int], form: str | None = None
) -> jax.Array:
  """Spreads a table over pairs of cells, which is a copy of its numbers in any form.

  The entry of a pair is at row (key row - query row + H - 1), columns alike. It takes no gather,
  whose gradient would be a scatter.

  Args:
    table: `[heads, 2H-1, 2W-1]`.
    window: (H, W).
    form: of `FORMS`; None for "slices" on TPUs and "repetition" elsewhere.

  Returns:
    `[heads, H*W queries, H*W keys]`.

  Raises:
    ValueError: a table of another window, or another form.
  """
  height, width = window
  if table.shape[1:] != (2 * height - 1, 2 * width - 1):
    raise ValueError(f"a table of {table.shape} does not belong to a window of {window}")
  if form is None:
    form = "slices" if target_platform() == "tpu" else "repetition"
  if form == "repetition":
    return _by_repetition(table, height, width)
  if form == "slices":
    return _by_slices(table, height, width)
  raise ValueError(f"relative_position_bias: unknown form {form!r}; known: {', '.join(FORMS)}")


def _by_repetition(table: jax.Array, height: int, width: int) -> jax.Array:
  """Rows repeated and cut where each begins one number later; the gradient is a plain sum."""

  def spread(t: jax.Array, n: int) -> jax.Array:  # [..., 2n - 1] -> [..., n queries, n keys]
    t = jnp.pad(t, [(0, 0)] * (t.ndim - 1) + [(0, 1)])
    t = jnp.broadcast_to(t[..., None, :], (*t.shape[:-1], n, 2 * n)).reshape(*t.shape[:-1], -1)
    t = t[..., : n * (2 * n - 1)].reshape(*t.shape[:-1], n, 2 * n - 1)
    return t[..., n - 1 :]

  by_column = spread(table, width)  # [heads, 2H-1, Wq, Wk]
  by_row = spread(jnp.moveaxis(by_column, 1, -1), height)  # [heads, Wq, Wk, Hq, Hk]
  bias = by_row.transpose(0, 3, 1, 4, 2)
  return bias.reshape(len(table), height * width, height * width)


def _by_slices(table: jax.Array, height: int, width: int) -> jax.Array:
  """A slice of columns for each column of queries; of these whole rows of keys for each row."""
  columns = [table[:, :, width - 1 - q : 2 * width - 1 - q] for q in range(width)]
  # [heads, Wq, (2H-1) Wk]: the keys of a query lie side by side, from its own first row on.
  keys = jnp.stack(columns, axis=1).reshape(len(table), width, -1)
  rows = [keys[..., (height - 1 - q) * width : (2 * height - 1 - q) * width] for q in range(height)]
  return jnp.stack(rows, axis=1).reshape(len(table), height * width, height * width)
