"""What kind of device a function that is being traced is for."""

from __future__ import annotations

import jax


def target_platform() -> str:
  """ "cpu", "gpu" or "tpu": of the mesh in `jax.set_mesh`, else of the process's default backend.

  A step may be traced for devices that its process has not, such as the chips of a TPU whose
  compiler alone is here.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform
