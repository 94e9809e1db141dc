"""FocalNet weights for larger kernels or more focal levels, as its dense tasks take them.

Paper, section 4.3, and the authors' `mmcv_custom/checkpoint.py`: new cells of a kernel are zeros
around the trained ones, so that the network answers as before until it is trained further.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

_KERNEL = "/kernel"
_PROJECTION = "/modulation/projection_in/"
_LEVEL = "/modulation/focal_conv_"


def fit_focal_levels(
  source: Mapping[str, Any], target: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
  """Changes the modulations of `source` to the kernel sizes and levels of `target`.

  A smaller kernel is surrounded with zeros, a larger one loses its rim. Added levels keep the new
  convolutions of `target` and get gates of zero; the gate of the mean over the map stays the last.

  Args:
    source: path of a leaf to array; paths that belong to no focal modulation pass through.
    target: the same for the network that shall take the weights.

  Returns:
    (`source` with those leaves changed, path of each of them to what was done). Levels cannot be
    taken away: then the shapes differ as before.
  """
  fitted, changes = dict(source), {}
  for path, new in target.items():
    if _LEVEL in path and path.endswith(_KERNEL):
      old = source.get(path)
      if old is None and path.partition(_LEVEL)[0] + _PROJECTION + "kernel" in source:
        fitted[path] = new
        changes[path] = "new, behind a gate of zero"
      elif old is not None and old.shape[:2] != new.shape[:2]:
        fitted[path] = _resize_kernel(jnp.asarray(old), new.shape[:2])
        kind = "zeros around" if old.shape[0] < new.shape[0] else "the middle of"
        changes[path] = f"{kind} {old.shape[0]}x{old.shape[1]}"
    elif _PROJECTION in path and path in source and source[path].shape[-1] < new.shape[-1]:
      old = jnp.asarray(source[path])
      zeros = jnp.zeros((*old.shape[:-1], new.shape[-1] - old.shape[-1]), old.dtype)
      fitted[path] = jnp.concatenate([old[..., :-1], zeros, old[..., -1:]], axis=-1)
      changes[path] = f"{zeros.shape[-1]} gates of zero added"
  return fitted, changes


def _resize_kernel(kernel: Any, size: tuple[int, int]) -> Any:
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
