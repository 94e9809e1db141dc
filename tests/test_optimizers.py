"""Schedules and one or two steps of each optimizer, against arithmetic by hand."""

import functools
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


def assert_close(found, expected, rtol=2e-6):
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=rtol, err_msg=name)


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


def test_polynomial_is_of_what_is_left_and_power_of_what_is_done():
  make = functools.partial(
    optimizers.make_schedule, peak=2.0, total_steps=12, warmup_steps=2, warmup_start=0.1, end=0.5
  )
  left, done = make("polynomial", power=0.9), make("power", power=0.9)
  for step in (2, 5, 11, 12, 40):
    part = min((step - 2) / 10, 1.0)
    assert float(left(step)) == pytest.approx(0.5 + 1.5 * (1 - part) ** 0.9, abs=1e-6)
    assert float(done(step)) == pytest.approx(2.0 - 1.5 * part**0.9, abs=1e-6)
  # Of the power 1 both are the straight line.
  line = make("linear")
  for name in ("polynomial", "power"):
    assert [float(make(name)(s)) for s in range(13)] == pytest.approx(
      [float(line(s)) for s in range(13)]
    )
  assert [float(left(s)) for s in (0, 1)] == pytest.approx([1.05, 2.0])
  risen = make("power", power=0.9, warmup_power=0.9)
  assert float(risen(0)) == pytest.approx(0.1 + 1.9 * 0.5**0.9)


