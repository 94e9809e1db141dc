"""A network's first variables, which one run asks for several times and traces once."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.ops.platforms import target_platform


def initial_variables(model: nn.Module, rng: jax.Array, *inputs: Any) -> dict[str, Any]:
  """`model.init(rng, …, train=False)`; equal networks with inputs of one shape are traced once.

  Args:
    model: whose `__call__` takes `train`.
    rng: of the parameters.
    inputs: arrays, or shapes of them: variables follow from shapes and types alone.

  Returns:
    The collections that the network has, e.g. {"params", "batch_stats"}.
  """
  shapes = tuple((tuple(x.shape), jnp.dtype(x.dtype)) for x in inputs)
  # What is traced for one kind of device may have forms that another has not.
  platform = target_platform()
  try:
    draw = _drawing(model, shapes, platform)
  except TypeError:
    # An attribute that cannot be hashed, such as a list.
    draw = _drawing.__wrapped__(model, shapes, platform)
  return dict(draw(rng))


def variable_shapes(model: nn.Module, *inputs: Any) -> dict[str, Any]:
  """Shapes and types of `initial_variables`; nothing is computed."""
  return jax.eval_shape(
    lambda rng: initial_variables(model, rng, *inputs), jax.eval_shape(lambda: jax.random.key(0))
  )


@functools.lru_cache(maxsize=16)
def _drawing(
  model: nn.Module, shapes: tuple[tuple[tuple[int, ...], Any], ...], platform: str
) -> Any:
  del platform

  def draw(rng: jax.Array) -> Any:
    return model.init(rng, *(jnp.zeros(*shape) for shape in shapes), train=False)

  return jax.jit(draw)
