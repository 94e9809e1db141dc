"""MOAT against the authors' own code, layer by layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.models import layers, moat
from hybrid_vit.weights import convert, keymap_moat
from tests import golden

NETWORKS = [n for n in golden.names("moat") if not n.startswith("attention_")]


def network(description) -> moat.MOAT:
  """Our network for the authors' arguments."""
  r = description["resolved"]
  windows = r["window_size"] or [None] * 4
  return moat.MOAT(
    stem_widths=tuple(r["stem_size"]),
    depths=tuple(r["num_blocks"]),
    widths=tuple(r["hidden_size"]),
    num_classes=r["build_classification_head_with_class_num"] or 0,
    block_types=tuple(r["block_type"]),
    strides=tuple(r["stage_stride"]),
    expansion=r["expansion_rate"],
    se_ratio=r["se_ratio"],
    head_size=r["head_size"],
    window_sizes=tuple(tuple(w) if w else None for w in windows),
    global_attention_at_end=r["global_attention_at_end_of_moat_stage"],
    position_bias=r["relative_position_embedding_type"] is not None,
    position_sizes=tuple(r["position_embedding_size"]),
    pool_size=r["pool_size"],
    layer_norm_epsilon=r["ln_epsilon"],
    drop_path_rate=1.0 - (r["survival_prob"] or 1.0),
  )


def run(description):
  """Our logits and endpoints under the authors' names, in the order of computation."""
  model = network(description)
  x = golden.image(description)
  template = jax.eval_shape(model.init, jax.random.key(0), x)
  weights = golden.weights(description)
  variables, report = keymap_moat.to_flax(weights, template)
  assert not report.initialised and not report.unused
  assert len(report.loaded) == len(weights)
  count = sum(p.size for p in jax.tree.leaves(variables["params"]))
  assert count == description["trainable_count"]
  logits, endpoints = jax.jit(functools.partial(model.apply, train=False))(variables, x)
  actual = {}
  for theirs, ours in enumerate(["stem", "stage1", "stage2", "stage3", "stage4"], start=1):
    actual[f"stage{theirs}"] = endpoints[ours]
    actual[f"res{theirs}"] = layers.gelu(endpoints[ours])
  if logits is not None:
    actual["logits"] = logits
  return actual


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
  description, expected = golden.load("moat", name)
  golden.assert_matches(expected, run(description))


@pytest.mark.parametrize("name", golden.names("moat", "attention_*"))
def test_attention_alone(name):
  description, expected = golden.load("moat", name)
  x = golden.image(description)
  weights = golden.weights(description)
  table = weights["attention/relative_position_embedding"]
  _, height, width, channels = x.shape
  layer = moat.Attention(
    head_size=description["arguments"]["head_size"],
    window=None,
    pad_windows=True,
    position_size=((table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2),
    dtype=jnp.float32,
  )
  template = jax.eval_shape(layer.init, jax.random.key(0), x)

  def key_map(path):
    key = keymap_moat.official_key(path.replace("params/", "params/stage1_block0/attention/"))
    return convert.OfficialKey(key.name.removeprefix("moat/block_00_00/"))

  variables, _ = convert.import_weights(weights, template, key_map)
  window = (height, width)
  resized = layers.resize_relative_table(jnp.asarray(table), (2 * height - 1, 2 * width - 1))
  bias = layers.relative_position_bias(resized, window)
  out = layer.apply(variables, x).reshape(len(x), height * width, channels)
  # The file's "output" is a part, its "output_stats" are of the whole.
  expected["first_tokens"] = expected.pop("output")
  actual = {
    "bias": bias,
    "bias_rows": bias[:, np.array([0, 1, width, height * width - 1])],
    "output": out,
    "first_tokens": out[:, :64],
  }
  golden.assert_matches(expected, actual)


def test_the_first_deviating_layer_is_named():
  description, expected = golden.load("moat", "small_global")
  actual = run(description)
  actual["stage3"] = actual["stage3"] + 1e-3
  actual["logits"] = actual["logits"] + 1.0
  with pytest.raises(AssertionError, match="first layer that deviates is stage3"):
    golden.assert_matches(expected, actual)
