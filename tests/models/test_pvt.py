"""PVT: exact counts, the structure's promises, and equality with a public implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.models import pvt
from hybrid_vit.models.registry import create_model, list_models
from hybrid_vit.weights import convert, keymap_pvt
from tests import golden
from tests.models import contract


def small(**overrides):
  settings = {
    "widths": (8, 16, 24, 32),
    "depths": (1, 1, 2, 1),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 2, 2),
    "image_size": 64,
    "reduction_ratios": (4, 2, 1, 1),
  }
  return create_model("pvt_tiny", 10, **{**settings, **overrides})


@pytest.mark.parametrize("name", list_models("pvt_*"))
def test_entries(name):
  contract.check_entry(name)


@pytest.mark.slow
def test_the_structure():
  contract.check_gradients(small(qkv_bias=False))
  contract.check_bfloat16(small, (64, 64))
  contract.check_remat(small, (64, 64))
  contract.check_drop_path(small, (64, 64))
  contract.check_sizes(small(), [(64, 96), (128, 32)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_trains(dtype):
  contract.check_trains(small(dtype=dtype, image_size=32, reduction_ratios=(2, 2, 1, 1)))


@pytest.mark.parametrize("layout", keymap_pvt.LAYOUTS)
def test_weights_go_out_and_back(layout):
  contract.check_round_trip(small(), keymap_pvt.LAYOUTS[layout], (64, 64))


def network(description):
  a = description["arguments"]
  full = pvt.PVT()
  return pvt.PVT(
    widths=tuple(a.get("hidden_sizes", full.widths)),
    depths=tuple(a["depths"]),
    num_heads=tuple(a.get("num_attention_heads", full.num_heads)),
    mlp_ratios=tuple(a.get("mlp_ratios", full.mlp_ratios)),
    reduction_ratios=tuple(a.get("sequence_reduction_ratios", full.reduction_ratios)),
    image_size=a.get("image_size", 224),
    num_classes=a["num_labels"],
    qkv_bias=a.get("qkv_bias", True),
  )


@pytest.mark.parametrize("name", golden.names("pvt"))
def test_golden(name):
  description, expected = golden.load("pvt", name)
  model, x = network(description), golden.image(description)
  template = jax.eval_shape(model.init, jax.random.key(0), x)
  key_map = keymap_pvt.LAYOUTS["transformers"].key_map(model)
  variables, report = convert.import_weights(golden.weights(description), template, key_map)
  assert not report.initialised and not report.unused
  logits, endpoints = jax.jit(functools.partial(model.apply, train=False))(variables, x)
  stages = {f.name: endpoints[f.name] for f in model.features}
  golden.assert_matches(expected, {**stages, "logits": logits})


def test_positions_of_another_map_are_read_between_the_old_ones():
  table = jnp.concatenate([jnp.full((1, 1, 1), 9.0), jnp.arange(4.0).reshape(1, 4, 1)], 1)
  resized = np.asarray(pvt.resize_positions(table, 2, (2, 4)))[0, :, 0]
  # The class token's stays; the columns 0, 1 are read at -0.25, 0.25, 0.75, 1.25, edges held.
  np.testing.assert_allclose(resized, [9, 0, 0.25, 0.75, 1, 2, 2.25, 2.75, 3])
  np.testing.assert_array_equal(pvt.resize_positions(table, 2, (2, 2)), table)


def test_errors_say_what_is_wrong():
  with pytest.raises(ValueError, match="map of 4x16 in stage 1, smaller than its reduction of 8"):
    x = jnp.zeros((1, 16, 64, 3))
    jax.eval_shape(small(reduction_ratios=(8, 4, 2, 1)).init, jax.random.key(0), x)
  with pytest.raises(ValueError, match="depths names 4 stages but num_heads has 2"):
    jax.eval_shape(small(num_heads=(1, 2)).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
