"""Whole states of a run, saved and restored.

A work directory holds

    checkpoints/<step>/   the last few whole states, for going on
    best/<step>/          the evaluation variables (no optimizer) that measured best, kept apart so
                          that they cannot push the newest out
    export/               the last evaluation variables, see `exports`
    saved_once            a file that says that a state has been whole here

Each state carries a fingerprint of every leaf (`fingerprints`): orbax notices a truncated file but
not a flipped byte. It is set aside (its name ends in ".broken…", nothing is deleted) only on the
verdict of fingerprint or format; whatever else keeps it from being read is tried again and then an
error, and leaves all as it is (`stored_trees`).

In an object store a state is renamed by copying its files one by one; orbax marks a whole one by a
file of its own there.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from hybrid_vit.exports import export as export
from hybrid_vit.exports import load_weights as load_weights
from hybrid_vit.fingerprints import fingerprints, first_difference
from hybrid_vit.fingerprints import first_nonfinite as first_nonfinite
from hybrid_vit.paths import as_path
from hybrid_vit.sharding import leaf_names
from hybrid_vit.stored_trees import (
  CheckpointError,
  DamagedError,
  OtherNetworkError,
  metadata_tree,
  names_in,
  on_first_process,
  patiently,
  read_metadata,
  read_tree,
  reason,
  say_the_first_error_alone,
  steps_in,
  unsliced,
)


def abstract_like(tree: Any, shardings: Any) -> Any:
  """`jax.ShapeDtypeStruct` with shardings: what `restore` is to fill."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    shardings,
  )


# With it a directory of metrics and no state has lost its states; without it, the run ended before
# its first one was whole, and begins anew unasked.
_SAVED_ONCE = "saved_once"


class Restored(NamedTuple):
  """A state, and what was saved beside it.

  Attributes:
    state: the state, on the shardings asked for.
    step: that it is of.
    run_config: the configuration of the run that saved it.
    sums: the log's sums at that step, as they were given to `save`.
    info: what was said of the weights, e.g. class names.
  """

  state: Any
  step: int
  run_config: dict[str, Any]
  sums: dict[str, Any]
  info: dict[str, Any]


class Checkpointer:
  """Saves a run's states and restores the newest one that is whole.

  Args:
    workdir: directory of the run, local or in an object store.
    keep: how many of the newest states to keep.
    every_steps: save when the step is a multiple of it; None: not by steps.
    every_minutes: save when so long has passed since the last one; None: not by the clock.
    keep_best: whether `save_best` keeps anything.
    run_config: written beside each state.
    info: what a user of the weights must know (network, arguments, preprocessing, class names …),
      written beside each state; `load_weights` gives it back.

  Raises:
    CheckpointError: the directory cannot be listed or made.
  """

  def __init__(
    self,
    workdir: Any,
    *,
    keep: int = 2,
    every_steps: int | None = None,
    every_minutes: float | None = None,
    keep_best: bool = True,
    run_config: Mapping[str, Any] | None = None,
    info: Mapping[str, Any] | None = None,
  ):
    say_the_first_error_alone()
    self._workdir = as_path(workdir)
    self._keep = keep
    self._every_steps = every_steps
    self._every_seconds = every_minutes * 60.0 if every_minutes else None
    self._beside = {"config": dict(run_config or {}), "info": dict(info or {})}
    self._last_time = time.monotonic()
    # Two managers: one that keeps the best would delete the newest when it is not among the best.
    self._latest = _manager(self._workdir / "checkpoints", keep)
    self._saved_once = self._failed = False
    self._best: ocp.CheckpointManager | None = None
    self._best_value: tuple[float, bool] | None = None
    self._measured: int | None = None  # the step that the value was read of
    # The directories are listed here; from then on what is in them is known.
    self._steps = set(_listed(self._workdir / "checkpoints"))
    self._best_steps: set[int] = set()
    if keep_best:
      self._best = _manager(self._workdir / "best", 1)
      self._best_steps = set(_listed(self._workdir / "best"))
      self._best_value = self._read_best_value()
    self._note_saved(self._steps)

  def should_save(self, step: int, *, ask_clock: bool) -> bool:
    """Whether it is time; the same on every process.

    Args:
      step: finished steps.
      ask_clock: whether to look at the clock too. With several processes that is a message, since
        their clocks differ and process 0 decides; so ask now and then.
    """
    if self._every_steps and step % self._every_steps == 0:
      return True
    if self._every_seconds is None or not ask_clock:
      return False
    due = time.monotonic() - self._last_time >= self._every_seconds
    if jax.process_count() > 1:
      due = bool(multihost_utils.broadcast_one_to_all(np.asarray(due)))
    return due

  def steps(self) -> list[int]:
    """Steps of the kept states, the newest first."""
    return sorted(self._steps, reverse=True)

  def preempted(self, step: int) -> bool:
    """Whether the cluster has told some process to stop (only under `jax.distributed`)."""
    return jax.process_count() > 1 and self._latest.reached_preemption(step)

  def save(self, state: Any, step: int, sums: Mapping[str, Any] | None = None) -> bool:
    """Starts saving `state`; returns before the files are written. False if it is saved already.

    Args:
      state: tree of arrays.
      step: that it is of.
      sums: numbers (in lists and dicts, what JSON knows) that are given back by `restore`.

    Raises:
      CheckpointError: it, or the one before it, cannot be written; the message says why.
    """
    if step in self._steps:
      return False
    self._last_time = time.monotonic()
    self._write(self._latest, step, state, {"sums": dict(sums or {})})
    # The one before is on disk when the next is begun.
    self._note_saved(self._steps)
    self._steps = set(sorted({*self._steps, step})[-self._keep :])
    return True

  def save_best(self, variables: Any, step: int, value: float, higher_is_better: bool) -> bool:
    """Keeps `variables` if `value` is better than any before, in earlier runs here too.

    Args:
      variables: {"params", "batch_stats"}: the evaluation variables, not a whole state.
      step: that they are of.
      value: of the measure; NaN and infinities never are the best.
      higher_is_better: its direction. A value of a measure of the other direction does not count.

    Returns:
      Whether they are kept; never where `keep_best` is off.
    """
    if self._best is None or not math.isfinite(value) or step in self._best_steps:
      return False
    if self._best_value is not None and self._best_value[1] == higher_is_better:
      before = self._best_value[0]
      if not (value > before if higher_is_better else value < before):
        return False
    weights = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    more = {"value": value, "higher_is_better": higher_is_better}
    # The manager keeps the newest. One of a later step is there where the run went on from an older
    # state than the best.
    self._set_best_aside([later for later in self._best_steps if later > step])
    self._write(self._best, step, weights, more)
    self._best_steps, self._best_value = {step}, (value, higher_is_better)
    return True

  def restore(self, target: Any, *, begin_anew: bool = False) -> Restored | None:
    """The newest whole state, on the shardings of `target`; None in a new work directory.

    Walks from the newest to the oldest; one that is damaged is passed over with a warning and left
    where it is, with ".broken" added to its name. Older ones than are to be kept, which a run that
    was killed as it saved had not come to delete, go.

    Args:
      target: see `abstract_like`; or `(step) → target`, where it differs from step to step.
      begin_anew: whether None is the answer too where an earlier run has left something but no
        whole state. Its best state is set aside then.

    Raises:
      CheckpointError: a state cannot be read (nothing is set aside then); or none is whole; or the
        newest belongs to another network; or an earlier run has left metrics, a best state or set
        aside states, and going on would begin anew. Metrics alone, of a run that ended before its
        first state was whole, are no reason (`reporting` keeps a copy of them).
    """
    directory = self._workdir / "checkpoints"
    found, failures = _newest_whole(directory, target, self._set_aside)
    if found is not None:
      self._drop_surplus()
      return found
    left = patiently(lambda: self._left_by_others(failures), str(self._workdir), together=True)
    if left and not begin_anew:
      raise CheckpointError(
        f"no checkpoint in {directory} can be read, and {self._workdir} is not new: it holds "
        f"{left}. Put back a copy of a checkpoint, or give another work directory, or say that the "
        "run is to begin anew in this one"
      )
    self._set_best_aside(sorted(self._best_steps))
    return None

  def wait(self) -> None:
    """Until everything is on disk.

    Raises:
      CheckpointError: something cannot be written; the message says why.
    """
    try:
      for manager in (self._latest, self._best):
        if manager is not None:
          manager.wait_until_finished()
      self._note_saved(self._steps)
    except Exception as error:
      raise self._unsaved(error) from error

  def close(self) -> None:
    """Waits and releases orbax's threads.

    Raises:
      CheckpointError: as `wait`.
    """
    failure: CheckpointError | None = None
    try:
      self.wait()
    except CheckpointError as error:
      failure = error
    for manager in (self._latest, self._best):
      try:
        if manager is not None:
          manager.close()
      except Exception as error:
        # Of what was told above; or of the other manager.
        failure = failure or self._unsaved(error)
    if failure is not None:
      raise failure

  def _unsaved(self, error: Exception) -> CheckpointError:
    self._failed = True
    unsaved = CheckpointError(f"a state cannot be saved in {self._workdir}: {reason(error)}")
    unsaved.__cause__ = error
    return unsaved

  def _write(
    self, manager: ocp.CheckpointManager, step: int, tree: Any, more: Mapping[str, Any]
  ) -> None:
    shapes = {name: list(leaf.shape) for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree))}
    beside = {"step": step, "fingerprints": fingerprints(tree), "shapes": shapes}
    metadata = metadata_tree({**beside, **self._beside, **more})
    items = ocp.args.Composite(
      state=ocp.args.StandardSave(unsliced(tree)), metadata=ocp.args.JsonSave(metadata)
    )
    if jax.process_count() > 1:
      # Managers name their barriers alike: of two that write at once both would fail.
      self.wait()
    try:
      manager.save(step, args=items, force=True)
    except Exception as error:
      self._failed = True
      raise CheckpointError(
        f"step {step} cannot be saved in {manager.directory}: {reason(error)}"
      ) from error

  def _note_saved(self, steps: set[int]) -> None:
    """Remembers that a state has been whole here, once."""
    if not steps or self._failed or self._saved_once or jax.process_index():
      return
    path = self._workdir / _SAVED_ONCE
    if not path.exists():
      path.write_text("A state of this run has been whole in checkpoints/.\n")
    self._saved_once = True

  def _set_best_aside(self, steps: list[int]) -> None:
    if self._best is None or not steps:
      return
    self._best.wait_until_finished()
    for step in steps:
      _rename(self._workdir / "best" / str(step), "earlier")
    self._best.reload()
    self._best_steps.difference_update(steps)
    self._best_value = self._best_value if self._best_steps else None

  def _set_aside(self, checkpoint: epath.Path) -> None:
    _rename(checkpoint, "broken")
    self._latest.reload()
    self._steps.discard(int(checkpoint.name))

  def _drop_surplus(self) -> None:
    """Deletes what a manager deletes once a newer one is whole, where a kill came between."""
    surplus = [(self._latest, self._steps, step) for step in sorted(self._steps)[: -self._keep]]
    # Of the best states the newest is the best, where it says how good it is.
    if self._best is not None and self._measured == max(self._best_steps, default=None):
      surplus += [(self._best, self._best_steps, step) for step in sorted(self._best_steps)[:-1]]
    for manager, steps, step in surplus:
      try:
        manager.delete(step)
      except Exception as error:
        raise CheckpointError(
          f"step {step} cannot be deleted from {manager.directory}: {reason(error)}"
        ) from error
      steps.discard(step)

  def _left_by_others(self, failures: list[str]) -> str:
    """What an earlier run has left here, in words; "" where there is nothing."""
    left = []
    aside = [n for n in names_in(self._workdir / "checkpoints") if ".broken" in n]
    if failures or aside:
      why = f" ({'; '.join(failures)})" if failures else ""
      left.append(f"checkpoints that were set aside{why}")
    metrics, names = self._workdir / "metrics.jsonl", names_in(self._workdir)
    if {metrics.name, _SAVED_ONCE} <= set(names) and metrics.stat().length:
      left.append("the metrics of an earlier run (metrics.jsonl)")
    if self._best_steps:
      left.append(f"its best state (step {max(self._best_steps)})")
    return " and ".join(left)

  def _read_best_value(self) -> tuple[float, bool] | None:
    """Value and direction of the best state here, so that a later run measures up to it."""
    for step in sorted(self._best_steps, reverse=True):
      path = self._workdir / "best" / str(step)
      try:
        metadata = patiently(lambda path=path: _metadata_of(path), str(path))  # type: ignore[misc]
        value = float(metadata["value"]), bool(metadata.get("higher_is_better", True))
        self._measured = step
        return value
      except (DamagedError, KeyError) as error:
        logging.warning("%s does not say how good it is: %s", path, error)
    return None


def restore_from(directory: Any, target: Any) -> Restored:
  """Another run's whole state, to go on with in a new work directory.

  Args:
    directory: a work directory (its newest whole state is taken; damaged ones are passed over with
      a warning) or one checkpoint. Nothing in it is changed.
    target: as for `Checkpointer.restore`.

  Raises:
    CheckpointError: no whole state there, or one of another network, or it cannot be read.
  """
  directory = as_path(directory)
  names = patiently(lambda: names_in(directory), str(directory), together=True)
  if "state" in names:
    return _restore_one(directory, target)
  found, failures = _newest_whole(directory / "checkpoints", target, lambda _: None)
  if found is None:
    why = f" ({'; '.join(failures)})" if failures else ""
    raise CheckpointError(
      f"no whole state in {directory}: looked for a checkpoint (state/ and metadata/) and a work "
      f"directory (checkpoints/){why}"
    )
  return found


def _manager(directory: epath.Path, keep: int) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
  try:
    return ocp.CheckpointManager(directory, options=options)
  except OSError as error:
    raise CheckpointError(f"{directory} cannot be used: {reason(error)}") from error


def _listed(directory: epath.Path) -> list[int]:
  return patiently(lambda: steps_in(directory), str(directory))


def _metadata_of(checkpoint: epath.Path) -> dict[str, Any]:
  return read_metadata(checkpoint / "metadata" / "metadata")


