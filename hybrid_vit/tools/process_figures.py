"""What Linux says of processes: their CPU time and their memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path


def cpu_seconds(pids: Iterable[int | None]) -> float:
  """CPU time of all threads of processes so far, in hundredths of a second as the system counts."""
  ticks = 0
  for pid in pids:
    # The name, in parentheses, may hold anything.
    fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    ticks += int(fields[11]) + int(fields[12])
  return ticks / os.sysconf("SC_CLK_TCK")


def resident_mib(pids: Iterable[int | None]) -> float:
  """Memory that processes hold themselves, MiB; pages that they share count for each in part.

  Pages of files (libraries) are left out: a process's part of them changes by a hundred MiB
  whenever another one that has mapped the same libraries begins or ends.
  """
  total = 0
  for pid in pids:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8").splitlines()
    own = [line for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
    total += sum(int(line.split()[1]) for line in own)
  return total / 1024


def children(pid: int) -> list[int]:
  """The processes that a process has begun and that live."""
  found = []
  for task in Path(f"/proc/{pid}/task").iterdir():
    with contextlib.suppress(OSError):  # a thread that has ended meanwhile
      found += [int(child) for child in (task / "children").read_text("utf-8").split()]
  return found
