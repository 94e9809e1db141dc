"""Anchors: boxes of fixed shapes at every cell of a pyramid's maps.

They depend on shapes alone, and so are NumPy constants; which of them a picture uses depends on its
size, and is traced. Within a level the order is (row, column, shape), levels follow each other.
mmdetection's and detectron2's anchors are centred on the cells' upper left corners, their sides not
rounded; torchvision's base boxes are rounded to whole pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

_ORDERS = ("ratios_first", "scales_first")


def base_anchors(
  side: float,
  scales: Sequence[float],
  ratios: Sequence[float] = (0.5, 1.0, 2.0),
  *,
  centre: float = 0.0,
  order: str = "ratios_first",
  rounded: bool = False,
) -> np.ndarray:
  """The shapes of one level, around its first cell.

  A shape's width is side * scale / sqrt(ratio) and its height side * scale * sqrt(ratio).

  Args:
    side: of scale 1; the stride in mmdetection, 1 in torchvision, whose scales are sides.
    scales: of the side.
    ratios: height over width.
    centre: where the centre lies, in sides: 0 for the cell's upper left corner, 0.5 for its middle.
    order: "ratios_first": all scales of a ratio, then those of the next (mmdetection,
      torchvision); "scales_first": the other way (detectron2).
    rounded: whether corners are whole pixels, halves to the even one (torchvision).

  Returns:
    float32 `[scales x ratios, 4]`.

  Raises:
    ValueError: another order.
  """
  if order not in _ORDERS:
    raise ValueError(f"base_anchors: order is {order!r}; one of {', '.join(_ORDERS)} was expected")
  roots = np.sqrt(np.asarray(ratios, np.float32))
  sizes = np.asarray(scales, np.float32)
  by_side = np.float32(side)
  if order == "ratios_first":
    widths = by_side * (1 / roots)[:, None] * sizes
    heights = by_side * roots[:, None] * sizes
  else:
    widths = by_side * sizes[:, None] * (1 / roots)
    heights = by_side * sizes[:, None] * roots
  half_w, half_h = np.float32(0.5) * widths.ravel(), np.float32(0.5) * heights.ravel()
  boxes = np.stack([-half_w, -half_h, half_w, half_h], axis=1)
  return (np.round(boxes) if rounded else boxes) + np.float32(centre * side)


def octave_scales(base: float = 4.0, octaves: int = 3) -> tuple[float, ...]:
  """RetinaNet's scales: base * 2^(i / octaves) (arXiv:1708.02002, section 4)."""
  return tuple(float(base * 2 ** (i / octaves)) for i in range(octaves))


def grid_anchors(base: np.ndarray, grid: tuple[int, int], stride: tuple[int, int]) -> np.ndarray:
  """Base boxes moved to each cell.

  Args:
    base: `[A, 4]`, of the first cell.
    grid: (rows, columns) of the map.
    stride: pixels (down, across) from cell to cell.

  Returns:
    float32 `[rows * columns * A, 4]`, in the order (row, column, shape).
  """
  y = np.arange(grid[0], dtype=np.float32) * np.float32(stride[0])
  x = np.arange(grid[1], dtype=np.float32) * np.float32(stride[1])
  y, x = np.meshgrid(y, x, indexing="ij")
  shift = np.stack([x, y, x, y], axis=-1)
  return (shift[:, :, None] + np.asarray(base, np.float32)).reshape(-1, 4)


def pyramid_anchors(
  grids: Sequence[tuple[int, int]],
  strides: Sequence[int],
  scales: Sequence[float] = (8.0,),
  ratios: Sequence[float] = (0.5, 1.0, 2.0),
  *,
  centre: float = 0.0,
  order: str = "ratios_first",
) -> tuple[np.ndarray, ...]:
  """mmdetection's anchors of each level, sides in multiples of the stride.

  Args:
    grids: (rows, columns) of each map.
    strides: of each map.
    scales: of the stride; `octave_scales()` for RetinaNet, (8,) for ATSS, with ratio 1 alone.
    ratios: height over width.
    centre: of `base_anchors`.
    order: of `base_anchors`.

  Returns:
    For each level float32 `[rows * columns * scales * ratios, 4]`.

  Raises:
    ValueError: as many strides as maps were expected, or another order.
  """
  if len(grids) != len(strides):
    raise ValueError(
      f"pyramid_anchors: {len(grids)} maps and {len(strides)} strides; as many were expected"
    )
  return tuple(
    grid_anchors(
      base_anchors(stride, scales, ratios, centre=centre, order=order), grid, (stride, stride)
    )
    for grid, stride in zip(grids, strides)
  )