def _newest_whole(
  directory: epath.Path, target: Any, set_aside: Any
) -> tuple[Restored | None, list[str]]:
  """The newest whole state, and why each newer one is not."""
  failures: list[str] = []
  for step in patiently(lambda: steps_in(directory), str(directory), together=True):
    checkpoint = directory / str(step)
    try:
      return _restore_one(checkpoint, target), failures
    except DamagedError as error:
      logging.warning("checkpoint %s is broken and passed over: %s", checkpoint, error)
      failures.append(f"{step}: {error}")
      set_aside(checkpoint)
  return None, failures


def _restore_one(checkpoint: epath.Path, target: Any) -> Restored:
  def read() -> tuple[dict[str, Any], Any]:
    metadata = _metadata_of(checkpoint)
    wanted = target(int(metadata["step"])) if callable(target) else target
    _check_same_leaves(metadata["shapes"], wanted, checkpoint)
    return metadata, read_tree(checkpoint / "state", wanted, list(metadata["shapes"]))

  metadata, state = patiently(read, str(checkpoint), together=True)
  # A computation of all processes, and so outside of what one of them may have to try again.
  differs = first_difference(state, metadata["fingerprints"])
  if differs is not None:
    raise DamagedError(f"{checkpoint}: {differs!r} is not what was saved (its fingerprint differs)")
  return Restored(
    state,
    int(metadata["step"]),
    metadata["config"],
    metadata.get("sums", {}),
    metadata.get("info", {}),
  )


def _check_same_leaves(saved: Mapping[str, list[int]], target: Any, checkpoint: epath.Path) -> None:
  wanted = {
    name: list(leaf.shape) for name, leaf in zip(leaf_names(target), jax.tree.leaves(target))
  }
  missing = [name for name in wanted if name not in saved]
  surplus = [name for name in saved if name not in wanted]
  other = [name for name in wanted if name in saved and saved[name] != wanted[name]]
  if not (missing or surplus or other):
    return
  if missing:
    example = f"it lacks {missing[0]!r}"
  elif surplus:
    example = f"it has {surplus[0]!r} besides"
  else:
    example = f"{other[0]!r} has shape {saved[other[0]]} in it and {wanted[other[0]]} here"
  raise OtherNetworkError(
    f"{checkpoint} is of another configuration: {example} ({len(missing)} leaves missing, "
    f"{len(surplus)} surplus, {len(other)} of another shape). Give another --workdir, or the "
    "configuration that wrote it (config.json lies in the work directory)"
  )


def _rename(checkpoint: epath.Path, word: str) -> None:
  """Adds ".<word>" to a checkpoint's name, so that its step can be saved again."""

  def rename() -> None:
    names = set(names_in(checkpoint.parent))
    if checkpoint.name in names:
      candidates = (f"{checkpoint.name}.{word}{number or ''}" for number in itertools.count())
      checkpoint.rename(checkpoint.parent / next(n for n in candidates if n not in names))

  on_first_process(rename, f"setting {checkpoint} aside")
