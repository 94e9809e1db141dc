"""The one loop: restore ▸ for each phase: ( step ▸ log ▸ evaluate ▸ save )* ▸ done.

It takes a `Run` and knows no configuration, no task and no key of a batch.
"""

from __future__ import annotations

import collections
import dataclasses
import signal
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from hybrid_vit import programs, sharding
from hybrid_vit.build import Run
from hybrid_vit.checkpoints import Checkpointer, CheckpointError, load_weights
from hybrid_vit.data.evaluation import EvaluationSet, open_evaluation
from hybrid_vit.data.pipeline import training_batches
from hybrid_vit.data.sources import Source
from hybrid_vit.early_stop import KEY as EARLY_STOP
from hybrid_vit.early_stop import Patience
from hybrid_vit.evaluate import evaluate_all, run_and_write
from hybrid_vit.finishing import finish
from hybrid_vit.nonfinite import NonFiniteError, first_bad_tensor
from hybrid_vit.paths import as_path
from hybrid_vit.reporting import Reporter, SilentReporter, figures
from hybrid_vit.starting import Start, begin, check_classes
from hybrid_vit.stopping import Interrupted, Preempted, StopSignal
from hybrid_vit.tasks.base import Evaluator
from hybrid_vit.timing import Clock, Profile
from hybrid_vit.train_state import TrainState

# How many steps the host runs ahead of the device before it looks at their results.
_LAG = 3

# Beside the task's measures in the sums of the log's window; no measure may be called so.
_REPLACED = " replaced"


def train(
  run: Run,
  source: Source,
  workdir: Any,
  *,
  begin_anew: bool = False,
  profile: tuple[int, int] | None = None,
) -> dict[str, float]:
  """Trains, from the newest checkpoint in `workdir` where there is one.

  Args:
    run: see `hybrid_vit.build`.
    source: the opened training data.
    workdir: where everything goes.
    begin_anew: whether to begin at step 0 in a directory whose checkpoints cannot be used.
    profile: steps (first, last) of which a trace is written to `workdir`/profile.

  Returns:
    The last evaluation's measures, "<set>/<measure>".

  Raises:
    ValueError: the devices do not divide a phase's batch.
    NonFiniteError: loss or gradient not finite; the last good checkpoint stays.
    Preempted: told to stop, and saved.
  """
  workdir, settings = as_path(workdir), run.settings
  mesh = sharding.make_mesh(run.mesh_axes)
  for phase in run.curriculum.phases:
    sharding.check_batch_size(phase.batch_size, mesh)
  with StopSignal() as stop:
    sets = open_evaluation(run.evaluation, run.evaluation_fields, mesh, stop.raise_if_told)
    check_classes(run, sets)
    checkpointer = Checkpointer(
      workdir,
      keep=settings.keep,
      every_steps=settings.save_every_steps,
      every_minutes=settings.save_every_minutes,
      keep_best=settings.best_metric is not None,
      run_config=run.config,
      info=run.metadata,
    )
    try:
      start = begin(run, mesh, checkpointer, workdir, begin_anew=begin_anew)
      reporter: Reporter | SilentReporter = SilentReporter()
      if jax.process_index() == 0:
        reporter = Reporter(
          workdir,
          run.curriculum.total_steps,
          start.step,
          run_config=run.config,
          sinks=settings.sinks,
        )
      try:
        loop = _Loop(run, mesh, workdir, checkpointer, reporter, stop, start, profile)
        loop.evaluators = run.task.evaluators(sets)
        return loop.run_all(source, sets)
      finally:
        reporter.close()
    finally:
      checkpointer.close()


