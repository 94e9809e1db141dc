"""The two convolutions of a scale-aware modulation: kernels of several sizes, and small groups.

Each is many small operations by its definition, which a TPU is not made for: runs of 16 channels
fill an eighth of a register, groups of four channels a thirtieth of a product's side. Both have a
form of one operation for it, in which zeros stand for what is not there. By the TPU compiler's own
cycles (v5e, 64 maps of 56 x 56 x 64, four kernels of 3 to 9, bfloat16), forward and backward: the
convolutions 9.5 + 10.3 to 4.5 + 5.4 M, the groups 5.3 + 6.2 to 0.4 + 0.5 M.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.ops.depthwise_conv import depthwise_conv
from hybrid_vit.ops.platforms import target_platform

MIXED_FORMS = ("separate", "merged")
GROUPED_FORMS = ("batched", "dense")


def mixed_depthwise_conv(
  x: jax.Array, kernels: Sequence[jax.Array], *, form: str | None = None
) -> jax.Array:
  """Convolves runs of channels, each run with kernels of its own size; stride 1, zeros around.

  Args:
    x: `[B, H, W, C]`, any floating dtype.
    kernels: n of `[k, k, 1, C / n]`, each k odd; kernel i meets run i of the channels.
    form: "separate", a convolution for each run; "merged", one with all kernels in the middle of
      the largest one's size; None for "merged" on TPUs and "separate" elsewhere.

  Returns:
    `[B, H, W, C]` in the dtype of `x`.

  Raises:
    ValueError: for shapes or forms that do not fit.
  """
  run = x.shape[-1] // len(kernels)
  for kernel in kernels:
    side = kernel.shape[0]
    if kernel.shape != (side, side, 1, run) or side % 2 == 0 or run * len(kernels) != x.shape[-1]:
      raise ValueError(
        f"mixed_depthwise_conv: {len(kernels)} kernels [k, k, 1, {run}], k odd, were expected for "
        f"{x.shape[-1]} channels; one is {kernel.shape}"
      )
  if form is None:
    form = "merged" if target_platform() == "tpu" else "separate"
  if form == "separate":
    parts = zip(jnp.split(x, len(kernels), axis=-1), kernels)
    return jnp.concatenate([_centred(part, kernel) for part, kernel in parts], axis=-1)
  if form == "merged":
    return mixed_depthwise_conv_merged(x, *kernels)
  raise ValueError(f"mixed_depthwise_conv: unknown form {form!r}; known: {', '.join(MIXED_FORMS)}")


# This and `grouped_product_dense` are jitted under names of their own, by which `tools.summarize`
# counts what the runs and groups multiply, without the zeros.


@jax.jit
def mixed_depthwise_conv_merged(x: jax.Array, *kernels: jax.Array) -> jax.Array:
  """`mixed_depthwise_conv` as one convolution, the smaller kernels in the middle of zeros."""
  side = max(kernel.shape[0] for kernel in kernels)
  around = [(side - kernel.shape[0]) // 2 for kernel in kernels]
  kernel = jnp.concatenate(
    [jnp.pad(k, ((n, n), (n, n), (0, 0), (0, 0))) for k, n in zip(kernels, around)], axis=-1
  )
  # Without the barrier the zeros are put in anew for each part of the map: ten times the cycles.
  return _centred(x, lax.optimization_barrier(kernel.astype(x.dtype)))


def _centred(x: jax.Array, kernel: jax.Array) -> jax.Array:
  half = kernel.shape[0] // 2
  return depthwise_conv(x, kernel, stride=1, padding=((half, half), (half, half)))


def grouped_product(
  x: jax.Array, kernel: jax.Array, groups: int, *, form: str | None = None
) -> jax.Array:
  """A 1x1 convolution of each group of channels by itself.

  Args:
    x: `[..., n groups]`; channel `i groups + g` is input i of group g.
    kernel: `[n, groups m]`; column `g m + j` makes output j of group g.
    groups: their number.
    form: "batched", a product for each group; "dense", one of all channels by a kernel that is zero
      between groups; None for the one measured fastest.

  Returns:
    `[..., groups m]`, a group's outputs side by side, in the dtype of `x`.

  Raises:
    ValueError: for shapes or forms that do not fit.
  """
  inputs, outputs = kernel.shape
  if x.shape[-1] != inputs * groups or outputs % groups:
    raise ValueError(
      f"grouped_product: x [..., {inputs} x {groups}] and a kernel [{inputs}, {groups} m] were "
      f"expected; got {x.shape} and {kernel.shape}"
    )
  if form is None:
    form = "batched" if target_platform() == "cpu" else "dense"
  kernel = kernel.astype(x.dtype).reshape(inputs, groups, outputs // groups)
  if form == "batched":
    return _batched(x, kernel)
  if form == "dense":
    return grouped_product_dense(x, kernel)
  raise ValueError(f"grouped_product: unknown form {form!r}; known: {', '.join(GROUPED_FORMS)}")


def _batched(x: jax.Array, kernel: jax.Array) -> jax.Array:
  inputs, groups, _ = kernel.shape
  # Group by group all its channels; splitting and stacking is faster than a transpose on CPUs.
  parts = jnp.stack(jnp.split(x, inputs, axis=-1), axis=-1)
  y = jnp.einsum("...gn,ngm->...gm", parts, kernel)
  return y.reshape(*x.shape[:-1], groups * kernel.shape[2])


@jax.jit
def grouped_product_dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """`[..., n g]` by `[n, g, m]` to `[..., g m]`, the kernel spread over `[n g, g m]`."""
  return x @ spread_groups(kernel)


def spread_groups(kernel: jax.Array) -> jax.Array:
  """`[n, g, m]` to `[n g, g m]`, which is zero between groups."""
  inputs, groups, outputs = kernel.shape
  own = jnp.eye(groups, dtype=kernel.dtype)[None, :, :, None]
  spread = kernel[:, :, None, :] * own  # [n, g, g, m]
  return spread.reshape(inputs * groups, groups * outputs)
