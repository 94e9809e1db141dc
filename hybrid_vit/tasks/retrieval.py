"""Recall of retrieval from embeddings, without ever holding all similarities.

COCO's and Flickr30K's protocol: a picture is right at k where any of its own captions is among the
k nearest of all captions, a caption where its picture is among the k nearest of all pictures.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_KS = (1, 5, 10)
RECALLS = tuple(
  f"{direction}_r{k}" for direction in ("image_to_text", "text_to_image") for k in _KS
)
# Sides of a block of similarities: 16 MiB of float32.
_ROWS, _COLUMNS = 1024, 4096


def recalls(
  images: np.ndarray, texts: np.ndarray, owners: np.ndarray, *, block: tuple[int, int] | None = None
) -> dict[str, float]:
  """The measures of `RECALLS`.

  Pictures without a caption are nowhere right or wrong, but can be found by those of others.

  Args:
    images: float32 `[N, D]`, of unit length.
    texts: float32 `[M, D]`, of unit length.
    owners: int `[M]`, the picture of each caption.
    block: rows and columns of similarities at once.

  Raises:
    ValueError: no captions, or a picture that is not there.
  """
  if not len(texts) or owners.min() < 0 or owners.max() >= len(images):
    raise ValueError(f"{len(texts)} captions of {len(images)} pictures: owners must be among these")
  numbers = np.arange(len(images))
  found: dict[str, float] = {}
  of_images = ranks(images, texts, numbers, owners, block=block)[np.isin(numbers, owners)]
  of_texts = ranks(texts, images, owners, numbers, block=block)
  for direction, rank in (("image_to_text", of_images), ("text_to_image", of_texts)):
    found |= {f"{direction}_r{k}": float(np.mean(rank < k)) for k in _KS}
  return found


def ranks(
  rows: np.ndarray,
  columns: np.ndarray,
  row_groups: np.ndarray,
  column_groups: np.ndarray,
  *,
  block: tuple[int, int] | None = None,
) -> np.ndarray:
  """How many columns of other groups are at least as near to a row as the best of its own.

  Ties count against, and so does a NaN.

  Args:
    rows: float32 `[N, D]`.
    columns: float32 `[M, D]`.
    row_groups: int `[N]`.
    column_groups: int `[M]`.
    block: rows and columns of similarities at once.

  Returns:
    int64 `[N]`: 0 for a row whose nearest column is its own; M for one without a column.
  """
  # No smaller a block than the data; every one of the same shape, so that it is compiled once and
  # equal columns give equal numbers.
  most_rows, most_columns = block or (_ROWS, _COLUMNS)
  height, width = min(most_rows, _padded(len(rows))), min(most_columns, _padded(len(columns)))
  result = np.zeros((len(rows),), np.int64)
  wide = [
    (_pad(columns[j : j + width], width, 0.0), _pad(column_groups[j : j + width], width, -1))
    for j in range(0, len(columns), width)
  ]
  for i in range(0, len(rows), height):
    part = _pad(rows[i : i + height], height, 0.0)
    groups = _pad(row_groups[i : i + height], height, -2)
    own = np.full((height,), -np.inf, np.float32)
    for columns_there, groups_there in wide:
      own = np.maximum(own, np.asarray(_best(part, columns_there, groups, groups_there)))
    ahead = np.zeros((height,), np.int64)
    for columns_there, groups_there in wide:
      ahead += np.asarray(_ahead(part, columns_there, groups, groups_there, own))
    count = min(height, len(rows) - i)
    result[i : i + count] = ahead[:count]
  return np.where(np.isin(row_groups, column_groups), result, len(columns))


def _padded(count: int) -> int:
  return -(-count // 128) * 128


def _pad(array: np.ndarray, size: int, value: float) -> np.ndarray:
  widths = ((0, size - len(array)), *([(0, 0)] * (array.ndim - 1)))
  return np.pad(array, widths, constant_values=value)


def _similarities(rows: jax.Array, columns: jax.Array) -> jax.Array:
  return jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def _best(rows: jax.Array, columns: jax.Array, groups: jax.Array, others: jax.Array) -> jax.Array:
  own = groups[:, None] == others
  return jnp.max(jnp.where(own, _similarities(rows, columns), -jnp.inf), axis=-1)


@jax.jit
def _ahead(
  rows: jax.Array, columns: jax.Array, groups: jax.Array, others: jax.Array, best: jax.Array
) -> jax.Array:
  rivals = (groups[:, None] != others) & (others >= 0)
  return jnp.sum(~(_similarities(rows, columns) < best[:, None]) & rivals, axis=-1)
