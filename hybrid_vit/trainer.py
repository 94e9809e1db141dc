"""The one loop: build ▸ restore ▸ (step ▸ log ▸ evaluate ▸ save)* ▸ done."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hybrid_vit import run, sharding
from hybrid_vit.checkpoints import Checkpointer, abstract_like, export, load_weights
from hybrid_vit.config import Config, ConfigError, differences
from hybrid_vit.nonfinite import NonFiniteError, first_bad_tensor
from hybrid_vit.reporting import Reporter, plot_curves
from hybrid_vit.tasks.base import Evaluator, Task
from hybrid_vit.train_state import TrainState, create_state, make_train_step
from hybrid_vit.weights.transfer import transfer

# How many steps the host runs ahead of the device before it looks at their results.
_LAG = 3


class Preempted(SystemExit):
  """Told to stop; the state is saved. Carries the shell's code for the signal."""


class _StopSignal:
  """Notes SIGTERM and the first Ctrl-C; a second Ctrl-C interrupts at once."""

  def __init__(self) -> None:
    self.number: int | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> _StopSignal:
    # Several processes must stop at one step: JAX's own handler of SIGTERM sees to that, and Ctrl-C
    # just interrupts.
    if jax.process_count() > 1:
      return self
    # Signals can be caught in the main thread only.
    with contextlib.suppress(ValueError):
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._note)
    return self

  def _note(self, number: int, _: Any) -> None:
    if self.number is not None:
      raise KeyboardInterrupt
    self.number = number

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)


def train(config: Config, workdir: Path) -> dict[str, float]:
  """Trains as `config` says, from the newest checkpoint in `workdir` where there is one.

  Returns:
    The last evaluation's measures, "<set>/<measure>".

  Raises:
    NonFiniteError: loss or gradient not finite; the last good checkpoint stays.
    Preempted: told to stop, and saved.
  """
  mesh = sharding.make_mesh(run.mesh_axes(config))
  source = run.open_training_source(config)
  task, spec = run.build_task(config, source.num_classes)
  length = run.training_length(config, len(source))
  settings = run.loop_settings(config, length.steps_per_epoch, task.primary_metric)
  seed, ema_decay = settings.seed, settings.ema_decay
  run_config = config.resolved()

  first = next(iter(_host_batches(config, source, 0, seed, mesh)))
  shapes = run.example_batch(config, first["image"].shape[1:3])
  shapes["image"] = jax.ShapeDtypeStruct(shapes["image"].shape, first["image"].dtype)
  abstract_params = jax.eval_shape(lambda key: task.init(key, shapes), jax.random.key(0))["params"]
  optimizer, schedule = run.build_optimizer(config, abstract_params, length)

  def new_state(key: jax.Array) -> TrainState:
    return create_state(key, task, optimizer, shapes, ema=ema_decay is not None)

  abstract = jax.eval_shape(new_state, jax.random.key(seed))
  layout = sharding.state_shardings(abstract, run.sharding_rules(config), mesh)
  sets = run.evaluation_sets(config, mesh, spec.num_classes)
  config.assert_all_read()

  checkpointer = Checkpointer(
    workdir,
    keep=settings.keep,
    every_steps=settings.save_every_steps,
    every_minutes=settings.save_every_minutes,
    run_config=run_config,
  )
  evaluators = task.evaluators(sets)
  restored = checkpointer.restore(abstract_like(abstract, layout))
  if restored is not None:
    state, start_step = restored.state, restored.step
  else:
    start_step = 0
    state = jax.jit(new_state, out_shardings=layout)(jax.random.key(seed))
  reporter = _reporter(workdir, length.total_steps, start_step, run_config)
  loop = _Loop(
    task=task,
    evaluators=evaluators,
    reporter=reporter,
    checkpointer=checkpointer,
    length=length,
    batch_size=int(config.data.batch_size),
    log_every=settings.log_every,
    evaluate_every=settings.evaluate_every,
    accumulation=settings.accumulation,
    best_metric=settings.best_metric,
  )
  try:
    if restored is not None:
      reporter.message(f"restored step {start_step} from {workdir / 'checkpoints'}")
      for change in differences(restored.run_config, run_config):
        reporter.message(f"not as it was when that was saved: {change}")
    elif settings.init_from is not None:
      new_head = settings.reinitialize_head
      state = _start_from(state, settings.init_from, new_head, layout, reporter)
    reporter.message(_summary(spec, abstract, length, mesh, config, schedule))
    step_function = jax.jit(
      make_train_step(
        task,
        optimizer,
        schedule,
        accumulation_steps=settings.accumulation,
        ema_decay=ema_decay,
        log_every_steps=settings.log_every,
      ),
      in_shardings=(layout, sharding.batch_sharding(mesh)),
      out_shardings=(layout, sharding.replicated(mesh)),
      donate_argnums=0,
    )
    with _StopSignal() as stop:
      batches = _host_batches(config, source, start_step, seed, mesh)
      state, results = loop.run(state, step_function, batches, mesh, start_step, stop)
    _finish(workdir, task, evaluators, state, spec, source.class_names, results, reporter)
  finally:
    checkpointer.close()
    reporter.close()
  return results


