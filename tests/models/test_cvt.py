import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.models import cvt
from hybrid_vit.models.registry import create_model, list_models
from hybrid_vit.weights import keymap_cvt
from tests.models import contract

# The authors' code, counted: multiply-adds in 10^9 at the entry's own input size.
MULTIPLY_ADDS = {
  "cvt_13": 4.566,
  "cvt_21": 7.178,
  "cvt_13_384": 16.269,
  "cvt_21_384": 24.849,
  "cvt_13_384_22kto1k": 16.269,
  "cvt_21_384_22kto1k": 24.849,
  "cvt_w24_384_22kto1k": 194.222,
}
# Two stages: the depthwise convolutions take long to compile.
SMALL = {
  "widths": (8, 16),
  "depths": (1, 2),
  "num_heads": (1, 2),
  "patch_sizes": (7, 3),
  "strides": (4, 2),
  "paddings": (2, 1),
  "mlp_ratios": (2, 2),
  "qkv_bias": (True, True),
  "class_tokens": (False, True),
  "projections": ("dw_bn", "dw_bn"),
  "kernel_sizes": (3, 3),
  "kv_strides": (2, 2),
  "kv_paddings": (1, 1),
}


def small(num_classes=10, **overrides):
  return create_model("cvt_13", num_classes, **{**SMALL, "drop_path_rate": 0.0, **overrides})


def test_the_table_of_variants_is_complete():
  assert set(list_models("cvt*")) == set(MULTIPLY_ADDS)


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_entry(name):
  contract.check_entry(name)


@pytest.mark.parametrize("name", [n for n in MULTIPLY_ADDS if "_22k" not in n or "w24" in n])
def test_multiply_adds(name):
  counted = contract.multiply_adds(name)
  assert round(counted / 1e9, 3) == MULTIPLY_ADDS[name]


def test_every_parameter_gets_a_gradient():
  # A constant added to all keys leaves the softmax as it is; the class token, which alone reaches
  # the logits, passes by the last block's convolution of queries.
  last = "stage2_block1/attention/query"
  contract.check_gradients(
    small(),
    size=(32, 32),
    dead=(
      "attention/key/bias",
      "stage1_block0/attention/key_norm/bias",
      f"{last}_conv/kernel",
      f"{last}_norm/scale",
      f"{last}_norm/bias",
    ),
  )


def test_bfloat16():
  contract.check_bfloat16(small)


def test_recomputing_blocks():
  contract.check_remat(small)


def test_drop_path():
  # At half the rate: with two branches of two samples, at 0.9 all would be dropped.
  contract.check_drop_path(lambda drop_path_rate=0.0: small(drop_path_rate=drop_path_rate / 2))


def test_drop_path_is_in_the_last_stage_and_ramps_from_zero():
  model, variables = small(drop_path_rate=0.45), contract.drawn_variables(small())
  x = contract.images(2, 32, 32)
  one, other = (contract.run(model, variables, x, True, jax.random.key(k))[0][1] for k in (0, 1))
  np.testing.assert_array_equal(one["stage2_block0"], other["stage2_block0"])
  assert float(jnp.abs(one["stage2"] - other["stage2"]).max()) > 0.01
  rates = create_model(
    "cvt_21", depths=(1, 2, 3), drop_path_rate=(0.1, 0.2, 0.3)
  )._drop_path_rates()
  np.testing.assert_allclose(np.concatenate(rates), [0, 0, 0.2, 0, 0.15, 0.3])


@pytest.mark.parametrize("size", [(35, 52), (20, 31)])
def test_odd_and_non_square_inputs(size):
  contract.check_sizes(small(), [size])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trains(dtype):
  contract.check_trains(small(depths=(1, 1), dtype=dtype), rate=6e-3)


@pytest.mark.parametrize("layout", keymap_cvt.LAYOUTS)
def test_weights_come_back(layout):
  contract.check_round_trip(small(), keymap_cvt.LAYOUTS[layout])


def test_names_in_transformers():
  official = keymap_cvt.LAYOUTS["transformers"].key_map(small())
  names = {
    "params/stage3_embed/class_token": "cvt.encoder.stages.2.cls_token",
    "params/stem/conv/kernel": (
      "cvt.encoder.stages.0.embedding.convolution_embeddings.projection.weight"
    ),
    "batch_stats/stage2_block1/attention/key_norm/mean": (
      "cvt.encoder.stages.1.layers.1.attention.attention.convolution_projection_key."
      "convolution_projection.normalization.running_mean"
    ),
    "params/stage1_block0/attention/out/bias": (
      "cvt.encoder.stages.0.layers.0.attention.output.dense.bias"
    ),
    "params/stage1_block0/fc2/kernel": "cvt.encoder.stages.0.layers.0.output.dense.weight",
    "params/head/kernel": "classifier.weight",
  }
  for ours, theirs in names.items():
    assert official(ours).name == theirs
  with pytest.raises(ValueError, match="no variable 'params/stage1_block0/mlp/kernel'"):
    official("params/stage1_block0/mlp/kernel")


