import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.models import layers, swin
from hybrid_vit.models.registry import create_model, list_models, model_entry
from hybrid_vit.weights import keymap_swin
from hybrid_vit.weights.transfer import transfer
from tests.models import contract

SIZES = {size: ["", "_22k", "_22kto1k"] for size in ("tiny", "small")}
SIZES |= {
  "base": ["", "_384", "_22k", "_384_22k", "_22kto1k", "_384_22kto1k"],
  "large": ["_22k", "_384_22k", "_22kto1k", "_384_22kto1k"],
}
NAMES = [f"swin_{size}{suffix}" for size, suffixes in SIZES.items() for suffix in suffixes]
SMALL = {"width": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 3, "mlp_ratio": 2}


def small(num_classes=10, **overrides):
  return create_model("swin_tiny", num_classes, **{**SMALL, "drop_path_rate": 0.0, **overrides})


def test_the_table_of_variants_is_complete():
  assert set(list_models("swin*")) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_entry(name):
  contract.check_entry(name)


@pytest.mark.parametrize("name", [n for n in NAMES if model_entry(n).published.multiply_adds])
def test_multiply_adds(name):
  """To the paper's last digit, but for norms, which the authors count too."""
  entry = model_entry(name)
  counted = contract.multiply_adds(name)
  assert abs(counted / entry.published.multiply_adds - 1.0) < 0.01


def test_every_parameter_gets_a_gradient():
  # The key's third of the bias has none either, which the fused projection hides.
  contract.check_gradients(small(), size=(32, 32))


def test_bfloat16():
  contract.check_bfloat16(small)


def test_recomputing_blocks():
  contract.check_remat(small)


def test_drop_path():
  contract.check_drop_path(small)


@pytest.mark.parametrize("size", [(37, 51), (9, 40)])
def test_odd_and_non_square_inputs(size):
  contract.check_sizes(small(), [size])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trains(dtype):
  contract.check_trains(small(width=16, dtype=dtype), rate=1e-2)


@pytest.mark.parametrize("layout", keymap_swin.LAYOUTS)
def test_weights_come_back(layout):
  model, layout = small(), keymap_swin.LAYOUTS[layout]
  variables = jax.device_get(contract.drawn_variables(model))
  tensors = {}
  for path, leaf in jax.tree.leaves_with_path(variables):
    key = layout.key_map(model)("/".join(p.key for p in path))
    tensors |= key.write(leaf)
    np.testing.assert_array_equal(key.read(tensors), leaf)
  apart = 2 if "classifier.weight" in tensors else 0  # query, key, value: weights and biases
  blocks = sum(model.depths)
  assert len(tensors) == len(jax.tree.leaves(variables)) + 2 * apart * blocks


def test_names_of_each_layout():
  paths = {
    "params/stage2_merging/reduction/kernel": (
      "layers.0.downsample.reduction.weight",
      "layers.1.downsample.reduction.weight",
      "swin.encoder.layers.0.downsample.reduction.weight",
    ),
    "params/stage3_block1/attention/position_bias": (
      "layers.2.blocks.1.attn.relative_position_bias_table",
      "layers.2.blocks.1.attn.relative_position_bias_table",
      "swin.encoder.layers.2.blocks.1.attention.self.relative_position_bias_table",
    ),
    "params/head/bias": ("head.bias", "head.fc.bias", "classifier.bias"),
  }
  for path, names in paths.items():
    known = ("official", "timm", "transformers")
    found = [keymap_swin.LAYOUTS[n].key_map(None)(path).name for n in known]
    assert tuple(found) == names
  rename = keymap_swin.LAYOUTS["transformers"].rename
  assert rename("swin.encoder.layers.0.blocks.1.attention.k_proj.bias") == (
    "swin.encoder.layers.0.blocks.1.attention.self.key.bias"
  )
  with pytest.raises(ValueError, match="no variable 'params/stage1_block0/mlp/kernel'"):
    keymap_swin.LAYOUTS["timm"].key_map(None)("params/stage1_block0/mlp/kernel")


def attention(shifted, window=3):
  return swin.WindowAttention(
    num_heads=1, window_size=window, shifted=shifted, qkv_bias=True, dtype=jnp.float32
  )


def drawn(layer, x):
  params = layer.init(jax.random.key(0), x)["params"]
  return jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)


