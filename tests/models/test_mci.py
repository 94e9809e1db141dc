"""MCi: exact counts, the structure's promises, merging, and both layouts of its weights."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from hybrid_vit.models import mobileone
from hybrid_vit.models.registry import create_model, list_models, model_entry
from hybrid_vit.tools.summarize import count_parameters
from hybrid_vit.weights import keymap_mci
from tests.models import contract

# From the authors' code: parameters when merged. Multiply-adds are counted here, at 256 x 256, as
# trained and merged; timm's tables have 2.42, 4.72 and 7.91 G as trained, norms included.
FIGURES = {
  "mci0": (11356992, 2392653824, 2385149952),
  "mci1": (21460544, 4667736064, 4658266112),
  "mci2": (35702480, 7846389760, 7834224640),
}


def small(**overrides):
  """Two stages with everything in them; the squeeze's width is that of the rule's lower end."""
  settings = {
    "depths": (1, 1),
    "widths": (16, 32),
    "num_classes": 10,
    "mlp_ratios": (2, 2),
    "token_mixers": ("repmixer", "attention"),
    "downsamples": (True, True),
    "se_downsamples": (False, True),
    "position_kernel_sizes": (None, 3),
    "down_kernel_size": 5,
    "mlp_kernel_size": 3,
    "layer_scale": 0.5,
  }
  return create_model("mci0", **{**settings, **overrides})


@pytest.mark.parametrize("name", FIGURES)
def test_entries(name):
  contract.check_entry(name, (256, 224))
  parameters, *multiply_adds = FIGURES[name]
  for merged, expected in zip((False, True), multiply_adds):
    model = contract.traced(create_model(name, reparameterized=merged), (256, 256))
    assert model.multiply_adds == expected
    assert abs(expected / model_entry(name).published.multiply_adds - 1) < 0.02
  assert count_parameters(model.variables["params"]) == parameters


def test_no_variant_is_missing():
  assert list_models("mci*") == list(FIGURES)


@pytest.mark.slow
def test_the_structure():
  contract.check_gradients(small(head_bias=True), (32, 48))
  contract.check_bfloat16(small)
  deeper = functools.partial(small, depths=(2, 2))
  contract.check_remat(deeper, (64, 64))
  contract.check_drop_path(deeper)
  contract.check_sizes(small(), [(37, 51)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_trains(dtype):
  contract.check_trains(small(dtype=dtype, head_bias=True, drop_path_rate=0.1), rate=2e-2)


def test_initial_biases():
  """Torch's own where the authors leave them, zero in the MLPs and the attention."""
  params = contract.initialize(small(), contract.images(1, 32, 32))["params"]
  kinds = set()
  for path, bias in traverse_util.flatten_dict(jax.device_get(params), sep="/").items():
    kind = re.search(r"(position_conv|reduce|expand|fc1|fc2|proj)/bias$", path)
    if not kind:
      continue
    kinds.add(kind[1])
    if kind[1] in ("fc1", "fc2", "proj"):
      assert not bias.any(), path
      continue
    owner = params
    for name in path.split("/")[:-1]:
      owner = owner[name]
    bound = math.prod(owner["kernel"].shape[:-1]) ** -0.5
    assert 0.5 * bound < abs(bias).max() <= bound, (path, bound)
  assert kinds == {"position_conv", "reduce", "expand", "fc1", "fc2", "proj"}


@pytest.mark.parametrize("layout", keymap_mci.LAYOUTS)
@pytest.mark.parametrize("merged", [False, True])
def test_weights_go_out_and_back(layout, merged):
  model = small(head_bias=layout == "timm", reparameterized=merged)
  contract.check_round_trip(model, keymap_mci.LAYOUTS[layout])


def test_timm_has_a_bias_of_zeros_beside_the_projection():
  constants = keymap_mci.LAYOUTS["timm"].constants
  np.testing.assert_array_equal(constants(small())["head.fc.bias"], np.zeros(10))
  assert not constants(small(head_bias=True)) and not constants(small().clone(num_classes=0))


# Without layer scales, without the 3x3 branch of the mixers, and with every other option.
@pytest.mark.parametrize("overrides", [{}, {"layer_scale": None, "mixer_kernel_size": 1}])
def test_merged_branches_give_the_same_answers(overrides):
  model, x = small(**overrides), contract.images(2, 45, 64)
  variables = contract.drawn_variables(model)
  merged = mobileone.reparameterize(variables)
  model_merged = model.clone(reparameterized=True)
  shapes = jax.eval_shape(model_merged.init, jax.random.key(0), x)
  jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), merged, dict(shapes))
  before, after = contract.run(model, variables, x), contract.run(model_merged, merged, x)
  for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after)):
    np.testing.assert_allclose(other, one, atol=2e-5 * float(jnp.abs(one).max()))


def test_stages_without_a_step():
  settings = {"downsamples": (False, False, False, True), "widths": (32, 32, 64, 64)}
  model = create_model("mci0", depths=(1, 1, 1, 1), **settings)
  assert [f.stride for f in model.features] == [4, 4, 8, 8]
  x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  (_, endpoints), _ = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  assert [endpoints[f.name].shape[1:] for f in model.features] == [
    (16, 16, 32),
    (16, 16, 32),
    (8, 8, 64),
    (8, 8, 64),
  ]
  assert {k for k in endpoints if "downsample" in k} == {"stage3_downsample"}
  official = keymap_mci.LAYOUTS["official"].key_map(model)
  # network: 0 and 1 blocks, 2 the step, 3 blocks, 4 the position convolution, 5 blocks.
  assert official("params/stage4_block0/norm/scale").name == "network.5.0.norm.weight"


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"widths": (8, 16, 32)}, "depths names 2 stages but widths has 3 values"),
    ({"token_mixers": ("repmixer", "pool")}, "'pool'; a stage's is 'repmixer' or"),
    ({"widths": (16, 48)}, "48 of stage 2, which attends, is no multiple of the heads' 32"),
    ({"widths": (24, 32)}, "32 of stage 2 is no multiple of the 24"),
  ],
)
def test_errors_say_what_is_wrong(overrides, message):
  x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(small(**overrides).init, jax.random.key(0), x)