def test_initial_values():
  one_stage = {k: v[-1:] for k, v in SMALL.items()}
  model = small(**one_stage | {"depths": (1,), "projections": ("linear",)})
  params = jax.jit(model.init)(jax.random.key(0), contract.images(1, 8, 8))["params"]
  for value in params["stem"]["conv"].values():
    assert 0.7 * 27**-0.5 < float(jnp.abs(value).max()) <= 27**-0.5
  assert abs(float(params["stage1_block0"]["fc1"]["kernel"].std()) / 0.02 - 1.0) < 0.15
  assert not params["stage1_block0"]["fc1"]["bias"].any()
  assert 0.0 < float(jnp.abs(params["head"]["bias"]).max()) <= 16**-0.5


def attention(projection, size, **settings):
  return cvt.Attention(
    size=size,
    num_heads=2,
    qkv_bias=True,
    projection=projection,
    kernel_size=3,
    kv_stride=2,
    kv_padding=1,
    batch_norm_momentum=0.9,
    batch_norm_groups=1,
    dtype=jnp.float32,
    **settings,
  )


def test_linear_attention_is_plain_attention_scaled_by_the_whole_width():
  x = np.random.default_rng(0).normal(size=(1, 7, 8)).astype(np.float32)  # a token and 2x3 cells
  layer = attention("linear", (2, 3))
  params = layer.init(jax.random.key(0), x, False)["params"]
  params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(1), p.shape), params)
  out = layer.apply({"params": params}, x, False)
  q, k, v = (
    (x[0] @ params[n]["kernel"] + params[n]["bias"]).reshape(7, 2, 4).transpose(1, 0, 2)
    for n in ("query", "key", "value")
  )
  weights = np.exp(q @ k.swapaxes(1, 2) * 8**-0.5)
  weights /= weights.sum(-1, keepdims=True)
  y = (weights @ v).transpose(1, 0, 2).reshape(7, 8)
  expected = y @ params["out"]["kernel"] + params["out"]["bias"]
  np.testing.assert_allclose(out[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
  ("settings", "counts"),
  [
    # 8 cells in steps of 2: the last window overhangs and has two cells of the padded nine left.
    ((3, 2, 1), [3, 3, 3, 3, 2]),
    ((2, 2, 0), [2, 2, 2, 2]),
    ((3, 4, 1), [3, 3, 2]),
    ((3, 1, 1), [3] * 8),
    # A fourth window would begin in the padding on the far side.
    ((1, 3, 0), [1, 1, 1]),
  ],
)
def test_average_pool_counts_the_padding_but_not_what_overhangs_it(settings, counts):
  window, stride, padding = settings
  x = np.random.default_rng(0).normal(size=(8,)).astype(np.float32)
  padded = np.pad(x, (padding, padding))
  parts = [padded[i * stride : i * stride + window] for i in range(len(counts))]
  assert [len(p) for p in parts] == counts
  expected = np.array([p.mean() for p in parts])
  column = np.outer(x, x)[None, :, :, None]
  out = cvt.average_pool_ceil(jnp.asarray(column), window, stride, padding)
  np.testing.assert_allclose(out[0, :, :, 0], np.outer(expected, expected), atol=1e-5)


def test_without_a_classifier():
  model = small(num_classes=0)
  variables = contract.drawn_variables(small())
  params = {k: v for k, v in variables["params"].items() if not k.startswith("head")}
  shapes = jax.eval_shape(model.init, jax.random.key(0), contract.images(1, 32, 32))
  assert set(shapes["params"]) == set(params)
  logits, endpoints = contract.run(
    model, {**variables, "params": params}, contract.images(2, 32, 32)
  )
  assert logits is None
  np.testing.assert_array_equal(endpoints["pre_logits"], endpoints["stage2_class_token"][:, 0])


@pytest.mark.parametrize(
  ("overrides", "size", "message"),
  [
    ({"widths": (8, 16, 24)}, 32, "depths names 2 stages but widths has 3 values"),
    ({"drop_path_rate": (0.1,)}, 32, "drop_path_rate has 1 values"),
    ({"projections": ("dw_bn", "conv")}, 32, "'conv'; a stage takes one of dw_bn, avg, linear"),
    ({"kernel_sizes": (3, 4)}, 32, "kernel_sizes has 4 for stage 2; only an odd kernel"),
    ({"num_heads": (1, 3)}, 32, "3 heads do not divide the width 16 of stage 2"),
    ({}, 2, "an image of 2x2 leaves a map of 2x2 before stage 1.* at least 3 rows"),
  ],
)
def test_errors_say_what_is_wrong(overrides, size, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(small(**overrides).init, jax.random.key(0), contract.images(1, size, size))