def evaluate(config: Config, workdir: Path | None) -> dict[str, float]:
  """Evaluates the weights of `workdir`, else of `config.init_from`, by their own preprocessing."""
  directory = workdir or config.get("init_from")
  if directory is None:
    raise ValueError("--mode=evaluate needs weights: give --workdir or --config.init_from")
  mesh = sharding.make_mesh(run.mesh_axes(config))
  weights, metadata = load_weights(directory)
  head = weights["params"].get("head", {}).get("bias")
  preprocessing, said_by = run.weights_preprocessing(config, metadata)
  task, spec = run.build_task(config, None if head is None else int(head.shape[0]), preprocessing)
  sets = run.evaluation_sets(config, mesh, spec.num_classes, preprocessing)
  if not sets:
    raise ConfigError("`config.evaluation.sets` is empty: there is nothing to evaluate on")
  batch = {"image": next(iter(sets[0].batches()))["image"]}
  target = jax.eval_shape(lambda key: task.init(key, batch), jax.random.key(0))
  variables, report = transfer(weights, target)
  layout = sharding.state_shardings(variables, (), mesh, params_key="")
  variables = jax.tree.map(jax.device_put, variables, layout)
  if jax.process_index() == 0:
    step = metadata.get("step")
    print(f"weights from {directory}" + (f", step {step}" if step is not None else ""))
    print(report)
    print(run.describe_preparation(preprocessing, said_by, sets))
  results = {}
  for evaluator in task.evaluators(sets):
    values = evaluator.run(variables)
    results.update({f"{evaluator.name}/{key}": value for key, value in values.items()})
    if jax.process_index() == 0:
      print(f"{evaluator.name}: {_figures(values)}")
  return results


