r"""Pictures read a second, of sources and transforms, beside one another or beside timm.

    python -m hybrid_vit.tools.benchmark data --source=folder:/path/flowers
    python -m hybrid_vit.tools.benchmark data --source folder:/path zip:/path.zip tfds:flowers \
      --against=timm --out=runs/speed/data

The batches are those of a training's loader, uint8 pictures that a device normalises. What is
compared takes turns, round by round, and medians are given. Ratios are taken within rounds, to the
first row, or with --against=timm to DataLoader and timm.data with as many worker processes, whose
batches are uint8, too. `per_core` is pictures a second of CPU time, of all threads and processes: a
machine that is busy with other things changes it little. The start of processes does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_vit.data import spec
from hybrid_vit.data.ahead import available_cores
from hybrid_vit.data.loader import Reading, train_batches
from hybrid_vit.data.sources import Source, create_source
from hybrid_vit.data.transforms import DECODERS, parse_transform
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.tools import torch_loading
from hybrid_vit.tools.benchmark_results import head_of, write_results
from hybrid_vit.tools.process_figures import children, cpu_seconds
from hybrid_vit.tools.torch_process import PeerError

TRANSFORM = "decode|random_resized_crop(224)|flip_lr"
WORKERS = ("threads", "processes")
# Returns seconds, and CPU seconds.
Call = Callable[[], tuple[float, float]]
_FIRST = ("source", "transform", "batch", "workers", "form")
_UINT8 = "timm, uint8"


def reader(
  opens: Callable[[], Source],
  transform: str,
  decoder: str,
  *,
  pictures: int,
  batch_size: int,
  workers: int,
  by: str = "threads",
) -> Call:
  """A call that reads so many pictures, in whole batches, in a training's order.

  Args:
    opens: gives the source.
    transform: see `hybrid_vit.data.transforms`.
    decoder: see there.
    pictures: at least; several epochs where the source has fewer.
    batch_size: of this process.
    workers: that read and transform.
    by: one of `WORKERS`.

  Returns:
    The call, which returns seconds and CPU seconds.
  """
  source, steps = opens(), -(-pictures // batch_size)
  apply = parse_transform(transform, decoder)
  fields = {"image": spec.Field("image", shape=(None, None, None))}
  fields = spec.resolve(fields, apply, lambda: source[0])
  # So many steps and no more: what is read ahead of the last one would be in the others' way.
  reading = Reading(batch_size, apply, fields, steps)

  def by_threads() -> tuple[float, float]:
    begin = _now()
    for _ in train_batches(source, [reading], seed=0, num_threads=workers):
      pass
    return _since(begin)

  def by_processes() -> tuple[float, float]:
    one_more = dataclasses.replace(reading, steps=steps + 1)
    batches = train_batches(source, [one_more], seed=0, num_processes=workers, opens=opens)
    next(batches)
    pids = [os.getpid(), *children(os.getpid())]
    begin, cpu = time.perf_counter(), cpu_seconds(pids)
    for _ in range(steps):
      next(batches)
    found = time.perf_counter() - begin, cpu_seconds(pids) - cpu
    batches.close()
    return found

  return by_threads if by == "threads" else by_processes


def _now() -> tuple[float, float]:
  return time.perf_counter(), time.process_time()


def _since(begin: tuple[float, float]) -> tuple[float, float]:
  now = _now()
  return now[0] - begin[0], now[1] - begin[1]


def measure(
  options: argparse.Namespace, source: str, transform: str, batch_size: int, workers: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
  """Rows of one setting, each decoder and each of the peer's forms; and the peer's versions."""
  whole = -(-options.pictures // batch_size) * batch_size
  given = (source, options.split, options.data_dir)
  with contextlib.ExitStack() as stack:
    runs: dict[str, Call] = {
      decoder if by == "threads" else f"{decoder}, processes": reader(
        functools.partial(create_source, *given), transform, decoder,
        pictures=whole, batch_size=batch_size, workers=workers, by=by,
      )
      for decoder in options.decoders
      for by in options.by
    }  # fmt: skip
    reference = next(iter(runs))
    versions: dict[str, str] = {}
    if options.against is not None:
      theirs, versions = stack.enter_context(
        torch_loading.calls(
          *given, transform, pictures=whole, batch_size=batch_size, workers=workers
        )
      )
      runs |= {name: _answered(call) for name, call in theirs.items()}
      reference = _UINT8
    for run in runs.values():
      run()  # does not count
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(options.rounds):
      for name, run in runs.items():
        found[name].append(run())
  kind = source.partition(":")[0]
  about = {"source": kind, "transform": transform, "batch": batch_size, "workers": workers}
  return [about | row for row in _rows(found, whole, reference)], versions


def _answered(call: Callable[[], str]) -> Call:
  """Of a call that answers its CPU seconds."""

  def run() -> tuple[float, float]:
    begin = time.perf_counter()
    cpu = float(call())
    return time.perf_counter() - begin, cpu

  return run


def _rows(
  found: Mapping[str, Sequence[tuple[float, float]]], pictures: int, reference: str
) -> Iterator[dict[str, Any]]:
  other, other_cpu = zip(*found[reference])
  for name, own in found.items():
    seconds, cpu = zip(*own)
    yield {
      "form": name,
      "images_per_second": round(pictures / statistics.median(seconds), 1),
      "per_core": round(pictures / max(statistics.median(cpu), 1e-3), 1),
      "speed_ratio": _ratio(seconds, other),
      "per_core_ratio": _ratio(cpu, other_cpu),
      "ratio_to": reference,
    }


def _ratio(own: Sequence[float], reference: Sequence[float]) -> float:
  return round(statistics.median(b / max(a, 1e-3) for a, b in zip(own, reference)), 3)


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m hybrid_vit.tools.benchmark data",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--source", nargs="+", required=True, help="each as config.data.source")
  parser.add_argument("--split", default="train")
  parser.add_argument("--data_dir")
  parser.add_argument("--transform", nargs="+", help=f"{TRANSFORM}; with --against all it has")
  parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=["pil", "opencv"])
  parser.add_argument("--workers", type=int, nargs="+", default=[available_cores()])
  parser.add_argument("--by", nargs="+", choices=WORKERS, default=["threads"])
  parser.add_argument("--batch_size", type=int, nargs="+", default=[64], help="of one process")
  parser.add_argument("--pictures", type=int, default=400, help="in a round, in whole batches")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--against", choices=("timm",), help="needs torch and timm")
  parser.add_argument("--out", type=Path, help="of the files, without an ending")
  given = list(sys.argv[1:] if arguments is None else arguments)
  options = parser.parse_args(given)
  transforms = options.transform or (torch_loading.TRANSFORMS if options.against else [TRANSFORM])
  rows: list[dict[str, Any]] = []
  try:
    head = head_of("benchmark data", given, None, options.rounds)
    for setting in itertools.product(
      options.source, transforms, options.batch_size, options.workers
    ):
      found, versions = measure(options, *setting)
      head |= versions
      for row in found:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
      rows += found
      if options.out is not None:
        write_results(options.out, head, rows, _FIRST)
  except (OSError, ValueError, ImportError, PeerError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


if __name__ == "__main__":
  run_tool(main)
