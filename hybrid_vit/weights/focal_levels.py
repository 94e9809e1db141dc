"""FocalNet weights for dense tasks: larger kernels, more focal levels.

Paper, section 4.3, and the authors' `mmcv_custom/checkpoint.py`: new cells of a kernel are zeros
around the trained ones, so that the network answers as before until it is trained further.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

_PROJECTION = "/modulation/projection_in/"
_LEVEL = "/modulation/focal_conv_"


def fit_focal_levels(
  source: Mapping[str, Any], target: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
  """Changes the modulations of `source` to the kernel sizes and levels of `target`.

  A smaller kernel is surrounded with zeros, a larger one loses its rim. Added levels get gates of
  zero; the gate of the mean over the map stays the last.

  Args:
    source: path of a leaf to array; paths that belong to no focal modulation pass through.
    target: the same for the network that shall take the weights.

  Returns:
    (`source` with those leaves changed, path of each of them to what was done, path to reason of
    what `source` need not have: convolutions of added levels). Levels cannot be taken away: then
    the shapes differ as before.
  """
  fitted = dict(source)
  changes: dict[str, str] = {}
  new: dict[str, str] = {}
  if not any(_PROJECTION in path for path in source):
    return fitted, changes, new
  for path, wanted in target.items():
    old = source.get(path)
    if old is None:
      if _LEVEL in path and path.partition(_LEVEL)[0] + _PROJECTION + "kernel" in source:
        new[path] = "an added level, behind a gate of zero"
    elif _LEVEL in path and old.shape[:2] != wanted.shape[:2]:
      fitted[path] = resize_kernel(jnp.asarray(old), wanted.shape[:2])
      kind = "zeros around" if old.shape[0] < wanted.shape[0] else "the middle of"
      changes[path] = f"{kind} {old.shape[0]}x{old.shape[1]}"
    elif _PROJECTION in path and old.shape[-1] < wanted.shape[-1]:
      old = jnp.asarray(old)
      zeros = jnp.zeros((*old.shape[:-1], wanted.shape[-1] - old.shape[-1]), old.dtype)
      fitted[path] = jnp.concatenate([old[..., :-1], zeros, old[..., -1:]], axis=-1)
      changes[path] = f"{zeros.shape[-1]} gates of zero added"
  return fitted, changes, new


def resize_kernel(kernel: Any, size: tuple[int, int]) -> Any:
  """Pads with zeros or crops `[kh, kw, 1, C]` around its centre."""
  for axis, wanted in enumerate(size):
    spare = (wanted - kernel.shape[axis]) // 2
    if spare < 0:
      kernel = jnp.take(kernel, jnp.arange(-spare, kernel.shape[axis] + spare), axis=axis)
    else:
      pads = [(0, 0)] * kernel.ndim
      pads[axis] = (spare, spare)
      kernel = jnp.pad(kernel, pads)
  return kernel
