"""What the benchmarks share: calls in turn, how a result was made, its files."""

from __future__ import annotations

import datetime
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from hybrid_vit.data.ahead import available_cores
from hybrid_vit.tables import write_table

# Seconds of a call from which on it is not repeated.
_LONG = 30.0
# Libraries whose versions a result says, where they were used.
_LIBRARIES = ("torch", "torchvision", "scipy")


def seconds_in_turn(
  runs: Mapping[str, Callable[[], Any]],
  rounds: int,
  *,
  long: float = _LONG,
  settle: bool = False,
) -> dict[str, list[float]]:
  """Seconds of each round, after a call of each that does not count.

  Args:
    runs: what is called, one after the other, and again.
    rounds: how often.
    long: of what takes longer in its second call, that call's time stands for all rounds.
    settle: a call that does not count before each that does: what the one before left behind
      (threads that still spin, memory) is not this one's.
  """

  def timed(run: Callable[[], Any]) -> float:
    if settle and len(runs) > 1:
      run()
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin

  for run in runs.values():
    run()
  seconds = {name: [timed(run)] for name, run in runs.items()}
  for _ in range(rounds - 1):
    for name, run in runs.items():
      first = seconds[name][0]
      seconds[name].append(first if first > long else timed(run))
  return seconds


def head_of(
  tool: str, arguments: Sequence[str], topology: str | None, rounds: int
) -> dict[str, Any]:
  """How a result was made: command, date, JAX, device.

  Args:
    tool: of `hybrid_vit.tools`, with its subcommand.
    arguments: of the command.
    topology: where it was compiled for; None where it was run here.
    rounds: of the calls.
  """
  head: dict[str, Any] = {
    "command": " ".join([f"python -m hybrid_vit.tools.{tool}", *arguments]),
    "date": datetime.date.today().isoformat(),
    "JAX": jax.__version__,
  }
  if topology is not None:
    return {**head, "compiled for": topology}
  return {**head, "device": device_name(), "rounds": rounds}


def device_name() -> str:
  """What calls run on here: an accelerator's kind, or the processor's name and cores."""
  kind = jax.devices()[0].device_kind
  if kind != "cpu":
    return kind
  return f"{_processor()} ({platform.machine()}, {available_cores()} cores)"


def _processor() -> str:
  """Its name where the system says it (Linux), with the widest vectors that it has."""
  try:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
  except OSError:
    return platform.processor() or "cpu"
  said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
  vectors = next((v for v in ("avx512f", "avx2") if v in said.get("flags", "").split()), "")
  return " ".join(filter(None, (said.get("model name", "cpu"), vectors)))


def libraries() -> dict[str, str]:
  """Versions of the other libraries that this process has loaded."""
  return {n: str(sys.modules[n].__version__) for n in _LIBRARIES if n in sys.modules}


def earlier_rows(path: Path) -> list[dict[str, Any]]:
  """Rows that an earlier call of `write_results` left at this path; none without such a file."""
  stored = path.with_name(path.name + ".json")
  return list(json.loads(stored.read_text("utf-8"))["rows"]) if stored.is_file() else []


def write_results(
  path: Path,
  head: Mapping[str, Any],
  rows: Sequence[Mapping[str, Any]],
  first: Sequence[str],
) -> None:
  """PATH.json with everything, and PATH.md: how it was made, then the table.

  Args:
    path: of both, without an ending.
    head: see `head_of`.
    rows: of the table.
    first: columns that come first.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  head = {**head, **libraries()}
  stored = {**head, "rows": list(rows)}
  path.with_name(path.name + ".json").write_text(json.dumps(stored, indent=1) + "\n", "utf-8")
  _, markdown = write_table(path, rows, first)
  path.with_name(path.name + ".csv").unlink()  # the same as the JSON
  lines = [
    f"    {head['command']}",
    "",
    ", ".join(f"{k} {head[k]}" for k in head if k != "command"),
  ]
  markdown.write_text("\n".join(lines) + "\n\n" + markdown.read_text("utf-8"), "utf-8")
