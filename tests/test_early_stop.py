"""Ending early: the counting, what a resumed run remembers, what is exported."""

import jax
import numpy as np
import pytest

from hybrid_vit import build, main
from hybrid_vit.checkpoints import load_weights
from hybrid_vit.config import Config, ConfigError
from hybrid_vit.early_stop import EarlyStop, Patience
from hybrid_vit.reporting import read_metrics
from tests.test_build import DIGITS, local

NAN = float("nan")


def ends(values, settings, higher_is_better=True):
  """The evaluation that ends the training, with the memory handed on through each one."""
  memory = None
  for number, value in enumerate(values):
    patience = Patience(settings, higher_is_better, memory)
    if patience.ends_after(value):
      return number
    memory = patience.memory
  return None


def test_so_many_evaluations_without_a_better_one():
  two = EarlyStop(2)
  assert ends([0.1, 0.2, 0.2, 0.3, 0.3, 0.2], two) == 5
  assert ends([0.1, 0.2, 0.1, 0.3], two) is None
  assert ends([2.0, 1.0, 1.5, 1.0], two, higher_is_better=False) == 3
  assert ends([0.1, 0.14, 0.16, 0.18], EarlyStop(2, min_delta=0.05)) is None
  assert ends([0.1, 0.14, 0.15, 0.3], EarlyStop(2, min_delta=0.05)) == 2
  assert ends([NAN, NAN], two) == 1 and ends([0.5, NAN, 0.6, NAN], two) is None


def test_settings_out_of_range_are_named():
  with pytest.raises(ValueError, match=r"config.early_stop.patience` is 0; at least 1"):
    build.build(local(early_stop__patience=0), DIGITS)
  with pytest.raises(ConfigError, match=r"early_stop` needs a best measure"):
    build.build(local(early_stop__patience=2, checkpoint__keep_best=False), DIGITS)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
  """A training whose rate is so large after its first epochs that it only becomes worse."""
  workdir = tmp_path_factory.mktemp("early") / "run"
  main.train(settings(), workdir)
  return workdir


def settings():
  return Config(
    local(
      early_stop__patience=2,
      total_epochs=40,
      evaluate_every_steps=2,
      evaluate_every_epochs=None,
      data__batch_size=256,
      sinks=(),
      optimizer=dict(name="sgd", learning_rate=0.0, schedule=dict(name="constant")),
    ).resolved()
  )


def test_a_training_ends_early_and_exports_its_best_weights(ended):
  lines = [x for x in read_metrics(ended / "metrics.jsonl") if x["kind"] == "eval/validation"]
  steps = [line["step"] for line in lines]
  values = [line["top1"] for line in lines]
  best = steps[int(np.argmax(values))]
  assert steps[-1] < 40 * 5 and max(values[-2:]) <= max(values[:-2])
  weights, metadata = load_weights(ended)
  assert metadata["weights"] == f"trained here, the best by validation/top1: of step {best}"
  assert metadata["results"]["validation/top1"] == pytest.approx(max(values))
  kept, _ = load_weights(ended / "best")
  jax.tree.map(np.testing.assert_array_equal, weights, kept)


def test_the_same_command_again_stays_ended(ended, capsys):
  before = (ended / "metrics.jsonl").read_bytes()
  main.train(settings(), ended)
  assert (ended / "metrics.jsonl").read_bytes() == before
  assert "ended early at step" in capsys.readouterr().out
