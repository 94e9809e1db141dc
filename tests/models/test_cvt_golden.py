"""CvT against the authors' own code, layer by layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.models import cvt
from hybrid_vit.weights import convert, keymap_cvt
from tests import golden

NETWORKS = [n for n in golden.names("cvt") if not n.startswith("attention_")]
LAYOUT = keymap_cvt.LAYOUTS["official"]


def network(description) -> cvt.CvT:
  """Our network for the authors' arguments."""
  spec = {
    k: tuple(v) if isinstance(v, list) else v for k, v in description["arguments"]["SPEC"].items()
  }
  assert set(spec["STRIDE_Q"]) == {1}
  assert all(p == k // 2 for p, k in zip(spec["PADDING_Q"], spec["KERNEL_QKV"]))
  return cvt.CvT(
    widths=spec["DIM_EMBED"],
    depths=spec["DEPTH"],
    num_heads=spec["NUM_HEADS"],
    num_classes=description["arguments"]["NUM_CLASSES"],
    patch_sizes=spec["PATCH_SIZE"],
    strides=spec["PATCH_STRIDE"],
    paddings=spec["PATCH_PADDING"],
    mlp_ratios=spec["MLP_RATIO"],
    qkv_bias=spec["QKV_BIAS"],
    class_tokens=spec["CLS_TOKEN"],
    projections=spec["QKV_PROJ_METHOD"],
    kernel_sizes=spec["KERNEL_QKV"],
    kv_strides=spec["STRIDE_KV"],
    kv_paddings=spec["PADDING_KV"],
    drop_path_rate=spec["DROP_PATH_RATE"],
  )


def trained(description):
  """The authors' weights, without what is no weight."""
  weights = golden.weights(description)
  return {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}


def run(description):
  """Our answers under the authors' names, in the order of computation."""
  model = network(description)
  x = golden.image(description)
  template = jax.eval_shape(model.init, jax.random.key(0), x)
  variables, _ = convert.import_weights(trained(description), template, LAYOUT.key_map(model))
  count = sum(p.size for p in jax.tree.leaves(variables["params"]))
  assert count == description["parameter_count"]
  logits, endpoints = jax.jit(functools.partial(model.apply, train=False))(variables, x)
  actual = {}
  for stage, depth in enumerate(model.depths, start=1):
    actual[f"embed{stage}"] = endpoints["stem" if stage == 1 else f"stage{stage}_embed"]
    for i in range(depth):
      actual[f"block{stage}_{i + 1}"] = endpoints[f"stage{stage}_block{i}"]
    actual[f"stage{stage}"] = endpoints[f"stage{stage}"]
    if f"stage{stage}_class_token" in endpoints:
      actual[f"stage{stage}_cls_token"] = endpoints[f"stage{stage}_class_token"]
  return {**actual, "pooled": endpoints["pre_logits"], "logits": logits}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
  description, expected = golden.load("cvt", name)
  actual = run(description)
  # The file of the full size has no answers of single blocks.
  answered = {k: v for k, v in actual.items() if k in expected or f"{k}_stats" in expected}
  assert name.startswith("cvt-") or len(answered) == len(actual)
  golden.assert_matches(expected, answered)


@pytest.mark.parametrize("name", golden.names("cvt", "attention_*"))
def test_attention_alone(name):
  description, expected = golden.load("cvt", name)
  arguments = description["arguments"]
  x = golden.image(description)
  batch, height, width, channels = x.shape
  tokens = x.reshape(batch, -1, channels)
  if arguments["with_cls_token"]:
    token = golden.image({"input": description["class_token_input"]}).reshape(batch, 1, channels)
    tokens = np.concatenate([token, tokens], axis=1)
  layer = cvt.Attention(
    size=(height, width),
    num_heads=arguments["num_heads"],
    qkv_bias=arguments["qkv_bias"],
    projection=arguments["method"],
    kernel_size=arguments["kernel_size"],
    kv_stride=arguments["stride_kv"],
    kv_padding=arguments["padding_kv"],
    batch_norm_momentum=0.9,
    batch_norm_groups=1,
    dtype=jnp.float32,
  )
  template = jax.eval_shape(functools.partial(layer.init, train=False), jax.random.key(0), tokens)
  official = LAYOUT.key_map(None)

  def key_map(path):
    collection, rest = path.split("/", 1)
    key = official(f"{collection}/stage1_block0/attention/{rest}")
    return convert.OfficialKey(
      key.name.removeprefix("stage0.blocks.0.attn."), key.to_ours, key.to_theirs
    )

  variables, _ = convert.import_weights(trained(description), template, key_map)
  out = jax.jit(functools.partial(layer.apply, train=False))(variables, tokens)
  before = int(arguments["with_cls_token"])
  actual = {"output": out[:, before:].reshape(x.shape)}
  if before:
    actual["output_cls_token"] = out[:, :1]
  for key, value in actual.items():
    actual[key] = np.asarray(value).reshape(expected[key].shape)
  golden.assert_matches(expected, actual)
