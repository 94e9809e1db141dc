"""The run that is disturbed, and whether what it leaves is what an undisturbed one leaves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit.checkpoints import load_weights
from hybrid_vit.stored_trees import read_arrays, read_metadata, steps_in
from tests import command

# Two phases of other sizes and batches (tables of positions are converted between them), states
# saved often, the best kept, averages, accumulation, two sinks.
CONFIG = f"""
from hybrid_vit.config import load_config


def get_config():
  config = load_config("configs/quickstart.py")
  config.model.arguments = {command.TINY_NETWORK | {"batch_norm_momentum": 0.7}!r}
  config.data.batch_size = 48
  config.data.image_size = 16
  config.data.transform = "decode|resize({{image_size}})|random_resized_crop({{image_size}})"
  config.evaluation.sets.validation.transform = "decode|resize(16, 'bilinear')"
  config.phases = (
    dict(steps=12, image_size=8, batch_size=96, arguments=dict(position_sizes=(None, 1))),
    dict(steps=18),
  )
  del config.total_epochs, config.evaluate_every_epochs
  config.evaluate_every_steps = 6
  config.log_every_steps = 2
  config.ema_decay = 0.7
  config.optimizer.learning_rate = 1e-2
  config.accumulation_steps = 2
  config.optimizer.schedule.warmup_epochs = 0
  config.sinks = ("tensorboard", "csv")
  config.checkpoint = dict(keep=3, every_steps=3, best_metric="validation/loss")
  return config
"""
STEPS, BORDER = 30, 12
# Seconds for what must end: a busy machine is no fault.
PATIENCE = 3600.0
# Of a killed run nothing of these may stay, and of an unbroken one nothing is there.
_LEFT_OVERS = ("*orbax-checkpoint-tmp*", "*.partial", "*.old", "*.new", "*.broken*")


def write_config(directory: Path) -> Path:
  """The configuration as a file."""
  path = directory / "endurance.py"
  path.write_text(CONFIG)
  return path


def arguments(config: Path, workdir: Path) -> tuple[str, str]:
  """Of the command."""
  return f"--config={config}", f"--workdir={workdir}"


def finish(cache: Path, config: Path, workdir: Path) -> str:
  """Runs the command to its end; what it printed."""
  process = command.start(cache, *arguments(config, workdir))
  return command.finish(process, seconds=PATIENCE)


def differences(workdir: Path, whole: Path) -> list[str]:
  """What is not bit for bit as in an unbroken run's directory; each a line.

  Compared are metrics.jsonl and metrics.csv (without its times) byte by byte, which states there
  are, every array of every state, of the best one and of the export, and what lies beside them.
  """
  found = []
  for name in ("metrics.jsonl", "metrics.csv", "config.json"):
    if (whole / name).exists() and _figures(workdir / name) != _figures(whole / name):
      found.append(f"{name} differs")
  for place in ("checkpoints", "best"):
    names = [sorted(p.name for p in (w / place).iterdir()) for w in (workdir, whole)]
    if names[0] != names[1]:
      found.append(f"{place} holds {names[0]}, not {names[1]}")
      continue
    for step in names[0]:
      one, other = (w / place / step for w in (workdir, whole))
      found += _unlike(one / "state", other / "state")
      if read_metadata(one / "metadata" / "metadata") != read_metadata(
        other / "metadata" / "metadata"
      ):
        found.append(f"{one}/metadata differs")
  one, other = workdir / "export", whole / "export"
  found += _unlike(one / "weights", other / "weights")
  if json.loads((one / "metadata.json").read_text()) != json.loads(
    (other / "metadata.json").read_text()
  ):
    found.append("export/metadata.json differs")
  load_weights(workdir)  # fingerprints are compared here
  return found + [f"{path} was left" for path in left_overs(workdir)]


def left_overs(workdir: Path) -> list[Path]:
  """What an end at the wrong moment leaves half done."""
  places = (workdir, workdir / "checkpoints", workdir / "best", workdir / "tensorboard")
  return sorted(p for place in places for pattern in _LEFT_OVERS for p in place.glob(pattern))


def saved_steps(workdir: Path) -> list[int]:
  """Steps of the states that count as whole, the newest first."""
  return steps_in(workdir / "checkpoints")  # type: ignore[arg-type]


def _figures(path: Path) -> list[bytes]:
  """The lines of a file without those of the clock."""
  return [line for line in path.read_bytes().split(b"\n") if b",timing," not in line]


def _unlike(one: Path, other: Path) -> Iterator[str]:
  first, second = (dict(_leaves(read_arrays(path))) for path in (one, other))
  if first.keys() != second.keys():
    yield f"{one} has other leaves"
    return
  for name, value in first.items():
    # As bytes, so that a NaN is like itself and -0 is not 0.
    if value.dtype != second[name].dtype or value.tobytes() != second[name].tobytes():
      yield f"{one}: {name} differs"


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
  if isinstance(tree, dict):
    for key, value in tree.items():
      yield from _leaves(value, f"{name}/{key}")
  elif isinstance(tree, list | tuple):
    for i, value in enumerate(tree):
      yield from _leaves(value, f"{name}/{i}")
  elif tree is not None:
    yield name, np.asarray(tree)
