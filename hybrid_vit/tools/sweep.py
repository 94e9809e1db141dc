"""The trainings of a configuration's `sweep()`, one after another, and a table of their results.

python -m hybrid_vit.tools.sweep --config=my_config.py --workdir=runs/sweep

`sweep()` stands beside `get_config` and returns a list: of dicts of fields,
{"optimizer.learning_rate": 1e-3}, set in what `get_config` returns, or of whole ConfigDicts. Run
number k lies in WORKDIR/00k. The same command again passes over what is finished and goes on with
what is not. WORKDIR/table.csv and table.md hold the last evaluation of each; a run that fails is
told there, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from hybrid_vit.checkpoints import CheckpointError
from hybrid_vit.config import Config, ConfigError, differences, load_sweep
from hybrid_vit.standard_streams import run_tool
from hybrid_vit.tables import write_table
from hybrid_vit.workdir import WorkdirError

_RESULT, _TABLE = "result.json", "table"
_TOLD = (ValueError, OSError, FloatingPointError, CheckpointError, WorkdirError)


def run_sweep(
  configs: Sequence[tuple[Mapping[str, Any], ConfigDict]],
  workdir: str | Path,
  train: Callable[[ConfigDict, Path], Mapping[str, float]],
  show: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
  """Runs what is not finished yet.

  Args:
    configs: what `config.load_sweep` gives.
    workdir: where the runs lie.
    train: runs one, or goes on with it; returns its measures.
    show: told what happens.

  Returns:
    Rows of the table: "run", the fields that differ, "status" ("finished", "failed: …") and
    measures.

  Raises:
    ConfigError: a finished run was of another configuration, or there is nothing to run.
  """
  if not configs:
    raise ConfigError("`sweep()` gives an empty list: there is nothing to run")
  workdir = Path(workdir)
  resolved = [Config(config).resolved() for _, config in configs]
  for number, settings in enumerate(resolved):
    _check_same(_place(workdir, number), settings)
  rows: list[dict[str, Any]] = []
  for number, (fields, config) in enumerate(configs):
    place = _place(workdir, number)
    row: dict[str, Any] = {"run": place.name, "status": "finished", **fields}
    done = _finished(place)
    said = ", ".join(f"{key}={value}" for key, value in fields.items())
    if done is None:
      show(f"run {number + 1} of {len(configs)}, {place}: {said}")
      try:
        done = {key: float(value) for key, value in train(config, place).items()}
        _write(place / _RESULT, {"config": resolved[number], "results": done})
      except _TOLD as error:
        done = {}
        row["status"] = "failed: " + " ".join(str(error).split())
        show(f"{place.name} {row['status']}")
      # Nothing of a run is used by the next one.
      jax.clear_caches()
    else:
      show(f"run {number + 1} of {len(configs)}, {place}: finished before ({said})")
    rows.append({**row, **done})
    write_table(workdir / _TABLE, rows, ("run", "status"))
  return rows


def _place(workdir: Path, number: int) -> Path:
  return workdir / f"{number:03}"


def _finished(place: Path) -> dict[str, float] | None:
  path = place / _RESULT
  return json.loads(path.read_text())["results"] if path.exists() else None


def _check_same(place: Path, settings: Mapping[str, Any]) -> None:
  path = place / _RESULT
  if path.exists():
    found = differences(json.loads(path.read_text())["config"], settings)
    if found:
      raise ConfigError(
        f"{place} is a finished run of another configuration ({found[0]}): give another --workdir"
      )


def _write(path: Path, content: Mapping[str, Any]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(path.name + ".partial")
  partial.write_text(json.dumps(content, default=str))
  os.replace(partial, path)


def main(argv: Sequence[str] | None = None) -> int:
  """The command line; 0, or 1 after an error or where a run failed."""
  parser = argparse.ArgumentParser(prog="sweep", description=__doc__.splitlines()[0])
  parser.add_argument("--config", required=True, help="FILE.py[:argument] with sweep()")
  parser.add_argument("--workdir", required=True, help="directory of all its runs")
  args = parser.parse_args(argv)
  # Late, since its flags are a command's own.
  from hybrid_vit.main import train, use_compilation_cache

  try:
    file, _, argument = args.config.partition(":")
    configs = load_sweep(file, argument or None)
    use_compilation_cache()
    rows = run_sweep(configs, args.workdir, lambda config, place: train(config, place))
  except _TOLD as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  print((Path(args.workdir) / f"{_TABLE}.md").read_text(), end="")
  return 0 if all(row["status"] == "finished" for row in rows) else 1


if __name__ == "__main__":
  run_tool(main)
