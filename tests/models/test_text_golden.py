"""CLIP's text towers against the authors' own code, layer by layer."""

import functools

import jax
import pytest

from hybrid_vit.models import mobileone, text
from hybrid_vit.weights import convert, keymap_text
from tests import golden


def load(model, layout_name, weights, tokens):
  layout = keymap_text.LAYOUTS[layout_name]
  template = jax.eval_shape(model.init, jax.random.key(0), tokens)
  renamed = {layout.rename(name): value for name, value in weights.items()}
  return convert.import_weights(
    renamed, template, layout.key_map(model), may_ignore=layout.not_weights
  )[0]


def check(model, variables, tokens, expected, block, last):
  """Compares blocks, the last norm where the file has it, and the embedding, named `last`."""
  embedding, endpoints = jax.jit(functools.partial(model.apply, train=False))(variables, tokens)
  actual = {block.format(i): endpoints[f"block{i}"] for i in range(len(endpoints) - 2)}
  norm = block.replace("transformer.{}", "final_layer_norm")
  if f"{norm}_corner" in expected:
    actual[norm] = endpoints["final_norm"]
  for name in list(actual):
    expected[f"{name}_first"] = expected.pop(f"{name}_corner")
    actual[f"{name}_first"] = actual[name][0, :8, :8]
  golden.assert_matches(expected, {**actual, last: embedding})


@pytest.mark.parametrize("name", golden.names("mobileclip", "text_small*"))
@pytest.mark.parametrize("merged", [False, True])
def test_small(name, merged):
  description, expected = golden.load("mobileclip", name)
  tokens = expected.pop("tokens")
  cfg = {
    k: tuple(v) if isinstance(v, list) else v for k, v in description["arguments"]["cfg"].items()
  }
  model = text.TextTransformer(
    causal=cfg["causal_masking"],
    vocabulary_size=cfg["vocab_size"],
    context_length=cfg["context_length"],
    width=cfg["dim"],
    depth=cfg["n_transformer_layers"],
    num_heads=cfg["n_heads_per_layer"],
    embedding_size=description["arguments"]["projection_dim"],
    mixer_blocks=cfg["model_name"] == "mct",
    mlp_ratio=cfg["ffn_multiplier_per_layer"],
    positions=not cfg.get("no_pos_embedding", False),
  )
  variables = load(model, "official", golden.weights(description), tokens)
  count = sum(p.size for p in jax.tree.leaves(variables["params"]))
  assert count == description["trainable_count"]
  if merged:
    model, variables = model.clone(reparameterized=True), mobileone.reparameterize(variables)
    if model.mixer_blocks:
      exported = convert.export_weights(variables, keymap_text.LAYOUTS["official"].key_map(model))
      theirs = description["reparameterized_parameters"]
      assert {k: list(v.shape) for k, v in exported.items()} == {
        k: v for k, v in theirs.items() if not k.endswith("num_batches_tracked")
      }
  check(model, variables, tokens, expected, "transformer.{}", "output")


def test_mobileclip_s0():
  description, expected = golden.load("mobileclip", "mobileclip_s0_256")
  tokens = expected["tokens"]
  description["parameters"] = {
    k: v for k, v in description["parameters"].items() if k.startswith("text_encoder.")
  }
  model = text.create_text_tower("mobileclip_s0")
  variables = load(model, "official", golden.weights(description), tokens)
  expected = {k: v for k, v in expected.items() if k.startswith("text.") or k == "text_embedding"}
  check(model, variables, tokens, expected, "text.transformer.{}", "text_embedding")


def test_open_clip():
  description, expected = golden.load("mobileclip", "openclip_vit_small_64")
  cfg, tokens = description["arguments"]["text_cfg"], expected["tokens"]
  model = text.TextTransformer(
    causal=True,
    vocabulary_size=cfg["vocab_size"],
    context_length=cfg["context_length"],
    width=cfg["width"],
    depth=cfg["layers"],
    num_heads=cfg["heads"],
    embedding_size=description["arguments"]["embed_dim"],
  )
  variables = load(model, "open_clip", golden.weights(description), tokens)
  expected = {k: v for k, v in expected.items() if k.startswith("transf") or k == "text_embedding"}
  check(model, variables, tokens, expected, "transformer.resblocks.{}", "text_embedding")
