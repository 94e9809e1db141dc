"""Saving and restoring; the one module that touches orbax.

A work directory holds

    checkpoints/<step>/   the last few whole states, for going on
    best/<step>/          the best one by the task's measure, kept apart so that it cannot push the
                          newest out
    export/               parameters and running statistics alone, for fine-tuning and evaluation

Each checkpoint carries a fingerprint of every leaf: orbax notices a truncated file but not a
flipped byte. The fingerprint is a sum modulo 2^32 of the leaf's words, each hashed with its place,
so that it does not depend on how the leaf lies on devices and any single change shows.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from hybrid_vit.sharding import leaf_names

_METADATA = "metadata.json"
_WEIGHTS = "weights"


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be used; the message says which and why."""


def fingerprint(leaf: jax.Array) -> jax.Array:
  """Order-independent uint32 checksum of an array (or typed key) and of each value's place."""
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  if leaf.dtype == jnp.bool_:
    leaf = leaf.astype(jnp.uint8)
  unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
  words = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
  place = jnp.zeros(words.shape, jnp.uint32)
  for axis, size in enumerate(words.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
  # Not a linear function of the words: in a plain weighted sum two flipped signs cancel. Each step
  # (those of MurmurHash3's finalizer) can be undone, so that one changed word always shows.
  mixed = words ^ (place * jnp.uint32(0x9E3779B1))
  mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


@jax.jit
def _fingerprints(leaves: list[jax.Array]) -> list[jax.Array]:
  return [fingerprint(leaf) for leaf in leaves]


def fingerprints(tree: Any) -> dict[str, int]:
  """Fingerprint of every leaf, by its path."""
  values = jax.device_get(_fingerprints(jax.tree.leaves(tree)))
  return {name: int(value) for name, value in zip(leaf_names(tree), values)}


def _verify(tree: Any, expected: Mapping[str, int], where: str) -> None:
  found = fingerprints(tree)
  for name, value in expected.items():
    if found.get(name) != value:
      raise CheckpointError(f"{where}: {name!r} is not what was saved (its fingerprint differs)")


def abstract_like(tree: Any, shardings: Any) -> Any:
  """`jax.ShapeDtypeStruct` with shardings: what `restore` is to fill."""
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    shardings,
  )


class Restored(NamedTuple):
  """A state, the step it is of, and the configuration of the run that saved it."""

  state: Any
  step: int
  run_config: dict[str, Any]


class Checkpointer:
  """Saves a run's states and restores the newest one that is whole.

  Args:
    workdir: directory of the run.
    keep: how many of the newest states to keep.
    every_steps: save when the step is a multiple of it; None: not by steps.
    every_minutes: save when so long has passed since the last one; None: not by the clock.
    run_config: written beside each state.
  """

  def __init__(
    self,
    workdir: str | Path,
    *,
    keep: int = 2,
    every_steps: int | None = None,
    every_minutes: float | None = None,
    run_config: Mapping[str, Any] | None = None,
  ):
    self._workdir = Path(workdir).absolute()
    self._every_steps = every_steps
    self._every_seconds = every_minutes * 60.0 if every_minutes else None
    self._run_config = dict(run_config or {})
    self._last_time = time.monotonic()
    # Two managers: one that keeps the best would delete the newest when it is not among the best.
    self._latest = _manager(self._workdir / "checkpoints", keep)
    self._best = _manager(self._workdir / "best", 1)
    self._best_value = self._read_best_value()

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
    return sorted(self._latest.all_steps(), reverse=True)

  def preempted(self, step: int) -> bool:
    """Whether the cluster has told some process to stop (only under `jax.distributed`)."""
    return jax.process_count() > 1 and self._latest.reached_preemption(step)

  def save(self, state: Any, step: int) -> bool:
    """Starts saving `state`; returns before the files are written. False if it is saved already."""
    if step in self._latest.all_steps():
      return False
    self._last_time = time.monotonic()
    _save(self._latest, step, state, {"config": self._run_config})
    return True

  def save_best(self, state: Any, step: int, value: float) -> bool:
    """Keeps `state` as the best one if `value` is higher than any before (NaN never is)."""
    if not (math.isfinite(value) and (self._best_value is None or value > self._best_value)):
      return False
    if step in self._best.all_steps():
      return False
    self._best_value = value
    _save(self._best, step, state, {"config": self._run_config, "value": value})
    return True

  def restore(self, target: Any) -> Restored | None:
    """The newest whole state, on the shardings of `target`; None where there is none.

    Walks from the newest to the oldest; one that cannot be read, or whose fingerprints differ, is
    passed over with a warning and left where it is, with ".broken" added to its name.

    Raises:
      CheckpointError: states are there but none is whole, or the newest belongs to another network.
    """
    return _restore_newest(self._workdir / "checkpoints", target, self._latest)

  def wait(self) -> None:
    """Until everything is on disk."""
    self._latest.wait_until_finished()
    self._best.wait_until_finished()

  def close(self) -> None:
    """Waits and releases orbax's threads."""
    self.wait()
    self._latest.close()
    self._best.close()

  def _read_best_value(self) -> float | None:
    steps = sorted(self._best.all_steps(), reverse=True)
    for step in steps:
      try:
        return float(_read_metadata(self._workdir / "best" / str(step))["value"])
      except (OSError, KeyError, ValueError, CheckpointError):
        continue
    return None


