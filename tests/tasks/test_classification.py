import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.models.registry import create_model
from hybrid_vit.tasks.classification import Classification, count_correct
from tests import small


def test_rows_without_mask_and_ties_count_for_nothing():
  task = small.make_task()
  logits = jnp.zeros((4, 10)).at[0, 3].set(2.0).at[1, 3].set(2.0).at[3].set(jnp.nan)
  fake = types.SimpleNamespace(apply=lambda *_, **__: (logits, {}))
  task = task.__class__(fake, 10, task.mean, task.std)
  batch = {
    "image": np.zeros((4, 8, 8, 3), np.float32),
    "label": np.array([3, 4, 0, 0], np.int32),
    "mask": np.array([1, 1, 1, 0], np.float32),
  }
  sums = jax.device_get(task.evaluate_batch({}, batch))
  # Right; behind one class and tied with eight others; tied with all.
  assert sums["top1"] == (1.0, 3.0)
  assert sums["top5"] == (1.0, 3.0)
  expected = [-2 + np.log(np.exp(2) + 9), np.log(np.exp(2) + 9), np.log(10)]
  np.testing.assert_allclose(sums["loss"][0], sum(expected), rtol=1e-5)


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_losses_by_their_definition(name):
  base = small.make_task()
  logits = np.random.default_rng(0).normal(size=(3, 4))
  targets = np.array([[1, 0, 0, 0], [0, 0.5, 0.5, 0], [0.25] * 4])
  fake = types.SimpleNamespace(apply=lambda *_, **__: ((jnp.asarray(logits), {}), {}))
  task = base.__class__(fake, 4, base.mean, base.std, loss_name=name)
  batch = {"image": np.zeros((3, 8, 8, 3)), "target": jnp.asarray(targets)}
  loss, aux = task.loss({}, batch, jax.random.key(0))
  if name == "softmax":
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -(targets * logs).sum(-1)
  else:
    p = 1 / (1 + np.exp(-logits))
    expected = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).sum(-1)
  np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
  np.testing.assert_allclose(aux["metrics"]["loss"][0], expected.sum(), rtol=1e-5)
  assert loss.dtype == jnp.float32


def test_pictures_are_normalised_once():
  task, batch = small.make_task(), small.make_batch()
  found = task.normalize(jnp.asarray(batch["image"]))
  np.testing.assert_allclose(found, (batch["image"] / 255.0 - 0.5) / 0.25, atol=1e-5)
  assert task.normalize(found) is found
  np.testing.assert_allclose(task.displayable(np.asarray(found)), batch["image"], atol=1)


@pytest.mark.parametrize("bad", ["all", "own", "another"])
def test_logits_that_are_no_numbers_are_not_right(bad):
  row = {
    "all": jnp.full(10, jnp.nan),
    "own": jnp.arange(10.0).at[9].set(jnp.nan),
    "another": jnp.zeros(10).at[9].set(5.0).at[2].set(jnp.nan),
  }[bad]
  logits = jnp.stack([row, jnp.arange(10.0)])
  base = small.make_task()
  fake = types.SimpleNamespace(apply=lambda *_, **__: (logits, {}))
  task = base.__class__(fake, 10, base.mean, base.std)
  batch = {"image": np.zeros((2, 8, 8, 3), np.float32), "label": np.array([9, 9], np.int32)}
  sums = task.evaluate_batch({}, {**batch, "mask": np.ones(2, np.float32)})
  assert float(sums["top1"][0]) == 1.0
  # One NaN beside the right class, the largest of all numbers: it may still be among five.
  assert float(sums["top5"][0]) == (2.0 if bad == "another" else 1.0)
  targets = jax.nn.one_hot(batch["label"], 10)
  assert float(count_correct(logits, targets)) == 1.0


def test_measures_have_directions_and_labels_have_limits():
  task = small.make_task()
  assert task.measures == {"top1": "max", "top5": "max", "loss": "min"}
  assert next(iter(task.measures)) == "top1"
  assert "top5" not in small.make_task(num_classes=3).measures
  label = task.spec.train["label"]
  assert (label.minimum, label.maximum) == (0, 9)


def test_a_reversible_network_has_its_inverse_measured():
  arguments = dict(widths=(4, 4, 8, 8), depths=(1, 1, 1, 1), num_columns=3)
  model = create_model("revcol_tiny", 3, **arguments, reversible=True)
  task = Classification(model, 3, mean=(0.5,) * 3, std=(0.5,) * 3)
  images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)

  class Data:
    name, info = "held_out", {}

    def __len__(self):
      return 1

    def batches(self):
      yield {"image": images, "label": np.zeros(4, np.int32), "mask": np.ones(4, np.float32)}, {}

    def sample(self, count):
      return {"image": images[:count], "label": np.zeros(4, np.int32)}

  variables = jax.jit(lambda: task.init(jax.random.key(0), {"image": images}))()
  (evaluator,) = task.evaluators([Data()])
  error = evaluator.run(variables)["inverse_error"]
  assert 0 < error < 1e-4 and task.measures["inverse_error"] == "min"
  # A gain that hides what it is multiplied with: what is rebuilt is worth less.
  alphas = {f"alpha{i}": np.full(w, 0.01, np.float32) for i, w in enumerate(arguments["widths"])}
  worse = {"params": {**variables["params"]}}
  for column in ("column1", "column2"):
    worse["params"][column] = {**worse["params"][column], **alphas}
  assert evaluator.run(worse)["inverse_error"] > 100 * error
  plain = dataclasses.replace(task, model=model.clone(reversible=False))
  assert "inverse_error" not in plain.measures
