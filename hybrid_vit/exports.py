"""Weights alone: written for fine-tuning and evaluation, and read from wherever they lie."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from hybrid_vit import hub
from hybrid_vit.fingerprints import fingerprints, first_difference
from hybrid_vit.hub import METADATA_FILE, WEIGHTS_FOLDER
from hybrid_vit.paths import as_path, is_remote
from hybrid_vit.stored_trees import (
  CheckpointError,
  DamagedError,
  metadata_text,
  names_in,
  on_first_process,
  patiently,
  read_arrays,
  read_metadata,
  reason,
  say_the_first_error_alone,
  steps_in,
  unsliced,
)


def export(directory: Any, variables: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
  """Writes parameters and running statistics alone, for `init_from` and `--mode=evaluate`.

  Whole or absent: the old export is replaced only when the new one is complete, and what a crash
  left of an earlier try does no harm. With several processes every one of them calls this.

  An object store has no renaming of directories: there the old export goes first, and the new one
  counts from the moment at which its metadata.json is written, the last of its files.

  Args:
    directory: where to.
    variables: {"params", "batch_stats"}.
    metadata: what a user of the weights must know: the network's name and arguments, its
      preprocessing, class names, where the weights come from.

  Raises:
    CheckpointError: it cannot be written; the message says why.
  """
  say_the_first_error_alone()
  directory = as_path(directory)
  remote = is_remote(directory)
  partial = directory if remote else _beside(directory, "partial")

  def begin() -> None:
    if remote:
      if METADATA_FILE in names_in(directory):
        (directory / METADATA_FILE).unlink()
      if WEIGHTS_FOLDER in names_in(directory):
        (directory / WEIGHTS_FOLDER).rmtree()
      return
    heal(directory)
    if partial.exists():
      partial.rmtree()

  on_first_process(begin, f"{directory} cannot be written")
  weights = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
  try:
    with ocp.StandardCheckpointer() as writer:
      writer.save(partial / WEIGHTS_FOLDER, unsliced(weights))
  except Exception as error:
    raise CheckpointError(f"{directory} cannot be written: {reason(error)}") from error
  text = metadata_text({**metadata, "fingerprints": fingerprints(weights)})

  def end() -> None:
    if remote:
      (partial / METADATA_FILE).write_text(text)
      return
    with open(partial / METADATA_FILE, "w") as file:
      file.write(text)
      file.flush()
      # A rename can reach the disk before the content of what is renamed.
      os.fsync(file.fileno())
    put_in_place(partial, directory)

  on_first_process(end, f"{directory} cannot be written")


def _beside(directory: epath.Path, word: str) -> epath.Path:
  return directory.parent / f"{directory.name}.{word}"


def put_in_place(new: epath.Path, directory: epath.Path) -> None:
  """Gives a whole local directory the name of another, whose content goes, if it is there."""
  if directory.exists():
    directory.rename(_beside(directory, "old"))
  new.rename(directory)
  if _beside(directory, "old").exists():
    _beside(directory, "old").rmtree()


def heal(directory: epath.Path) -> None:
  """Ends what a crash between the two renames of `put_in_place` interrupted."""
  old = _beside(directory, "old")
  if old.exists():
    if directory.exists():
      old.rmtree()
    else:
      old.rename(directory)


def load_weights(directory: Any, *, raw: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
  """Weights from an export, a checkpoint, a directory of such or a work directory, and their facts.

  A work directory gives its export, unless a newer state shows that the run went on since: then, as
  without an export, its newest state (its best one is in best/, to be named). A state gives its
  averaged variables where it has them. Each process reads for itself; none waits for another.

  Args:
    directory: where they lie; or an address of the hub, "hf:owner/name", of an export that was
      pushed there, or what `hub.fetch` gave of it.
    raw: whether the variables of the last step are wanted though there is an average of them. Only
      whole states have both: exports and best/ are passed over.

  Returns:
    {"params", "batch_stats"} as numpy arrays, and the metadata: of an export what was given to
    `export`, of a state the `info` of the run that saved it, with its step; of a state also
    "config", the run's configuration.

  Raises:
    CheckpointError: nothing usable there; the message lists what was looked for. Or it cannot be
      read, or is damaged; the message says why.
  """
  if isinstance(directory, hub.Fetched) or hub.is_address(directory):
    return _load_from_hub(directory, raw)
  directory = as_path(directory)
  names = patiently(lambda: names_in(directory), str(directory))
  if not names and f"{directory.name}.old" in _names(directory.parent):
    # A crash came between the two renames of an export.
    old = _beside(directory, "old")
    logging.warning("%s was being replaced when the run ended: reading %s", directory, old)
    return load_weights(old, raw=raw)
  if METADATA_FILE in names and WEIGHTS_FOLDER in names and not raw:
    return patiently(lambda: _read_export(directory), str(directory))
  if "state" in names:
    return patiently(lambda: _read_state(directory, raw), str(directory))
  if {"export", "export.old"} & set(names) and not raw:
    exported = load_weights(directory / "export")
    newest = max(_steps(directory / "checkpoints"), default=-1)
    step = exported[1].get("step")
    if step is None or newest <= int(step):
      return exported
    logging.warning(
      "%s is of step %s and passed over: the run went on to step %s",
      directory / "export",
      step,
      newest,
    )
  # A directory of states itself, then those of a work directory.
  places = (directory, directory / "checkpoints", *([] if raw else [directory / "best"]))
  for place in places:
    for step in _steps(place):
      try:
        return load_weights(place / str(step), raw=raw)
      except DamagedError as error:
        logging.warning("passed over: %s", error)
  raise CheckpointError(
    f"no weights in {directory}: looked for an export (weights/ and metadata.json), a checkpoint "
    "(state/ and metadata/) and a work directory (export/, checkpoints/, best/); "
    + (f"there are: {_few(names)}" if names else "there is nothing")
  )


def _load_from_hub(place: Any, raw: bool) -> tuple[dict[str, Any], dict[str, Any]]:
  try:
    fetched = place if isinstance(place, hub.Fetched) else hub.fetch(place)
  except (hub.HubError, ModuleNotFoundError) as error:
    raise CheckpointError(str(error)) from error
  if fetched.path.is_file():
    raise CheckpointError(
      f"{place} holds {fetched.path.name}, a file of another program: `python -m "
      f"hybrid_vit.tools.import_weights --from={place} --to=DIR` makes a directory of it"
    )
  weights, metadata = load_weights(fetched.path, raw=raw)
  source = {**(metadata.get("source") or {}), **fetched.origin}
  return weights, {**metadata, "source": source}


def _few(names: Sequence[str], most: int = 8) -> str:
  return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _names(directory: epath.Path) -> list[str]:
  return patiently(lambda: names_in(directory), str(directory))


def _steps(directory: epath.Path) -> list[int]:
  return patiently(lambda: steps_in(directory), str(directory))


def _read_export(directory: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
  metadata = read_metadata(directory / METADATA_FILE)
  weights = read_arrays(directory / WEIGHTS_FOLDER)
  weights.setdefault("batch_stats", {})
  _verify(weights, metadata.pop("fingerprints"), directory)
  return weights, metadata


def _read_state(directory: epath.Path, raw: bool) -> tuple[dict[str, Any], dict[str, Any]]:
  metadata = read_metadata(directory / "metadata" / "metadata")
  averaged = not raw and any(name.startswith("ema/") for name in metadata["shapes"])
  # The optimizer's state is larger than the weights, and nobody wants it here.
  if averaged:
    branch, prefix = read_arrays(directory / "state", ["ema"])["ema"], "ema/"
  else:
    branch, prefix = read_arrays(directory / "state", ["params", "batch_stats"]), ""
  weights = {"params": branch["params"], "batch_stats": branch.get("batch_stats") or {}}
  expected = {
    name.removeprefix(prefix): value
    for name, value in metadata["fingerprints"].items()
    if name.startswith((f"{prefix}params/", f"{prefix}batch_stats/"))
  }
  _verify(weights, expected, directory)
  info, step = metadata.get("info") or {}, metadata["step"]
  known = {
    **info,
    "step": step,
    "results": info.get("results", {}),
    "weights": f"state of step {step}" + (", averaged over steps" if averaged else ""),
    "config": metadata["config"],
  }
  return weights, known


def _verify(weights: Any, expected: Mapping[str, int], directory: epath.Path) -> None:
  differs = first_difference(weights, expected)
  if differs is not None:
    raise DamagedError(f"{directory}: {differs!r} is not what was saved (its fingerprint differs)")