def _manager(directory: Path, keep: int) -> ocp.CheckpointManager:
  options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
  return ocp.CheckpointManager(directory, options=options)


def _save(manager: ocp.CheckpointManager, step: int, state: Any, extra: dict[str, Any]) -> None:
  shapes = {name: list(leaf.shape) for name, leaf in zip(leaf_names(state), jax.tree.leaves(state))}
  metadata = {"step": step, "fingerprints": fingerprints(state), "shapes": shapes, **extra}
  manager.save(
    step,
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(state), metadata=ocp.args.JsonSave(_jsonable(metadata))
    ),
    force=True,
  )


def _jsonable(value: Any) -> Any:
  return json.loads(json.dumps(value, default=str))


def _read_metadata(checkpoint: Path) -> dict[str, Any]:
  path = checkpoint / "metadata" / "metadata"
  if not path.is_file():
    raise CheckpointError(f"{checkpoint}: no metadata, so it is not a whole checkpoint")
  return json.loads(path.read_text())


def _steps(directory: Path) -> list[int]:
  if not directory.is_dir():
    return []
  return sorted(
    (int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal()), reverse=True
  )


def _restore_newest(
  directory: Path, target: Any, manager: ocp.CheckpointManager | None = None
) -> Restored | None:
  failures = []
  for step in _steps(directory):
    checkpoint = directory / str(step)
    metadata, state, reason = _read_state(checkpoint, target)
    if state is not None:
      try:
        _verify(state, metadata["fingerprints"], str(checkpoint))
        return Restored(state, step, metadata["config"])
      except CheckpointError as error:
        reason = str(error)
    logging.warning("checkpoint %s is broken and passed over: %s", checkpoint, reason)
    failures.append(f"{step}: {reason}")
    _set_aside(checkpoint, manager)
  if failures:
    raise CheckpointError(
      f"no checkpoint in {directory} can be read ({'; '.join(failures)}): remove the directory to "
      "start anew, or put back a copy"
    )
  return None


def _read_state(checkpoint: Path, target: Any) -> tuple[dict[str, Any], Any, str]:
  """(metadata, state, ""), or (…, None, why not); alike on every process."""
  metadata, state, reason = {}, None, ""
  try:
    metadata = _read_metadata(checkpoint)
    _check_same_leaves(metadata["shapes"], target, checkpoint)
    # Its own reader: a manager that has saved is bound to its items' handlers.
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
      state = reader.restore(checkpoint / "state", args=ocp.args.StandardRestore(target))
  except _OtherNetworkError:
    raise
  except Exception as error:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
  if jax.process_count() > 1:
    # A process reads its own shards only: it may be the only one that saw the damage.
    whole = multihost_utils.process_allgather(np.asarray(state is not None))
    if not whole.all():
      state, reason = None, reason or "another process cannot read its part"
  return metadata, state, reason


class _OtherNetworkError(CheckpointError):
  """The checkpoint is whole and is of something else: going back to an older one cannot help."""