def test_shifted_windows_do_not_reach_across_the_edge():
  """By hand: in the rolled map each window's cells attend to those that were neighbours before."""
  x = np.random.default_rng(0).normal(size=(1, 6, 6, 2)).astype(np.float32)
  layer = attention(True)
  params = drawn(layer, x)
  out = np.asarray(layer.apply({"params": params}, x))
  q, k, v = np.split(x[0] @ params["qkv"]["kernel"] + params["qkv"]["bias"], 3, axis=-1)
  # Rolled by one, windows of three begin at -2, 1, 4: along an axis the groups are 1-3, 4-5 and 0.
  group = np.array([0, 1, 1, 1, 2, 2])
  for r in range(6):
    for c in range(6):
      rows, columns = np.flatnonzero(group == group[r]), np.flatnonzero(group == group[c])
      places = [(i, j) for i in rows for j in columns]
      logits = [
        q[r, c] @ k[i, j] * 2**-0.5 + params["position_bias"][0, i - r + 2, j - c + 2]
        for i, j in places
      ]
      weights = np.exp(np.array(logits) - np.max(logits))
      y = weights / weights.sum() @ np.array([v[p] for p in places])
      expected = y @ params["out"]["kernel"] + params["out"]["bias"]
      np.testing.assert_allclose(out[0, r, c], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(3, 6), (2, 5)])
def test_a_map_of_one_windows_side_is_not_shifted(size):
  x = np.random.default_rng(0).normal(size=(1, *size, 4)).astype(np.float32)
  params = drawn(attention(True), x)
  plain, shifted = (attention(s).apply({"params": params}, x) for s in (False, True))
  np.testing.assert_array_equal(plain, shifted)


def test_a_window_that_shrinks_takes_the_table_resized():
  x = np.random.default_rng(0).normal(size=(1, 2, 2, 4)).astype(np.float32)
  layer = attention(False, window=4)
  params = drawn(layer, x)
  resized = swin.resize_bicubic_table(params["position_bias"], (3, 3))
  assert resized.shape == (1, 3, 3)
  small_table = {**params, "position_bias": resized}
  np.testing.assert_allclose(
    layer.apply({"params": params}, x),
    attention(False, window=2).apply({"params": small_table}, x),
    rtol=1e-5,
    atol=1e-6,
  )


def test_the_table_is_resized_as_torch_does():
  # torch.nn.functional.interpolate(arange(9).reshape(1, 1, 3, 3), (5, 5), mode="bicubic")
  first_row = [-0.3840, 0.0280, 0.7120, 1.3960, 1.8080]
  table = jnp.arange(9.0).reshape(1, 3, 3)
  out = swin.resize_bicubic_table(table, (5, 5))[0]
  np.testing.assert_allclose(out[0], first_row, atol=1e-4)
  np.testing.assert_allclose(out[2, 2], 4.0, atol=1e-5)


def test_fine_tuning_with_another_window_resizes_the_tables():
  model, larger = small(), small(window_size=4)
  x = contract.images(1, 32, 32)
  source = contract.drawn_variables(model)
  target = contract.initialize(larger, x)
  new, report = transfer(source, target)
  old = source["params"]["stage1_block0"]["attention"]["position_bias"]
  np.testing.assert_allclose(
    new["params"]["stage1_block0"]["attention"]["position_bias"],
    swin.resize_bicubic_table(old, (7, 7)),
  )
  assert sum("resized" in name for name in report.loaded) == 4 and not report.initialised


def test_without_a_classifier():
  model = small(num_classes=0)
  variables = contract.drawn_variables(model)
  assert not any(name.startswith("head") for name in variables["params"])
  logits, endpoints = contract.run(model, variables, contract.images(1, 32, 32))
  assert logits is None
  np.testing.assert_allclose(endpoints["pre_logits"], endpoints["stage2"].mean((1, 2)), rtol=1e-4)


def test_bias_of_a_pair_is_at_key_less_query():
  table = np.random.default_rng(0).normal(size=(25, 2)).astype(np.float32)
  ours = keymap_swin.LAYOUTS["official"].key_map(None)(
    "params/stage1_block0/attention/position_bias"
  )
  bias = layers.relative_position_bias(jnp.asarray(ours.to_ours(table)), (3, 3))
  for query in range(9):
    for key in range(9):
      row, column = query // 3 - key // 3 + 2, query % 3 - key % 3 + 2  # the authors' index
      np.testing.assert_array_equal(bias[:, query, key], table[row * 5 + column])


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"num_heads": (1, 2, 4)}, "depths names 2 stages but num_heads has 3 values"),
    ({"num_heads": (1, 3)}, "3 heads do not divide the width 16 of stage 2"),
  ],
)
def test_errors_say_what_is_wrong(overrides, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(small(**overrides).init, jax.random.key(0), contract.images(1, 32, 32))
