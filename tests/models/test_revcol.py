import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from hybrid_vit.models import revcol
from hybrid_vit.models.registry import create_model, list_models, model_entry
from hybrid_vit.tasks.intermediate_supervision import IntermediateSupervision
from hybrid_vit.weights import keymap_revcol
from tests.models import contract

LAYOUT = keymap_revcol.LAYOUTS["official"]


def small(**overrides):
  settings = {"widths": (8, 12, 16, 20), "depths": (1, 1, 1, 1), "num_columns": 2}
  # A layer scale near 0 would hide the blocks, and drop path with them.
  return create_model("revcol_tiny", 10, **{**settings, "layer_scale_init": 1.0, **overrides})


def still(**overrides):
  return small(**{"drop_path_rate": 0.0, **overrides})


@pytest.mark.parametrize("name", list_models("revcol_*"))
def test_entries(name):
  contract.check_entry(name)


def test_no_published_variant_is_missing():
  sizes = {"tiny", "small", "base", "large", "xlarge", "huge"}
  fine_tuned = {"base_22kto1k", "base_384_22kto1k", "large_384_22kto1k"}
  pretrained = {"base_22k", "large_22k", "xlarge_22k"}
  assert set(list_models("revcol_*")) == {f"revcol_{n}" for n in sizes | fine_tuned | pretrained}


# Of the authors' code with intermediate supervision: with 1,000 and with 21,841 classes.
@pytest.mark.parametrize(
  ("size", "at_1k", "at_22k"),
  [
    ("tiny", 33063984, 79494852),
    ("small", 63176240, 109607108),
    ("base", 141694960, 193772980),
    ("large", 280372272, 371077188),
    ("xlarge", 851958576, 1005203844),
    ("huge", 2199107704, 2433000700),
  ],
)
def test_parameters_with_intermediate_supervision(size, at_1k, at_22k):
  x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  for num_classes, expected in ((1000, at_1k), (21841, at_22k)):
    model = create_model(f"revcol_{size}", num_classes, intermediate_supervision=True)
    (_, endpoints), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert sum(p.size for p in jax.tree.leaves(variables["params"])) == expected
    for i in range(3):
      assert endpoints[f"auxiliary_logits{i}"].shape == (1, num_classes)
      assert endpoints[f"reconstruction{i}"].shape == (1, 64, 64, 3)


@pytest.mark.parametrize(
  "name", [n for n in list_models("revcol_*") if model_entry(n).published.multiply_adds]
)
def test_multiply_adds(name):
  entry = model_entry(name)
  found = contract.multiply_adds(name)
  # The published figures have two or three digits.
  assert found == pytest.approx(entry.published.multiply_adds, rel=0.015), found / 1e9


def test_the_structure():
  first = tuple(f"column0/alpha{i}" for i in range(4))
  contract.check_gradients(still(), dead=first)
  contract.check_bfloat16(still)
  contract.check_drop_path(still)
  contract.check_sizes(still(), [(32, 96), (64, 32)])


def test_sides_that_32_does_not_divide():
  model = still(bottom_to_top=True)
  variables = contract.drawn_variables(model)
  logits, endpoints = contract.run(model, variables, contract.images(1, 70, 127))
  assert bool(jnp.isfinite(logits).all())
  for i, size in enumerate([(17, 31), (8, 15), (4, 7), (2, 3)], start=1):
    assert endpoints[f"stage{i}"].shape[1:3] == size


def test_stretching_takes_the_nearest_cell():
  x = jnp.arange(6.0).reshape(1, 2, 3, 1)
  rows, columns = [0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 2, 2]
  expected = np.asarray(x)[:, rows][:, :, columns]
  np.testing.assert_array_equal(revcol.stretch_nearest(x, (5, 7)), expected)
  twice = revcol.stretch_nearest(x, (4, 6))
  np.testing.assert_array_equal(twice, np.repeat(np.repeat(x, 2, axis=1), 2, axis=2))


def test_remat():
  contract.check_remat(still)