def test_powers_are_read_where_there_is_one():
  fields = {"name": "polynomial", "power": 0.9, "warmup_steps": 10, "warmup_power": 0.5}
  rate = from_config(learning_rate=1.0, schedule=fields)
  assert float(rate(55)) == pytest.approx(0.5**0.9, abs=1e-6)
  assert float(rate(4)) == pytest.approx(0.5**0.5)
  for wrong in ({"power": 0.0}, {"warmup_power": -1.0}):
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}` is .*; more than 0"):
      from_config(learning_rate=1.0, schedule={**fields, **wrong})
  config = Config({"learning_rate": 1.0, "schedule": {"name": "cosine", "power": 2.0}})
  optimizers.schedule_from_config(config, batch_size=8, total_steps=100, steps_per_epoch=10)
  with pytest.raises(ConfigError, match="power"):
    config.assert_all_read()


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


def test_ends_and_starts_as_parts_of_the_peak_follow_the_batch():
  fields = {"end_learning_rate_factor": 0.1, "warmup_start_factor": 0.5, "warmup_steps": 4}
  for batch_size, peak in ((512, 0.5), (1024, 1.0), (256, 0.25)):
    rate = from_config(batch_size, learning_rate=0.5, learning_rate_batch_size=512, schedule=fields)
    assert float(rate(100)) == pytest.approx(0.1 * peak)
    # From half of the peak: an eighth of it more with each of four steps.
    assert [float(rate(s)) for s in (0, 3)] == pytest.approx([0.625 * peak, peak])
  absolute = from_config(
    2048,
    learning_rate=0.5,
    learning_rate_batch_size=512,
    schedule={"end_learning_rate": 0.01, "warmup_start_learning_rate": 1.0, "warmup_steps": 4},
  )
  assert [float(absolute(s)) for s in (0, 3, 100)] == pytest.approx([1.25, 2.0, 0.01])


@pytest.mark.parametrize(
  ("rate", "factor"),
  [
    ("end_learning_rate", "end_learning_rate_factor"),
    ("warmup_start_learning_rate", "warmup_start_factor"),
  ],
)
def test_a_rate_and_a_part_of_the_peak_exclude_each_other(rate, factor):
  fields = {rate: 1e-6, factor: 0.25, "warmup_epochs": 1}
  with pytest.raises(ConfigError) as error:
    from_config(learning_rate=1.0, schedule=fields)
  group = "config.optimizer.schedule"
  assert str(error.value) == (
    f"`{group}.{rate}` is 1e-06 and `{group}.{factor}` is 0.25: give one of them, a rate or a part "
    "of the peak"
  )


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"learning_rate": "1e-3"}, "`config.learning_rate` is '1e-3'; a number was expected"),
    ({"learning_rate": -1.0}, "`config.learning_rate` is -1.0; at least 0.0 was expected"),
    ({}, "`config.learning_rate` is needed and was not given"),
    ({"learning_rate_batch_size": 0}, "`config.learning_rate_batch_size` is 0; at least 1"),
    ({"learning_rate_batch_size": 25.5}, "is 25.5; a whole number was expected"),
    ({"schedule": "cosine"}, "`config.schedule` is 'cosine'; a group of fields was expected"),
    ({"schedule": {"warmup_epochs": "5"}}, "`config.schedule.warmup_epochs` is '5'; a number"),
    ({"schedule": {"warmup_steps": 1.5}}, "`config.schedule.warmup_steps` is 1.5; a whole number"),
    ({"schedule": {"warmup_steps": -1}}, "`config.schedule.warmup_steps` is -1; at least 0"),
    (
      {"schedule": {"end_learning_rate": None, "end_learning_rate_factor": "x"}},
      "is 'x'; a number",
    ),
    ({"schedule": {"end_learning_rate": True}}, "`config.schedule.end_learning_rate` is True"),
  ],
)
def test_settings_of_a_schedule_are_checked_by_name(fields, message):
  given = {} if not fields else {"learning_rate": 1.0, **fields}
  with pytest.raises(ConfigError) as error:
    from_config(**given)
  assert message in str(error.value)


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


@pytest.mark.parametrize("weight_decay", [0.2, 0.0])
@pytest.mark.parametrize("freeze", [(), ("^stem/kernel",)])
def test_lamb_by_hand(weight_decay, freeze):
  found = steps(name="lamb", eps=1e-3, weight_decay=weight_decay, freeze=freeze)
  expected = {}
  for name, value in BEFORE.items():
    direction = GRADIENT[name] / (np.abs(GRADIENT[name]) + 1e-3)
    ratio = 1.0  # what is not decayed takes Adam's step
    if name in DECAYED:
      direction = direction + weight_decay * value
      ratio = np.linalg.norm(value) / np.linalg.norm(direction)
    expected[name] = value - 0.1 * ratio * direction
  if freeze:
    expected["stem/kernel"] = BEFORE["stem/kernel"]
  assert_close(found, expected, rtol=1e-3)  # 0.00164 is a small difference of two numbers


def test_lambs_trust_ratio_follows_rules_of_ones_own():
  rules = (("^head/", 1.0), (".*", 0.0))
  found = steps(name="lamb", eps=1e-3, weight_decay=0.2, weight_decay_rules=rules)
  adam = steps(name="adamw", eps=1e-3)
  lamb = steps(name="lamb", eps=1e-3, weight_decay=0.2, weight_decay_rules=((".*", 1.0),))
  assert_close(found, {n: (lamb if n.startswith("head/") else adam)[n] for n in BEFORE})


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


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"b1": "0.9"}, "`config.b1` is '0.9'; a number was expected"),
    ({"b2": 1.0}, "`config.optimizer.b2` is 1.0; a number below 1 was expected"),
    ({"eps": -1e-8}, "`config.eps` is -1e-08; at least 0.0 was expected"),
    ({"name": "sgd", "momentum": 1}, "`config.optimizer.momentum` is 1.0; a number below 1"),
    ({"name": "sgd", "nesterov": "no"}, "`config.nesterov` is 'no'; True or False was expected"),
    ({"weight_decay": "0.05"}, "`config.weight_decay` is '0.05'; a number was expected"),
    ({"weight_decay": -0.1}, "`config.weight_decay` is -0.1; at least 0.0 was expected"),
    ({"gradient_clip_norm": True}, "`config.gradient_clip_norm` is True; a number was expected"),
    ({"freeze": "^stem"}, "`config.freeze` is '^stem'; a tuple was expected"),
    ({"freeze": (1,)}, "`config.optimizer.freeze` holds 1; regexes were expected"),
    ({"freeze": ("(stem",)}, "`config.optimizer.freeze` holds '(stem', which is no regular"),
    ({"learning_rate_rules": ("head", 2.0)}, "learning_rate_rules` holds 'head'; pairs (regex"),
    ({"learning_rate_rules": (("head", "2"),)}, "holds ('head', '2'); pairs (regex, number)"),
    (
      {"weight_decay": 0.1, "weight_decay_rules": (("*", 1.0),)},
      "weight_decay_rules` holds '*', which is no regular expression: nothing to repeat",
    ),
    ({"layer_decay": 0.8}, "`config.layer_decay` is 0.8; a group of fields was expected"),
    ({"layer_decay": {"rate": 0.0}}, "`config.layer_decay.rate` is 0.0; more than 0.0"),
    ({"layer_decay": {"rate": 0.8, "layers": (("^stem",),)}}, "layer_decay.layers` holds"),
  ],
)
def test_settings_of_an_optimizer_are_checked_by_name(fields, message):
  with pytest.raises(ConfigError) as error:
    optimizers.make_optimizer(Config({"name": "adamw", **fields}), PARAMS, lambda step: 0.1)
  assert message in str(error.value)


# Rules.


@pytest.mark.parametrize(
  ("name", "decayed"),
  [
    ("kernel", True),
    ("block0/attention/query/kernel", True),
    ("bias", False),
    ("block0/norm/bias", False),
    ("norm/scale", False),
    ("block0/gamma", False),
    ("gamma", False),
    ("class_token", False),
    ("tower/class_token", False),
    ("position_embedding", False),
    ("attention/position_table12", False),
    ("gamma/kernel", True),  # a module's name is not its parameter's
    ("subclass_token", True),
    ("relative_position_index", True),
  ],
)
def test_what_is_decayed_by_default(name, decayed):
  params: dict = {}
  *modules, last = name.split("/")
  place = params
  for module in modules:
    place = place.setdefault(module, {})
  place[last] = jnp.ones(2)
  config = Config({"name": "sgd", "weight_decay": 0.5})
  optimizer = optimizers.make_optimizer(config, params, lambda step: 1.0)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  assert float(jax.tree.leaves(updates)[0][0]) == (-0.5 if decayed else 0.0)


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