@dataclasses.dataclass
class _Loop:
  """The linear part of a training, and what it needs."""

  task: Task
  evaluators: list[Evaluator]
  reporter: Reporter | _Silent
  checkpointer: Checkpointer
  length: run.Length
  batch_size: int
  log_every: int
  evaluate_every: int
  accumulation: int
  best_metric: str | None

  def run(
    self,
    state: TrainState,
    step_function: Any,
    batches: Any,
    mesh: Mesh,
    step: int,
    stop: _StopSignal,
  ) -> tuple[TrainState, dict[str, float]]:
    """From `step` to the end; returns the last state and evaluation."""
    results: dict[str, float] = {}
    if step and self._evaluates(step):
      # The run may have been stopped between saving this step and the end of its evaluation.
      results = self._evaluate(state, step)
    # (step, report, batch) of steps whose results the host has not looked at.
    pending: collections.deque[tuple[int, Any, Any]] = collections.deque()
    batch_layout = sharding.batch_sharding(mesh)
    clock = _Clock(batches)
    compiled = None
    while step < self.length.total_steps:
      host_batch = clock.waiting(lambda: next(batches))
      batch = sharding.put_batch(host_batch, batch_layout)
      if compiled is None:
        begin = time.monotonic()
        compiled = step_function.lower(state, batch).compile()
        seconds = time.monotonic() - begin
        self.reporter.message(f"compiled the step in {seconds:.1f} s")
        self.reporter.timing(step, {"compile_seconds": seconds})
        clock.restart()
      state, report = compiled(state, batch)
      step += 1
      clock.images += self.batch_size
      pending.append((step, report, batch))
      while len(pending) > _LAG:
        self._look(pending.popleft(), state, clock)

      last = step == self.length.total_steps
      evaluating = self._evaluates(step)
      logging_now = last or step % self.log_every == 0
      saving = last or self.checkpointer.should_save(step, ask_clock=logging_now)
      stopping = stop.number is not None or self.checkpointer.preempted(step)
      if not (evaluating or saving or stopping):
        continue
      while pending:
        self._look(pending.popleft(), state, clock)
      if saving or stopping:
        self.checkpointer.save(state, step)
      if stopping:
        self._stop(step, stop.number)
      if evaluating:
        results = self._evaluate(state, step)
      clock.restart()
    return state, results

  def _evaluates(self, step: int) -> bool:
    return step == self.length.total_steps or step % self.evaluate_every == 0

  def _look(self, item: tuple[int, Any, Any], state: TrainState, clock: _Clock) -> None:
    """Reads one step's report: stops at a NaN, writes the line of the log."""
    step, report, batch = item
    if int(report["bad_step"]) >= 0:
      kept = self.checkpointer.steps()
      where = first_bad_tensor(self.task, state, batch, self.accumulation)
      raise NonFiniteError(int(report["bad_step"]), where, batch, kept[0] if kept else None)
    last = step == self.length.total_steps
    if step % self.log_every and not last:
      if step % 10 == 0:
        self._show(step, None, clock)
      return
    sums = jax.device_get(report["metrics"])
    values = {key: float(total / weight) for key, (total, weight) in sums.items()}
    values["learning_rate"] = float(report["learning_rate"])
    values["gradient_norm"] = float(report["gradient_norm"])
    self.reporter.scalars(step, values, kind="train")
    self._show(step, values["loss"], clock)
    rate, wait = clock.rates()
    self.reporter.timing(
      step,
      {
        "images_per_second": rate,
        "data_wait_fraction": wait,
        "corrupt_pictures": float(clock.corrupt),
      },
    )

  def _show(self, step: int, loss: float | None, clock: _Clock) -> None:
    clock.loss = loss if loss is not None else clock.loss
    rate, wait = clock.rates()
    self.reporter.progress(step, loss=clock.loss, images_per_second=rate, data_wait_fraction=wait)

  def _evaluate(self, state: TrainState, step: int) -> dict[str, float]:
    results: dict[str, float] = {}
    for evaluator in self.evaluators:
      values = evaluator.run(state.evaluation_variables)
      self.reporter.scalars(step, values, kind=f"eval/{evaluator.name}")
      self.reporter.message(f"step {step}, {evaluator.name}: {_figures(values)}")
      results.update({f"{evaluator.name}/{key}": value for key, value in values.items()})
    if self.best_metric is not None:
      if self.best_metric not in results:
        raise ValueError(
          f"config.checkpoint.best_metric {self.best_metric!r} is not measured; there are: "
          f"{', '.join(results)}"
        )
      self.checkpointer.save_best(state, step, results[self.best_metric])
    return results

  def _stop(self, step: int, number: int | None) -> None:
    self.checkpointer.wait()
    self.reporter.message(
      f"told to stop: step {step} is saved; the same command with the same --workdir goes on"
    )
    raise Preempted(128 + (number or signal.SIGTERM))


class _Clock:
  """Pictures and waiting since the last restart; evaluation and compilation do not count."""

  def __init__(self, batches: Any):
    self._batches = batches
    self.loss: float | None = None
    self.restart()

  def restart(self) -> None:
    self.images = 0
    self._begin = time.monotonic()
    self._waited = 0.0

  def waiting(self, get: Any) -> Any:
    begin = time.monotonic()
    result = get()
    self._waited += time.monotonic() - begin
    return result

  def rates(self) -> tuple[float, float]:
    """Images per second over all processes, and the part of the time spent waiting for data."""
    seconds = max(time.monotonic() - self._begin, 1e-9)
    return self.images / seconds, min(self._waited / seconds, 1.0)

  @property
  def corrupt(self) -> int:
    return self._batches.corrupt.count


