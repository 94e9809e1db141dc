"""A training told to stop (SIGTERM), and one process of two told to stop or killed.

    python -m tests.endurance.processes --place=DIR --out=docs/results/reliability/processes

Each case is sent its signal some milliseconds after a drawn step is logged. Told to stop, every
process must save the step that it says, and end with 143; where one of two is killed, the other
must end by itself, its output naming the cause. Then the same command goes on, and leaves what
an unbroken run (of as many processes) leaves, bit for bit.
"""

from __future__ import annotations

import argparse
import logging
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit.reporting import read_metrics
from hybrid_vit.tables import write_table
from tests import command
from tests.endurance import kills, runs

# (processes, signal, the process that gets it), and how often.
CASES = (
  (1, "SIGTERM", 0, 2),
  (2, "SIGTERM", 0, 2),
  (2, "SIGTERM", 1, 2),
  (2, "SIGKILL", 0, 2),
  (2, "SIGKILL", 1, 2),
)
# Seconds within which what is left must have ended.
PATIENCE = 240.0
# Ours, and JAX's own before it ends a process whose coordinator is gone.
_CAUSES = (
  re.compile(r"^error: (another process of this run is gone)", re.M),
  re.compile(r"(This most likely indicates that another task died)"),
)


def start(
  cache: Path, config: Path, workdir: Path, count: int
) -> tuple[list[subprocess.Popen], list[Path]]:
  """So many processes of the command, and the files of what they print."""
  given, logs = runs.arguments(config, workdir), []
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{listener.getsockname()[1]}"
  processes = []
  for process in range(count):
    together = {} if count == 1 else {
      "JAX_COORDINATOR_ADDRESS": address,
      "JAX_NUM_PROCESSES": str(count),
      "JAX_PROCESS_ID": str(process),
    }  # fmt: skip
    logs.append(workdir.parent / f"{workdir.name}.{process}.txt")
    with logs[-1].open("w") as file:
      processes.append(
        command.start(cache, *["--distributed"] * (count > 1), *given, stdout=file, **together)
      )
  return processes, logs


def end(processes: Sequence[subprocess.Popen], patience: float = PATIENCE) -> list[int | None]:
  """Their exit statuses; None for one that had to be killed after so many seconds."""
  deadline, codes = time.monotonic() + patience, []
  for process in processes:
    try:
      codes.append(process.wait(max(0.0, deadline - time.monotonic())))
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
      codes.append(None)
  return codes


def whole(cache: Path, config: Path, workdir: Path, count: int) -> list[Path]:
  """Runs to the end; what the processes print."""
  processes, logs = start(cache, config, workdir, count)
  codes = end(processes)
  assert codes == [0] * count, "\n".join(log.read_text() for log in logs)
  return logs


def one(
  count: int, name: str, receiver: int, step: int, delay: float, cache: Path, config: Path,
  workdir: Path,
) -> dict[str, Any]:  # fmt: skip
  """Sends a signal, waits for the end, goes on; a row without the comparison."""
  processes, logs = start(cache, config, workdir, count)
  metrics = workdir / "metrics.jsonl"
  while not (metrics.exists() and any(x["step"] >= step for x in read_metrics(metrics))):
    assert all(p.poll() is None for p in processes), "\n".join(log.read_text() for log in logs)
    time.sleep(0.002)
  time.sleep(delay)
  processes[receiver].send_signal(getattr(signal, name))
  begin = time.monotonic()
  codes = end(processes)
  seconds = time.monotonic() - begin
  texts = [log.read_text() for log in logs]
  for log in logs:
    log.rename(log.with_suffix(".interrupted.txt"))
  told = [re.search(r"told to stop: step (\d+) is saved", text) for text in texts]
  saved = next(iter(runs.saved_steps(workdir)), 0)
  others = [p for p in range(count) if name == "SIGTERM" or p != receiver]
  causes = [_cause(texts[p]) for p in others]
  resumed = [re.search(r"restored step (\d+) ", log.read_text()) for log in
             whole(cache, config, workdir, count)]  # fmt: skip
  return {
    "processes": count, "signal": name, "to": receiver, "after_step": step,
    "ended_in_s": round(seconds, 1), "codes": " ".join(map(str, codes)),
    "hung": sum(codes[p] is None for p in others),
    "said_saved": next((int(match[1]) for match in told if match), ""),
    "saved": saved,
    "resumed": next((int(match[1]) for match in resumed if match), 0),
    "cause": " / ".join(dict.fromkeys(causes)) if name == "SIGKILL" else "",
  }  # fmt: skip


def _cause(text: str) -> str:
  """What a process says of its end, where that is that another one is gone."""
  found = next(filter(None, (pattern.search(text) for pattern in _CAUSES)), None)
  return found[1] if found else "(none)"


def main(arguments: Sequence[str] | None = None) -> int:
  """All cases; 1 where one hung, ended otherwise or left other bytes."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--case", type=int, help="number of one of the cases; the others' rows stay")
  parser.add_argument("--place", type=Path, required=True, help="of the runs; kept")
  parser.add_argument("--out", type=Path, required=True, help="of .csv and .md, without ending")
  options = parser.parse_args(arguments)
  logging.getLogger("absl").setLevel(logging.ERROR)
  place, bad = options.place, 0
  rows: list[dict[str, Any]] = []
  if options.case is not None:
    own = tuple(map(str, CASES[options.case][:3]))
    found = kills.earlier(options.out.with_name(options.out.name + ".csv"))
    rows = [r for r in found if (r["processes"], r["signal"], r["to"]) != own]
  place.mkdir(parents=True, exist_ok=True)
  config, cache = runs.write_config(place), place / "xla"
  numbered = [(case, turn) for case in range(len(CASES)) for turn in range(CASES[case][3])]
  for case, turn in numbered:
    if options.case not in (None, case):
      continue
    count, name, receiver, _ = CASES[case]
    unbroken = place / f"unbroken_{count}"
    if not (unbroken / "export").exists():
      shutil.rmtree(unbroken, ignore_errors=True)
      whole(cache, config, unbroken, count)
    rng = np.random.default_rng((options.seed, case, turn))
    step, delay = 2 * int(rng.integers(1, 14)), float(rng.uniform(0, 0.2))
    workdir = place / f"case_{case}_{turn}"
    shutil.rmtree(workdir, ignore_errors=True)
    row = one(count, name, receiver, step, delay, cache, config, workdir)
    unlike = runs.differences(workdir, unbroken)
    row["different"] = len(unlike)
    print(
      "  ".join(f"{key} {value}" for key, value in row.items()), *unlike, sep="\n  ", flush=True
    )
    wrong_codes = name == "SIGTERM" and row["codes"] != " ".join(["143"] * count)
    unnamed = name == "SIGKILL" and "(none)" in row["cause"]
    bad += bool(unlike or row["hung"] or unnamed or wrong_codes)
    rows.append(row)
    write_table(options.out, rows)
  print(f"{len(rows)} rows, {bad} bad")
  return int(bad > 0)


if __name__ == "__main__":
  sys.exit(main())
