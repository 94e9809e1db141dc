r"""Whether memory grows while pictures are read: a line through it over the minutes.

    python -m hybrid_vit.tools.memory_drift --source=folder:/path/flowers --minutes=60

Batches are read and dropped, as fast as they come. Memory is that of this process and of those
that it has begun, measured every second. The line is fitted to what comes after the first fifth, in
which buffers and caches fill; beside its slope stands the slope's standard error.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit.data import spec
from hybrid_vit.data.ahead import available_cores
from hybrid_vit.data.loader import Reading, train_batches
from hybrid_vit.data.sources import create_source
from hybrid_vit.data.transforms import DECODERS, parse_transform
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.tools.benchmark_results import head_of, write_results
from hybrid_vit.tools.process_figures import children, resident_mib

# Of the time, before memory counts.
_WARM_UP = 0.2


def fitted_slope(times: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
  """The slope of a straight line through points, and its standard error.

  Args:
    times: three or more.
    values: one for each.
  """
  x, y = np.asarray(times) - np.mean(times), np.asarray(values) - np.mean(values)
  spread = float(x @ x)
  slope = float(x @ y) / spread
  rest = y - slope * x
  return slope, float(np.sqrt(rest @ rest / (len(x) - 2) / spread))


def measure(
  source: str,
  split: str,
  data_dir: str | None,
  transform: str,
  decoder: str,
  *,
  batch_size: int,
  threads: int,
  seconds: float,
  every: float = 1.0,
) -> list[tuple[float, int, float]]:
  """(seconds since the start, pictures read, MiB), about every so many seconds.

  Args:
    source: see `hybrid_vit.data.sources`.
    split: see there.
    data_dir: see there.
    transform: see `hybrid_vit.data.transforms`.
    decoder: see there.
    batch_size: of this process.
    threads: that read and transform.
    seconds: how long.
    every: how often.
  """
  opened = create_source(source, split, data_dir)
  apply = parse_transform(transform, decoder)
  fields: dict[str, Any] = {"image": spec.Field("image", shape=(None, None, None))}
  reading = Reading(batch_size, apply, spec.resolve(fields, apply, lambda: opened[0]))
  batches = train_batches(opened, [reading], seed=0, num_threads=threads)
  found: list[tuple[float, int, float]] = []
  begin, read = time.monotonic(), 0
  for _ in batches:
    read += batch_size
    now = time.monotonic() - begin
    if not found or now - found[-1][0] >= every:
      found.append((now, read, resident_mib([os.getpid(), *children(os.getpid())])))
    if now >= seconds:
      break
  batches.close()
  return found


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m hybrid_vit.tools.memory_drift",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--source", required=True, help="as config.data.source")
  parser.add_argument("--split", default="train")
  parser.add_argument("--data_dir")
  parser.add_argument("--transform", default="decode|random_resized_crop(224)|flip_lr")
  parser.add_argument("--decoder", choices=DECODERS, default="opencv")
  parser.add_argument("--threads", type=int, default=available_cores())
  parser.add_argument("--batch_size", type=int, default=256, help="of one process")
  parser.add_argument("--minutes", type=float, default=60.0)
  parser.add_argument("--out", type=Path, help="of the files, without an ending")
  given = list(sys.argv[1:] if arguments is None else arguments)
  options = parser.parse_args(given)
  try:
    found = measure(
      options.source, options.split, options.data_dir, options.transform, options.decoder,
      batch_size=options.batch_size, threads=options.threads, seconds=60 * options.minutes,
    )  # fmt: skip
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  late = [point for point in found if point[0] >= _WARM_UP * found[-1][0]]
  if len(late) < 3:
    print(f"error: {len(found)} batches in the time; three late ones at least", file=sys.stderr)
    return 1
  slope, deviation = fitted_slope([point[0] / 3600 for point in late], [point[2] for point in late])
  values = [point[2] for point in late]
  row = {
    "source": options.source.partition(":")[0], "transform": options.transform,
    "minutes": round(found[-1][0] / 60, 1), "pictures": found[-1][1],
    "first_mib": round(values[0], 1), "last_mib": round(values[-1], 1),
    "least_mib": round(min(values), 1), "most_mib": round(max(values), 1),
    "mib_per_hour": round(slope, 1), "standard_error": round(deviation, 1),
  }  # fmt: skip
  print("  ".join(f"{key} {value}" for key, value in row.items()))
  if options.out is not None:
    write_results(options.out, head_of("memory_drift", given, None, 1), [row], ("source",))
  return 0


if __name__ == "__main__":
  run_tool(main)
