"""Commands that are killed while they write: what a later reader finds, and what they do again.

    python -m tests.endurance.writers --place=DIR --out=docs/results/reliability/writers

Each command writes once undisturbed, with its operations on files counted. Then it is killed
before one of them (kill -9), at so many bytes of a file (SIGXFSZ, which like kill -9 leaves nothing
to be tidied: this way one meets the writers in C++ and Rust, too), or so long after the first.
A later process must find what was there before, or nothing, or all of the new; and the same command
again must succeed and leave what an undisturbed one leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pickle
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit.tables import write_table
from tests.endurance import kills
from tests.endurance.written_files import WRITERS, Writer

# What changes files, by Python's names for it (`sys.audit`).
_OPERATIONS = (
  "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"
)  # fmt: skip
FAULTS = ("mixed", "lost", "nameless", "stuck")


@dataclasses.dataclass(frozen=True)
class Kill:
  """When a command is killed; one of the three is given.

  Attributes:
    operation: before this one, from 0.
    size: when a file grows beyond so many bytes.
    delay: seconds after the first operation.
  """

  operation: int | None = None
  size: int | None = None
  delay: float | None = None

  def __str__(self) -> str:
    if self.operation is not None:
      return f"operation {self.operation}"
    return f"byte {self.size}" if self.size is not None else f"{1000 * (self.delay or 0):.0f} ms"


class _Watch:
  """Sees a process's operations below a directory, and ends the process at one of them."""

  def __init__(self, place: Path, kill: Kill):
    self.operations: list[str] = []
    self.times: list[float] = []
    self._place, self._kill = str(place), kill
    if kill.size is not None:
      signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
      resource.setrlimit(resource.RLIMIT_FSIZE, (kill.size, resource.RLIM_INFINITY))
    sys.addaudithook(self._see)

  def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
      path, _, flags = arguments
      if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    elif event in _OPERATIONS:
      path = arguments[0]
    else:
      return
    if not isinstance(path, str | bytes | os.PathLike):
      return
    if not os.path.abspath(os.fsdecode(path)).startswith(self._place):
      return
    if self._kill.operation == len(self.operations):
      os.kill(os.getpid(), signal.SIGKILL)
    if self._kill.delay is not None and not self.operations:
      timer = threading.Timer(self._kill.delay, os.kill, (os.getpid(), signal.SIGKILL))
      timer.daemon = True
      timer.start()
    self.operations.append(event)
    self.times.append(time.monotonic())


def in_child(do: Callable[[], Any]) -> tuple[int, Any]:
  """A function in a fork of this process: exit status (negative: a signal), and its value."""
  reads, writes = os.pipe()
  pid = os.fork()
  if not pid:
    os.close(reads)
    status = 1
    with contextlib.suppress(BaseException):
      try:
        value = do()
        status = 0
      except BaseException:
        value = traceback.format_exc()
      with os.fdopen(writes, "wb") as file:
        pickle.dump(value, file)
    os._exit(status)
  os.close(writes)
  with os.fdopen(reads, "rb") as file:
    content = file.read()
  status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
  return status, pickle.loads(content) if content else None


def found(writer: Writer, there: Path) -> tuple[str, Any]:
  """("read", what is read) or ("refused" or "nameless", the error)."""
  try:
    return "read", writer.read(there)
  except Exception as error:
    named = any(part in str(error) for part in (str(there), writer.target))
    return ("refused" if named else "nameless"), f"{type(error).__name__}: {error}"


def left_beside(there: Path, whole: Sequence[str]) -> list[str]:
  """What lies in a directory and the directories in it, and does not after an undisturbed end."""
  return [name for name in _names(there) if name not in whole]


def _names(there: Path) -> list[str]:
  # Deeper lie only orbax's files, whose names are drawn.
  found = (path for depth in ("*", "*/*", "*/*/*") for path in there.glob(depth))
  return sorted(path.relative_to(there).as_posix() for path in found)


