"""ResNet: exact counts, the structure's promises, and equality with a public implementation."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from hybrid_vit.models import resnet
from hybrid_vit.models.registry import create_model, list_models, model_entry
from hybrid_vit.weights import convert, keymap_resnet
from tests import golden
from tests.models import contract


def small(**overrides):
  settings = {"stem_width": 8, "widths": (16, 24, 32, 40), "depths": (1, 2, 1, 1)}
  return create_model("resnet50", 10, **{**settings, **overrides})


def test_entries():
  assert list_models("resnet*") == ["resnet50", "resnet101"]
  for name in list_models("resnet*"):
    contract.check_entry(name)


@pytest.mark.parametrize("name", list_models("resnet*"))
def test_multiply_adds(name):
  found = contract.multiply_adds(name)
  assert found == pytest.approx(model_entry(name).published.multiply_adds, rel=0.005), found / 1e9


def test_the_structure():
  contract.check_gradients(small(), (48, 64))
  contract.check_bfloat16(small, (64, 64), tolerance=0.2)
  contract.check_remat(small)
  contract.check_drop_path(small)
  contract.check_sizes(small(), [(71, 93), (33, 17)])


def test_initial_values():
  variables = jax.device_get(contract.initialize(small(), contract.images(1, 32, 32)))
  for path, value in traverse_util.flatten_dict(variables["params"], sep="/").items():
    leaf = path.rsplit("/", 1)[1]
    if path.startswith("head/"):
      assert 0.5 * 40**-0.5 < float(np.abs(value).max()) <= 40**-0.5
    elif leaf == "kernel":
      # Kernels keep the gradient's scale: variance 2 / (cells of the kernel * outputs).
      std = np.sqrt(2.0 / (value.size / value.shape[-2]))
      assert abs(float(value.std()) / std - 1.0) < 5 / np.sqrt(2 * value.size), path
    else:
      np.testing.assert_array_equal(value, float(leaf == "scale"), err_msg=path)


def test_running_statistics_follow_torch():
  model, x = small(), contract.images(2, 32, 32)
  variables = contract.drawn_variables(model)
  _, new = contract.run(model, variables, x, True, jax.random.key(0))
  kernel = variables["params"]["stem"]["conv"]["kernel"]
  out = jax.lax.conv_general_dilated(
    x, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  old, found = (v["batch_stats"]["stem"]["norm"] for v in (variables, new))
  count = out.size // out.shape[-1]
  mean = 0.9 * old["mean"] + 0.1 * out.mean((0, 1, 2))
  var = 0.9 * old["var"] + 0.1 * out.var((0, 1, 2)) * count / (count - 1)
  np.testing.assert_allclose(found["mean"], mean, atol=1e-5)
  np.testing.assert_allclose(found["var"], var, rtol=1e-4)


def test_errors_say_what_is_wrong():
  x = contract.images(1, 32, 32)
  with pytest.raises(ValueError, match="depths names 4 stages but widths has 1 values"):
    jax.eval_shape(small(widths=(8,)).init, jax.random.key(0), x)
  with pytest.raises(ValueError, match="widths must be multiples of 4"):
    jax.eval_shape(small(widths=(8, 8, 8, 10)).init, jax.random.key(0), x)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_trains(dtype):
  contract.check_trains(small(dtype=dtype))


@pytest.mark.parametrize("layout", keymap_resnet.LAYOUTS)
def test_weights_go_out_and_back(layout):
  contract.check_round_trip(small(), keymap_resnet.LAYOUTS[layout])


def test_the_official_names():
  key_map = keymap_resnet.LAYOUTS["official"].key_map(small())
  for path, name in {
    "params/stem/conv/kernel": "conv1.weight",
    "batch_stats/stem/norm/var": "bn1.running_var",
    "params/stage2_block0/shortcut_conv/kernel": "layer2.0.downsample.0.weight",
    "params/stage2_block0/shortcut_norm/scale": "layer2.0.downsample.1.weight",
    "params/stage3_block5/conv2/kernel": "layer3.5.conv2.weight",
    "batch_stats/stage3_block5/norm3/mean": "layer3.5.bn3.running_mean",
    "params/head/bias": "fc.bias",
  }.items():
    assert key_map(path).name == name
  with pytest.raises(ValueError, match="ResNet has no variable"):
    key_map("params/neck/conv/kernel")


@pytest.mark.parametrize("name", golden.names("resnet"))
def test_golden(name):
  description, expected = golden.load("resnet", name)
  a = description["arguments"]
  model = resnet.ResNet(
    depths=tuple(a.get("depths", (3, 4, 6, 3))),
    widths=tuple(a.get("hidden_sizes", (256, 512, 1024, 2048))),
    stem_width=a.get("embedding_size", 64),
    num_classes=a["num_labels"],
  )
  x, layout = golden.image(description), keymap_resnet.LAYOUTS["transformers"]
  template = jax.eval_shape(model.init, jax.random.key(0), x)
  weights = golden.weights(description)
  weights = {k: v for k, v in weights.items() if not re.search(layout.not_weights, k)}
  variables, report = convert.import_weights(weights, template, layout.key_map(model))
  assert not report.initialised and not report.unused
  logits, endpoints = jax.jit(functools.partial(model.apply, train=False))(variables, x)
  blocks = {k: v for k, v in endpoints.items() if k == "stem" or "block" in k}
  golden.assert_matches(expected, {**blocks, "logits": logits})
