"""All of a training run's state, and the pure step from one state to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from hybrid_vit.optimizers import Schedule
from hybrid_vit.tasks.base import Batch, Task


class TrainState(flax.struct.PyTreeNode):
  """Everything that a checkpoint holds; a run resumed from it goes on bit for bit.

  Attributes:
    step: int32, number of finished steps, which is also the position in the data.
    params: float32 tree.
    batch_stats: running statistics of the norms, float32; {} where there are none.
    opt_state: the optimizer's.
    ema: {"params", "batch_stats"} averaged over the steps, or None.
    rng: typed key; constant, each step folds its number in.
    metrics: name → (sum, weight) since the last line of the log.
    bad_step: int32, the step whose loss or gradient was not finite, -1 while there is none. From
      then on the rest of the state stands still.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  ema: Any
  rng: jax.Array
  metrics: dict[str, tuple[jax.Array, jax.Array]]
  bad_step: jax.Array

  @property
  def variables(self) -> dict[str, Any]:
    """What the network's `apply` takes."""
    return {"params": self.params, "batch_stats": self.batch_stats}

  @property
  def evaluation_variables(self) -> dict[str, Any]:
    """The averaged variables where they are kept, else the last ones."""
    return self.ema if self.ema is not None else self.variables


def create_state(
  rng: jax.Array,
  task: Task,
  optimizer: optax.GradientTransformation,
  batch: Batch,
  *,
  ema: bool,
) -> TrainState:
  """The state of step 0; pure, so that it runs under `jax.jit` and `jax.eval_shape`."""
  init_rng, state_rng = jax.random.split(rng)
  variables = task.init(init_rng, batch)
  params, batch_stats = variables["params"], variables.get("batch_stats", {})

  def metrics_of(variables: Any, batch: Batch, key: jax.Array) -> Any:
    return task.loss(variables, task.augment(batch, key), key)[1]["metrics"]

  metrics = jax.eval_shape(metrics_of, variables, batch, state_rng)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=optimizer.init(params),
    ema={"params": params, "batch_stats": batch_stats} if ema else None,
    rng=state_rng,
    metrics=jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.float32), metrics),
    bad_step=jnp.full((), -1, jnp.int32),
  )


def loss_and_gradients(
  task: Task, variables: Mapping[str, Any], batch: Batch, rng: jax.Array, accumulation_steps: int
) -> tuple[jax.Array, dict[str, Any], Any]:
  """Loss, auxiliary results and gradients of one batch, in so many parts.

  Row i of the batch goes to part i modulo `accumulation_steps`: this way each device keeps its own
  rows. Every part starts from the same running statistics and the new ones are averaged, so that
  the result is that of the whole batch with statistics by groups.

  Raises:
    ValueError: the batch is not divisible.
  """

  def one_part(part: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, Any], Any]:
    def loss_of(params: Any) -> tuple[jax.Array, dict[str, Any]]:
      return task.loss({**variables, "params": params}, part, key)

    (loss, aux), gradients = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
    return loss, aux, gradients

  if accumulation_steps == 1:
    return one_part(batch, rng)

  def split(rows: jax.Array) -> jax.Array:
    if rows.shape[0] % accumulation_steps:
      raise ValueError(
        f"a batch of {rows.shape[0]} does not fall into {accumulation_steps} equal parts: change "
        "config.accumulation_steps or config.data.batch_size"
      )
    parts = rows.reshape(-1, accumulation_steps, *rows.shape[1:])
    return jnp.moveaxis(parts, 1, 0)

  def body(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, one_part(*part)), None

  parts = (jax.tree.map(split, dict(batch)), jax.random.split(rng, accumulation_steps))
  shapes = jax.eval_shape(one_part, *jax.tree.map(lambda part: part[0], parts))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  (loss, aux, gradients), _ = jax.lax.scan(body, zeros, parts)
  mean = lambda tree: jax.tree.map(lambda x: x / accumulation_steps, tree)  # noqa: E731
  # Metrics are pairs of sums, and stay so.
  return mean(loss), {**aux, "batch_stats": mean(aux["batch_stats"])}, mean(gradients)


def make_train_step(
  task: Task,
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  *,
  accumulation_steps: int = 1,
  ema_decay: float | None = None,
  log_every_steps: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
  """The pure function `(state, batch) → (new state, report)`.

  The report is small and is read by the host some steps later: `metrics` (sums and weights since
  the last line of the log), `learning_rate`, `gradient_norm`, `bad_step`.
  """

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
    augment_rng, loss_rng = jax.random.split(jax.random.fold_in(state.rng, state.step))
    batch = task.augment(batch, augment_rng)
    loss, aux, gradients = loss_and_gradients(
      task, state.variables, batch, loss_rng, accumulation_steps
    )
    gradient_norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    variables = {"params": params, "batch_stats": aux["batch_stats"]}
    ema = state.ema
    if ema_decay is not None:
      ema = jax.tree.map(lambda old, new: ema_decay * old + (1 - ema_decay) * new, ema, variables)

    # A new window of the log begins after each line of it.
    keep = (state.step % log_every_steps != 0).astype(jnp.float32)
    metrics = jax.tree.map(lambda total, new: keep * total + new, state.metrics, aux["metrics"])

    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & (state.bad_step < 0)
    new_state = state.replace(
      step=state.step + 1,
      params=params,
      batch_stats=aux["batch_stats"],
      opt_state=opt_state,
      ema=ema,
      metrics=metrics,
      rng=None,
    )
    new_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), new_state, state.replace(rng=None)
    )
    bad_step = jnp.where(finite | (state.bad_step >= 0), state.bad_step, state.step + 1)
    new_state = new_state.replace(rng=state.rng, bad_step=bad_step)
    report = {
      "metrics": new_state.metrics,
      "learning_rate": schedule(state.step),
      "gradient_norm": gradient_norm,
      "bad_step": bad_step,
    }
    return new_state, report

  return train_step