class _Silent:
  """The reporter of processes other than the first."""

  def _nothing(self, *args: Any, **kwargs: Any) -> None:
    del args, kwargs

  scalars = timing = progress = message = close = _nothing


def _reporter(
  workdir: Path, total_steps: int, start_step: int, run_config: dict[str, Any]
) -> Reporter | _Silent:
  if jax.process_index():
    return _Silent()
  return Reporter(workdir, total_steps, start_step, run_config=run_config)


def _host_batches(config: Config, source: Any, start_step: int, seed: int, mesh: Mesh) -> Any:
  part, parts = sharding.batch_part(sharding.batch_sharding(mesh))
  return run.training_batches(
    config, source, start_step=start_step, seed=seed, process_index=part, process_count=parts
  )


def _start_from(
  state: TrainState, directory: str, new_head: bool, layout: Any, reporter: Reporter | _Silent
) -> TrainState:
  """A new state whose variables (and their average) are those of other weights."""
  weights, _ = load_weights(directory)
  variables, report = transfer(weights, state.variables, reinitialize_head=new_head)
  reporter.message(f"starting from {directory}\n{report}")
  put = lambda tree, to: jax.tree.map(jax.device_put, tree, to)  # noqa: E731
  params = put(variables["params"], layout.params)
  batch_stats = put(variables["batch_stats"], layout.batch_stats)
  ema = None
  if state.ema is not None:
    # Copies: the state is donated, and one buffer cannot be given away twice.
    ema = jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats})
  return state.replace(params=params, batch_stats=batch_stats, ema=ema)


def _summary(
  spec: run.ModelSpec,
  state: TrainState,
  length: run.Length,
  mesh: Mesh,
  config: Config,
  schedule: Any,
) -> str:
  parameters = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params))
  peak = max(float(schedule(s)) for s in np.linspace(0, length.total_steps - 1, 200).round())
  axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  return (
    f"{spec.name}: {parameters:,} parameters, {spec.num_classes} classes\n"
    f"{length.total_steps} steps of {config.data.batch_size} ({length.epochs:.1f} epochs of "
    f"{length.steps_per_epoch} steps), peak learning rate {peak:.3g}\n"
    f"{mesh.size} {mesh.devices.flat[0].platform} device(s) ({axes}), {jax.process_count()} "
    "process(es); batch norm statistics are those of the global batch"
    + (f" in {groups} groups" if (groups := config.get("batch_norm_groups", 1)) > 1 else "")
  )


def _finish(
  workdir: Path,
  task: Task,
  evaluators: list[Evaluator],
  state: TrainState,
  spec: run.ModelSpec,
  class_names: Any,
  results: Mapping[str, float],
  reporter: Reporter | _Silent,
) -> None:
  """Exports the weights, draws the pictures, says what to do next."""
  metadata = {
    **dataclasses.asdict(spec),
    "class_names": list(class_names),
    "step": int(state.step),
    "results": dict(results),
    "weights": "trained here" + (", averaged over steps" if state.ema is not None else ""),
  }
  export(workdir / "export", state.evaluation_variables, metadata)
  if jax.process_index():
    return
  plot_curves(workdir / "metrics.jsonl", workdir / "curves.png")
  if evaluators and jax.process_count() == 1:
    evaluators[0].draw(state.evaluation_variables, workdir / "predictions.png")
  reporter.message(
    f"done. In {workdir}:\n"
    "  curves.png, predictions.png   to look at\n"
    "  metrics.jsonl, tensorboard/   every figure (tensorboard --logdir " + str(workdir) + ")\n"
    "  checkpoints/, best/           whole states\n"
    "  export/                       the weights alone\n"
    "Next:\n"
    f"  evaluate them:    add --mode=evaluate --workdir={workdir} to the command\n"
    f"  fine-tune them:   python -m hybrid_vit.main --config=configs/finetune.py "
    f"--config.init_from={workdir} --config.data.source=folder:/path/to/pictures"
  )


def _figures(values: Mapping[str, float]) -> str:
  shown = {key: value for key, value in values.items() if key != "examples"}
  text = ", ".join(
    f"{key} {value:.2%}" if key.startswith("top") else f"{key} {value:.4f}"
    for key, value in shown.items()
  )
  return f"{text} ({values['examples']:.0f} examples)" if "examples" in values else text
