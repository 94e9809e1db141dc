"""What kind of device a function that is being traced is for."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax import lax

_TARGETS: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("targets", default=())


def target_platform() -> str:
  """ "cpu", "gpu", "tpu", or "several" of them.

  That of `tracing_for`, else of the mesh in `jax.set_mesh`, else of the process's default backend.
  A step may be traced for devices that its process has not, such as the chips of a TPU whose
  compiler alone is here. What is traced for several takes the form that is right everywhere, or
  both by `on_cpu`.
  """
  if targets := _TARGETS.get():
    return targets[0] if len(targets) == 1 else "several"
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


@contextlib.contextmanager
def tracing_for(platforms: tuple[str, ...]) -> Iterator[None]:
  """Within it functions are traced for these: "cpu", "gpu", "tpu", one or more.

  What was traced before under `jax.jit` stays as it was: give it a function of its own.
  """
  before = _TARGETS.set(tuple(dict.fromkeys(platforms)))
  try:
    yield
  finally:
    _TARGETS.reset(before)


def on_cpu(form: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
  """Of two forms of one function of arrays the one for the devices that it is traced for.

  For several of them both are traced, and each platform compiles its own.
  """
  if target_platform() == "several" and "cpu" in _TARGETS.get():
    return lambda *arrays: lax.platform_dependent(*arrays, cpu=form, default=elsewhere)
  return form if target_platform() == "cpu" else elsewhere
