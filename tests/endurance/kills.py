"""kill -9 at random moments of a training, after each of which it goes on to the same bytes.

    python -m tests.endurance.kills --kills=50 --place=DIR --out=docs/results/reliability/kills

Each number of a kill draws, from the seed and that number, a kind of moment and a delay; the moment
itself is what the run is at by then, which another machine or another hour moves by milliseconds.
With one chance in four the run that goes on is killed, too. A row a kill is written as soon as it
is judged, so that `--first` can go on with a later number.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import logging
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit.reporting import read_metrics
from hybrid_vit.tables import write_table
from tests import command
from tests.endurance import runs

# Kinds of moments: the share of the kills, and seconds from their beginning within which one falls.
MOMENTS = {
  "anywhere": (0.3, None),
  "saving": (0.25, 0.15),
  "evaluating": (0.15, 0.5),
  "phase border": (0.1, 0.3),
  "keeping the best": (0.1, 0.15),
  "exporting": (0.1, 0.3),
}
AGAIN = 0.25
_BEST_STEPS = (6, 18, 24, 30)


@dataclasses.dataclass(frozen=True)
class Moment:
  """When a run is killed.

  Attributes:
    kind: of `MOMENTS`.
    step: at which it is looked for; 0 where it has none.
    delay: seconds from its beginning; of "anywhere" from the start of the process.
    again: seconds after its start at which the run that goes on is killed, too; None: it is not.
  """

  kind: str
  step: int
  delay: float
  again: float | None


def draw(seed: int, number: int, seconds: float, kind: str | None = None) -> Moment:
  """The moment of a kill, of a run that takes so many seconds unbroken."""
  rng = np.random.default_rng((seed, number))
  kinds, shares = list(MOMENTS), [share for share, _ in MOMENTS.values()]
  kind = kind or str(rng.choice(kinds, p=shares))
  steps = {
    "saving": range(3, runs.STEPS + 1, 3),
    "evaluating": range(6, runs.STEPS + 1, 6),
    "phase border": (runs.BORDER,),
    "keeping the best": _BEST_STEPS,
  }.get(kind, (0,))
  step = int(rng.choice(list(steps)))
  delay = float(rng.uniform(0, MOMENTS[kind][1] or seconds))
  again = float(rng.uniform(0, seconds)) if rng.random() < AGAIN else None
  return Moment(kind, step, delay, again)


def begun(moment: Moment, workdir: Path) -> Callable[[], bool]:
  """Whether the moment's kind has begun, by what lies in the work directory."""

  def logged(kind: str) -> bool:
    try:
      lines = read_metrics(workdir / "metrics.jsonl")
    except OSError:
      return False
    return any(line["step"] >= moment.step and line["kind"] == kind for line in lines)

  def being_written(place: str) -> bool:
    return any(workdir.glob(f"{place}/{moment.step}.*tmp*"))

  return {
    "anywhere": lambda: True,
    "saving": lambda: being_written("checkpoints"),
    "evaluating": lambda: logged("train"),
    "phase border": lambda: logged("eval/validation"),
    "keeping the best": lambda: being_written("best"),
    "exporting": (workdir / "export.partial").exists,
  }[moment.kind]


def kill(
  process: subprocess.Popen, has_begun: Callable[[], bool], delay: float
) -> tuple[bool, str]:
  """Kills a process so many seconds after something has begun.

  Returns:
    Whether it was killed, and did not end before; what it had printed.
  """
  while process.poll() is None and not has_begun():
    time.sleep(0.001)
  try:
    process.wait(delay)
  except subprocess.TimeoutExpired:
    process.send_signal(signal.SIGKILL)
  output, _ = process.communicate()
  return process.returncode == -signal.SIGKILL, output


def found_after(workdir: Path) -> dict[str, Any]:
  """What a kill has left: steps saved and logged, and what is half written."""
  metrics = workdir / "metrics.jsonl"
  content = metrics.read_bytes() if metrics.exists() else b""
  steps = [line["step"] for line in read_metrics(metrics)] if content else []
  return {
    "saved": next(iter(runs.saved_steps(workdir)), 0),
    "logged": max(steps, default=0),
    "torn_states": sum(".orbax" in path.name for path in runs.left_overs(workdir)),
    "torn_export": int((workdir / "export.partial").exists()),
    "torn_lines": int(bool(content) and not content.endswith(b"\n")),
  }