def _check_same_leaves(saved: Mapping[str, list[int]], target: Any, checkpoint: Path) -> None:
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
  raise _OtherNetworkError(
    f"{checkpoint} is of another configuration: {example} ({len(missing)} leaves missing, "
    f"{len(surplus)} surplus, {len(other)} of another shape). Give another --workdir, or the "
    "configuration that wrote it (config.json lies in the work directory)"
  )


def _set_aside(checkpoint: Path, manager: ocp.CheckpointManager | None) -> None:
  """Renames a broken checkpoint, so that its step can be saved again; nothing is deleted."""
  if jax.process_index() == 0 and checkpoint.is_dir():
    names = (f"{checkpoint.name}.broken{number or ''}" for number in itertools.count())
    checkpoint.rename(next(p for p in map(checkpoint.with_name, names) if not p.exists()))
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"set aside {checkpoint.name}")
  if manager is not None:
    manager.reload()


def export(
  directory: str | Path, variables: Mapping[str, Any], metadata: Mapping[str, Any]
) -> None:
  """Writes parameters and running statistics alone, for `init_from` and `--mode=evaluate`.

  Whole or absent: the old export is replaced only when the new one is complete. With several
  processes every one of them calls this.

  Args:
    directory: where to.
    variables: {"params", "batch_stats"}.
    metadata: what a user of the weights must know: the network's name and arguments, its
      preprocessing, class names, where the weights come from.
  """
  directory = Path(directory).absolute()
  partial = directory.with_name(directory.name + ".partial")
  if jax.process_index() == 0 and partial.exists():
    shutil.rmtree(partial)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("export begins")
  weights = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
  with ocp.StandardCheckpointer() as writer:
    writer.save(partial / _WEIGHTS, weights)
  found = fingerprints(weights)
  if jax.process_index() == 0:
    text = json.dumps(_jsonable({**metadata, "fingerprints": found}), indent=2)
    (partial / _METADATA).write_text(text + "\n")
    if directory.exists():
      old = directory.with_name(directory.name + ".old")
      directory.rename(old)
      partial.rename(directory)
      shutil.rmtree(old)
    else:
      partial.rename(directory)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("export ends")


def load_weights(directory: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """Weights from an export, a checkpoint or a work directory, and what is known about them.

  A work directory gives its export; without one its best state, else its newest. A state gives its
  averaged variables where it has them.

  Returns:
    {"params", "batch_stats"} as numpy arrays, and the metadata.

  Raises:
    CheckpointError: nothing usable there; the message lists what was looked for.
  """
  directory = Path(directory).expanduser().absolute()
  if (directory / _METADATA).is_file() and (directory / _WEIGHTS).is_dir():
    metadata = json.loads((directory / _METADATA).read_text())
    weights = _read_arrays(directory / _WEIGHTS)
    weights.setdefault("batch_stats", {})
    _verify(weights, metadata["fingerprints"], str(directory))
    return weights, metadata
  if (directory / "state").is_dir():
    metadata = _read_metadata(directory)
    state = _read_arrays(directory / "state")
    branch = state.get("ema") or state
    prefix = "ema/" if state.get("ema") else ""
    weights = {"params": branch["params"], "batch_stats": branch.get("batch_stats") or {}}
    expected = {
      name.removeprefix(prefix): value
      for name, value in metadata["fingerprints"].items()
      if name.startswith((f"{prefix}params/", f"{prefix}batch_stats/"))
    }
    _verify(weights, expected, str(directory))
    return weights, {key: v for key, v in metadata.items() if key != "fingerprints"}
  if (directory / "export").is_dir():
    return load_weights(directory / "export")
  for name in ("best", "checkpoints"):
    for step in _steps(directory / name):
      try:
        return load_weights(directory / name / str(step))
      except CheckpointError as error:
        logging.warning("passed over: %s", error)
  raise CheckpointError(
    f"no weights in {directory}: looked for an export (weights/ and metadata.json), a checkpoint "
    "(state/ and metadata/) and a work directory (export/, best/, checkpoints/)"
  )


def _read_arrays(directory: Path) -> dict[str, Any]:
  """A saved tree as numpy arrays, whatever mesh it was saved from."""
  try:
    with ocp.PyTreeCheckpointer() as reader:
      tree = reader.metadata(directory).item_metadata.tree
      restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
      return reader.restore(directory, restore_args=restore_args)
  except Exception as error:
    raise CheckpointError(f"{directory} cannot be read: {error}") from error
