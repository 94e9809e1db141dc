"""Trees of arrays in files: what is written beside them, how they are read, what an error means.

A file system fails in passing (a stale handle, a time limit, a lost right); data is damaged for
good. The two must not be taken for one another: what is damaged may be passed over, whatever else
goes wrong is tried again and then told, and nothing is touched. Damage is the verdict of a
fingerprint or of the format alone, and only where every file can be read to its end.

Where a check needs all processes, each of them comes to the same verdict.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import re
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from hybrid_vit.sharding import leaf_names
from hybrid_vit.workdir import explain

# Bytes from which a replicated leaf is written from all devices that have it.
_LARGE_LEAF = 2**22

# Pauses before reading again what could not be read.
RETRY_SECONDS: tuple[float, ...] = (1.0, 4.0, 16.0)

# What the threads of further arrays say when one could not be read or written.
_FOLLOWING = ("Event loop is closed", "Encountered error while reading array")
# TensorStore's own words for what it cannot do with an array.
_OF_AN_ARRAY = re.compile(r"Error (?:reading|writing|opening) ")
_CHECKSUM = "checksum"
# TensorStore's words for data that is not what it should be. Its other words (UNAVAILABLE,
# PERMISSION_DENIED, RESOURCE_EXHAUSTED …) and any error of the system say nothing of the data.
_DAMAGE = re.compile(r"\b(DATA_LOSS|OUT_OF_RANGE|NOT_FOUND|INVALID_ARGUMENT)\b")
_SYSTEM = re.compile(
  r"OS error (?!2:)\d+|os_error_code='(?!2')\d+|\b(UNAVAILABLE|PERMISSION_DENIED|"
  r"UNAUTHENTICATED|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|ABORTED|CANCELLED)\b"
)

T = TypeVar("T")


def _is_new(record: logging.LogRecord) -> bool:
  """False of traces that asyncio and orbax print of an error which its caller is given, too."""
  if record.name == "asyncio":
    text = record.getMessage()
    own = "orbax" in text or _orbax_raised(record)
    return not (own and text.startswith(("Task exception was never", "Future exception was never")))
  return not (record.exc_info and "orbax" in record.pathname)


def _orbax_raised(record: logging.LogRecord) -> bool:
  frames = traceback.walk_tb(record.exc_info[2] if record.exc_info else None)
  return any("orbax" in frame.f_code.co_filename for frame, _ in frames)


# Orbax narrates by absl's logger. Its threads print each error once more for each that waits.
for _name in ("asyncio", "absl"):
  logging.getLogger(_name).addFilter(_is_new)


class CheckpointError(RuntimeError):
  """A checkpoint or export that cannot be used; the message says which and why."""


class DamagedError(CheckpointError):
  """Its data is not what was saved: reading it again will not help."""


class OtherNetworkError(CheckpointError):
  """It is whole and of something else: going back to an older one cannot help."""


def metadata_text(metadata: Mapping[str, Any]) -> str:
  """Metadata as JSON, with a checksum of itself; what JSON does not know becomes text."""
  plain = json.loads(json.dumps(metadata, default=str))
  return json.dumps({**plain, _CHECKSUM: _checksum(plain)}, indent=2) + "\n"


def metadata_tree(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """The same as a dict."""
  return json.loads(metadata_text(metadata))


def read_metadata(path: epath.Path) -> dict[str, Any]:
  """What `metadata_text` gave, from a file.

  Raises:
    DamagedError: it is not there, or not what was written.
    OSError: it cannot be read.
  """
  try:
    metadata = json.loads(path.read_text())
  except FileNotFoundError as error:
    # A directory that cannot be listed raises here: then nothing is known.
    present = ", ".join(sorted(p.name for p in path.parent.parent.iterdir())) or "nothing"
    raise DamagedError(
      f"{path} is not there ({present} beside it), so this is not a whole checkpoint"
    ) from error
  except ValueError as error:
    raise DamagedError(f"{path} is not JSON: {error}") from error
  if not isinstance(metadata, dict):
    raise DamagedError(f"{path} holds {type(metadata).__name__}; a JSON object was expected")
  checksum = metadata.pop(_CHECKSUM, None)
  if checksum is not None and checksum != _checksum(metadata):
    raise DamagedError(
      f"{path} is not what was written (its checksum differs; who edits it by hand takes out the "
      f"line {_CHECKSUM!r})"
    )
  return metadata


def _checksum(plain: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(plain, sort_keys=True).encode())


def unsliced(tree: Any) -> Any:
  """The tree to write, with small replicated leaves as the first device has them; no copy.

  Of a replicated leaf orbax takes a part from each device, by a program for each shape and part:
  hundreds of compilations at the first state. That pays where leaves are large.
  """
  if jax.process_count() > 1:
    return tree

  def of_one_device(leaf: Any) -> Any:
    small = isinstance(leaf, jax.Array) and leaf.nbytes < _LARGE_LEAF
    return leaf.addressable_data(0) if small and leaf.is_fully_replicated else leaf

  return jax.tree.map(of_one_device, tree)


def read_tree(directory: epath.Path, target: Any, names: Sequence[str]) -> Any:
  """A saved tree on the shardings of `target`, each process its own part.

  Args:
    directory: where orbax wrote it.
    target: tree of `jax.ShapeDtypeStruct` with shardings.
    names: paths of the leaves that were saved.

  Raises:
    DamagedError: see the head of this file.
    CheckpointError: it cannot be read; nothing is known about the data.
  """
  # A reader of our own (a manager that has saved is bound to its items' handlers), and of this
  # process alone: it may be the only one that fails, and the others would wait for it in a barrier.
  say_the_first_error_alone()
  own = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
  try:
    with ocp.Checkpointer(ocp.StandardCheckpointHandler(), multiprocessing_options=alone) as reader:
      return reader.restore(directory, args=ocp.args.StandardRestore(target))
  except Exception as error:
    raise _judged(error, directory, names) from error


def read_arrays(directory: epath.Path, branches: Sequence[str] | None = None) -> dict[str, Any]:
  """A saved tree, or the named branches of it, as numpy arrays, whatever mesh it was saved from.

  Raises: as `read_tree`.
  """
  say_the_first_error_alone()
  own = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=alone) as reader:
      tree = dict(reader.metadata(directory).item_metadata.tree)
      if branches is not None:
        tree = {name: tree[name] for name in branches if name in tree}
      as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
      wanted = ocp.args.PyTreeRestore(
        item=tree, restore_args=as_numpy, partial_restore=branches is not None
      )
      return reader.restore(directory, args=wanted)
  except Exception as error:
    raise _judged(error, directory, None) from error


@functools.cache
def say_the_first_error_alone() -> None:
  """Keeps threads of TensorStore from printing that nobody waits for their arrays any more.

  The first array that cannot be read or written ends the loop that waits for all of them; the
  others' threads find it closed, at some later time, and no caller can catch what they print. Of
  those that failed before, asyncio logs that nobody asked.
  """
  before = sys.unraisablehook

  def hook(unraisable: Any) -> None:
    if not str(unraisable.exc_value).startswith(_FOLLOWING):
      before(unraisable)

  sys.unraisablehook = hook
  logging.getLogger("asyncio").addFilter(lambda record: not _follows(record))


def _follows(record: logging.LogRecord) -> bool:
  """Whether asyncio logs a further array that could not be read or written."""
  error = record.exc_info[1] if record.exc_info else None
  return "exception was never retrieved" in record.getMessage() and bool(
    _OF_AN_ARRAY.search(str(error))
  )


def _judged(error: Exception, directory: epath.Path, names: Sequence[str] | None) -> Exception:
  """What an exception of a reader says about the data."""
  if isinstance(error, CheckpointError):
    return error
  chain = list(_chain(error))
  text = " ".join(str(e) for e in chain)
  system = _SYSTEM.search(text) is not None or any(
    isinstance(e, OSError | MemoryError) and not isinstance(e, FileNotFoundError) for e in chain
  )
  if not system:
    try:
      said = any(
        isinstance(e, FileNotFoundError | UnicodeError | json.JSONDecodeError) for e in chain
      )
      if said or _DAMAGE.search(text) or _has_other_leaves(directory, names):
        _read_through(directory)
        return DamagedError(f"{directory}: {reason(error)}")
    except OSError as system_error:
      error = system_error
  return CheckpointError(f"{directory} cannot be read: {reason(error)}")


def _has_other_leaves(directory: epath.Path, names: Sequence[str] | None) -> bool:
  """Whether the format's own list of leaves is unreadable, or not that of what was saved."""
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      tree = reader.metadata(directory).item_metadata.tree
    found = leaf_names(tree)
  except OSError:
    raise
  except Exception:
    return True
  return names is not None and sorted(found) != sorted(names)


