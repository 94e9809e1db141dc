import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.models import l2vit
from hybrid_vit.models.registry import create_model, list_models
from hybrid_vit.weights import keymap_l2vit
from tests.models import contract

# By arithmetic, in 10^9, at the entry's own input size. At 384 the windows of 12 divide every map
# but the last.
MULTIPLY_ADDS = {
  "l2vit_tiny": 4.69,
  "l2vit_small": 8.98,
  "l2vit_base": 15.81,
  "l2vit_base_22kto1k": 15.81,
  "l2vit_base_384_22kto1k": 47.32,
}
# Two stages: the depthwise convolutions take long to compile.
SMALL = {"widths": (8, 16), "depths": (2, 2), "num_heads": (1, 2), "mlp_ratios": (2, 2)}


def small(num_classes=10, **overrides):
  settings = {"drop_path_rate": 0.0, "window_size": 3, **SMALL, **overrides}
  return create_model("l2vit_tiny", num_classes, **settings)


def test_the_table_of_variants_is_complete():
  assert set(list_models("l2vit*")) == {*MULTIPLY_ADDS, "l2vit_base_22k"}


@pytest.mark.parametrize("name", [*MULTIPLY_ADDS, "l2vit_base_22k"])
def test_entry(name):
  contract.check_entry(name)


@pytest.mark.parametrize("name", [n for n in MULTIPLY_ADDS if n != "l2vit_base_22kto1k"])
def test_multiply_adds(name):
  counted = contract.multiply_adds(name)
  assert round(counted / 1e9, 2) == MULTIPLY_ADDS[name]


def test_every_parameter_gets_a_gradient():
  contract.check_gradients(small(), size=(32, 32))


def test_bfloat16():
  contract.check_bfloat16(small)


def test_recomputing_blocks():
  contract.check_remat(small)


def test_drop_path():
  contract.check_drop_path(small)


@pytest.mark.parametrize("size", [(37, 51), (30, 24)])
def test_odd_and_non_square_inputs(size):
  contract.check_sizes(small(), [size])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trains(dtype):
  contract.check_trains(small(depths=(1, 2), dtype=dtype), rate=4e-3)


@pytest.mark.parametrize("options", [{}, {"stem": "patch", "projection_width": 12}])
def test_weights_come_back(options):
  contract.check_round_trip(small(**options), keymap_l2vit.LAYOUTS["official"])


@pytest.mark.parametrize(
  ("stem", "names"),
  [
    ("patch", {"downsample_layers.0.proj.weight": (4, 4, 3, 8)}),
    ("overlapped_patch", {"downsample_layers.0.proj.weight": (7, 7, 3, 8)}),
    (
      "conv4",
      {
        "downsample_layers.0.proj.proj.0.weight": (7, 7, 3, 4),
        "downsample_layers.0.proj.proj.3.weight": (3, 3, 4, 4),
        "downsample_layers.0.proj.proj.6.weight": (3, 3, 4, 4),
        "downsample_layers.0.proj.proj.9.weight": (2, 2, 4, 8),
      },
    ),
  ],
)
def test_stems_have_the_authors_kernels(stem, names):
  model = small(stem=stem, block_types="local")
  x = contract.images(1, 30, 21)
  (_, endpoints), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  assert endpoints["stem"].shape == (1, 8, 6, 8)
  key_map = keymap_l2vit.LAYOUTS["official"].key_map(model)
  leaves = jax.tree.leaves_with_path(variables["params"]["stem"])
  found = {}
  for path, leaf in leaves:
    name = key_map("params/stem/" + "/".join(p.key for p in path)).name
    if leaf.ndim == 4:
      found[name] = leaf.shape
  assert found == names


def test_initial_values():
  model = small(block_types="global", depths=(1, 1))
  params = contract.initialize(model, contract.images(1, 8, 8))["params"]
  block = params["stage1_block0"]
  np.testing.assert_array_equal(block["attention"]["temperature"], np.float32(8**-0.5))
  for kernel in (block["mlp"]["fc1"]["kernel"], block["concentration"]["conv_0"]["kernel"]):
    assert abs(float(kernel.std()) / 0.02 - 1.0) < 4 / np.sqrt(2 * kernel.size)
  assert not params["stem"]["conv_0"]["bias"].any()


