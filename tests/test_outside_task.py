"""A task from outside the package: registered here, then trained, evaluated, resumed, looked at.

It guesses two numbers of a picture, its mean brightness and where its weight lies, from batches
that have no label. Nothing in the package knows of it.
"""

import dataclasses
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from hybrid_vit import dry_run, evaluate, main
from hybrid_vit.config import Config, ConfigError
from hybrid_vit.data.spec import MASK, Field, Spec
from hybrid_vit.reporting import read_metrics
from hybrid_vit.stopping import Preempted
from hybrid_vit.tasks.base import summed
from hybrid_vit.tasks.registry import register_task
from tests.command import TINY_NETWORK

pytestmark = pytest.mark.usefixtures("shared_programs")


@dataclasses.dataclass(frozen=True)
class RegressionSettings:
  scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Regression:
  model: object
  scale: float
  separable: bool = True

  @property
  def spec(self):
    image = Field("image", shape=(None, None, 3))
    return Spec({"image": image}, {"image": image, "name": Field("host")})

  @property
  def measures(self):
    return {"error": "min"}

  def stored_info(self):
    return {"targets": ["brightness", "weight"]}

  def init(self, rng, batch):
    image = batch["image"]
    return self.model.init(rng, jnp.zeros((1, *image.shape[1:])), train=False)

  def augment(self, batch, rng, step):
    picture = batch["image"].astype(jnp.float32) / 255.0
    middle = picture.mean((1, 3)) @ jnp.linspace(-1, 1, picture.shape[2])
    return {"image": picture, "target": jnp.stack([picture.mean((1, 2, 3)), middle], -1)}

  def loss(self, variables, batch, rng):
    (out, _), updated = self.model.apply(
      variables, batch["image"], train=True, rngs={"dropout": rng}, mutable=["batch_stats"]
    )
    errors = self.scale * jnp.sum((out - batch["target"]) ** 2, -1)
    metrics = {"loss": (jnp.sum(errors), jnp.asarray(len(out), jnp.float32))}
    return jnp.mean(errors), {"metrics": metrics, "batch_stats": updated["batch_stats"]}

  def predict(self, variables, batch):
    rows = self.augment(batch, None, None)
    return self.model.apply(variables, rows["image"], train=False)[0]

  def activations(self, variables, batch, rng):
    return {"image": batch["image"]}

  def evaluators(self, data):
    return [Error(self, item) for item in data]


class Error:
  def __init__(self, task, data):
    self.name, self._task, self._data = data.name, task, data
    self.names = set()

    @jax.jit
    def evaluate_batch(variables, batch):
      target = task.augment(batch, None, None)["target"]
      errors = jnp.sum((task.predict(variables, batch) - target) ** 2, -1)
      return {"error": (jnp.sum(errors * batch[MASK]), jnp.sum(batch[MASK]))}

    self._evaluate_batch = evaluate_batch

  def run(self, variables):
    total, weight = summed(self._data, self._evaluate_batch, variables)["error"]
    return {"error": total / weight}

  def draw(self, variables, path):
    return False


@register_task("regression_of_a_test", RegressionSettings)
def build(settings, context):
  return Regression(context.make_network(2), settings.scale)


def config(**changes):
  values = ConfigDict()
  values.model = dict(name="tiny_moat_0", arguments=TINY_NETWORK)
  values.task = dict(name="regression_of_a_test", scale=2.0)
  values.data = dict(
    source="digits", batch_size=96, image_size=16, transform="decode|resize(16, 'bilinear')"
  )
  values.evaluation = dict(
    sets=dict(held_out=dict(split="validation", transform="decode|resize(16)"))
  )
  values.phases = (dict(steps=6), dict(steps=4, batch_size=48))
  values.optimizer = dict(name="adamw", learning_rate=3e-3, schedule=dict(name="constant"))
  values.checkpoint = dict(every_steps=3, keep=9)
  values.log_every_steps = 2
  values.update(changes)
  return values


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shared_programs):
  workdir = tmp_path_factory.mktemp("regression") / "whole"
  return workdir, main.train(config(), workdir)