def one(
  number: int, moment: Moment, config: Path, cache: Path, workdir: Path, whole: Path
) -> list[dict[str, Any]]:
  """Rows of a kill, and of a second one where there is one; none where the run ended first."""
  begin, given = time.monotonic(), runs.arguments(config, workdir)
  killed, _ = kill(command.start(cache, *given), begun(moment, workdir), moment.delay)
  if not killed:
    return []
  shown = {"kill": number, "moment": moment.kind, "step": moment.step or ""}
  rows = [{**shown, "delay_ms": round(1000 * moment.delay), **found_after(workdir)}]
  outputs = []
  if moment.again is not None:
    killed, output = kill(command.start(cache, *given), lambda: True, moment.again)
    outputs.append(output)
    if killed:
      shown = {"kill": number, "moment": "going on", "step": ""}
      rows.append({**shown, "delay_ms": round(1000 * moment.again), **found_after(workdir)})
  outputs.append(runs.finish(cache, config, workdir))
  unlike = runs.differences(workdir, whole)
  for line in unlike:
    print(f"  DIFFERENT: {line}", flush=True)
  for place, row in enumerate(rows):
    # One that was killed before it could say so says nothing; then the next one's word counts.
    said = (re.search(r"restored step (\d+) ", output) for output in outputs[place:])
    resumed = int(next((match[1] for match in said if match), 0))
    row["resumed"] = resumed
    row["lost_states"] = int(resumed < row["saved"])
    row["steps_again"] = max(0, row["logged"] - resumed)
    row["different"] = len(unlike)
    row["seconds"] = round(time.monotonic() - begin, 1)
  return rows


def unbroken(place: Path) -> tuple[Path, Path, float]:
  """(configuration, work directory, seconds) of a run that nothing disturbs; made once."""
  config, workdir, clock = runs.write_config(place), place / "unbroken", place / "seconds"
  if not clock.exists():
    shutil.rmtree(workdir, ignore_errors=True)
    # Compiles; the one that counts finds its programs.
    runs.finish(place / "xla", config, place / "first")
    begin = time.monotonic()
    runs.finish(place / "xla", config, workdir)
    clock.write_text(f"{time.monotonic() - begin:.1f}")
    assert runs.differences(workdir, place / "first") == []
  return config, workdir, float(clock.read_text())


def earlier(path: Path) -> list[dict[str, Any]]:
  """Rows that an earlier call left."""
  if not path.exists():
    return []
  with path.open(newline="") as file:
    return list(csv.DictReader(file))


def main(arguments: Sequence[str] | None = None) -> int:
  """Kills until there are so many rows; 1 where one left other bytes."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--first", type=int, default=0, help="number of the first; 0 begins anew")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--place", type=Path, required=True, help="of the runs; kept")
  parser.add_argument("--out", type=Path, required=True, help="of .csv and .md, without ending")
  options = parser.parse_args(arguments)
  options.place.mkdir(parents=True, exist_ok=True)
  # Orbax misses a file that is not written here.
  logging.getLogger("absl").setLevel(logging.ERROR)
  config, whole, seconds = unbroken(options.place)
  print(f"an unbroken run takes {seconds:.1f} s", flush=True)
  table = options.out.with_name(options.out.name + ".csv")
  rows = earlier(table) if options.first else []
  number, done, ended_first = options.first, 0, 0
  while done < options.kills:
    workdir = options.place / f"killed_{number}"
    shutil.rmtree(workdir, ignore_errors=True)
    moment = draw(options.seed, number, seconds)
    new = one(number, moment, config, options.place / "xla", workdir, whole)
    ended_first += not new
    done += len(new)
    rows += new
    for row in new:
      print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if rows:
      write_table(options.out, rows, list(rows[-1]))
    if not any(row["different"] for row in new):
      shutil.rmtree(workdir)
    number += 1
  bad = sum(int(row["different"]) > 0 or int(row["lost_states"]) > 0 for row in rows)
  print(
    f"{len(rows)} kills, {bad} with other bytes or a lost state; {ended_first} runs ended before "
    f"their kill; go on with --first={number}",
    flush=True,
  )
  return int(bad > 0)


if __name__ == "__main__":
  sys.exit(main())