@pytest.mark.parametrize(
  "overrides",
  [
    {"num_columns": 6, "bottom_to_top": True},
    {"num_columns": 4, "intermediate_supervision": True},
    {"num_columns": 8, "intermediate_supervision": True, "keep_every": 0, "layer_scale_init": 1e-6},
  ],
  ids=["bottom to top", "supervised after each", "supervised after every second"],
)
def test_reversible_gradients_are_the_plain_ones(overrides):
  plain = still(**overrides)
  variables, x = contract.drawn_variables(plain), contract.images(2, 32, 32)

  def gradients(model):
    def loss(params, x):
      logits, ends = model.apply({"params": params}, x, train=True)
      more = [v for k, v in ends.items() if k.startswith(("auxiliary", "reconstruction"))]
      return sum(jnp.sum(jnp.sin(v)) for v in (logits, *more))

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(variables["params"], x)

  expected, found = gradients(plain), gradients(plain.clone(reversible=True))
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  # The eightfold growth of rounding in each column: what keeping every third one is for.
  tolerance = 1e-4 if overrides.get("keep_every") is None else 5e-2
  for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
    assert float(jnp.linalg.norm(a - b)) <= tolerance * float(jnp.linalg.norm(b))
  scanned = gradients(plain.clone(reversible=True, scan_blocks=True))
  for a, b in zip(jax.tree.leaves(scanned), jax.tree.leaves(found), strict=True):
    assert float(jnp.linalg.norm(a - b)) <= tolerance * float(jnp.linalg.norm(b))


def test_reversible():
  def make(**overrides):
    return small(**{"drop_path_rate": 0.0, "num_columns": 3, "reversible": True, **overrides})

  contract.check_drop_path(make)
  model, variables, x = make(), contract.drawn_variables(make()), contract.images(2, 32, 32)
  key = jax.random.key(0)
  (_, ends), _ = contract.run(make(dtype=jnp.bfloat16), variables, x, True, key)
  # The state is float32, and nothing of single columns is there to be kept.
  assert all(ends[f"stage{i}"].dtype == jnp.float32 for i in range(1, 5))
  assert not any(name.startswith("column") for name in ends)
  _, ends = contract.run(make(dtype=jnp.bfloat16), variables, x)
  assert ends["column1_level0"].dtype == jnp.float32
  errors = jax.jit(lambda v, x: model.apply(v, x, method="inverse_errors"))(variables, x)
  assert errors.shape == (2, 4) and 0 < float(errors.max()) < 1e-4
  with pytest.raises(ValueError, match="remat and reversible both"):
    jax.eval_shape(make(remat=True).init, key, x)
  with pytest.raises(ValueError, match="keep_every is -1"):
    jax.eval_shape(make(keep_every=-1).init, key, x)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_trains(dtype):
  contract.check_trains(small(dtype=dtype))


@pytest.mark.parametrize(
  "overrides",
  [
    {"bottom_to_top": True},
    {"num_columns": 4, "intermediate_supervision": True},
    {"num_columns": 4, "intermediate_supervision": True, "num_classes": 1001},
  ],
)
def test_weights_go_out_and_back(overrides):
  model = still(**overrides) if "num_classes" not in overrides else still().clone(**overrides)
  contract.check_round_trip(model, LAYOUT)


def test_initial_values():
  model = still(head_init_scale=0.25)
  params = contract.initialize(model, contract.images(1, 32, 32))["params"]
  for path, value in traverse_util.flatten_dict(jax.device_get(params), sep="/").items():
    leaf = path.rsplit("/", 1)[1]
    if leaf == "kernel":
      std = 0.005 if path.startswith("head/") else 0.02
      assert abs(float(value.std()) / std - 1.0) < 5 / np.sqrt(2 * value.size), path
    else:
      expected = 0.5 if leaf.startswith("alpha") else float(leaf in ("scale", "gamma"))
      np.testing.assert_array_equal(value, expected, err_msg=path)
  assert create_model("revcol_tiny").layer_scale_init == 1e-6


