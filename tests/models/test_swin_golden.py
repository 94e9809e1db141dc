"""Swin against transformers, layer by layer."""

import functools

import jax
import pytest

from hybrid_vit.models.registry import create_model
from hybrid_vit.weights import convert, keymap_swin
from tests import golden

LAYOUT = keymap_swin.LAYOUTS["transformers"]


def network(arguments):
  """Our network for the arguments of transformers' configuration."""
  return create_model(
    "swin_tiny",
    arguments["num_labels"],
    width=arguments["embed_dim"],
    depths=arguments["depths"],
    num_heads=arguments["num_heads"],
    window_size=arguments["window_size"],
    qkv_bias=arguments.get("qkv_bias", True),
  )


@pytest.mark.parametrize("name", golden.names("swin"))
def test_network(name):
  description, expected = golden.load("swin", name)
  model = network(description["arguments"])
  x = golden.image(description)
  weights = {LAYOUT.rename(k): v for k, v in golden.weights(description).items()}
  template = jax.eval_shape(model.init, jax.random.key(0), x)
  variables, _ = convert.import_weights(weights, template, LAYOUT.key_map(model))
  count = sum(p.size for p in jax.tree.leaves(variables["params"]))
  assert count == description["trainable_count"]
  logits, endpoints = jax.jit(functools.partial(model.apply, train=False))(variables, x)
  actual = {k: v for k, v in endpoints.items() if "_block" in k or "_merging" in k}
  golden.assert_matches(expected, {**actual, "logits": logits})
