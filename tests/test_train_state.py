import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit import build, programs, sharding
from hybrid_vit.collectives import collectives_of
from hybrid_vit.config import Config, load_config
from hybrid_vit.data.spec import REPLACED
from hybrid_vit.nonfinite import NonFiniteError, first_bad_tensor
from hybrid_vit.optimizers import frozen_parameters
from hybrid_vit.train_state import create_state, loss_and_gradients, make_train_step
from tests import small

close = functools.partial(
  jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
)


def frozen_tree(task, names):
  """Booleans for each parameter; None where none is named."""
  params = jax.eval_shape(lambda key: task.init(key, small.make_batch()), jax.random.key(0))
  return frozen_parameters(Config({"freeze": names}), params["params"])


@functools.cache
def setup(ema_decay=None, accumulation=1, skip_bad_steps=0, frozen=(), **arguments):
  """(task, state of step 0, compiled step that keeps its argument)."""
  task = small.make_task(**arguments)
  optimizer = small.adamw(task)
  make = functools.partial(
    create_state, task=task, optimizer=optimizer, batch=small.make_batch(), ema=bool(ema_decay)
  )
  step = make_train_step(
    task,
    optimizer,
    small.schedule,
    accumulation_steps=accumulation,
    ema_decay=ema_decay,
    skip_bad_steps=skip_bad_steps,
    frozen=frozen_tree(task, frozen),
  )
  return task, jax.jit(make)(jax.random.key(0)), jax.jit(step)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_big_batch(parts):
  accumulated, batch = small.make_task(label_smoothing=0.1), small.make_batch(16)
  variables = accumulated.init(jax.random.key(0), batch)
  key = jax.random.key(1)
  rows = accumulated.augment(batch, key, 0)
  found = jax.jit(functools.partial(loss_and_gradients, accumulated, accumulation_steps=parts))(
    variables, rows, key
  )
  # Batch norm works in groups of neighbours; the parts take every so-manyth row.
  whole = small.make_task(label_smoothing=0.1, groups=parts)
  order = np.concatenate([np.arange(first, 16, parts) for first in range(parts)])
  in_groups = jax.tree.map(lambda x: x[order], dict(rows))
  expected = loss_and_gradients(whole, variables, in_groups, key, 1)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected)


def test_a_batch_that_does_not_fall_into_parts_is_refused():
  task, batch = small.make_task(), small.make_batch(16)
  variables = jax.eval_shape(lambda key: task.init(key, batch), jax.random.key(0))
  rows = task.augment(batch, jax.random.key(0), 0)
  with pytest.raises(ValueError, match="batch of 16 does not fall into 3 equal parts"):
    jax.eval_shape(lambda v: loss_and_gradients(task, v, rows, jax.random.key(0), 3), variables)


def test_a_step_is_a_function_of_state_and_batch_alone():
  _, state, step = setup(drop_path_rate=0.5)
  one, again = (step(state, small.make_batch()) for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(s[1]) for s in (one, again)))
  for a, b in zip(jax.tree.leaves(one[0].params), jax.tree.leaves(again[0].params)):
    np.testing.assert_array_equal(a, b)
  later = step(state.replace(step=state.step + 1), small.make_batch())
  assert float(later[1]["gradient_norm"]) != float(one[1]["gradient_norm"])  # another draw
  assert int(one[0].step) == 1 and int(one[0].bad_step) == -1
  np.testing.assert_array_equal(*(jax.random.key_data(s.rng) for s in (state, one[0])))


def test_the_average_follows_parameters_and_statistics():
  _, state, step = setup(ema_decay=0.75)
  expected = state.ema
  for seed in range(3):
    state, _ = step(state, small.make_batch(seed=seed))
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, expected, state.variables)
  close(state.ema, expected)
  assert state.evaluation_variables is state.ema
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.ema, state.variables)
  assert all(distance > 0 for distance in jax.tree.leaves(moved))


def test_a_report_has_the_sums_of_its_step():
  task, state, step = setup()
  batch = {**small.make_batch(), REPLACED: np.array([1.0] * 3 + [0.0] * 13, np.float32)}
  rows = task.augment(batch, jax.random.key(0), 0)
  expected = float(task.loss(state.variables, rows, jax.random.key(0))[0]) * 16
  new, report = step(state, batch)
  total, weight = report["metrics"]["loss"]
  np.testing.assert_allclose(total, expected, rtol=1e-4)
  assert weight == 16 and report["replaced"] == 3
  norm = np.sqrt(sum(float(jnp.sum(p**2)) for p in jax.tree.leaves(new.params)))
  np.testing.assert_allclose(report["parameter_norm"], norm, rtol=1e-5)