def test_alpha_is_clamped_away_from_zero_with_a_plain_gradient():
  alpha = jnp.array([0.5, -2.0, 1e-4, -1e-4, 0.0, 1e-3])
  expected = np.array([0.5, -2.0, 1e-3, -1e-3, 0.0, 1e-3], np.float32)
  np.testing.assert_array_equal(revcol.clamp_alpha(alpha), expected)
  slope = jax.grad(lambda a: jnp.sum(3.0 * revcol.clamp_alpha(a)))(alpha)
  np.testing.assert_array_equal(slope, np.full(6, 3.0, np.float32))


def test_a_column_can_be_undone():
  """Each old map follows from the new ones: (new - level) / alpha, the deepest level first."""
  model, x = still(), contract.images(1, 32, 32)
  variables = contract.drawn_variables(model)
  _, ends = contract.run(model, variables, x)
  params = variables["params"]["column1"]
  for bottom, width in ((3, 20), (2, 16)):
    level = revcol.Level(width, True, 3, 4, 1.0, (0.0,), jnp.float32)
    above = ends[f"column1_level{bottom - 1}"]
    below = ends["column0_level3"] if bottom == 2 else None
    added = level.apply({"params": params[f"level{bottom}"]}, above, below, None, False)
    alpha = revcol.clamp_alpha(params[f"alpha{bottom}"])
    undone = (ends[f"column1_level{bottom}"] - added) / alpha
    old = ends[f"column0_level{bottom}"]
    np.testing.assert_allclose(undone, old, atol=1e-4 * float(jnp.abs(old).max()))


def test_upsampling_keeps_the_corners_and_is_linear_between():
  x = np.arange(3.0)[None, :, None, None] + 10.0 * np.arange(2.0)[None, None, :, None]
  up = revcol.upsample_to_corners(jnp.asarray(x, jnp.float32))
  expected = np.linspace(0, 2, 6)[:, None] + np.linspace(0, 10, 4)[None]
  np.testing.assert_allclose(up[0, :, :, 0], expected, atol=1e-5)
  one = revcol.upsample_to_corners(jnp.full((1, 1, 1, 2), 3.0))
  np.testing.assert_array_equal(one, np.full((1, 2, 2, 2), 3.0))


def test_no_classifier():
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  model = still(num_columns=1).clone(num_classes=0)
  (logits, endpoints), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  assert logits is None and endpoints["pre_logits"].shape == (1, 20)
  assert not any(name.startswith("head") for name in variables["params"])


@pytest.mark.parametrize(
  ("overrides", "size", "message"),
  [
    ({}, (64, 31), "image is 64 x 31; both sides must be at least 32"),
    (
      {"num_columns": 4, "intermediate_supervision": True},
      (64, 72),
      "image is 64 x 72; with intermediate_supervision both sides must be multiples of 32",
    ),
    ({"widths": (8, 16)}, (32, 32), "a column has 4 levels, but widths has (8, 16)"),
    ({"kernel_size": 4}, (32, 32), "kernel_size is 4; it must be odd"),
    ({"num_columns": 0}, (32, 32), "num_columns is 0"),
    (
      {"num_columns": 6, "intermediate_supervision": True},
      (32, 32),
      "num_columns is 6, which 4 does not divide",
    ),
  ],
)
def test_errors_say_what_is_wrong(overrides, size, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    jax.eval_shape(small(**overrides).init, jax.random.key(0), contract.images(1, *size))


def test_the_compound_loss_wants_a_network_that_is_supervised():
  half = (0.5, 0.5, 0.5)
  task = IntermediateSupervision(model=still(), num_classes=10, mean=half, std=half)
  batch = {"image": contract.images(1, 32, 32), "target": jnp.eye(10)[:1]}
  variables = contract.drawn_variables(still())
  with pytest.raises(ValueError, match="intermediate_supervision = True"):
    jax.eval_shape(lambda: task.loss(variables, batch, jax.random.key(0)))
