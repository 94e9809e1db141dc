"""A training on two canvases: two compiled steps, and a resume that leaves the same bytes."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from hybrid_vit import build, trainer
from hybrid_vit.build import DataFacts
from hybrid_vit.config import Config, load_config
from hybrid_vit.data.sources import create_source

CONFIG = Path(__file__).parent.parent / "configs" / "resnet.py"
CANVASES = ((16, 24), (24, 16))


class Sized:
  """Digits that say that they lie, but every third, which stands."""

  def __init__(self, sizes=True):
    self._digits = create_source("digits", "train", None)
    self.info = self._digits.info
    if sizes:
      standing = np.arange(len(self._digits)) % 3 == 0
      self.sizes = np.where(standing[:, None], (12, 8), (8, 12))

  def __len__(self):
    return len(self._digits)

  def __getitem__(self, index):
    return self._digits[index]

  def describe(self, index):
    return self._digits.describe(index)


@pytest.fixture(scope="module")
def run():
  config = load_config(CONFIG, "runlocal")
  del config["total_epochs"]
  config.total_steps = 6
  config.evaluate_every_epochs = 0
  config.optimizer.schedule = dict(name="constant")
  config.log_every_steps = 1
  config.data.batch_size = 16
  config.data.canvases = CANVASES
  config.data.transform = "decode|resize({canvas}, 'bilinear')"
  config.evaluation.sets.validation.split = "validation[:40]"
  config.checkpoint.every_steps = 2
  config.checkpoint.keep = 5
  config.sinks = ()
  source = Sized()
  made = Config(config)
  run = build.build(made, DataFacts(source.info, len(source), example=lambda: source[0]))
  made.assert_all_read()
  return run


def test_a_step_for_each_canvas_and_a_resume_bit_for_bit(run, tmp_path):
  assert [b["image"].shape for b in run.canvas_batches(0)] == [(16, *c, 3) for c in CANVASES]
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  trainer.train(run, Sized(), whole)
  shutil.copytree(whole, broken)
  for path in (broken / "checkpoints").iterdir():
    if path.name.isdecimal() and int(path.name) > 2:
      shutil.rmtree(path)
  trainer.train(run, Sized(), broken)
  lines = (whole / "metrics.jsonl").read_bytes()
  assert lines.count(b'"train"') == 6 and (broken / "metrics.jsonl").read_bytes() == lines


def test_a_source_must_know_the_sizes(run, tmp_path):
  with pytest.raises(ValueError, match="which this source does not know beforehand"):
    trainer.train(run, Sized(sizes=False), tmp_path)