def test_bad_steps_are_skipped_up_to_a_number_in_a_row():
  _, state, step = setup(ema_decay=0.75, skip_bad_steps=2)
  state, _ = step(state, {**small.make_batch(), "image": np.zeros((16, 8, 8, 3), np.float32)})
  bad = {**small.make_batch(), "image": np.full((16, 8, 8, 3), np.nan, np.float32)}
  good = {**bad, "image": np.ones_like(bad["image"])}
  kept = lambda s: (s.params, s.opt_state, s.ema, s.batch_stats)  # noqa: E731
  counts = []
  for batch in (bad, bad, good, bad, bad, bad):
    new, report = step(state, batch)
    counts.append((int(new.step), int(report["skipped"]), int(report["bad_step"])))
    assert float(report["metrics"]["loss"][1]) == (16 if batch is good else 0)
    if batch is bad:
      jax.tree.map(np.testing.assert_array_equal, kept(new), kept(state))
    state = new
  assert counts == [(2, 1, -1), (3, 2, -1), (4, 0, -1), (5, 1, -1), (6, 2, -1), (6, 3, 7)]


def test_frozen_parts_cost_nothing_and_stand_still():
  names = ("^conv", "^norm", "^hidden")
  task, state, step = setup(frozen=names)
  _, _, plain = setup()
  new, report = step(state, small.make_batch())
  jax.tree.map(np.testing.assert_array_equal, new.batch_stats, state.batch_stats)
  # The gradient's norm is that of the head alone.
  frozen = frozen_tree(task, names)
  rows = task.augment(small.make_batch(), jax.random.key(0), 0)
  _, aux, gradients = loss_and_gradients(
    task, state.variables, rows, jax.random.key(0), frozen=frozen
  )
  assert not any(
    jnp.any(leaf) for n in ("conv", "norm", "hidden") for leaf in gradients[n].values()
  )
  head = np.sqrt(sum(float(jnp.sum(g**2)) for g in gradients["head"].values()))
  assert head > 0
  np.testing.assert_allclose(report["gradient_norm"], head, rtol=1e-4)
  # The batch norm uses its running figures, as it will in evaluation.
  logits = task.predict(state.variables, {"image": small.make_batch()["image"]})
  assert float(task.loss(state.variables, rows, jax.random.key(0))[0]) != pytest.approx(
    float(aux["metrics"]["loss"][0]) / 16, rel=1e-4
  )
  expected = -jax.nn.log_softmax(logits)[np.arange(16), small.make_batch()["label"]].sum()
  np.testing.assert_allclose(aux["metrics"]["loss"][0], expected, rtol=1e-4)
  # Nothing of the frozen part is differentiated.
  flops = [
    s.lower(state, small.make_batch()).compile().cost_analysis()["flops"] for s in (step, plain)
  ]
  assert flops[0] < 0.6 * flops[1]


def test_a_loss_of_the_whole_batch_is_not_taken_apart():
  task = dataclasses.replace(small.make_task(), separable=False)
  batch = small.make_batch()
  variables = jax.eval_shape(lambda key: task.init(key, batch), jax.random.key(0))
  rows = task.augment(batch, jax.random.key(0), 0)
  with pytest.raises(ValueError, match="looks at a whole batch"):
    jax.eval_shape(lambda v: loss_and_gradients(task, v, rows, jax.random.key(0), 2), variables)


def test_the_state_stands_still_from_the_first_bad_step_on():
  _, state, step = setup(ema_decay=0.75)
  state, _ = step(state, small.make_batch())
  bad = {**small.make_batch(), "image": np.full((16, 8, 8, 3), np.nan, np.float32)}
  good = {**bad, "image": np.zeros_like(bad["image"])}
  for batch in (bad, good, bad):
    new, report = step(state, batch)
    assert int(report["bad_step"]) == int(new.bad_step) == 2
    without = lambda s: s.replace(rng=None, bad_step=None, skipped=None)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, without(new), without(state))
    state = new


def test_the_first_bad_tensor_is_named():
  task, state, step = setup()
  images = np.random.default_rng(0).normal(size=(16, 8, 8, 3)).astype(np.float32)
  batch = {key: jnp.asarray(value) for key, value in small.make_batch().items()}

  def name(params, images):
    poisoned = state.replace(params=params)
    stopped, report = step(poisoned, {**batch, "image": images})
    assert int(report["bad_step"]) == 1
    return first_bad_tensor(task, stopped, {**batch, "image": images}, 1)

  assert name(state.params, images * np.nan) == "image"
  # Finite weights whose products are not: the hidden layer is where it begins.
  huge = jax.tree.map(lambda x: x, state.params)
  huge["hidden"]["kernel"] = jnp.full_like(huge["hidden"]["kernel"], 1e38)
  assert name(huge, images) == "hidden"
  huge["norm"]["bias"] = huge["norm"]["bias"] * np.nan
  assert name(huge, images) == "params/norm/bias"

  message = str(NonFiniteError(7, "hidden", batch, 5))
  assert "step 7; first bad tensor: hidden; data positions of the batch: 0, 1, 2" in message
  assert "last good checkpoint is that of step 5" in message
  assert "nothing was saved" in str(NonFiniteError(7, "hidden", batch, None))


