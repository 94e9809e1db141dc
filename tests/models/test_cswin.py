"""CSWin: exact counts, the structure's promises, and equality with the authors' code."""

import functools

import jax
import jax.numpy as jnp
import pytest

from hybrid_vit.models import cswin
from hybrid_vit.models.registry import create_model, list_models
from hybrid_vit.weights import convert, keymap_cswin
from tests import golden
from tests.models import contract


def small(**overrides):
  settings = {
    "width": 8,
    "depths": (1, 1, 2, 1),
    "num_heads": (2, 2, 4, 4),
    "stripe_widths": (1, 2, 2, 2),
  }
  return create_model("cswin_tiny", 10, **{**settings, **overrides})


@pytest.mark.parametrize("name", list_models("cswin_*"))
def test_entries(name):
  contract.check_entry(name)


@pytest.mark.slow
def test_the_structure():
  contract.check_gradients(small())
  contract.check_bfloat16(small, (64, 64))
  contract.check_remat(small, (64, 64))
  contract.check_drop_path(small, (64, 64))
  contract.check_sizes(small(), [(64, 96), (128, 32)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_trains(dtype):
  contract.check_trains(small(dtype=dtype))


def test_weights_go_out_and_back():
  contract.check_round_trip(small(), keymap_cswin.LAYOUTS["official"], (64, 64))


def network(description):
  a = description["arguments"]
  return cswin.CSWin(
    width=a["embed_dim"],
    depths=tuple(a["depth"]),
    num_heads=tuple(a["num_heads"]),
    stripe_widths=tuple(a["split_size"]),
    mlp_ratio=int(a.get("mlp_ratio", 4)),
    num_classes=a.get("num_classes", 1000),
  )


@pytest.mark.parametrize("name", golden.names("cswin"))
def test_golden(name):
  description, expected = golden.load("cswin", name)
  dense = "logits" not in expected
  model, x = network(description), golden.image(description)
  if dense:
    model = model.clone(num_classes=0, output_norms=(1, 2, 3, 4))
  template = jax.eval_shape(model.init, jax.random.key(0), x)
  key_map = keymap_cswin.LAYOUTS["official"].key_map(model)
  variables, _ = convert.import_weights(golden.weights(description), template, key_map)
  logits, endpoints = jax.jit(functools.partial(model.apply, train=False))(variables, x)
  actual = {f"stage{i}": endpoints[f"stage{i}"] for i in range(1, 5)}
  golden.assert_matches(expected, actual if dense else {**actual, "logits": logits})


def test_errors_say_what_is_wrong():
  with pytest.raises(ValueError, match="stage 1 of width 8 has 3 heads"):
    jax.eval_shape(small(num_heads=(3, 2, 4, 4)).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
  with pytest.raises(ValueError, match="depths names 4 stages but stripe_widths has 2"):
    jax.eval_shape(small(stripe_widths=(1, 2)).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
