"""The real command in processes of its own, on a network that compiles in seconds."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Two blocks for 16 x 16 pictures.
TINY_NETWORK = dict(
  stem_widths=(8, 8),
  depths=(1, 1),
  widths=(8, 16),
  block_types=("mbconv", "moat"),
  strides=(2, 2),
  window_sizes=(None, None),
  position_sizes=(None, 2),
  head_size=8,
  drop_path_rate=0.2,
  batch_norm_momentum=0.9,
)

# The quickstart with that network; everything that a checkpoint holds is in use.
TINY = f"""
from hybrid_vit.config import load_config


def get_config():
  config = load_config("configs/quickstart.py")
  config.model.arguments = {TINY_NETWORK!r}
  config.data.batch_size = 96
  config.data.transform = "decode|resize(18, 'bilinear')|random_crop(16)"
  config.evaluation.sets.validation.transform = "decode|resize(16, 'bilinear')"
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.sharding_rules = ((".*", "fsdp"),)
  config.total_epochs = 2
  config.evaluate_every_epochs = 1
  config.log_every_steps = 2
  config.ema_decay = 0.9
  config.accumulation_steps = 2
  config.optimizer.schedule.warmup_epochs = 1
  config.checkpoint.keep = 3
  config.checkpoint.every_steps = 3
  return config
"""
STEPS = 30  # two epochs of 1,437 / 96


def environment(cache, devices=1, **more):
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    **more,
  }


def start(cache, *arguments, devices=1, stdout=subprocess.PIPE, **more):
  """The command, begun; its output is in one stream, a file's where one is given."""
  return subprocess.Popen(
    [sys.executable, "-m", "hybrid_vit.main", *map(str, arguments)],
    cwd=ROOT,
    env=environment(cache, devices, **more),
    stdout=stdout,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process, code=0, seconds=180):
  """What it printed; it must end with `code` within so many seconds."""
  try:
    output, _ = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    process.kill()
    raise AssertionError(f"not done in time; it printed\n{process.communicate()[0]}") from None
  assert process.returncode == code, textwrap.indent(output, "  ")
  return output


def run(cache, *arguments, code=0, **options):
  """The command from start to end."""
  return finish(start(cache, *arguments, **options), code)