def test_bfloat16_is_for_the_computation_alone():
  _, state, step = setup(dtype="bfloat16", ema_decay=0.75)
  _, exact, exact_step = setup(ema_decay=0.75)
  new, report = step(state, small.make_batch())
  _, exact_report = exact_step(exact, small.make_batch())
  floats = [x for x in jax.tree.leaves(new.replace(rng=None)) if x.dtype != jnp.int32]
  assert floats and all(x.dtype == jnp.float32 for x in floats)
  total, weight = report["metrics"]["loss"]
  assert total.dtype == jnp.float32
  exact_loss = float(exact_report["metrics"]["loss"][0] / weight)
  assert 0 < abs(float(total / weight) - exact_loss) < 0.02 * exact_loss
  # The convolution itself is in bfloat16.
  text = str(jax.make_jaxpr(step)(state, small.make_batch()))
  convolutions = [line for line in text.splitlines() if "conv_general_dilated[" in line]
  assert convolutions and all("bf16" in line for line in convolutions)


@pytest.mark.parametrize("remat", [False, True])
def test_recomputation_is_a_line_of_the_configuration(remat):
  values = load_config("configs/quickstart.py")
  values.remat = remat
  config = Config(values)
  facts = build.DataFacts(num_classes=10)
  (task,), _ = build.build_tasks(config, facts, build.preprocessing_of(config), None)
  shape = {
    "image": jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32),
    "target": jax.ShapeDtypeStruct((2, 10), np.float32),
  }
  variables = jax.eval_shape(lambda key: task.init(key, shape), jax.random.key(0))
  step = functools.partial(loss_and_gradients, task, accumulation_steps=1)
  traced = jax.make_jaxpr(lambda v, b: step(v, b, jax.random.key(0)))(variables, shape)
  recomputed = [
    e for e in traced.eqns if "remat" in e.primitive.name or "check" in e.primitive.name
  ]
  assert bool(recomputed) == remat


@pytest.mark.parametrize(
  ("axes", "rules", "accumulation"),
  [
    ({"data": 2, "fsdp": 4}, sharding.DEFAULT_RULES, 1),
    ({"data": 2, "fsdp": 4}, sharding.DEFAULT_RULES, 2),
    (
      {"data": 2, "fsdp": 2, "tensor": 2},
      (("head/kernel", (("fsdp", "tensor"), None)), *sharding.DEFAULT_RULES),
      1,
    ),
  ],
)
def test_parameters_in_parts_are_gathered_and_activations_stay(axes, rules, accumulation):
  task, state, step = setup(accumulation=accumulation)
  mesh = sharding.make_mesh(axes)
  layout = sharding.state_shardings(state, rules, mesh)
  make = functools.partial(
    make_train_step, task, small.adamw(task), small.schedule, accumulation_steps=accumulation
  )

  def compiled(**arguments):
    where = (layout, sharding.batch_sharding(mesh))
    jitted = jax.jit(make(**arguments), in_shardings=where, out_shardings=(layout, None))
    return jitted.lower(state, small.make_batch(16)).compile()

  gathering = compiled(gather=functools.partial(sharding.gathered, layout=layout.params))
  in_parts = [
    leaf.nbytes
    for leaf, where in zip(jax.tree.leaves(state.params), jax.tree.leaves(layout.params))
    if where != sharding.without_fsdp(where)
  ]
  assert in_parts
  found = {c.kind: 0 for c in collectives_of(gathering.as_text())}
  for collective in collectives_of(gathering.as_text()):
    found[collective.kind] += collective.bytes * (collective.rounds or 1)
  # Forward, and again backward, of each part of the batch. Activations would be many times that.
  assert 0 < found["all-gather"] <= 2 * accumulation * sum(in_parts)
  assert found.get("all-to-all", 0) == 0

  batch = small.make_batch(16)
  placed = jax.device_put(state, layout), jax.device_put(batch, sharding.batch_sharding(mesh))
  ours, report = gathering(*placed)
  expected, expected_report = step(state, batch)
  close(jax.device_get(report["gradient_norm"]), jax.device_get(expected_report["gradient_norm"]))
  for one, other in zip(jax.tree.leaves(ours.opt_state), jax.tree.leaves(expected.opt_state)):
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


def test_an_evaluation_gathers_parameters_once_for_all_of_its_batches():
  values = load_config("configs/moat.py", "runlocal")
  values.mesh, values.ema_decay = dict(data=2, fsdp=4, tensor=1), 0.9
  facts = build.DataFacts({"class_names": tuple("0123456789")}, 1437)
  run = build.build(Config(values), facts)
  mesh = sharding.make_mesh(run.mesh_axes)
  _, layout = programs.abstract_state(run, mesh)
  make = jax.jit(lambda key: programs.new_state(run, key), out_shardings=layout)
  state = make(jax.random.key(0))
  in_parts = jax.tree.leaves(state.evaluation_variables)
  assert any(not leaf.sharding.is_fully_replicated for leaf in in_parts)
  whole = jax.tree.leaves(programs.evaluation_variables(run, mesh, state))
  assert all(leaf.sharding.is_fully_replicated for leaf in whole)
  for one, other in zip(whole, in_parts):
    np.testing.assert_array_equal(one, other)