def linear_attention(x, seed):
  """(ours, plain numpy, share of denominators on the floor) for cells `[1, H, W, 8]`, two heads."""
  layer = l2vit.LinearAttention(2, jnp.float32)
  params = layer.init(jax.random.key(0), x)["params"]
  params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(seed), p.shape), params)
  out = np.asarray(layer.apply({"params": params}, x))
  tokens = x.reshape(-1, 8) @ params["qkv"]["kernel"] + params["qkv"]["bias"]
  q, k, v = tokens.reshape(-1, 3, 2, 4).transpose(1, 2, 0, 3)
  weights = np.maximum(q, 0.0) @ np.maximum(k, 0.0).swapaxes(1, 2)
  mass = weights.sum(-1, keepdims=True)
  y = weights / np.maximum(mass, 100.0) * params["temperature"] @ v
  expected = y.transpose(1, 0, 2).reshape(-1, 8) @ params["out"]["kernel"] + params["out"]["bias"]
  return out.reshape(-1, 8), expected, float((mass < 100.0).mean())


@pytest.mark.parametrize("side", [2, 5, 16])
def test_linear_attention_has_a_floor_under_its_denominator(side):
  x = np.random.default_rng(0).normal(size=(1, side, side, 8)).astype(np.float32)
  out, expected, on_the_floor = linear_attention(x, 1)
  np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)
  lowest, highest = {2: (0.9, 1.0), 5: (0.2, 0.9), 16: (0.0, 0.2)}[side]
  assert lowest <= on_the_floor <= highest


def test_linear_attention_sums_in_float32():
  layer = l2vit.LinearAttention(2, jnp.bfloat16)
  x = jnp.ones((1, 4, 4, 8), jnp.bfloat16)
  variables = layer.init(jax.random.key(0), x)
  text = str(jax.make_jaxpr(layer.apply)(variables, x))
  products = [line for line in text.splitlines() if "dot_general" in line]
  # Two projections in bfloat16, three sums over cells or channels in float32.
  assert sum(":f32" in line.split(" = ")[0] for line in products) == 3
  assert sum(":bf16" in line.split(" = ")[0] for line in products) == 2


def test_padding_of_windows_is_attended_to():
  layer = l2vit.WindowAttention(1, 3, jnp.float32)
  x = np.random.default_rng(0).normal(size=(1, 2, 3, 4)).astype(np.float32)
  params = layer.init(jax.random.key(0), x)["params"]
  params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
  out = layer.apply({"params": params}, x)
  cells = np.concatenate([x.reshape(-1, 4), np.zeros((3, 4), np.float32)])
  q, k, v = np.split(cells @ params["qkv"]["kernel"] + params["qkv"]["bias"], 3, axis=-1)
  weights = np.exp(q @ k.T / 2.0)
  weights /= weights.sum(-1, keepdims=True)
  expected = (weights @ v)[:6] @ params["out"]["kernel"] + params["out"]["bias"]
  np.testing.assert_allclose(out.reshape(6, 4), expected, rtol=1e-3, atol=1e-4)


def test_output_norms_stand_beside_the_trunk():
  model = small(num_classes=0, output_norms=(2,))
  assert model.features == (("stage2_norm", 8, 16),)
  variables, x = contract.drawn_variables(model), contract.images(1, 32, 32)
  assert set(variables["params"]["stage2_norm"]) == {"scale", "bias"}
  assert not any(name.startswith("head") for name in variables["params"])
  logits, endpoints = contract.run(model, variables, x)
  assert logits is None
  y = np.asarray(endpoints["stage2"])
  y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
  norm = variables["params"]["stage2_norm"]
  np.testing.assert_allclose(
    endpoints["stage2_norm"], y * norm["scale"] + norm["bias"], rtol=1e-3, atol=1e-3
  )
  np.testing.assert_allclose(endpoints["pre_logits"], endpoints["stage2"].mean((1, 2)), rtol=1e-4)


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"widths": (8, 16, 24)}, "depths names 2 stages but widths has 3 values"),
    ({"block_types": "both"}, "block_types is 'both'; it takes one of mixed, global, local"),
    ({"stem": "conv3"}, "stem is 'conv3'; it takes one of conv, conv4, patch, overlapped_patch"),
    ({"num_heads": (1, 3)}, "3 heads do not divide the width 16 of stage 2"),
    ({"output_norms": (0, 1)}, "output_norms names stage 0; the stages are 1 to 2"),
  ],
)
def test_errors_say_what_is_wrong(overrides, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(small(**overrides).init, jax.random.key(0), contract.images(1, 32, 32))
