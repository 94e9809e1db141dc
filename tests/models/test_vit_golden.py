"""ViT's forms against public implementations, layer by layer."""

import functools

import jax
import numpy as np
import pytest

from hybrid_vit.models import vit
from hybrid_vit.weights import convert, keymap_vit
from tests import golden


def answers(model, layout_name, weights, x):
  """Our logits and endpoints for a checkpoint of which every name is used."""
  layout = keymap_vit.LAYOUTS[layout_name]
  template = jax.eval_shape(model.init, jax.random.key(0), x)
  renamed = {layout.rename(name): value for name, value in weights.items()}
  variables, _ = convert.import_weights(
    renamed, template, layout.key_map(model), may_ignore=layout.not_weights
  )
  return jax.jit(functools.partial(model.apply, train=False))(variables, x)


def tokens_of(endpoints):
  """Class token and map as one array of tokens, as the authors have them."""
  tokens = {}
  for name, value in endpoints.items():
    if f"{name}_token" in endpoints:
      value = value.reshape(value.shape[0], -1, value.shape[-1])
      value = np.concatenate([endpoints[f"{name}_token"][:, None], value], axis=1)
    tokens[name] = value
  return tokens


def first_tokens(expected, actual):
  """The files' corners of tokens, 8 by 8, as whole arrays of their own."""
  for name in list(actual):
    if actual[name].ndim == 3:
      expected[f"{name}_first"] = expected.pop(f"{name}_corner")
      actual[f"{name}_first"] = actual[name][0, :8, :8]
  return expected, actual


@pytest.mark.parametrize("name", golden.names("mobileclip", "vit_small*"))
def test_mobileclip(name):
  description, expected = golden.load("mobileclip", name)
  a = description["arguments"]
  model = vit.VisionTransformer(
    width=a["cfg"]["embed_dim"],
    depth=a["cfg"]["n_transformer_layers"],
    num_heads=a["cfg"]["n_attn_heads"],
    num_classes=a["projection_dim"],
    stem="convolutions",
    positions="sequence",
    layer_norm_epsilon=1e-5,
    head_bias=False,
  )
  x = golden.image(description)
  logits, endpoints = answers(model, "official", golden.weights(description), x)
  tokens = tokens_of(endpoints)
  actual = {"patch_emb": tokens["stem"]}
  actual |= {f"transformer.{i}": tokens[f"stage1_block{i}"] for i in range(model.depth)}
  actual["post_transformer_norm"] = tokens["head_norm"]
  expected, actual = first_tokens(expected, actual)
  golden.assert_matches(expected, {**actual, "output": logits})


def test_open_clip():
  description, expected = golden.load("mobileclip", "openclip_vit_small_64")
  a = description["arguments"]["vision_cfg"]
  model = vit.VisionTransformer(
    width=a["width"],
    depth=a["layers"],
    num_heads=a["width"] // a["head_width"],
    num_classes=description["arguments"]["embed_dim"],
    patch_size=a["patch_size"],
    position_size=a["image_size"] // a["patch_size"],
    stem_bias=False,
    pre_norm=True,
    layer_norm_epsilon=1e-5,
    head_bias=False,
  )
  x = golden.image(description)
  logits, endpoints = answers(model, "official", golden.weights(description), x)
  tokens = tokens_of(endpoints)
  actual = {"visual.ln_pre": tokens["pre_norm"]}
  for i in range(model.depth):
    actual[f"visual.transformer.resblocks.{i}"] = tokens[f"stage1_block{i}"]
  expected = {k: v for k, v in expected.items() if k.startswith("visual.") or k[:6] == "image_"}
  expected, actual = first_tokens(expected, actual)
  golden.assert_matches(expected, {**actual, "image_embedding": logits})


@pytest.mark.parametrize("name", golden.names("vit"))
def test_transformers(name):
  description, expected = golden.load("vit", name)
  a = description["arguments"]
  common = {"num_classes": a.get("num_labels", a.get("projection_dim"))}
  if "projection_dim" in a:
    common |= {"stem_bias": False, "pre_norm": True, "head_bias": False}
  model = vit.VisionTransformer(
    width=a["hidden_size"],
    depth=a["num_hidden_layers"],
    num_heads=a["num_attention_heads"],
    patch_size=a["patch_size"],
    position_size=a["image_size"] // a["patch_size"],
    mlp_ratio=a["intermediate_size"] / a["hidden_size"],
    activation=a["hidden_act"],
    layer_norm_epsilon=a["layer_norm_eps"],
    distillation_token="distillation_logits" in expected,
    **common,
  )
  x, weights = golden.image(description), golden.weights(description)
  assert sum(v.size for v in weights.values()) == description["trainable_count"]
  logits, endpoints = answers(model, "transformers", weights, x)
  actual = {name: endpoints[name] for name in expected_layers(expected)}
  golden.assert_matches(expected, {**actual, "logits": logits})


def expected_layers(expected):
  names = (name.removesuffix("_corner").removesuffix("_stats") for name in expected)
  return [name for name in dict.fromkeys(names) if name != "logits"]