def _read_through(directory: epath.Path) -> None:
  """Raises OSError where a file of it cannot be read to its end."""
  for path in directory.iterdir():
    if path.is_dir():
      _read_through(path)
    else:
      with path.open("rb") as file:
        while file.read(1 << 24):
          pass


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def reason(error: BaseException) -> str:
  """The cause of an error, in one line."""
  # Readers wrap the cause in general words; the innermost one names the file.
  innermost = list(_chain(error))[-1]
  lines = (str(innermost) or str(error)).strip().splitlines()
  line = lines[0].split(" [tensorstore_spec")[0] if lines else ""
  line = line if len(line) <= 300 else line[:299] + "…"
  return explain(error) or (
    line if isinstance(innermost, CheckpointError) else f"{type(innermost).__name__}: {line}"
  )


def patiently(read: Callable[[], T], what: str, *, together: bool = False) -> T:
  """`read()`; where it fails for another reason than the data, again after a while.

  Args:
    read: returns, or raises; anything but `DamagedError` and `OtherNetworkError` is tried again.
    what: is read, for messages.
    together: every process calls this, and all of them succeed or fail alike.

  Raises:
    CheckpointError: the last failure.
  """
  for seconds in (*RETRY_SECONDS, None):
    value, error = None, None
    try:
      value = read()
    except CheckpointError as own:
      error = own
    except Exception as own:
      error = CheckpointError(f"{what} cannot be read: {reason(own)}")
      error.__cause__ = own
    kinds = (DamagedError, OtherNetworkError, CheckpointError)
    severity = 0 if error is None else 1 + [isinstance(error, k) for k in kinds].index(True)
    worst = severity
    if together and jax.process_count() > 1:
      worst = int(multihost_utils.process_allgather(np.asarray(severity)).max())
    if not worst:
      return value  # type: ignore[return-value]
    if worst < len(kinds) or seconds is None:
      if error is not None and severity == worst:
        raise error
      raise kinds[worst - 1](f"{what}: another process cannot read its part (its output says why)")
    logging.warning(
      "%s; reading again in %g s", error or f"{what}: another process failed", seconds
    )
    time.sleep(seconds)
  raise AssertionError("unreachable")


def on_first_process(do: Callable[[], None], what: str) -> None:
  """`do()` on process 0 while the others wait; all raise where it fails.

  Raises:
    CheckpointError: `what` failed, and why.
  """
  error: Exception | None = None
  if jax.process_index() == 0:
    try:
      do()
    except Exception as own:
      error = own
  failed = error is not None
  if jax.process_count() > 1:
    failed = bool(multihost_utils.broadcast_one_to_all(np.asarray(failed)))
  if failed:
    why = reason(error) if error is not None else "process 0 says why"
    raise CheckpointError(f"{what}: {why}") from error


def steps_in(directory: epath.Path) -> list[int]:
  """Steps of the states in a directory, the newest first; [] where there is no such directory.

  Raises:
    OSError: it cannot be listed, so that nothing is known.
  """
  return sorted((int(name) for name in names_in(directory) if name.isdecimal()), reverse=True)


def names_in(directory: epath.Path) -> list[str]:
  """Names of what lies in a directory; [] where there is no such directory."""
  try:
    return sorted(path.name for path in directory.iterdir())
  except FileNotFoundError:
    return []
  except NotADirectoryError as error:
    raise OSError(errno.ENOTDIR, "is a file; a directory was expected", str(directory)) from error
