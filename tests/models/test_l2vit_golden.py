"""L2ViT against the author's own code, layer by layer."""

import functools

import jax
import jax.numpy as jnp
import pytest

from hybrid_vit.models import l2vit
from hybrid_vit.models.registry import create_model
from hybrid_vit.weights import convert, keymap_l2vit
from tests import golden

NETWORKS = [n for n in golden.names("l2vit") if n.startswith(("small_", "L2ViT_"))]
LAYOUT = keymap_l2vit.LAYOUTS["official"]
BLOCK_TYPES = {"mix_local_enhanced_vit": "mixed", "enhanced_vit": "global", "local": "local"}
LAYERS = {
  "LinearAttention": "attention",
  "WindowAttention": "attention",
  "LCM": "concentration",
  "LWABlock": None,
  "LGABlock": None,
}


def network(description) -> l2vit.L2ViT:
  """Our network for the author's arguments."""
  a = dict(description["arguments"])
  function = a.pop("function")
  if function != "L2ViT":
    assert not a
    return create_model(function.lower())
  stem = "overlapped_patch" if a.pop("stem_overlapped", False) else "patch"
  if a.pop("conv_stem", False):
    stem = {"2L": "conv", "4L": "conv4"}[a.pop("conv_stem_type", "2L")]
  dense_task = "/mmdet/" in description["source"] or "/mmseg/" in description["source"]
  stages = [i + 1 for i in a.pop("out_indices", range(4))]
  model = l2vit.L2ViT(
    widths=tuple(a.pop("dims")),
    depths=tuple(a.pop("depths")),
    num_heads=tuple(a.pop("num_heads")),
    num_classes=0 if dense_task else a.pop("num_classes"),
    block_types=BLOCK_TYPES[a.pop("block_type")],
    mlp_ratios=tuple(a.pop("mlp_ratio", (4.0,) * 4)),
    window_size=a.pop("window_size", 7),
    stem=stem,
    overlapped_downsampling=a.pop("overlapped", False),
    position_gelu=a.pop("cpe_act", False),
    projection_width=1280 if a.pop("last_proj", False) else None,
    output_norms=tuple(stages) if dense_task else (),
  )
  assert not a, f"arguments that nothing took: {a}"
  return model


def trained(description):
  """The author's weights, without what is no weight."""
  weights = golden.weights(description)
  return {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}


def run(description):
  """Our answers under the author's names, in the order of computation."""
  model = network(description)
  x = golden.image(description)
  template = jax.eval_shape(model.init, jax.random.key(0), x)
  variables, _ = convert.import_weights(trained(description), template, LAYOUT.key_map(model))
  count = sum(p.size for p in jax.tree.leaves(variables["params"]))
  assert count == description["parameter_count"]

  branches = {"attn": "attention", "lcm": "concentration", "mlp": "mlp"}

  @jax.jit
  def forward(variables, x):
    (logits, endpoints), kept = model.apply(
      variables,
      x,
      train=False,
      mutable=["intermediates"],
      capture_intermediates=lambda module, _: module.name in branches.values(),
    )
    return logits, endpoints, kept["intermediates"]

  logits, endpoints, inside = forward(variables, x)
  actual = {}
  for stage, depth in enumerate(model.depths, start=1):
    actual[f"embed{stage}"] = endpoints["stem" if stage == 1 else f"stage{stage}_downsample"]
    if stage == 3:
      for theirs, ours in branches.items():
        if ours in inside[f"stage3_block{depth - 1}"]:
          actual[f"stage3_last_{theirs}"] = inside[f"stage3_block{depth - 1}"][ours]["__call__"][0]
    actual[f"stage{stage}"] = endpoints[f"stage{stage}"]
    if stage in model.output_norms:
      actual[f"out{stage - 1}"] = endpoints[f"stage{stage}_norm"]
  if logits is not None:
    actual["logits"] = logits
  return actual


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name):
  description, expected = golden.load("l2vit", name)
  actual = run(description)
  # The branches are answered only where the last block of stage 3 is a global one.
  actual = {
    k: v for k, v in actual.items() if not k.startswith("stage3_last") or f"{k}_stats" in expected
  }
  golden.assert_matches(expected, actual)


def layer(description):
  """Our layer for the author's, and whether its call is told about training."""
  a = description["arguments"]
  norm = {"batch_norm_momentum": 0.9, "batch_norm_groups": 1, "dtype": jnp.float32}
  if a["function"] == "LinearAttention":
    return l2vit.LinearAttention(a["num_heads"], jnp.float32), False
  if a["function"] == "LCM":
    return l2vit.LocalConcentration(**norm), True
  block = l2vit.Block(
    attends_globally=a["function"] == "LGABlock",
    num_heads=a["num_heads"],
    mlp_ratio=4.0,
    window_size=7,
    position_gelu=False,
    drop_path_rate=0.0,
    **norm,
  )
  return block, True


@pytest.mark.parametrize("name", sorted(set(golden.names("l2vit")) - set(NETWORKS)))
def test_layer_alone(name):
  description, expected = golden.load("l2vit", name)
  x = golden.image(description)
  module, takes_train = layer(description)
  call = {"train": False} if takes_train else {}
  scope = {"LinearAttention": ("attention/", "attn."), "LCM": ("concentration/", "local_mp.")}
  ours, theirs = scope.get(description["arguments"]["function"], ("", ""))

  def key_map(path):
    collection, rest = path.split("/", 1)
    key = LAYOUT.key_map(None)(f"{collection}/stage1_block0/{ours}{rest}")
    return convert.OfficialKey(
      key.name.removeprefix(f"stages.0.0.{theirs}"), key.to_ours, key.to_theirs
    )

  template = jax.eval_shape(functools.partial(module.init, **call), jax.random.key(0), x)
  variables, _ = convert.import_weights(trained(description), template, key_map)
  out = jax.jit(functools.partial(module.apply, **call))(variables, x)
  # The file's "output" is a part, its "output_stats" are of the whole.
  tokens = out.reshape(out.shape[0], -1, out.shape[-1])
  expected["first_tokens"] = expected.pop("output")
  first = expected["first_tokens"].shape[1]
  golden.assert_matches(expected, {"output": out, "first_tokens": tokens[:, :first]})
