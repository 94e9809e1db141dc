"""When a loss or gradient is not finite: where it began, in words that help to mend it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.sharding import leaf_names
from hybrid_vit.tasks.base import Task, constants_of, with_constants
from hybrid_vit.train_state import TrainState, loss_and_gradients

_SHOWN_ROWS = 16


class NonFiniteError(FloatingPointError):
  """Loss or gradient was NaN or infinite; the message says where it began and what is saved."""

  def __init__(self, step: int, where: str, batch: Mapping[str, Any], saved_step: int | None):
    kept = (
      "nothing was saved yet"
      if saved_step is None
      else f"the last good checkpoint is that of step {saved_step}"
    )
    super().__init__(
      f"loss or gradient is not finite in step {step}; first bad tensor: {where}; data positions "
      f"of the batch: {_rows(batch)}; {kept}. Lower the learning rate, clip the gradient "
      "(config.optimizer.gradient_clip_norm) or train in float32 (config.precision)"
    )


def _rows(batch: Mapping[str, Any]) -> str:
  rows = batch.get("index")
  if rows is None or not rows.is_fully_addressable:
    return "unknown (they lie on other hosts)"
  values = np.asarray(rows)
  return ", ".join(map(str, values[:_SHOWN_ROWS])) + (" …" if len(values) > _SHOWN_ROWS else "")


def first_bad_tensor(
  task: Task,
  state: TrainState,
  batch: Mapping[str, Any],
  accumulation_steps: int,
  frozen: Any = None,
) -> str:
  """Runs a bad step again and names its first tensor, in the order of computation, that is bad.

  Args:
    task: the task.
    state: the state that the bad step left untouched; `state.bad_step` is that step.
    batch: the step's batch.
    accumulation_steps: as in the step.
    frozen: as in the step.

  Returns:
    The tensor's name, and how many more of its kind are not finite.
  """
  key = jax.random.fold_in(state.rng, state.bad_step - 1)
  augment_rng, loss_rng = jax.random.split(key)
  order: list[str] = []

  @jax.jit
  def finite(variables: Any, rows: Any) -> Any:
    augmented = task.augment(rows, augment_rng, state.bad_step - 1)
    tensors = task.activations(variables, augmented, loss_rng)
    order.extend(tensors)  # jit returns a dict sorted by its keys; the forward order is this one
    loss, _, gradients = loss_and_gradients(
      task, variables, augmented, loss_rng, accumulation_steps, frozen
    )
    named = {**tensors, "loss": loss, "gradients": gradients, "params": variables["params"]}
    return jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), named)

  variables = with_constants(state.variables, constants_of(task))
  found = jax.device_get(finite(variables, batch))
  for name in ("params", *order, "loss", "gradients"):
    branch = {name: found[name]}
    bad = [leaf for leaf, good in zip(leaf_names(branch), jax.tree.leaves(branch)) if not good]
    if bad:
      return bad[0] + (f" (and {len(bad) - 1} more of {name})" if len(bad) > 1 else "")
  return "none when the step is run again (an optimizer's overflow, or faulty hardware)"