def test_it_trains_and_is_kept_by_its_own_measure(whole):
  workdir, results = whole
  lines = read_metrics(workdir / "metrics.jsonl")
  train = [line for line in lines if line["kind"] == "train"]
  assert train[-1]["loss"] < 0.8 * train[0]["loss"]
  assert set(results) == {"held_out/error"}
  metadata = json.loads((workdir / "export" / "metadata.json").read_text())
  assert metadata["targets"] == ["brightness", "weight"]
  assert metadata["task"] == "regression_of_a_test" and metadata["task_settings"] == {"scale": 2.0}
  assert not (workdir / "predictions.png").exists() and (workdir / "curves.png").exists()


@pytest.mark.parametrize("stop", [3, 6, 8], ids=["inside", "at the border", "in the second phase"])
def test_it_goes_on_bit_for_bit_from_any_place(whole, tmp_path, stop):
  """From a copy that ends at `stop`: what comes then is what came in the unbroken run."""
  workdir, _ = whole
  broken = shutil.copytree(workdir, tmp_path / "run")
  for path in (broken / "checkpoints").iterdir():
    if path.name.isdecimal() and int(path.name) > stop:
      shutil.rmtree(path)
  main.train(config(), broken)
  assert (broken / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()


def test_being_told_to_stop_is_noticed_within_an_evaluation(whole, tmp_path, monkeypatch):
  """The state is saved, the figures are written when the run goes on, and only once."""
  workdir, _ = whole
  run = Error.run

  def told(self, variables):
    os.kill(os.getpid(), signal.SIGTERM)
    run(self, variables)
    raise AssertionError("the evaluation went on to its end")

  with monkeypatch.context() as patch:
    patch.setattr(Error, "run", told)
    with pytest.raises(Preempted) as stopped:
      main.train(config(), tmp_path / "run")
  assert stopped.value.code == 128 + signal.SIGTERM
  assert not any(
    line["kind"].startswith("eval") for line in read_metrics(tmp_path / "run/metrics.jsonl")
  )
  main.train(config(), tmp_path / "run")
  ended = tmp_path / "run" / "metrics.jsonl"
  assert ended.read_bytes() == (workdir / "metrics.jsonl").read_bytes()


def test_a_trace_of_the_steps_asked_for(tmp_path):
  main.train(config(phases=(dict(steps=5),)), tmp_path / "run", profile=(2, 3))
  assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_another_runs_whole_state_is_gone_on_with(whole, tmp_path):
  """The step, the moments and the place in the data come along; that run's directory stays."""
  workdir, _ = whole
  before = sorted(path.name for path in (workdir / "checkpoints").iterdir())
  longer = config(phases=(dict(steps=6), dict(steps=6, batch_size=48)), resume_from=str(workdir))
  main.train(longer, tmp_path / "run")
  train = [x for x in read_metrics(tmp_path / "run/metrics.jsonl") if x["kind"] == "train"]
  assert [line["step"] for line in train] == [12]
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == before


def test_its_weights_are_evaluated(whole, capsys):
  workdir, results = whole
  found = evaluate.evaluate(Config(config()), workdir)
  assert found == pytest.approx(results)
  with pytest.raises(ConfigError, match=r"`config\.task\.scales` is not read"):
    values = config()
    values.task = dict(name="regression_of_a_test", scales=2.0)
    evaluate.evaluate(Config(values), workdir)


def test_its_dry_run_finds_nothing_wrong_and_what_is():
  plan = dry_run.examine(Config(config()), devices=8)
  assert plan.problems == [] and plan.multiply_adds and plan.activation_bytes
  wrong = config(checkpoint=dict(best_metric="held_out/top1"))
  problems = dry_run.examine(Config(wrong), devices=8).problems
  assert any("'held_out/top1'; there are: held_out/error" in text for text in problems), problems
