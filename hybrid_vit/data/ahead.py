"""Work done by threads a bounded way ahead of whoever takes its results, in order."""

from __future__ import annotations

import collections
import contextlib
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
Parts = Sequence[Callable[[], None]]


class Ahead(Generic[T]):
  """The results of jobs, in their order.

  A job is what will be its result, and parts that fill it in, in any order and at the same time.
  What a part raises is raised for its job, after all earlier ones were given; of several parts the
  first one's counts. The threads begin with the first result that is asked for, and end when there
  are no more jobs, something was raised, this is closed, or nobody holds it any more.

  Args:
    jobs: is asked for the next job when there is room for it, always by the thread that takes.
    threads: how many.
    depth: so many jobs are begun and not yet taken.
    stop: set at the end, so that parts may notice it.
    ended: called at the end, once.
  """

  def __init__(
    self,
    jobs: Iterator[tuple[T, Parts]],
    threads: int,
    depth: int,
    stop: threading.Event,
    ended: Callable[[], None] = lambda: None,
  ):
    self._jobs, self._depth = jobs, depth
    self._begun: collections.deque[tuple[T, list[Future[None]]]] = collections.deque()
    self._pool = ThreadPoolExecutor(threads, thread_name_prefix="data")
    # Whoever drops this without closing it must not keep the threads.
    self._end = weakref.finalize(self, _end, self._pool, stop, ended)

  def __iter__(self) -> Ahead[T]:
    return self

  def __next__(self) -> T:
    if not self._end.alive:
      raise StopIteration
    try:
      self._begin()
      if not self._begun:
        raise StopIteration
      result, parts = self._begun.popleft()
      with contextlib.suppress(CancelledError):
        for part in parts:
          part.result()
      if not self._end.alive:  # closed meanwhile, by another thread: parts of it are missing
        raise StopIteration
      # The threads have work while the taker is busy with this one.
      self._begin()
    except BaseException:
      self.close()
      raise
    return result

  def close(self) -> None:
    """Ends the threads, each after the example at which it is, without waiting for them."""
    self._begun.clear()
    self._end()

  def _begin(self) -> None:
    while len(self._begun) < self._depth:
      job = next(self._jobs, None)
      if job is None:
        return
      result, parts = job
      self._begun.append((result, [self._pool.submit(part) for part in parts]))


def _end(pool: ThreadPoolExecutor, stop: threading.Event, ended: Callable[[], None]) -> None:
  stop.set()
  pool.shutdown(wait=False, cancel_futures=True)
  ended()


def available_cores() -> int:
  """How many cores this process may use: its affinity, and its share where a cgroup sets one."""
  try:
    cores = len(os.sched_getaffinity(0))
  except AttributeError:  # no such call outside Linux
    cores = os.cpu_count() or 1
  return max(1, math.ceil(min(cores, _cgroup_cores(Path("/proc/self/cgroup"), _CGROUPS))))


_CGROUPS = Path("/sys/fs/cgroup")


def _cgroup_cores(membership: Path, root: Path) -> float:
  """The smallest quota of this process's cgroup and those above it, in cores."""
  quotas = [math.inf]
  with contextlib.suppress(OSError, ValueError):
    for line in membership.read_text().splitlines():
      _, controllers, inside = line.split(":", 2)
      if controllers and "cpu" not in controllers.split(","):
        continue
      base = root / "cpu" if controllers else root
      # In a container the path is the one outside, and the mount shows the container's own.
      for part in (inside, *(parent.as_posix() for parent in Path(inside).parents)):
        quotas.append(_quota(base / part.lstrip("/")))
  return min(quotas)


def _quota(folder: Path) -> float:
  with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
    quota, period = (folder / "cpu.max").read_text().split()
    return math.inf if quota == "max" else float(quota) / float(period)
  with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
    microseconds = float((folder / "cpu.cfs_quota_us").read_text())
    if microseconds > 0:
      return microseconds / float((folder / "cpu.cfs_period_us").read_text())
  return math.inf
