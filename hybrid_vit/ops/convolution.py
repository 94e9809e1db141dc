"""Convolution as `flax.linen.Conv` calls it, in forms made for CPUs.

On a CPU XLA convolves forward about as fast as its matrix products run; what it derives for the
kernel's gradient takes two to seven times that (718 ms against 81 of a 3x3 kernel, 8 x 112 x 112 x
64, two cores). There it is written as products of shifted views here. And convolutions whose cells
do not overlap (1x1, patches) are products wholly. Elsewhere all is `lax.conv_general_dilated`.
Differentiated in reverse only where it is written here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.ops.platforms import target_platform

FORMS = ("reference", "products")
_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Below this width the views of a kernel's row stand side by side for one product: a product of few
# channels by itself does not fill the vector units. Above, putting them there costs more.
_NARROW = 128

Pair = tuple[int, int]
Pads = tuple[Pair, Pair]


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[Pair],
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  precision: Any = None,
  *,
  form: str | None = None,
) -> jax.Array:
  """`lax.conv_general_dilated`; on a CPU, and where it applies, as products.

  Args:
    lhs: `[B, H, W, C]`.
    rhs: `[kh, kw, C, O]`, of the same type.
    window_strides: as all the others, those of `lax.conv_general_dilated`.
    padding: likewise.
    lhs_dilation: likewise; other than 1 is left to it.
    rhs_dilation: likewise.
    dimension_numbers: likewise; other layouts than the above are left to it.
    feature_group_count: likewise; other than 1 is left to it.
    precision: likewise; other than None is left to it.
    form: "reference" or "products"; None takes "products" on CPUs, see
      `platforms.target_platform`.

  Returns:
    `[B, H', W', O]`.

  Raises:
    ValueError: for an unknown form.
  """
  if form is None:
    form = "products" if target_platform() == "cpu" else "reference"
  if form not in FORMS:
    raise ValueError(f"conv_general_dilated: unknown form {form!r}; known: {', '.join(FORMS)}")
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  plain = (
    lhs.ndim == 4
    and numbers == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)
    and all(d == 1 for d in lhs_dilation or ())
    and feature_group_count == 1
    and precision is None
  )
  if form == "reference" or not plain:
    return lax.conv_general_dilated(
      lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
      feature_group_count, precision=precision,
    )  # fmt: skip
  strides = (int(window_strides[0]), int(window_strides[1]))
  dilation = (1, 1) if rhs_dilation is None else (int(rhs_dilation[0]), int(rhs_dilation[1]))
  if isinstance(padding, str):
    extent = [d * (k - 1) + 1 for k, d in zip(rhs.shape[:2], dilation)]
    padding = lax.padtype_to_pads(lhs.shape[1:3], extent, strides, padding)
  (top, bottom), (left, right) = padding
  return _products(lhs, rhs, strides, ((int(top), int(bottom)), (int(left), int(right))), dilation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _products(x, kernel, strides: Pair, pads: Pads, dilation: Pair):
  if not _apart(kernel, strides, pads, dilation):
    return _library(x, kernel, strides, pads, dilation)
  patches = _patches(x, kernel.shape[:2], strides)
  flat = kernel.reshape(-1, kernel.shape[-1])
  return (patches.reshape(-1, flat.shape[0]) @ flat).reshape(*patches.shape[:3], -1)


def _products_forward(x, kernel, strides, pads, dilation):
  return _products(x, kernel, strides, pads, dilation), (x, kernel)


def _products_backward(strides, pads, dilation, kept, g):
  x, kernel = kept
  if not _apart(kernel, strides, pads, dilation):
    of_input = jax.linear_transpose(
      lambda x: _library(x, kernel, strides, pads, dilation), jax.ShapeDtypeStruct(x.shape, x.dtype)
    )
    of_kernel = _kernel_gradient(x, g, kernel.shape[:2], strides, pads, dilation)
    return of_input(g)[0], of_kernel.astype(kernel.dtype)
  patches, put_back = jax.vjp(lambda x: _patches(x, kernel.shape[:2], strides), x)
  flat = kernel.reshape(-1, kernel.shape[-1])
  of_patches = (g.reshape(-1, g.shape[-1]) @ flat.T).reshape(patches.shape)
  of_kernel = _sum_of_products(patches.reshape(*g.shape[:3], -1), g)
  return put_back(of_patches)[0], of_kernel.reshape(kernel.shape).astype(kernel.dtype)


_products.defvjp(_products_forward, _products_backward)


def _apart(kernel: jax.Array, strides: Pair, pads: Pads, dilation: Pair) -> bool:
  """Whether no cell of the input is read twice: patches, or a 1x1 kernel, of whatever stride."""
  size = kernel.shape[:2]
  return pads == ((0, 0), (0, 0)) and (size == (1, 1) or (size == strides and dilation == (1, 1)))


def _patches(x: jax.Array, size: Sequence[int], strides: Pair) -> jax.Array:
  """`[B, H, W, C]` as `[B, H', W', kh, kw, C]`; what is over at the end is left."""
  batch, channels = x.shape[0], x.shape[3]
  rows, columns = ((n - k) // s + 1 for n, k, s in zip(x.shape[1:3], size, strides))
  x = x[:, : strides[0] * rows, : strides[1] * columns]
  if tuple(size) == (1, 1):
    return x[:, :: strides[0], :: strides[1], None, None]
  x = x.reshape(batch, rows, size[0], columns, size[1], channels)
  return x.transpose(0, 1, 3, 2, 4, 5)


def _library(x, kernel, strides, pads, dilation):
  return lax.conv_general_dilated(
    x, kernel, strides, pads, rhs_dilation=dilation, dimension_numbers=_LAYOUT
  )


def _kernel_gradient(x, g, size, strides, pads, dilation) -> jax.Array:
  """`[kh, kw, C, O]`: for each kernel position, the product of a shifted view and `g`."""
  channels, width = x.shape[3], g.shape[3]
  padded = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), *((*p, 0) for p in pads), (0, 0, 0)))
  of_rows = []
  for i in range(size[0]):
    views = [
      shifted_view(padded, (i * dilation[0], j * dilation[1]), g.shape[1:3], strides)
      for j in range(size[1])
    ]
    if channels < _NARROW:
      views = [jnp.concatenate(views, axis=-1)]
    of_row = jnp.concatenate([_sum_of_products(view, g) for view in views])
    of_rows.append(of_row.reshape(size[1], channels, width))
  return jnp.stack(of_rows)


def shifted_view(padded: jax.Array, offset: Pair, size: Sequence[int], strides: Pair) -> jax.Array:
  """The cells of `[B, H, W, C]` that one kernel position meets: `[B, H', W', C]`, of that size."""
  first = (0, *offset, 0)
  ends = (o + s * (n - 1) + 1 for o, s, n in zip(offset, strides, size))
  return lax.slice(padded, first, (padded.shape[0], *ends, padded.shape[3]), (1, *strides, 1))


def _sum_of_products(x: jax.Array, g: jax.Array) -> jax.Array:
  """`[..., C]` and `[..., O]` to `[C, O]`, summed over all cells, float32 inside."""
  return lax.dot_general(
    x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1]), (((0,), (0,)), ((), ())),
    preferred_element_type=jnp.float32,
  )  # fmt: skip