def torchvision_anchors(
  grids: Sequence[tuple[int, int]],
  image: tuple[int, int],
  sizes: Sequence[Sequence[float]] = ((32,), (64,), (128,), (256,), (512,)),
  ratios: Sequence[float] | Sequence[Sequence[float]] = (0.5, 1.0, 2.0),
) -> tuple[np.ndarray, ...]:
  """torchvision's anchors of each level: rounded, the stride floor(image / map).

  Args:
    grids: (rows, columns) of each map.
    image: (height, width) of the padded batch.
    sizes: sides of each level.
    ratios: height over width, of all levels or a row for each.

  Returns:
    For each level float32 `[rows * columns * sizes * ratios, 4]`.

  Raises:
    ValueError: not as many rows of sizes, or of ratios, as maps.
  """
  rows: list = [ratios] * len(grids) if np.ndim(ratios[0]) == 0 else list(ratios)
  if not len(grids) == len(sizes) == len(rows):
    raise ValueError(
      f"torchvision_anchors: {len(grids)} maps, sizes of {len(sizes)} levels and ratios of "
      f"{len(rows)}; as many were expected"
    )
  return tuple(
    grid_anchors(
      base_anchors(1.0, own_sizes, own_ratios, rounded=True),
      grid,
      (image[0] // grid[0], image[1] // grid[1]),
    )
    for grid, own_sizes, own_ratios in zip(grids, sizes, rows)
  )


def valid_anchors(
  grids: Sequence[tuple[int, int]],
  strides: Sequence[int],
  shapes: int,
  size: Sequence[int] | jax.Array,
) -> jax.Array:
  """Which anchors belong to cells of a picture, rather than of the batch's padding.

  Args:
    grids: (rows, columns) of each map.
    strides: of each map.
    shapes: anchors a cell.
    size: (height, width) of the picture as it was padded by itself, or `[..., 2]` of many.

  Returns:
    bool `[..., N]`, levels joined: cells before ceil(size / stride).
  """
  size = jnp.asarray(size)
  flags = []
  for (rows, columns), stride in zip(grids, strides):
    cells = -(-size // stride)
    down = jnp.arange(rows) < cells[..., :1]
    across = jnp.arange(columns) < cells[..., 1:]
    inside = down[..., :, None] & across[..., None, :]
    inside = jnp.broadcast_to(inside[..., None], (*inside.shape, shapes))
    flags.append(inside.reshape(*size.shape[:-1], -1))
  return jnp.concatenate(flags, axis=-1)


def anchors_within(
  anchors: jax.Array | np.ndarray, size: Sequence[int] | jax.Array, border: float
) -> jax.Array:
  """Which anchors cross the picture's border by no more than allowed.

  Args:
    anchors: `[N, 4]`.
    size: (height, width) of the picture, without padding, or `[..., 2]` of many.
    border: pixels; 0 keeps what lies wholly inside; below 0 keeps all.

  Returns:
    bool `[..., N]`: upper left corner >= -border and lower right < size + border.
  """
  size = jnp.asarray(size, jnp.float32)[..., None, :]
  if border < 0:
    return jnp.ones((*size.shape[:-2], anchors.shape[0]), bool)
  x1, y1, x2, y2 = (jnp.asarray(anchors)[:, i] for i in range(4))
  before = (x1 >= -border) & (y1 >= -border)
  return before & (x2 < size[..., 1] + border) & (y2 < size[..., 0] + border)
