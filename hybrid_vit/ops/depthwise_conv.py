"""Depthwise convolution: one signature, a reference form, one made for CPUs and one for GPUs.

XLA's grouped convolution runs tens of times slower on a CPU than the arithmetic needs. The
shift-and-add form multiplies one shifted view of the input by one kernel value at a time, which
compiles to plain vector loops; its gradient is written out, because the transpose that JAX derives
(a pad for each kernel value) would lose the gain again. On GPUs XLA's gradients of a grouped
convolution are known to be slow; `ops.depthwise_conv_triton` has kernels for them, which no GPU has
timed yet. `hybrid_vit.tools.benchmark` prints the times of the forms of where it runs.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.ops.convolution import shifted_view
from hybrid_vit.ops.platforms import on_cpu, target_platform

FORMS = ("reference", "shift_add", "triton")
Pads = tuple[tuple[int, int], tuple[int, int]]


def depthwise_conv(
  x: jax.Array,
  kernel: jax.Array,
  *,
  stride: int | tuple[int, int] = 1,
  padding: str | Sequence[tuple[int, int]] = "SAME",
  form: str | None = None,
) -> jax.Array:
  """Convolves every channel with its own kernel.

  Args:
    x: `[B, H, W, C]`, any floating dtype.
    kernel: `[kh, kw, 1, C]`; it is cast to the dtype of `x`.
    stride: of both directions, or (rows, columns).
    padding: "SAME" (TensorFlow's: the odd cell goes after), "VALID", or explicit
      `((top, bottom), (left, right))` zeros.
    form: of `FORMS`; None takes the one measured fastest on the devices that it is traced for, see
      `platforms.target_platform`. "triton" has kernels for stride 1 and for all gradients; it runs
      on GPUs, and on CPUs interpreted.

  Returns:
    `[B, H', W', C]` in the dtype of `x`. All but the reference sum in float32 whatever that is.

  Raises:
    ValueError: for shapes, paddings or forms that do not fit; "triton" traced for a TPU.
  """
  if x.ndim != 4 or kernel.ndim != 4 or kernel.shape[2:] != (1, x.shape[-1]):
    raise ValueError(
      f"depthwise_conv: x must be [B, H, W, C] and kernel [kh, kw, 1, C]; got {x.shape} and "
      f"{kernel.shape}"
    )
  strides = (stride, stride) if isinstance(stride, int) else (stride[0], stride[1])
  kernel_size = (kernel.shape[0], kernel.shape[1])
  pads = _explicit_padding(x.shape[1:3], kernel_size, strides, padding)
  for axis, size in enumerate(x.shape[1:3]):
    if size + sum(pads[axis]) < kernel_size[axis]:
      raise ValueError(
        f"depthwise_conv: the padded input, {size} + {pads[axis]}, is smaller than the kernel, "
        f"{kernel_size[axis]}"
      )
  if form is None and target_platform() == "several":
    fixed = functools.partial(depthwise_conv, stride=strides, padding=pads)
    of_each = (functools.partial(fixed, form=name) for name in ("shift_add", "reference"))
    return on_cpu(*of_each)(x, kernel)
  if form is None:
    form = default_form()
  kernel = kernel.astype(x.dtype)
  if form == "reference":
    return _reference(x, kernel, strides, pads)
  if form == "shift_add":
    return _shift_add(x, kernel, strides, pads)
  if form == "triton":
    return _triton(x, kernel, strides, pads)
  raise ValueError(f"depthwise_conv: unknown form {form!r}; known: {', '.join(FORMS)}")


def default_form() -> str:
  """The form that `depthwise_conv` takes when none is named, traced for one kind of device."""
  return "shift_add" if target_platform() == "cpu" else "reference"


def _explicit_padding(size, kernel_size, strides, padding) -> Pads:
  if isinstance(padding, str):
    if padding.upper() not in ("SAME", "VALID"):
      raise ValueError(f"depthwise_conv: padding is SAME, VALID or explicit pairs, not {padding!r}")
    pairs = lax.padtype_to_pads(size, kernel_size, strides, padding.upper())
  else:
    pairs = padding
  (top, bottom), (left, right) = pairs
  if min(top, bottom, left, right) < 0:
    raise ValueError(f"depthwise_conv: padding must not be negative, got {padding!r}")
  return (int(top), int(bottom)), (int(left), int(right))


def _reference(x, kernel, strides, pads):
  return lax.conv_general_dilated(
    x,
    kernel,
    window_strides=strides,
    padding=pads,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=x.shape[-1],
  )


# The shift-and-add form. Its pieces are jitted under names of their own, so that a repeated block
# is traced once and `tools.summarize` can tell them from ordinary element-wise work.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _shift_add(x, kernel, strides, pads):
  return depthwise_conv_shift_add(x, kernel, strides, pads)


def _shift_add_forward(x, kernel, strides, pads):
  return depthwise_conv_shift_add(x, kernel, strides, pads), (x, kernel)


def _shift_add_backward(strides, pads, residuals, g):
  x, kernel = residuals
  spread_g = _spread(g, x, kernel, strides, pads)
  turned = kernel[::-1, ::-1]
  dx = depthwise_conv_shift_add(spread_g, turned, (1, 1), ((0, 0), (0, 0)))
  dk = depthwise_conv_kernel_gradient(x, g, kernel.shape[:2], strides, pads)
  return dx, dk.astype(kernel.dtype)


def _spread(g, x, kernel, strides, pads):
  """What the kernel, turned by 180 degrees, is convolved with for the gradient of `x`.

  The gradient of the output, spread by the stride.
  """
  back: list[tuple[int, int, int]] = [(0, 0, 0)]
  for axis in (0, 1):
    size, k, s = x.shape[1 + axis], kernel.shape[axis], strides[axis]
    low = k - 1 - pads[axis][0]
    spread = (g.shape[1 + axis] - 1) * s + 1
    # lax.pad takes negative counts as cropping: padding beyond the kernel is cropped away again.
    back.append((low, size + k - 1 - spread - low, s - 1))
  back.append((0, 0, 0))
  return lax.pad(g, jnp.zeros((), g.dtype), back)


_shift_add.defvjp(_shift_add_forward, _shift_add_backward)


@functools.partial(jax.jit, static_argnums=(2, 3))
def depthwise_conv_shift_add(x, kernel, strides, pads):
  """The sum over kernel positions of a shifted view of `x` times one kernel value.

  XLA would fuse the whole sum into each consumer (a norm has three) and compute it as often; it
  does not fuse across a conditional. Both branches give the same: the second one, which compiles to
  one call, is what a NaN kernel takes.
  """
  padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))

  def whole(padded, kernel):
    return _sum_of_shifts(padded, kernel, strides).astype(x.dtype)

  def library(padded, kernel):
    out = _reference(padded.astype(jnp.float32), kernel.astype(jnp.float32), strides, "VALID")
    return out.astype(x.dtype)

  return lax.cond(jnp.isnan(kernel[0, 0, 0, 0]), library, whole, padded, kernel)


def _sum_of_shifts(padded, kernel, strides):
  kh, kw = kernel.shape[:2]
  size = [(n - k) // s + 1 for n, k, s in zip(padded.shape[1:3], (kh, kw), strides)]
  kernel = kernel.astype(jnp.float32)
  total = jnp.zeros((), jnp.float32)
  for i in range(kh):
    for j in range(kw):
      shifted = shifted_view(padded, (i, j), size, strides)
      total = total + shifted.astype(jnp.float32) * kernel[i, j, 0]
  return total


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def depthwise_conv_kernel_gradient(x, g, kernel_size, strides, pads):
  """Gradient `[kh, kw, 1, C]`, float32: for each kernel position, the sum of shifted `x` times `g`.

  It goes row by row with one accumulator a kernel column and sums the rest at the end: XLA's
  reductions over leading axes are scalar loops on a CPU, element-wise accumulation is not.
  """
  kh, kw = kernel_size
  padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
  batch, rows, columns, channels = g.shape

  def add_row(row, sums):
    # [B, 1, W, C] times [B, kh, W, C]: what a row meets in each row of the kernel.
    g_row = lax.dynamic_slice_in_dim(g, row, 1, axis=1).astype(jnp.float32)
    x_rows = lax.dynamic_slice_in_dim(padded, row * strides[0], kh, axis=1).astype(jnp.float32)
    last = strides[1] * (columns - 1) + 1
    return tuple(
      column + lax.slice_in_dim(x_rows, j, j + last, strides[1], axis=2) * g_row
      for j, column in enumerate(sums)
    )

  zeros = tuple(jnp.zeros((batch, kh, columns, channels), jnp.float32) for _ in range(kw))
  sums = lax.fori_loop(0, rows, add_row, zeros)
  return jnp.stack([s.sum((0, 2)) for s in sums], axis=1).reshape(kh, kw, 1, channels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _triton(x, kernel, strides, pads):
  if strides != (1, 1):
    return _reference(x, kernel, strides, pads)
  convolve, _ = _triton_kernels()
  return convolve(jnp.pad(x, ((0, 0), *pads, (0, 0))), kernel)


def _triton_forward(x, kernel, strides, pads):
  return _triton(x, kernel, strides, pads), (x, kernel)


def _triton_backward(strides, pads, residuals, g):
  convolve, kernel_gradient = _triton_kernels()
  x, kernel = residuals
  dx = convolve(_spread(g, x, kernel, strides, pads), kernel[::-1, ::-1])
  # With zeros between its cells where the stride is more than 1; cells that no window reaches, at
  # the end, meet nothing.
  between = [(0, 0, 0), *((0, 0, stride - 1) for stride in strides), (0, 0, 0)]
  spread = lax.pad(g, jnp.zeros((), g.dtype), between)
  rows, columns = (n + k - 1 for n, k in zip(spread.shape[1:3], kernel.shape[:2]))
  padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))[:, :rows, :columns]
  return dx, kernel_gradient(padded, spread).astype(kernel.dtype)


_triton.defvjp(_triton_forward, _triton_backward)


def _triton_kernels():
  """(convolution, gradient of the kernel) for the devices that are traced for."""
  # Pallas takes a while to import, which only this form need wait for.
  from hybrid_vit.ops import depthwise_conv_triton as kernels

  platform = target_platform()
  if platform not in ("gpu", "cpu"):
    raise ValueError(f"depthwise_conv: the form 'triton' is for GPUs, not for {platform!r}")
  both = (kernels.depthwise_conv_triton, kernels.depthwise_conv_kernel_gradient_triton)
  return tuple(functools.partial(kernel, interpret=platform == "cpu") for kernel in both)
