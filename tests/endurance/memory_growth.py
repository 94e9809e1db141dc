"""Whether a training's memory grows: a line through it over the minutes.

    python -m tests.endurance.memory_growth --place=DIR --out=docs/results/reliability/memory

A tiny network logs every step to metrics.jsonl, timings.jsonl, TensorBoard and a CSV, evaluates and
saves every few hundred steps (or as often as is asked for, which tells one's part from the
other's), until it is told to stop. Its memory is looked at every second. As in
`hybrid_vit.tools.memory_drift` the line is fitted to what comes after the first fifth.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hybrid_vit.reporting import read_metrics
from hybrid_vit.tables import write_table
from hybrid_vit.tools.memory_drift import fitted_slope
from hybrid_vit.tools.process_figures import resident_mib
from tests import command
from tests.endurance import runs

# Of the time, before memory counts.
_WARM_UP = 0.2
_LONG = """
  del config.phases
  config.total_steps = 10_000_000
  config.log_every_steps = 1
  config.evaluate_every_steps = {evaluate_every}
  config.data.batch_size = 8
  config.accumulation_steps = 1
  config.checkpoint = dict(keep=2, every_steps={save_every}, best_metric="validation/loss")
  return config
"""


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; its figures are for people to judge."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--minutes", type=float, default=25.0)
  parser.add_argument("--evaluate_every", type=int, default=500, help="steps")
  parser.add_argument("--save_every", type=int, default=250, help="steps")
  parser.add_argument("--place", type=Path, required=True, help="of the run")
  parser.add_argument("--out", type=Path, required=True, help="of .csv and .md, without ending")
  options = parser.parse_args(arguments)
  options.place.mkdir(parents=True, exist_ok=True)
  config, workdir = options.place / "long.py", options.place / "long"
  lines = _LONG[1:].format(evaluate_every=options.evaluate_every, save_every=options.save_every)
  config.write_text(runs.CONFIG.replace("  return config\n", lines))
  shutil.rmtree(workdir, ignore_errors=True)
  metrics, log = workdir / "metrics.jsonl", options.place / "long.txt"
  with log.open("w") as file:
    process = command.start(options.place / "xla", *runs.arguments(config, workdir), stdout=file)
  while not metrics.exists() or not metrics.stat().st_size:
    if process.poll() is not None:
      print(log.read_text(), file=sys.stderr)
      return 1
    time.sleep(1)
  begin, found = time.monotonic(), list[tuple[float, float]]()
  while time.monotonic() - begin < 60 * options.minutes and process.poll() is None:
    found.append(((time.monotonic() - begin) / 3600, resident_mib([process.pid])))
    time.sleep(1)
  process.send_signal(signal.SIGTERM)
  code = process.wait(300)
  late = [point for point in found if point[0] >= _WARM_UP * found[-1][0]]
  slope, deviation = fitted_slope(*zip(*late))
  steps = read_metrics(metrics)[-1]["step"]
  values = [value for _, value in late]
  row = {
    "minutes": round(60 * found[-1][0], 1), "steps": steps,
    "metrics_mib": round(metrics.stat().st_size / 2**20, 1),
    "first_mib": round(values[0], 1), "last_mib": round(values[-1], 1),
    "least_mib": round(min(values), 1), "most_mib": round(max(values), 1),
    "mib_per_hour": round(slope, 2), "standard_error": round(deviation, 2),
    "bytes_a_step": round(slope * found[-1][0] * 2**20 / steps), "code": code,
  }  # fmt: skip
  print("  ".join(f"{key} {value}" for key, value in row.items()))
  write_table(options.out, [row])
  series = [{"hour": round(hour, 5), "mib": round(mib, 1)} for hour, mib in found[::10]]
  write_table(options.out.with_name(options.out.name + "_series"), series)
  return int(code != 143)


if __name__ == "__main__":
  sys.exit(main())
