"""A disk that is full, and one that is slow, while a training saves.

    python -m tests.endurance.disks full --place=DIR --out=docs/results/reliability/full_disk
    python -m tests.endurance.disks slow --place=DIR --out=docs/results/reliability/slow_disk

Both need root and Linux. "full" mounts a small file system in memory (tmpfs) and fills it with a
file until so many bytes are left: the run must end with its cause as the last line, no traceback,
every state that was whole before must still be, and with the file gone the same command goes on.
"slow" limits what a process may write in a second to the disk that holds DIR (blkio of control
groups, version 1), which writes wait for that are made to be safe, as those of states are.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hybrid_vit.reporting import read_metrics
from hybrid_vit.tables import write_table
from tests import command
from tests.endurance import kills, runs

# Bytes left on the disk; a whole run leaves 1.5 MB.
LEFT = (0, 20_000, 60_000, 120_000, 250_000, 400_000, 700_000, 1_000_000, 1_300_000, 1_500_000)
_GROUPS = Path("/sys/fs/cgroup/blkio")
# Bytes a second.
SPEEDS = (1_000_000, 200_000, 50_000)


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[Path]:
  """A file system in memory of so many bytes."""
  place.mkdir(parents=True, exist_ok=True)
  options = f"size={size},nr_inodes=10000"
  subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
  try:
    yield place
  finally:
    subprocess.run(["umount", str(place)], check=True)


def fill(path: Path, left: int) -> None:
  """Writes zeros until so many bytes are left on the disk of a file."""
  about = os.statvfs(path.parent)
  with path.open("wb") as file:
    os.posix_fallocate(file.fileno(), 0, max(1, about.f_bavail * about.f_frsize - left))


def whole_steps(workdir: Path) -> dict[int, list[bytes]]:
  """The bytes of every file of each state that counts as whole."""
  return {
    step: [p.read_bytes() for p in sorted(_files(workdir / "checkpoints" / str(step)))]
    for step in runs.saved_steps(workdir)
  }


def _files(place: Path) -> list[Path]:
  return [path for path in place.rglob("*") if path.is_file()]


def full(left: int, cache: Path, config: Path, place: Path, unbroken: Path) -> dict[str, Any]:
  """A run on a disk with so many bytes left, which goes on when there is space."""
  with small_disk(place / "disk", 8_000_000) as disk:
    workdir = disk / "run"
    fill(disk / "ballast", left)
    process = command.start(cache, *runs.arguments(config, workdir))
    output, _ = process.communicate(timeout=runs.PATIENCE)
    (place / f"full_{left}.txt").write_text(output)
    saved = runs.saved_steps(workdir) if workdir.exists() else []
    before = whole_steps(workdir) if saved else {}
    (disk / "ballast").unlink()
    again = runs.finish(cache, config, workdir)
    restored = re.search(r"restored step (\d+) ", again)
    resumed = int(restored[1]) if restored else 0
    kept = whole_steps(workdir)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    unlike = runs.differences(workdir, unbroken)
    return {
      "bytes_left": left, "code": process.returncode,
      "error": errors[-1].replace(str(workdir), "…") if errors else "",
      "traceback": int("Traceback (most recent" in output),
      "saved": saved[0] if saved else 0, "resumed": resumed,
      "changed_states": sum(kept[s] != before[s] for s in before if s in kept),
      "different": len(unlike),
    }  # fmt: skip


@contextlib.contextmanager
def slow_group(place: Path, speed: int) -> Iterator[Path]:
  """A control group whose processes write so many bytes a second to the disk of a directory."""
  device = os.stat(place).st_dev
  group = _GROUPS / f"endurance_{os.getpid()}"
  group.mkdir()
  try:
    limit = f"{os.major(device)}:{os.minor(device)} {speed}"
    (group / "blkio.throttle.write_bps_device").write_text(limit)
    yield group
  finally:
    # Whoever is still in it keeps it.
    with contextlib.suppress(OSError):
      group.rmdir()


def steps_meanwhile(process: subprocess.Popen, workdir: Path, until: int | None) -> int:
  """Watches a run until it ends, or a state of that step is being written.

  Returns:
    The most steps that were logged beyond a state while it was being written.
  """
  most = 0
  while process.poll() is None:
    written = {int(path.name.partition(".")[0]) for path in workdir.glob("checkpoints/*.*tmp*")}
    if until in written:
      break
    with contextlib.suppress(OSError):
      lines = read_metrics(workdir / "metrics.jsonl") if written else []
      most = max([most, *(line["step"] - step for line in lines for step in written)])
    time.sleep(0.02)
  return most


def slow(
  speed: int, how: str, cache: Path, config: Path, place: Path, unbroken: Path
) -> dict[str, Any]:
  """A run whose writes are slow; "told" and "killed" ones go on without the limit."""
  workdir = place / f"slow_{speed}_{how}"
  shutil.rmtree(workdir, ignore_errors=True)
  begin = time.monotonic()
  with slow_group(place, speed) as group:
    process = command.start(cache, *runs.arguments(config, workdir))
    (group / "cgroup.procs").write_text(str(process.pid))
    ahead = steps_meanwhile(process, workdir, until=None if how == "left alone" else 9)
    if how != "left alone":
      process.send_signal(signal.SIGTERM if how == "told" else signal.SIGKILL)
    output, _ = process.communicate(timeout=runs.PATIENCE)
    seconds = time.monotonic() - begin
  code, saved = process.returncode, runs.saved_steps(workdir)
  said = re.search(r"told to stop: step (\d+) is saved", output)
  restored = None
  if code:
    restored = re.search(r"restored step (\d+) ", runs.finish(cache, config, workdir))
  unlike = runs.differences(workdir, unbroken)
  for line in unlike:
    print(f"  DIFFERENT: {line}", flush=True)
  return {
    "bytes_a_second": speed, "run": how, "seconds": round(seconds, 1), "code": code,
    "traceback": int("Traceback (most recent" in output), "steps_meanwhile": ahead,
    "said_saved": said[1] if said else "", "saved": saved[0] if saved else 0,
    "resumed": int(restored[1]) if restored else "", "different": len(unlike),
  }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
  """Either of the two; 1 where something is not as it should be."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("kind", choices=("full", "slow"))
  parser.add_argument("--case", type=int, help="number of one of the cases; the others' rows stay")
  parser.add_argument("--place", type=Path, required=True, help="of the runs; kept")
  parser.add_argument("--out", type=Path, required=True, help="of .csv and .md, without ending")
  options = parser.parse_args(arguments)
  logging.getLogger("absl").setLevel(logging.ERROR)
  options.place.mkdir(parents=True, exist_ok=True)
  config, unbroken, seconds = kills.unbroken(options.place)
  cache, bad = options.place / "xla", 0
  rows: list[dict[str, Any]] = []
  print(f"an unbroken run takes {seconds:.1f} s", flush=True)
  cases: list[tuple[Any, ...]] = [(left,) for left in LEFT]
  if options.kind == "slow":
    cases = [(speed, how) for speed in SPEEDS for how in ("left alone", "told", "killed")]
  head = ("bytes_left",) if options.kind == "full" else ("bytes_a_second", "run")
  order = [tuple(map(str, case)) for case in cases]
  if options.case is not None:
    cases = [cases[options.case]]
    found = kills.earlier(options.out.with_name(options.out.name + ".csv"))
    rows = [row for row in found if tuple(row[name] for name in head) != order[options.case]]
  for case in cases:
    do = full if options.kind == "full" else slow
    row = do(*case, cache, config, options.place, unbroken)
    print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    # A full disk: the cause, and where.
    told = row.get("error", "")
    named = options.kind == "slow" or row["code"] == 0 or ("ENOSPC" in told and "…" in told)
    bad += bool(row["different"] or row["traceback"] or not named or row.get("changed_states"))
    rows.append(row)
    rows.sort(key=lambda row: order.index(tuple(str(row[name]) for name in head)))
    write_table(options.out, rows)
  print(f"{len(cases)} runs, {bad} bad")
  return int(bad > 0)


if __name__ == "__main__":
  sys.exit(main())
