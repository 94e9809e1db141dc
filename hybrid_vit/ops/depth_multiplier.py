"""Depthwise convolution that makes several channels of each: one signature, two forms.

By the TPU compiler's own cycles (v5e, 64 maps of 56 x 56 x 64 to 28 x 28 x 128, 7x7, bfloat16),
with the gradients: 6.9 M where channels are repeated beforehand, 3.0 M in the form for TPUs.
Repeating lanes costs as much as the convolution, and of the grouped one only the forward pass is
fast.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.ops.depthwise_conv import depthwise_conv
from hybrid_vit.ops.platforms import target_platform

FORMS = ("repeated", "grouped")


def multiplied_depthwise_conv(
  x: jax.Array,
  kernel: jax.Array,
  *,
  stride: int,
  padding: str | Sequence[tuple[int, int]],
  form: str | None = None,
) -> jax.Array:
  """Convolves each channel with m kernels of its own.

  Args:
    x: `[B, H, W, C]`, any floating dtype.
    kernel: `[kh, kw, 1, C m]`; channels `c m` to `c m + m - 1` of the result are of channel c. It
      is cast to the dtype of `x`.
    stride: of both directions.
    padding: "SAME", "VALID" or `((top, bottom), (left, right))` zeros.
    form: "repeated", a depthwise convolution of each channel m times; "grouped", a grouped
      convolution, differentiated in reverse only; None for "grouped" on TPUs and "repeated"
      elsewhere.

  Returns:
    `[B, H', W', C m]` in the dtype of `x`.

  Raises:
    ValueError: for shapes or forms that do not fit.
  """
  channels, features = x.shape[-1], kernel.shape[-1]
  if kernel.ndim != 4 or kernel.shape[2] != 1 or features % channels:
    raise ValueError(
      f"multiplied_depthwise_conv: a kernel [kh, kw, 1, m x {channels}] was expected; got "
      f"{kernel.shape}"
    )
  if form is None:
    form = "grouped" if target_platform() == "tpu" and features > channels else "repeated"
  if form == "repeated":
    repeated = x if features == channels else x.repeat(features // channels, axis=-1)
    return depthwise_conv(repeated, kernel, stride=stride, padding=padding)
  if form == "grouped":
    pads = padding if isinstance(padding, str) else tuple((low, high) for low, high in padding)
    return _grouped(x, kernel.astype(x.dtype), stride, pads)
  raise ValueError(f"multiplied_depthwise_conv: unknown form {form!r}; known: {', '.join(FORMS)}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _grouped(x, kernel, stride, pads):
  return _library(x, kernel, stride, pads)


def _grouped_forward(x, kernel, stride, pads):
  return _library(x, kernel, stride, pads), (x, kernel)


def _grouped_backward(stride, pads, kept, g):
  # Of this form the forward pass is dearer, the gradients are a half of the grouped one's.
  _, pull = jax.vjp(lambda x, kernel: _side_by_side(x, kernel, stride, pads), *kept)
  return pull(g)


_grouped.defvjp(_grouped_forward, _grouped_backward)


def _library(x, kernel, stride, pads):
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
  )  # fmt: skip


def _side_by_side(x, kernel, stride, pads):
  """All channels with their first kernels, then all with their second ones, then put in order."""
  channels = x.shape[-1]
  times = kernel.shape[-1] // channels
  ordered = kernel.reshape(*kernel.shape[:3], channels, times).swapaxes(3, 4)
  ordered = lax.optimization_barrier(ordered.reshape(kernel.shape))
  y = _library(jnp.concatenate([x] * times, axis=-1), ordered, stride, pads)
  # A product with zeros and ones moves lanes faster than a transpose does. In float32 it is exact
  # at the highest precision alone.
  moved = jnp.eye(channels * times, dtype=y.dtype).reshape(channels, times, -1).swapaxes(0, 1)
  return jnp.matmul(y, moved.reshape(channels * times, -1), precision=lax.Precision.HIGHEST)
