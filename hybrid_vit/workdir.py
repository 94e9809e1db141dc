"""The directory of a run: its own name, one process at a time, and errors of the disk in words."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from hybrid_vit.paths import as_path, is_remote

try:
  import fcntl
except ImportError:  # not on Windows
  fcntl = None  # type: ignore[assignment]

_LOCK = "lock"

_CAUSES = {
  errno.ENOSPC: ("the disk is full", "free some space, or put it on another disk"),
  errno.EDQUOT: ("your quota of that disk is used up", "free some space, or put it elsewhere"),
  errno.EFBIG: (
    "a file grows beyond what the file system or a limit of the system allows",
    "raise the limit (ulimit -f), or put it on another disk",
  ),
  errno.EROFS: ("that file system can only be read", "choose a place that can be written"),
  errno.EACCES: ("you have no right to it", "change its permissions, or choose another place"),
  errno.EPERM: ("you have no right to it", "change its permissions, or choose another place"),
  errno.ESTALE: ("the network file system lost it (a stale handle)", "mount it anew, try again"),
  errno.EIO: ("the disk or the network under it fails", "look at the system's log, try again"),
  errno.ETIMEDOUT: ("the file system did not answer in time", "try again"),
  errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
  errno.ENAMETOOLONG: ("its name is too long", "choose a shorter one"),
}
# How TensorStore writes an error of the system, in its older and newer versions.
_OS_ERROR = re.compile(r"(?:OS error |os_error_code=')(\d+)")
# How JAX's coordination service, and Gloo between CPUs, say that a process does not answer.
_GONE = re.compile(
  r"(?i)heartbeat timeout|CoordinationService|tasks are unhealthy|"
  r"gloo.*(?:connection (?:closed|reset)|timed out|socket)"
)
_QUOTED_PATH = re.compile(r"\"(/[^\"]*)\"|'(/[^']*)'")


class WorkdirError(RuntimeError):
  """A work directory that cannot be used; the message says why, and what to do."""


def new_workdir(name: str, parent: Any = "runs") -> epath.Path:
  """Makes `runs/NAME-YYYYmmdd-HHMMSS`, with "-2", "-3" … where that is taken.

  It is made exclusively, so that of two runs that begin in one second each has its own.

  Raises:
    WorkdirError: it cannot be made.
  """
  parent = as_path(parent)
  base = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
  try:
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
      path = parent / (base if number == 1 else f"{base}-{number}")
      try:
        path.mkdir()
        return path
      except FileExistsError:
        continue
  except OSError as error:
    raise WorkdirError(
      f"the work directory {parent / base} cannot be made: {explain(error) or error}. Give "
      "--workdir"
    ) from error
  raise WorkdirError(f"{parent} holds a thousand directories {base}-*: give --workdir")


@contextlib.contextmanager
def lock(workdir: Any, *, process_index: int = 0) -> Iterator[None]:
  """Holds a work directory for this run alone; makes it where it is missing.

  The system's lock on `workdir/lock` ends with the process, however that ends; host, process and
  start time stand in the file for the message. Of a distributed run process 0 holds it for all. Not
  for object stores, which have no locks: there nothing keeps two runs apart.

  Args:
    workdir: the directory.
    process_index: of this process; only 0 locks.

  Raises:
    WorkdirError: another process holds it, or it cannot be written.
  """
  workdir = as_path(workdir)
  if process_index or is_remote(workdir) or fcntl is None:
    yield
    return
  path, made = workdir / _LOCK, not workdir.exists()
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
  except OSError as error:
    raise WorkdirError(
      f"work directory {workdir} cannot be used: {explain(error) or error}"
    ) from error
  try:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise WorkdirError(
        f"work directory {workdir} is in use by {_holder(file)}: two runs in one directory destroy "
        "each other's files. Stop that run, or give another --workdir"
      ) from None
    except OSError as error:
      # Some network file systems know no locks: better to run than to refuse.
      if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
        raise
    who = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    try:
      os.ftruncate(file, 0)
      os.pwrite(file, (json.dumps(who) + "\n").encode(), 0)
    except OSError as error:
      error.filename = error.filename or os.fspath(path)
      raise WorkdirError(
        f"work directory {workdir} cannot be written: {explain(error) or error}"
      ) from error
    yield
  finally:
    # Before the lock is given back: nobody else can be holding a file that is about to go.
    if made:
      _remove_if_bare(workdir)
    os.close(file)


def _remove_if_bare(workdir: epath.Path) -> None:
  """Takes away a directory that a run made, failed in at once, and left nothing in."""
  with contextlib.suppress(OSError):
    if [path.name for path in workdir.iterdir()] == [_LOCK]:
      (workdir / _LOCK).unlink()
      workdir.rmdir()


def _holder(file: int) -> str:
  try:
    who = json.loads(os.pread(file, 4096, 0))
    return f"process {who['pid']} on {who['host']} (since {who['since']})"
  except (OSError, ValueError, KeyError, TypeError):
    return "another process"


@contextlib.contextmanager
def naming(path: Any) -> Iterator[None]:
  """Gives errors of the system this path where they have none, as those of writing have."""
  try:
    yield
  except OSError as error:
    if error.errno is not None and error.filename is None:
      error.filename = os.fspath(path)
    raise


def explain(error: BaseException) -> str | None:
  """An error of disk, file system, home directory or another process as one sentence, else None.

  It names the path where the error knows it, and what to do. The causes of the error are looked at
  too, as are errors of the system that another library wrote into its text.
  """
  seen: BaseException | None = error
  while seen is not None:
    text = str(seen)
    if isinstance(seen, RuntimeError | KeyError) and (
      "determine home directory" in text or text == "'HOME'"
    ):
      return "the home directory is not known: set HOME, or give paths without ~"
    if _GONE.search(text):
      return (
        "another process of this run is gone, or does not answer; its output says why. The same "
        "command in all of them goes on from the last checkpoint"
      )
    number, path = None, None
    if isinstance(seen, OSError):
      number, path = seen.errno, seen.filename
    found = _OS_ERROR.search(text)
    if number is None and found:
      number = int(found[1])
    if number in _CAUSES:
      cause, remedy = _CAUSES[number]
      if path is None and (quoted := _QUOTED_PATH.search(text)):
        path = quoted[1] or quoted[2]
      name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
      place = f"{name}: " if name else ""
      return f"{place}{cause} ({errno.errorcode[number]}): {remedy}"
    seen = seen.__cause__ or seen.__context__
  return None