@dataclasses.dataclass
class _Loop:
  """The linear part of a training, and what it needs."""

  run: Run
  mesh: Mesh
  workdir: epath.Path
  checkpointer: Checkpointer
  reporter: Reporter | SilentReporter
  stop: StopSignal
  start: Start
  profile: tuple[int, int] | None
  evaluators: list[Evaluator] = dataclasses.field(default_factory=list)

  def __post_init__(self) -> None:
    self.sums: dict[str, list[float]] = {k: list(v) for k, v in self.start.sums.items()}
    memory, settings = self.sums.pop(EARLY_STOP, None), self.run.settings
    self.patience: Patience | None = None
    if settings.early_stop is not None:
      self.patience = Patience(settings.early_stop, settings.best_is_max, memory)
    self.clock = Clock()

  def run_all(self, source: Source, sets: list[EvaluationSet]) -> dict[str, float]:
    """Everything from the first message to the last picture."""
    total = self.run.curriculum.total_steps
    for text in self.start.messages:
      self.reporter.message(text)
    if self.start.step < total:
      part, parts = sharding.batch_part(sharding.batch_sharding(self.mesh))
      batches = training_batches(
        self.run, source, start_step=self.start.step, process_index=part, process_count=parts
      )
      try:
        state, results = self.train(batches)
      finally:
        batches.close()
    else:
      self.reporter.message(
        f"nothing to train: step {self.start.step} is saved and the training ends at {total}. "
        "Lengthen it (config.total_epochs), or give another --workdir to begin anew"
      )
      state = self.start.state
      results = self.evaluate(state, self.start.step)
    weights = None
    if self.patience is not None:
      state, results, weights = self._best(state, results)
    finish(
      self.run, self.mesh, self.workdir, self.evaluators, state, results, self.reporter, weights
    )
    return results

  def train(self, batches: Any) -> tuple[TrainState, dict[str, float]]:
    """From the first step to the end; returns the last state and evaluation."""
    state, step = self.start.state, self.start.step
    curriculum, results = self.run.curriculum, {}
    if step and self.run.evaluates_at(step):
      # The run may have been stopped between saving this step and the end of its evaluation.
      results = self.evaluate(state, step)
      if self._ends_early(results, step):
        return state, results
    steps = self._compile(step)
    # (step, report, batch) of steps whose results the host has not looked at.
    pending: collections.deque[tuple[int, Any, Any]] = collections.deque()
    placement, phase = sharding.batch_sharding(self.mesh), -1
    with Profile(self.workdir, self.profile) as profile:
      while step < curriculum.total_steps:
        if curriculum.phase_of(step) != phase:
          # A step is looked at with the state of its own phase.
          while pending:
            self._look(pending.popleft(), state)
          phase = self._enter(curriculum.phase_of(step), steps)
          state = programs.enter_phase(self.run, phase, self.mesh, state)
        profile.at(step + 1)
        batch = sharding.put_batch(self.clock.waiting(lambda: next(batches)), placement)
        state, report = steps[phase].compiled(state, batch)
        step += 1
        self.clock.examples += curriculum.phases[phase].batch_size
        pending.append((step, report, batch))
        while len(pending) > _LAG:
          self._look(pending.popleft(), state)

        last = step == curriculum.total_steps
        evaluating = self.run.evaluates_at(step)
        logging_now = last or step % self.run.settings.log_every == 0
        saving = last or self.checkpointer.should_save(step, ask_clock=logging_now)
        stopping = self.stop.told or self.checkpointer.preempted(step)
        if not (evaluating or saving or stopping):
          continue
        while pending:
          self._look(pending.popleft(), state)
        # As they are before the evaluation, which a run that goes on from here makes again.
        sums = self._kept_sums()
        if saving or stopping:
          self.checkpointer.save(state, step, sums)
        if stopping:
          self._stop(step)
        if evaluating:
          results = self.evaluate(state, step)
          if not last and self._ends_early(results, step):
            self.checkpointer.save(state, step, sums)
            break
        self.clock.restart()
    return state, results

  def _compile(self, step: int) -> dict[int, programs.Program]:
    steps = programs.compile_phases(self.run, self.mesh, step)
    seconds = sum(program.seconds for program in steps.values())
    several = f" for {len(steps)} phases" if len(steps) > 1 else ""
    self.reporter.message(f"compiled the step{several} in {seconds:.1f} s")
    self.reporter.timing(step, {"compile_seconds": seconds})
    return steps

  def _enter(self, phase: int, steps: dict[int, programs.Program]) -> int:
    phases = self.run.curriculum.phases
    if len(phases) > 1:
      self.reporter.message(f"phase {phase + 1} of {len(phases)}: {phases[phase]}")
    per_example, peak = steps[phase].flops_per_example, programs.peak_flops(self.mesh)
    self.clock.utilisation_of_rate = per_example / peak if per_example and peak else None
    self.clock.restart()
    return phase

  def _look(self, item: tuple[int, Any, Any], state: TrainState) -> None:
    """Reads one step's report: stops at a NaN, adds to the sums, writes the line of the log."""
    step, report, batch = item
    found = jax.device_get(report)
    settings = self.run.settings
    if int(found["bad_step"]) >= 0:
      task = self.run.tasks[self.run.curriculum.phase_of(step - 1)]
      kept = self.checkpointer.steps()
      where = first_bad_tensor(task, state, batch, settings.accumulation, self.run.frozen)
      raise NonFiniteError(int(found["bad_step"]), where, batch, kept[0] if kept else None)
    if int(found["skipped"]):
      self.reporter.message(
        f"step {step} was skipped: its loss or gradient is not finite ({int(found['skipped'])} in "
        f"a row; more than {settings.skip_bad_steps} stop the run)"
      )
    self._add(_REPLACED, float(found["replaced"]), 1.0)
    for name, (total, weight) in found["metrics"].items():
      self._add(name, float(total), float(weight))
    if step % settings.log_every and step != self.run.curriculum.total_steps:
      if step % 10 == 0:
        self._show(step)
      return
    replaced = self.sums.pop(_REPLACED)[0]
    values = {
      k: total / weight if weight else float("nan") for k, (total, weight) in self.sums.items()
    }
    for name in ("learning_rate", "gradient_norm", "parameter_norm"):
      values[name] = float(found[name])
    if replaced:
      values["replaced_examples"] = replaced
    self.sums = {}
    self.reporter.scalars(step, values, kind="train")
    self.clock.loss = values.get("loss", self.clock.loss)
    self._show(step)
    self.reporter.timing(step, self.clock.figures())
    self.clock.window()

  def _add(self, name: str, total: float, weight: float) -> None:
    pair = self.sums.setdefault(name, [0.0, 0.0])
    pair[0] += total
    pair[1] += weight

  def _show(self, step: int) -> None:
    phases = self.run.curriculum.phases
    phase = self.run.curriculum.phase_of(step - 1)
    self.reporter.progress(
      step,
      loss=self.clock.loss,
      rate=self.clock.text(),
      phase=f"phase {phase + 1}/{len(phases)}" if len(phases) > 1 else None,
    )

  def evaluate(self, state: TrainState, step: int) -> dict[str, float]:
    """Measures every set; keeps the weights where they are the best so far."""
    results: dict[str, float] = {}
    variables = programs.evaluation_variables(self.run, self.mesh, state)
    # Files of what was found are the last evaluation's.
    place = self.workdir if step >= self.run.curriculum.total_steps else None
    try:
      for evaluator in self.evaluators:
        values = run_and_write(evaluator, variables, self.reporter.message, place)
        self.reporter.scalars(step, values, kind=f"eval/{evaluator.name}")
        self.reporter.message(f"step {step}, {evaluator.name}: {figures(values)}")
        results.update({f"{evaluator.name}/{key}": value for key, value in values.items()})
    except Interrupted:
      # It is done again by the run that goes on from here.
      self.checkpointer.save(state, step, self._kept_sums())
      self._stop(step)
    settings = self.run.settings
    if settings.best_metric is not None and settings.best_metric in results:
      self.checkpointer.save_best(
        variables,
        step,
        results[settings.best_metric],
        higher_is_better=settings.best_is_max,
      )
    return results

  def _kept_sums(self) -> dict[str, list[float]]:
    """What a checkpoint keeps beside the state."""
    return self.sums | ({EARLY_STOP: self.patience.memory} if self.patience is not None else {})

  def _ends_early(self, results: dict[str, float], step: int) -> bool:
    """Counts an evaluation; whether the training ends with it, saying so."""
    metric, early = self.run.settings.best_metric, self.run.settings.early_stop
    if self.patience is None or early is None or metric not in results:
      return False
    if not self.patience.ends_after(results[metric]):
      return False
    self.reporter.message(
      f"ended early at step {step}: {metric} has not improved in {early.patience} evaluation(s)"
    )
    return True

  def _best(
    self, state: TrainState, results: dict[str, float]
  ) -> tuple[TrainState, dict[str, float], str | None]:
    """The state with the best weights as what is evaluated, their measures, and what they are."""
    self.checkpointer.wait()
    try:
      variables, metadata = load_weights(self.workdir / "best")
    except CheckpointError:  # no evaluation gave a number
      return state, results, None
    step, metric = metadata["step"], self.run.settings.best_metric
    if step != int(state.step):
      layout = programs.abstract_state(self.run, self.mesh)[1]
      put = {
        "params": sharding.put_tree(variables["params"], layout.params),
        "batch_stats": sharding.put_tree(variables["batch_stats"], layout.batch_stats),
      }
      state = state.replace(**({"ema": put} if state.ema is not None else put))
      results = evaluate_all(
        self.evaluators,
        put,
        lambda text: self.reporter.message(f"the best weights, of step {step}: {text}"),
        self.workdir,
      )
    averaged = ", averaged over steps" if state.ema is not None else ""
    return state, results, f"trained here{averaged}, the best by {metric}: of step {step}"

  def _stop(self, step: int) -> None:
    self.checkpointer.wait()
    self.reporter.message(
      f"told to stop: step {step} is saved; the same command with the same --workdir goes on"
    )
    raise Preempted(128 + (self.stop.number or signal.SIGTERM))