@dataclasses.dataclass
class Trial:
  """A command, over something earlier or nothing, whose undisturbed run is known.

  Attributes:
    name: of the command.
    writer: the command.
    place: a directory, of which "given" holds the inputs, which are made where it is missing.
    over: whether something earlier is there.
  """

  name: str
  writer: Writer
  place: Path
  over: bool

  def __post_init__(self) -> None:
    self.given, self.there = self.place / "given", self.place / "there"
    self.before = self.place / "before"
    shutil.rmtree(self.before, ignore_errors=True)
    for path in (self.given, self.before):
      path.mkdir(parents=True, exist_ok=True)
    self._begin()
    status, told = in_child(self._whole)
    if status:
      raise RuntimeError(f"{self.name}: an undisturbed run ends with status {status}: {told}")
    self.old, self.new, self.operations, self.seconds, self.sizes, self.whole = told

  def _begin(self) -> None:
    shutil.rmtree(self.there, ignore_errors=True)
    shutil.copytree(self.before, self.there)

  def _whole(self) -> Any:
    if not any(self.given.iterdir()):
      self.writer.make(self.given)
    if self.over:
      self.writer.write(self.given, self.before, 0)
      self._begin()
    # Whoever reads what is kept of a folder or a tar keeps it.
    old = found(self.writer, self.there) if self.over else ("refused", "")
    earlier = set(self.there.rglob("*"))
    watch = _Watch(self.there, Kill())
    self.writer.write(self.given, self.there, 1)
    seconds = watch.times[-1] - watch.times[0]
    files = [path for path in self.there.rglob("*") if path.is_file() and path not in earlier]
    files = files or [path for path in self.there.rglob("*") if path.is_file()]
    sizes = sorted(path.stat().st_size for path in files)
    new = found(self.writer, self.there)
    if new[0] != "read" or (self.over and (old[0] != "read" or old == new)):
      raise RuntimeError(f"what is written cannot be told from what was before: {old}, {new}")
    return old, new, len(watch.operations), seconds, sizes, _names(self.there)

  def kills(self, most: int, rng: np.random.Generator) -> list[Kill]:
    """Before operations, all or so many of them; at bytes of files; after delays."""
    number = min(most, self.operations)
    places = np.unique(np.linspace(0, self.operations - 1, number).round().astype(int))
    largest = self.sizes[-1]
    sizes = sorted({max(1, int(largest * part)) for part in (0.05, 0.5, 0.95)})
    return [
      *(Kill(operation=int(place)) for place in places),
      *(Kill(size=size) for size in sizes),
      *(Kill(delay=float(rng.uniform(0, self.seconds))) for _ in range(2)),
    ]

  def one(self, kill: Kill) -> dict[str, Any] | None:
    """The row of a kill; None where the command ended before it."""
    self._begin()

    def write() -> None:
      _Watch(self.there, kill)
      self.writer.write(self.given, self.there, 1)

    status, told = in_child(write)
    if status == 0:
      return None
    if status not in (-signal.SIGKILL, -signal.SIGXFSZ):
      raise RuntimeError(f"{self.name}, {kill}: ended with status {status}: {told}")
    left = left_beside(self.there, self.whole)

    def later() -> tuple[tuple[str, Any], str, tuple[str, Any], list[str]]:
      first, error = found(self.writer, self.there), ""
      try:
        self.writer.write(self.given, self.there, 1)
      except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
      return first, error, found(self.writer, self.there), left_beside(self.there, self.whole)

    status, told = in_child(later)
    if status:
      raise RuntimeError(f"{self.name}, {kill}: reading it ends with status {status}: {told}")
    first, error, second, stayed = told
    if first == self.new:
      outcome = "new"
    elif first[0] == "read":
      outcome = "earlier" if self.over and first == self.old else "mixed"
    elif first[0] == "nameless":
      outcome = "nameless"
    else:
      outcome = "lost" if self.over else "nothing"
    # A command that takes only a new directory may say that the new is there.
    stuck = second != self.new or (error and not (outcome == "new" and self.writer.only_new))
    return {
      "file": self.name, "over": int(self.over), "killed_at": str(kill), "found": outcome,
      "half_written": len(left), "again": "stuck" if stuck else "done", "stayed": len(stayed),
      "told": " ".join((error or (first[1] if first[0] != "read" else "")).split())
      .replace(str(self.place), "…")[:200],
    }  # fmt: skip


def trials(place: Path, writers: Mapping[str, Writer]) -> list[tuple[str, Writer, Path, bool]]:
  """Every command, over nothing and, where it may, over something earlier."""
  return [
    # Those with the same inputs share them.
    (name, writer, place / writer.make.__name__.strip("_"), over)
    for name, writer in writers.items()
    for over in ((False,) if writer.only_new else (False, True))
  ]


def main(arguments: Sequence[str] | None = None) -> int:
  """The kills; 1 where one left what it should not."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--most", type=int, default=12, help="operations before which one is killed")
  parser.add_argument("--only", help="part of commands' names; the others' rows stay")
  parser.add_argument("--place", type=Path, required=True, help="of the files; emptied")
  parser.add_argument("--out", type=Path, required=True, help="of .csv and .md, without ending")
  options = parser.parse_args(arguments)
  rng = np.random.default_rng(options.seed)
  rows: list[dict[str, Any]] = []
  if options.only:
    rows = kills.earlier(options.out.with_name(options.out.name + ".csv"))
    rows = [row for row in rows if options.only not in row["file"]]
  shutil.rmtree(options.place, ignore_errors=True)
  for name, writer, place, over in trials(options.place.resolve(), WRITERS):
    if options.only and options.only not in name:
      continue
    trial = Trial(name, writer, place, over)
    for kill in trial.kills(options.most, rng):
      row = trial.one(kill)
      if row is None:
        continue
      print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
      rows.append(row)
      write_table(options.out, rows)
  bad = sum(row["found"] in FAULTS or row["again"] in FAULTS for row in rows)
  print(f"{len(rows)} kills, {bad} bad")
  return int(bad > 0)


if __name__ == "__main__":
  sys.exit(main())
