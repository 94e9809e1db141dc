"""All of a training run's state, and the pure step from one state to the next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from hybrid_vit import sharding
from hybrid_vit.data.spec import REPLACED
from hybrid_vit.gradient_caching import cached_gradients
from hybrid_vit.models.freezing import running_statistics
from hybrid_vit.optimizers import Schedule
from hybrid_vit.tasks.base import Batch, Task, with_constants


class TrainState(flax.struct.PyTreeNode):
  """What decides the next step: a run resumed from a checkpoint of it goes on bit for bit.

  Attributes:
    step: int32, number of finished steps; the position in the data follows from it.
    params: float32 tree.
    batch_stats: running statistics of the norms, float32; {} where there are none.
    opt_state: the optimizer's.
    ema: {"params", "batch_stats"} averaged over the steps, or None.
    rng: typed key; constant, each step folds its number in.
    skipped: int32, how many steps in a row, up to this one, were skipped for a loss or gradient
      that was not finite.
    bad_step: int32, the step at which more than the allowed number was skipped, -1 while there is
      none. From then on the rest of the state stands still.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  ema: Any
  rng: jax.Array
  skipped: jax.Array
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
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=optimizer.init(params),
    ema={"params": params, "batch_stats": batch_stats} if ema else None,
    rng=state_rng,
    skipped=jnp.zeros((), jnp.int32),
    bad_step=jnp.full((), -1, jnp.int32),
  )


def loss_and_gradients(
  task: Task,
  variables: Mapping[str, Any],
  batch: Batch,
  rng: jax.Array,
  accumulation_steps: int = 1,
  frozen: Any = None,
  gather: Callable[[Any], Any] | None = None,
) -> tuple[jax.Array, dict[str, Any], Any]:
  """Loss, auxiliary results and gradients of one batch, in so many parts.

  Row i of the batch goes to part i modulo `accumulation_steps`: this way each device keeps its own
  rows. Every part starts from the same running statistics and the new ones are averaged, so that
  the result is that of the whole batch with statistics by groups.

  A task whose loss looks at the whole batch is taken apart where it has `embed` and `embedded_loss`
  (see `Task`): by `gradient_caching`, the gradient is that of the whole batch.

  Args:
    task: its loss.
    variables: {"params", "batch_stats"}.
    batch: augmented.
    rng: a key.
    accumulation_steps: parts that come one after the other.
    frozen: a tree like the parameters of booleans, or None for none. Nothing is computed for the
      gradients of frozen parameters, which come as zeros, and batch norms all of whose parameters
      are frozen use and keep their running statistics.
    gather: makes parameters that devices hold in parts whole for their use; see
      `sharding.gathered`.

  Raises:
    ValueError: the batch is not divisible, or the task's loss cannot be had in parts.
  """
  trained, fixed = _split_parameters(variables["params"], frozen)

  def used(trained: Any) -> dict[str, Any]:
    params = flax.traverse_util.unflatten_dict({**trained, **fixed})
    return {**variables, "params": params if gather is None else gather(params)}

  def one_part(part: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, Any], Any]:
    def loss_of(trained: Any) -> tuple[jax.Array, dict[str, Any]]:
      with running_statistics(_frozen_modules(fixed, trained)):
        return task.loss(used(trained), part, key)

    if gather is not None:
      # Gathered again in the backward pass rather than kept whole for it.
      policy = jax.checkpoint_policies.save_anything_except_these_names(sharding.GATHERED)
      loss_of = jax.checkpoint(loss_of, policy=policy)
    (loss, aux), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
    return loss, aux, gradients

  def whole(gradients: Any) -> Any:
    zeros = {path: jnp.zeros_like(leaf) for path, leaf in fixed.items()}
    found = flax.traverse_util.unflatten_dict({**gradients, **zeros})
    # In the very containers and order of the parameters.
    return jax.tree.map(lambda _, leaf: leaf, variables["params"], found)

  if accumulation_steps == 1:
    loss, aux, gradients = one_part(batch, rng)
    return loss, aux, whole(gradients)
  embed = getattr(task, "embed", None)
  if not task.separable and embed is None:
    raise ValueError(
      "this task's loss looks at a whole batch, which accumulation would take apart: set "
      "config.accumulation_steps to 1"
    )

  def split(rows: jax.Array) -> jax.Array:
    if rows.shape[0] % accumulation_steps:
      raise ValueError(
        f"a batch of {rows.shape[0]} does not fall into {accumulation_steps} equal parts: change "
        "config.accumulation_steps or config.data.batch_size"
      )
    parts = rows.reshape(-1, accumulation_steps, *rows.shape[1:])
    return jnp.moveaxis(parts, 1, 0)

  parts = (jax.tree.map(split, dict(batch)), jax.random.split(rng, accumulation_steps))
  mean = lambda tree: jax.tree.map(lambda x: x / accumulation_steps, tree)  # noqa: E731
  if not task.separable:

    def embed_part(trained: Any, part: Batch, key: jax.Array) -> Any:
      with running_statistics(_frozen_modules(fixed, trained)):
        return embed(used(trained), part, key)  # type: ignore[misc]

    def whole_loss(trained: Any, embeddings: Any) -> Any:
      return task.embedded_loss(used(trained), embeddings, batch)  # type: ignore[attr-defined]

    loss, metrics, stats, gradients = cached_gradients(embed_part, whole_loss, trained, parts)
    return loss, {"metrics": metrics, "batch_stats": mean(stats)}, whole(gradients)

  def body(total: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, one_part(*part)), None

  shapes = jax.eval_shape(one_part, *jax.tree.map(lambda part: part[0], parts))
  zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
  (loss, aux, gradients), _ = jax.lax.scan(body, zeros, parts)
  # Metrics are pairs of sums, and stay so.
  aux = {**aux, "batch_stats": mean(aux["batch_stats"])}
  return mean(loss), aux, whole(mean(gradients))


