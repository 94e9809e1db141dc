"""SMT against the authors' own code, layer by layer."""

import functools

import jax
import jax.numpy as jnp
import pytest

from hybrid_vit.models import smt
from hybrid_vit.weights import convert, keymap_smt
from tests import golden

OFFICIAL = keymap_smt.LAYOUTS["official"]
NETWORKS = [n for n in golden.names("smt") if not n.startswith(("scale_aware", "self_attention"))]


def network(description) -> smt.SMT:
  """Our network for the authors' arguments."""
  a = description["arguments"]
  attends = ["modulation" if modulates else "attention" for modulates in a["ca_attentions"]]
  if len(attends) > 2 and a["ca_attentions"][2]:
    attends[2] = "hybrid"
  dense = not description["source"].split(", ")[1].startswith("models/")

  def heads(key):
    return tuple(n if n > 0 else None for n in a[key])

  return smt.SMT(
    depths=tuple(a["depths"]),
    widths=tuple(a["embed_dims"]),
    num_classes=0 if dense else a["num_classes"],
    block_types=tuple(attends),
    modulation_heads=heads("ca_num_heads"),
    attention_heads=heads("sa_num_heads"),
    mlp_ratios=tuple(a["mlp_ratios"]),
    expand_ratio=a.get("expand_ratio", 2),
    qkv_bias=a.get("qkv_bias", False),
    qk_scale=a.get("qk_scale"),
    stem_kernel=a.get("head_conv", 3),
    layer_scale=a.get("layerscale_value", 1e-4) if a.get("use_layerscale") else None,
    drop_path_rate=a.get("drop_path_rate", 0.0),
  )


def weights(description):
  """The file's tensors under the names that the key map knows, without counters."""
  made = {OFFICIAL.rename(k): v for k, v in golden.weights(description).items()}
  return {k: v for k, v in made.items() if not k.endswith("num_batches_tracked")}


def run(description):
  """Our logits and endpoints under the authors' names, in the order of computation."""
  model = network(description)
  x = golden.image(description)
  template = jax.eval_shape(model.init, jax.random.key(0), x)
  variables, _ = convert.import_weights(weights(description), template, OFFICIAL.key_map(model))
  count = sum(p.size for p in jax.tree.leaves(variables["params"]))
  assert count == description["parameter_count"]
  logits, endpoints = jax.jit(functools.partial(model.apply, train=False))(variables, x)
  actual = {}
  for stage, depth in enumerate(model.depths, start=1):
    actual[f"embed{stage}"] = endpoints["stem" if stage == 1 else f"stage{stage}_embedding"]
    for i in range(depth):
      actual[f"block{stage}_{i + 1}"] = endpoints[f"stage{stage}_block{i}"]
    actual[f"stage{stage}"] = endpoints[f"stage{stage}"]
  for i, feature in enumerate(model.features):
    actual[f"out{i}"] = endpoints[feature.name]
  actual["pooled"] = endpoints["pre_logits"]
  if logits is not None:
    actual["logits"] = logits
  return actual


def answered(expected, actual):
  """What the file has an answer for: the full-size one has no blocks, a backbone no logits."""
  return {k: v for k, v in actual.items() if k in expected or f"{k}_stats" in expected}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
  description, expected = golden.load("smt", name)
  golden.assert_matches(expected, answered(expected, run(description)))


@pytest.mark.parametrize("name", [n for n in golden.names("smt") if n not in NETWORKS])
def test_attention_or_modulation_alone(name):
  description, expected = golden.load("smt", name)
  a = description["arguments"]
  if a["ca_attention"]:
    layer = smt.ScaleAwareModulation(
      a["ca_num_heads"], a["expand_ratio"], a["qkv_bias"], 0.9, 1, jnp.float32
    )
    scope, arguments = "modulation", {"train": False}
  else:
    layer = smt.Attention(a["sa_num_heads"], a["qkv_bias"], a.get("qk_scale"), jnp.float32)
    scope, arguments = "attention", {}
  x = golden.image(description)
  template = jax.eval_shape(functools.partial(layer.init, **arguments), jax.random.key(0), x)

  def key_map(path):
    collection, rest = path.split("/", 1)
    key = keymap_smt.official_key(f"{collection}/stage1_block0/{scope}/{rest}")
    name = key.name.removeprefix("block1.0.attn.")
    return convert.OfficialKey(name, key.to_ours, key.to_theirs)

  variables, _ = convert.import_weights(weights(description), template, key_map)
  out, state = layer.apply(variables, x, **arguments, capture_intermediates=True)
  actual = {"output": out}
  if "modulator" in expected:
    modulator = state["intermediates"]["shrink"]["__call__"][0]
    actual = {"modulator": modulator, **actual}
  golden.assert_matches(expected, actual)
