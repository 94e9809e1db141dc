"""Processes that read and transform examples, where threads wait for the interpreter's lock.

Each thread of the loader hands one example to one process and waits for it without the lock. The
process is a fresh interpreter, never a fork: JAX's threads would not survive that. It opens the
source for itself, and writes an example's row into memory that it shares with the loader and that
has no name: nothing is left behind, however the two end. A process ends when its pipe does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import mmap
import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from typing import Any, Protocol

import numpy as np

from hybrid_vit.data import spec
from hybrid_vit.data.errors import CorruptExampleError
from hybrid_vit.data.examples import StoppedError, Transform, read_row
from hybrid_vit.data.sources import Source
from hybrid_vit.data.transform_registry import REGISTRY

# Rows of arrays begin at multiples of so many bytes.
_ALIGNMENT = 64


class Readable(Protocol):
  """What is asked of a `loader.Reading`."""

  @property
  def transform(self) -> Transform: ...

  @property
  def fields(self) -> Mapping[str, spec.Field]: ...


class ReadingProcesses:
  """So many processes; several threads may ask.

  Args:
    count: of processes.
    source: tells the names of examples.
    opens: gives each process its source; must be something that pickle can hand over, and a
      partial of a function of a module can.
    readings: how examples are read; what is asked for later is one of these.

  Raises:
    ValueError: `opens` or a transform cannot be handed to another process, or no Linux.
  """

  def __init__(
    self,
    count: int,
    source: Source,
    opens: Callable[[], Source],
    readings: Sequence[Readable],
  ):
    if not hasattr(os, "memfd_create"):
      raise ValueError(
        f"num_processes is {count}, which needs Linux's memory without a name; here is "
        f"{sys.platform}: leave it out, threads read then"
      )
    self._source, self._readings = source, list(readings)
    layouts = [spec.on_device(reading.fields) for reading in self._readings]
    modules = {factory.__module__ for factory in REGISTRY.values()} - {"__main__"}
    try:
      given = pickle.dumps((opens, [(r.transform, dict(r.fields)) for r in self._readings]))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
      raise ValueError(
        f"num_processes is {count}, and the data or its transform cannot be handed to another "
        f"process ({error}): use functions of modules, or threads"
      ) from error
    # Operations have their names before a transform's string is read.
    told = pickle.dumps((sorted(modules), given))
    self._closed = threading.Event()
    self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
    processes: list[_Process] = []
    # Whoever drops this without closing it must not keep the processes.
    self._end = weakref.finalize(self, _kill, processes, self._closed)
    with _shared(len(told)) as (fd, memory):
      memory[:] = told
      for _ in range(count):
        processes.append(_Process(fd, layouts))
        self._idle.put(processes[-1])

  @contextlib.contextmanager
  def row(self, reading: Readable, index: int, key: Any) -> Iterator[dict[str, Any]]:
    """As `read_row`; arrays are shared with a process, and another one's when this is left.

    Raises:
      RuntimeError: the process ended.
    """
    number = next(n for n, known in enumerate(self._readings) if known is reading)
    process = self._idle.get()
    try:
      try:
        process.pipe.send((number, index, key))
        error, row = pickle.loads(process.pipe.recv_bytes())
      except (EOFError, OSError) as broken:
        if self._closed.is_set():
          raise StoppedError from broken
        status = process.popen.wait()
        raise RuntimeError(
          f"a process ended with status {status} while it read {self._source.describe(index)}; "
          "see above. -9 is most often the system's, which has no more memory: a smaller "
          "num_processes needs less"
        ) from broken
      if error is not None:
        raise error
      yield {**process.rows[number], **row}
    finally:
      self._idle.put(process)

  def close(self) -> None:
    """Ends the processes."""
    self._end()


class _Process:
  """One process, as the loader sees it: its pipe, and the rows of each reading."""

  def __init__(self, told: int, layouts: Sequence[Mapping[str, spec.Field]]):
    self.pipe, theirs = Pipe()
    with _shared(max(map(_size, layouts), default=0)) as (fd, memory):
      self.rows = [_rows(layout, memory) for layout in layouts]
      passed = (theirs.fileno(), fd, told)
      self.popen = subprocess.Popen(
        [sys.executable, "-m", __name__, *map(str, passed)],
        stdin=subprocess.DEVNULL,
        pass_fds=passed,
        # Ctrl-C is for the one who reads the batches.
        start_new_session=True,
        env={
          **os.environ,
          "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
          "JAX_PLATFORMS": "cpu",
        },
      )
    theirs.close()


def _kill(processes: Sequence[_Process], closed: threading.Event) -> None:
  closed.set()
  for process in processes:
    process.popen.kill()
  for process in processes:
    process.popen.wait()


@contextlib.contextmanager
def _shared(size: int) -> Iterator[tuple[int, mmap.mmap]]:
  """Memory without a name, and a file descriptor of it, which is closed again."""
  fd = os.memfd_create("examples")
  try:
    os.ftruncate(fd, max(size, 1))
    yield fd, mmap.mmap(fd, max(size, 1))
  finally:
    os.close(fd)


def _bytes_of(field: spec.Field) -> int:
  size = (
    int(np.prod([n or 0 for n in field.shape], dtype=np.int64)) * np.dtype(field.dtype).itemsize
  )
  return -(-size // _ALIGNMENT) * _ALIGNMENT


def _size(layout: Mapping[str, spec.Field]) -> int:
  return sum(map(_bytes_of, layout.values()))


def _rows(layout: Mapping[str, spec.Field], memory: mmap.mmap) -> dict[str, np.ndarray]:
  rows, offset = {}, 0
  for name, field in layout.items():
    shape = tuple(n or 0 for n in field.shape)
    rows[name] = np.ndarray(shape, np.dtype(field.dtype), memory, offset)
    offset += _bytes_of(field)
  return rows


def _serve(pipe: Connection, memory: mmap.mmap, told: bytes) -> None:
  """Answers each (reading, index, key) by (error or None, what stays on the host)."""
  answer: Callable[[int, int, Any], dict[str, Any]]
  try:
    answer = _reader(memory, told)
  except Exception as error:
    answer = functools.partial(_failed, error)
  while True:
    try:
      asked = pipe.recv()
    except (EOFError, OSError):  # the loader is gone
      return
    try:
      said = pickle.dumps((None, answer(*asked)))
    except Exception as error:
      said = _pickled(error)
    try:
      pipe.send_bytes(said)
    except OSError:
      return


def _failed(error: Exception, *asked: Any) -> dict[str, Any]:
  raise error


def _reader(memory: mmap.mmap, told: bytes) -> Callable[[int, int, Any], dict[str, Any]]:
  modules, given = pickle.loads(told)
  for module in modules:
    importlib.import_module(module)
  opens, readings = pickle.loads(given)
  # What there is to say of the data was said when the loader's own process opened it.
  logging.disable(logging.WARNING)
  source = opens()
  logging.disable(logging.NOTSET)
  rows = [_rows(spec.on_device(fields), memory) for _, fields in readings]
  stop = threading.Event()

  def answer(number: int, index: int, key: Any) -> dict[str, Any]:
    transform, fields = readings[number]
    row = read_row(source, index, transform, fields, key, stop)
    for name, place in rows[number].items():
      place[...] = row.pop(name)
    return row

  return answer


def _pickled(error: Exception) -> bytes:
  """An answer by an error; by one that says the same, where it cannot be handed over itself."""
  if not isinstance(error, CorruptExampleError):
    error.add_note("in a process that reads:\n" + "".join(traceback.format_exception(error)))
  try:
    said = pickle.dumps((error, {}))
    pickle.loads(said)
    return said
  except Exception:
    return pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), {}))


if __name__ == "__main__":
  _pipe, _memory, _told = map(int, sys.argv[1:])
  _serve(Connection(_pipe), mmap.mmap(_memory, 0), mmap.mmap(_told, 0)[:])