def _split_parameters(params: Any, frozen: Any) -> tuple[dict[Any, Any], dict[Any, Any]]:
  """(trained, frozen), by path."""
  flat = flax.traverse_util.flatten_dict(dict(params))
  if frozen is None:
    return flat, {}
  still = flax.traverse_util.flatten_dict(dict(frozen))
  fixed = {path: leaf for path, leaf in flat.items() if still[path]}
  return {path: leaf for path, leaf in flat.items() if path not in fixed}, fixed


def _frozen_modules(fixed: Mapping[Any, Any], trained: Mapping[Any, Any]) -> Callable[[str], bool]:
  moving = {"/".join(path[:-1]) for path in trained}
  still = {"/".join(path[:-1]) for path in fixed} - moving
  return still.__contains__


def make_train_step(
  task: Task,
  optimizer: optax.GradientTransformation,
  schedule: Schedule,
  *,
  accumulation_steps: int = 1,
  ema_decay: float | None = None,
  frozen: Any = None,
  skip_bad_steps: int = 0,
  gather: Callable[[Any], Any] | None = None,
) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
  """The pure function `(state, batch, constants=None) → (new state, report)`.

  The third argument holds the task's constants where it has any; see `Task`.

  A step whose loss or gradient is not finite changes nothing but the counters. Up to
  `skip_bad_steps` of them in a row are skipped; at one more the state stands still for good, and
  the host stops the run.

  The report is small and is read by the host some steps later: `metrics` (name → sum and weight of
  this step), `learning_rate`, `gradient_norm` (of what is trained), `parameter_norm`, `replaced`
  (rows whose picture could not be read), `skipped` and `bad_step`.
  """

  def train_step(
    state: TrainState, batch: Batch, constants: Any = None
  ) -> tuple[TrainState, dict[str, Any]]:
    augment_rng, loss_rng = jax.random.split(jax.random.fold_in(state.rng, state.step))
    rows = task.augment(batch, augment_rng, state.step)
    variables = with_constants(state.variables, constants)
    loss, aux, gradients = loss_and_gradients(
      task, variables, rows, loss_rng, accumulation_steps, frozen, gather
    )
    gradient_norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    variables = {"params": params, "batch_stats": aux["batch_stats"]}
    ema = state.ema
    if ema_decay is not None:
      ema = jax.tree.map(lambda old, new: ema_decay * old + (1 - ema_decay) * new, ema, variables)

    finite = jnp.isfinite(loss) & jnp.isfinite(gradient_norm) & (state.bad_step < 0)
    skipped = jnp.where(finite, 0, state.skipped + 1)
    stopping = (state.bad_step < 0) & (skipped > skip_bad_steps)
    bad_step = jnp.where(stopping, state.step + 1, state.bad_step)

    def chosen(new: Any, old: Any) -> Any:
      return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

    new_state = TrainState(
      step=jnp.where(bad_step < 0, state.step + 1, state.step),
      params=chosen(params, state.params),
      batch_stats=chosen(aux["batch_stats"], state.batch_stats),
      opt_state=chosen(opt_state, state.opt_state),
      ema=chosen(ema, state.ema),
      rng=state.rng,
      skipped=jnp.where(state.bad_step < 0, skipped, state.skipped),
      bad_step=bad_step,
    )
    report = {
      # What a skipped step measured is no measure.
      "metrics": jax.tree.map(lambda m: jnp.where(finite, m, 0.0), aux["metrics"]),
      "learning_rate": schedule(state.step),
      "gradient_norm": jnp.where(finite, gradient_norm, 0.0),
      "parameter_norm": optax.tree.norm(new_state.params),
      "replaced": jnp.sum(batch[REPLACED]) if REPLACED in batch else jnp.zeros(()),
      "skipped": new_state.skipped,
      "bad_step": bad_step,
    }
    return new_state, report

  return train_step
