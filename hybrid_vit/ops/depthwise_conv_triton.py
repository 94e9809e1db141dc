"""Depthwise convolutions of stride 1, and the gradient of their kernel, as Pallas kernels for GPUs.

A program keeps a tile of columns by channels in registers and meets it with every kernel value;
what neighbouring kernel values read again comes from the caches. Sums are float32, and none is
atomic: the same numbers every time. On a CPU the kernels are interpreted, which is for tests.
No GPU was at hand to time them, so that `depthwise_conv` takes them only where they are named.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# A tile, of powers of two as Triton asks; with four warps four numbers a thread.
_COLUMNS, _CHANNELS = 16, 32
_WARPS = 4
# Among how many programs the rows of a batch are divided in the kernel's gradient.
_PARTS = 64


# Jitted under names of their own, as `ops.depthwise_conv` has it.


@functools.partial(jax.jit, static_argnums=2)
def depthwise_conv_triton(x: jax.Array, kernel: jax.Array, interpret: bool) -> jax.Array:
  """Every channel with its own kernel, stride 1, without padding.

  Args:
    x: `[B, H + kh - 1, W + kw - 1, C]`, any floating dtype.
    kernel: `[kh, kw, 1, C]`, any floating dtype.
    interpret: by JAX's operations, on any device.

  Returns:
    `[B, H, W, C]` in the dtype of `x`.
  """
  kh, kw, _, channels = kernel.shape
  batch, rows, columns = x.shape[0], x.shape[1] - kh + 1, x.shape[2] - kw + 1
  x = _filled(x, -columns % _COLUMNS)
  kernel = jnp.pad(kernel[:, :, 0], ((0, 0), (0, 0), (0, x.shape[-1] - channels)))
  wide = (batch, rows, x.shape[2] - kw + 1, x.shape[-1])
  out = _call(
    functools.partial(_convolve_tile, rows=rows, kernel_size=(kh, kw)),
    jax.ShapeDtypeStruct(wide, x.dtype),
    (batch * rows, wide[2] // _COLUMNS, wide[3] // _CHANNELS),
    interpret,
  )(x, kernel)
  return out[:, :, :columns, :channels]


@functools.partial(jax.jit, static_argnums=2)
def depthwise_conv_kernel_gradient_triton(x: jax.Array, g: jax.Array, interpret: bool) -> jax.Array:
  """Gradient `[kh, kw, 1, C]`, float32, of the kernel of `depthwise_conv_triton`.

  Args:
    x: `[B, H + kh - 1, W + kw - 1, C]`, what was convolved.
    g: `[B, H, W, C]`, gradient of the result.
    interpret: as above.
  """
  batch, rows, columns, channels = g.shape
  kh, kw = x.shape[1] - rows + 1, x.shape[2] - columns + 1
  x, g = (_filled(a, -columns % _COLUMNS) for a in (x, g))
  parts = min(_PARTS, batch * rows)
  sums = _call(
    functools.partial(_gradient_tile, batch=batch, rows=rows, parts=parts, kernel_columns=kw),
    jax.ShapeDtypeStruct((parts, kh, kw, g.shape[-1]), jnp.float32),
    (parts, kh, g.shape[-1] // _CHANNELS),
    interpret,
  )(x, g)
  return sums.sum(0)[:, :, None, :channels]


def _convolve_tile(
  x_ref: Any, kernel_ref: Any, out_ref: Any, *, rows: int, kernel_size: tuple[int, int]
) -> None:
  picture, row = pl.program_id(0) // rows, pl.program_id(0) % rows
  column = pl.program_id(1) * _COLUMNS
  channels = pl.ds(pl.program_id(2) * _CHANNELS, _CHANNELS)

  def add_kernel_row(i: Any, total: jax.Array) -> jax.Array:
    for j in range(kernel_size[1]):
      cells = x_ref[picture, row + i, pl.ds(column + j, _COLUMNS), channels]
      total += cells.astype(jnp.float32) * kernel_ref[i, j, channels].astype(jnp.float32)
    return total

  total = lax.fori_loop(
    0, kernel_size[0], add_kernel_row, jnp.zeros((_COLUMNS, _CHANNELS), jnp.float32)
  )
  out_ref[picture, row, pl.ds(column, _COLUMNS), channels] = total.astype(out_ref.dtype)


def _gradient_tile(
  x_ref: Any, g_ref: Any, out_ref: Any, *, batch: int, rows: int, parts: int, kernel_columns: int
) -> None:
  """One row of the kernel over every `parts`-th row of the maps."""
  part, i = pl.program_id(0), pl.program_id(1)
  channels = pl.ds(pl.program_id(2) * _CHANNELS, _CHANNELS)

  def add_row(step: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    place = part + step * parts
    picture, row = place // rows, place % rows

    def add_cells(tile: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      column = tile * _COLUMNS
      g = g_ref[picture, row, pl.ds(column, _COLUMNS), channels].astype(jnp.float32)
      return tuple(
        total
        + x_ref[picture, row + i, pl.ds(column + j, _COLUMNS), channels].astype(jnp.float32) * g
        for j, total in enumerate(sums)
      )

    return lax.fori_loop(0, g_ref.shape[2] // _COLUMNS, add_cells, sums)

  zeros = tuple(jnp.zeros((_COLUMNS, _CHANNELS), jnp.float32) for _ in range(kernel_columns))
  sums = lax.fori_loop(0, pl.cdiv(batch * rows - part, parts), add_row, zeros)
  for j, total in enumerate(sums):
    out_ref[part, i, j, channels] = total.sum(0)


def _filled(x: jax.Array, columns: int) -> jax.Array:
  """With so many more columns of zeros, and channels up to whole tiles."""
  return jnp.pad(x, ((0, 0), (0, 0), (0, columns), (0, -x.shape[-1] % _CHANNELS)))


def _call(
  kernel: Any, out_shape: jax.ShapeDtypeStruct, grid: tuple[int, int, int], interpret: bool
) -> Any:
  whole = pl.BlockSpec(memory_space=pl.ANY)
  return pl.pallas_call(
    kernel,
    out_shape=out_shape,
    grid=grid,
    in_specs=[whole, whole],
    out_specs=whole,
    compiler_params=triton.CompilerParams(num_warps=_WARPS),
    interpret=interpret,
  )
