"""Schedules and one or two steps of each optimizer, against arithmetic by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_vit import optimizers
from hybrid_vit.config import Config, ConfigError

PARAMS = {
  "stem": {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.array([0.1, -0.2])},
  "stage1": {"attention": {"position_table": jnp.array([0.3, 0.4])}},
  "head": {"kernel": jnp.array([[2.0], [-1.0]]), "bias": jnp.array([0.5])},
}
GRADIENTS = jax.tree.map(lambda p: 0.1 * p + 0.05, PARAMS)


def flat(tree):
  names = jax.tree_util.tree_leaves_with_path(tree)
  return {optimizers.path_name(path): np.asarray(leaf) for path, leaf in names}


def steps(number=1, rate=0.1, **fields):
  """Parameters, by name, after so many steps with the same gradients."""
  optimizer = optimizers.make_optimizer(Config(fields), PARAMS, lambda step: rate)
  params, state = PARAMS, optimizer.init(PARAMS)
  for _ in range(number):
    updates, state = optimizer.update(GRADIENTS, state, params)
    params = optax.apply_updates(params, updates)
  return flat(params)


def assert_close(found, expected):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=2e-6, err_msg=name)


BEFORE, GRADIENT = flat(PARAMS), flat(GRADIENTS)
DECAYED = ("stem/kernel", "head/kernel")


# Schedules.


def test_cosine_with_warm_up():
  rate = optimizers.make_schedule("cosine", peak=1.0, total_steps=14, warmup_steps=4, end=0.2)
  assert [float(rate(s)) for s in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
  assert float(rate(4)) == pytest.approx(1.0)
  assert float(rate(9)) == pytest.approx(0.6)  # half-way between the two
  assert float(rate(7)) == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 0.3)))
  assert float(rate(14)) == float(rate(99)) == pytest.approx(0.2)


def test_linear_and_constant():
  linear = optimizers.make_schedule("linear", peak=2.0, total_steps=10, end=1.0)
  assert [float(linear(s)) for s in (0, 5, 10, 20)] == pytest.approx([2.0, 1.5, 1.0, 1.0])
  constant = optimizers.make_schedule(
    "constant", peak=2.0, total_steps=10, warmup_steps=2, warmup_start=1.0
  )
  assert [float(constant(s)) for s in (0, 1, 2, 9)] == pytest.approx([1.5, 2.0, 2.0, 2.0])


def from_config(batch_size=1024, **fields):
  return optimizers.schedule_from_config(
    Config(fields), batch_size=batch_size, total_steps=100, steps_per_epoch=10
  )


def test_the_rate_follows_the_batch_only_when_told():
  assert float(from_config(learning_rate=0.5, schedule={"name": "constant"})(0)) == 0.5
  scaled = from_config(
    learning_rate=0.5, learning_rate_batch_size=512, schedule={"name": "constant"}
  )
  assert float(scaled(0)) == 1.0


def test_warm_up_in_epochs_or_steps():
  by_epochs = from_config(learning_rate=1.0, schedule={"warmup_epochs": 0.5})
  by_steps = from_config(learning_rate=1.0, schedule={"warmup_steps": 5, "warmup_epochs": 3})
  for rate in (by_epochs, by_steps):
    assert [float(rate(s)) for s in (0, 4)] == pytest.approx([0.2, 1.0])


def test_schedules_that_cannot_be():
  with pytest.raises(ValueError, match="warm-up of 10 steps leaves nothing of a training of 10"):
    optimizers.make_schedule("cosine", peak=1.0, total_steps=10, warmup_steps=10)
  with pytest.raises(ConfigError, match="did you mean 'cosine'"):
    from_config(learning_rate=1.0, schedule={"name": "cosin"})


def test_a_constant_schedule_does_not_read_an_end():
  config = Config(
    {"learning_rate": 1.0, "schedule": {"name": "constant", "end_learning_rate": 1e-5}}
  )
  optimizers.schedule_from_config(config, batch_size=1, total_steps=9, steps_per_epoch=3)
  with pytest.raises(ConfigError, match="end_learning_rate` is not read"):
    config.assert_all_read()


# Optimizers.


def test_adamw_two_steps_by_hand():
  found = steps(2, name="adamw", b1=0.9, b2=0.99, eps=1e-3, weight_decay=0.2)
  expected = {}
  for name, value in BEFORE.items():
    m = v = 0.0
    for t in (1, 2):
      m = 0.9 * m + 0.1 * GRADIENT[name]
      v = 0.99 * v + 0.01 * GRADIENT[name] ** 2
      direction = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-3)
      value = value - 0.1 * (direction + (0.2 * value if name in DECAYED else 0.0))
    expected[name] = value
  assert_close(found, expected)


def test_lamb_by_hand():
  found = steps(name="lamb", eps=1e-3, weight_decay=0.2)
  expected = {}
  for name, value in BEFORE.items():
    direction = GRADIENT[name] / (np.abs(GRADIENT[name]) + 1e-3)
    direction = direction + (0.2 * value if name in DECAYED else 0.0)
    ratio = np.linalg.norm(value) / np.linalg.norm(direction)
    expected[name] = value - 0.1 * ratio * direction
  assert_close(found, expected)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_with_momentum_and_coupled_decay_by_hand(nesterov):
  found = steps(2, name="sgd", momentum=0.8, nesterov=nesterov, weight_decay=0.2)
  expected = {}
  for name, value in BEFORE.items():
    momentum = 0.0
    for _ in range(2):
      slope = GRADIENT[name] + (0.2 * value if name in DECAYED else 0.0)
      momentum = 0.8 * momentum + slope
      value = value - 0.1 * (slope + 0.8 * momentum if nesterov else momentum)
    expected[name] = value
  assert_close(found, expected)


def test_clipping_is_by_the_global_norm():
  norm = math.sqrt(sum(float((g**2).sum()) for g in GRADIENT.values()))
  found = steps(name="sgd", gradient_clip_norm=norm / 4)
  assert_close(found, {n: BEFORE[n] - 0.1 * GRADIENT[n] / 4 for n in BEFORE})
  unclipped = steps(name="sgd", gradient_clip_norm=norm * 1.01)
  assert_close(unclipped, {n: BEFORE[n] - 0.1 * GRADIENT[n] for n in BEFORE})


# Rules.


def test_decay_by_rules_of_ones_own():
  found = steps(
    name="sgd",
    momentum=0.0,
    weight_decay=0.2,
    weight_decay_rules=(("^head/", 0.5), ("bias$", 0.0), (".*", 1.0)),
  )
  factor = {"head/kernel": 0.5, "head/bias": 0.5, "stem/bias": 0.0}
  assert_close(
    found,
    {n: BEFORE[n] - 0.1 * (GRADIENT[n] + 0.2 * factor.get(n, 1.0) * BEFORE[n]) for n in BEFORE},
  )


def test_layer_decay_times_rules_of_the_rate():
  found = steps(
    name="sgd",
    layer_decay={"rate": 0.5, "layers": (("^stem", 0), ("^stage1", 1), ("^head", 2))},
    learning_rate_rules=(("^head/bias$", 10.0), (".*", 1.0)),
  )
  factor = {"stem": 0.25, "stage1": 0.5, "head": 1.0}
  expected = {n: BEFORE[n] - 0.1 * factor[n.split("/")[0]] * GRADIENT[n] for n in BEFORE}
  expected["head/bias"] = BEFORE["head/bias"] - 0.1 * 10.0 * GRADIENT["head/bias"]
  assert_close(found, expected)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_frozen_parameters_stand_still_and_have_no_state(name):
  config = {"name": name, "freeze": ("^stem/", "position_table"), "weight_decay": 0.1}
  found = steps(2, **config)
  for parameter, value in BEFORE.items():
    frozen = parameter.startswith("stem/") or "position_table" in parameter
    assert np.array_equal(found[parameter], value) == frozen, parameter
  optimizer = optimizers.make_optimizer(Config(config), PARAMS, lambda step: 0.1)
  held = [n for n in flat(jax.eval_shape(optimizer.init, PARAMS)) if "stem" in n]
  assert not held
  trained = [n for n in flat(jax.eval_shape(optimizer.init, PARAMS)) if n.endswith("head/kernel")]
  assert trained


def test_a_frozen_part_does_not_count_in_the_norm():
  part = {n: g for n, g in GRADIENT.items() if n.startswith("head/")}
  norm = math.sqrt(sum(float((g**2).sum()) for g in part.values()))
  found = steps(name="sgd", freeze=("^stem/", "^stage1/"), gradient_clip_norm=norm / 2)
  for name, gradient in part.items():
    np.testing.assert_allclose(found[name], BEFORE[name] - 0.1 * gradient / 2, rtol=1e-6)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"weight_decay": 0.1, "weight_decay_rules": (("kernel$", 1.0),)}, "no rule covers"),
    (
      {"weight_decay": 0.1, "weight_decay_rules": (("scale$", 0.0), (".*", 1.0))},
      "weight_decay_rules: rule 'scale\\$' matches no parameter",
    ),
    ({"learning_rate_rules": (("^tail", 0.1), (".*", 1.0))}, "'\\^tail' matches no parameter"),
    ({"learning_rate_rules": (("^head", 0.1),)}, "no rule covers parameter 'stage1/"),
    ({"freeze": ("^stam",)}, "freeze: rule '\\^stam' matches no parameter"),
    (
      {"layer_decay": {"rate": 0.9, "layers": (("^stem", 0), ("^head", 1))}},
      "layer_decay.layers: no rule covers parameter 'stage1/attention/position_table'",
    ),
    ({"name": "adam"}, "'adam', which is not one of adamw, lamb, sgd; did you mean 'adamw'"),
  ],
)
def test_rules_cover_every_parameter_and_each_matches(fields, message):
  with pytest.raises(ValueError, match=message):
    optimizers.make_optimizer(Config({"name": "sgd", **fields}), PARAMS, lambda step: 0.1)


def test_the_optimizers_default_rules_fit_a_network_without_tables():
  optimizers.make_optimizer(
    Config({"name": "adamw", "weight_decay": 0.1}), {"kernel": jnp.ones(2)}, lambda step: 0.1
  )
