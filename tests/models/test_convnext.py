"""ConvNeXt: exact counts, the structure's promises, and equality with a public implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from hybrid_vit.models import convnext
from hybrid_vit.models.registry import create_model, list_models, model_entry
from hybrid_vit.weights import convert, keymap_convnext
from tests import golden
from tests.models import contract


def small(**overrides):
  settings = {"widths": (8, 12, 16, 20), "depths": (1, 1, 2, 1), "drop_path_rate": 0.0}
  # A layer scale near 0 would hide the blocks, and drop path with them.
  return create_model("convnext_tiny", 10, **{**settings, "layer_scale_init": 1.0, **overrides})


@pytest.mark.parametrize("name", list_models("convnext_*"))
def test_entries(name):
  contract.check_entry(name)


def test_no_published_variant_is_missing():
  at_1k = {"tiny", "small", "base", "large", "base_384", "large_384"}
  sizes = ("tiny", "small", "base", "large", "xlarge")
  at_22k = {f"{n}_{s}" for n in sizes for s in ("22k", "22kto1k", "384_22kto1k")}
  assert set(list_models("convnext_*")) == {f"convnext_{n}" for n in at_1k | at_22k}


@pytest.mark.parametrize(
  "name", [n for n in list_models("convnext_*") if model_entry(n).published.multiply_adds]
)
def test_multiply_adds(name):
  entry = model_entry(name)
  found = contract.multiply_adds(name)
  # The published figures have one digit after the point; the last of them are cut, not rounded.
  assert found == pytest.approx(entry.published.multiply_adds, rel=0.015), found / 1e9


def test_the_structure():
  contract.check_gradients(small())
  contract.check_bfloat16(small)
  contract.check_remat(small)
  contract.check_drop_path(small)


def test_cells_that_are_not_full_are_left_out():
  model = small()
  for size in ((71, 93), (63, 34)):
    logits, endpoints = contract.run(
      model, contract.drawn_variables(model), contract.images(1, *size)
    )
    assert bool(jnp.isfinite(logits).all())
    for f in model.features:
      expected = (1, size[0] // f.stride, size[1] // f.stride, f.channels)
      assert endpoints[f.name].shape == expected
  with pytest.raises(ValueError, match="image is 31 x 64; both sides must be at least 32"):
    jax.eval_shape(model.init, jax.random.key(0), contract.images(1, 31, 64))
  with pytest.raises(ValueError, match="depths names 4 stages but widths has 2 values"):
    jax.eval_shape(small(widths=(8, 8)).init, jax.random.key(0), contract.images(1, 32, 32))


def test_initial_values():
  model = small(head_init_scale=0.25)
  params = contract.initialize(model, contract.images(1, 32, 32))["params"]
  for path, value in traverse_util.flatten_dict(jax.device_get(params), sep="/").items():
    leaf = path.rsplit("/", 1)[1]
    if leaf == "kernel":
      std = 0.005 if path.startswith("head/") else 0.02
      assert abs(float(value.std()) / std - 1.0) < 5 / np.sqrt(2 * value.size), path
    else:
      np.testing.assert_array_equal(value, float(leaf in ("scale", "gamma")), err_msg=path)
  assert create_model("convnext_tiny").layer_scale_init == 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_trains(dtype):
  contract.check_trains(small(dtype=dtype))


@pytest.mark.parametrize("layout", keymap_convnext.LAYOUTS)
def test_weights_go_out_and_back(layout):
  contract.check_round_trip(small(), keymap_convnext.LAYOUTS[layout])


def test_the_official_and_timm_names():
  paths = {
    "params/stem/conv/kernel": ("downsample_layers.0.0.weight", "stem.0.weight"),
    "params/stage2_downsample/norm/bias": (
      "downsample_layers.1.0.bias",
      "stages.1.downsample.0.bias",
    ),
    "params/stage3_block1/depthwise_conv/bias": (
      "stages.2.1.dwconv.bias",
      "stages.2.blocks.1.conv_dw.bias",
    ),
    "params/stage1_block0/shrink/kernel": (
      "stages.0.0.pwconv2.weight",
      "stages.0.blocks.0.mlp.fc2.weight",
    ),
    "params/stage1_block0/layer_scale/gamma": ("stages.0.0.gamma", "stages.0.blocks.0.gamma"),
    "params/head_norm/scale": ("norm.weight", "head.norm.weight"),
    "params/head/kernel": ("head.weight", "head.fc.weight"),
  }
  for path, names in paths.items():
    for layout, name in zip(("official", "timm"), names):
      assert keymap_convnext.LAYOUTS[layout].key_map(small())(path).name == name
  with pytest.raises(ValueError, match="ConvNeXt has no variable"):
    keymap_convnext.LAYOUTS["timm"].key_map(small())("params/stage1_block0/attention/kernel")


@pytest.mark.parametrize("name", golden.names("convnext"))
def test_golden(name):
  description, expected = golden.load("convnext", name)
  a = description["arguments"]
  model = convnext.ConvNeXt(
    depths=tuple(a["depths"]),
    widths=tuple(a["hidden_sizes"]),
    num_classes=a["num_labels"],
    layer_scale_init=a.get("layer_scale_init_value", 1e-6) or None,
  )
  x = golden.image(description)
  template = jax.eval_shape(model.init, jax.random.key(0), x)
  key_map = keymap_convnext.LAYOUTS["transformers"].key_map(model)
  variables, report = convert.import_weights(golden.weights(description), template, key_map)
  assert not report.initialised and not report.unused
  logits, endpoints = jax.jit(functools.partial(model.apply, train=False))(variables, x)
  blocks = {k: v for k, v in endpoints.items() if k == "stem" or "block" in k}
  golden.assert_matches(expected, {**blocks, "logits": logits})
