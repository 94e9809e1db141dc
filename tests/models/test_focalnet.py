import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from hybrid_vit.models import focalnet
from hybrid_vit.models.registry import create_model, list_models, model_entry
from hybrid_vit.weights import keymap_focalnet
from tests.models import contract

SMALL = {
  "embed_dim": 8,
  "depths": (1, 2),
  "focal_levels": (2, 1),
  "focal_windows": (3, 3),
}
# Everything that the plain one has not.
OPTIONS = {
  "conv_embed": True,
  "layer_scale": 0.5,
  "post_norm": True,
  "modulation_norm": True,
  "normalize_modulator": True,
}
DENSE = {"num_classes": 0, "pad_maps": True, "stem_padding": 3, "output_norms": (1, 2)}


def small(**overrides):
  return create_model("focalnet_tiny_srf", **{"num_classes": 10, **SMALL, **overrides})


def with_options(**overrides):
  return small(**{**OPTIONS, **overrides})


SIZES = ("tiny", "small", "base")
NAMES = [f"{size}_{kind}" for size in SIZES for kind in ("srf", "lrf", "iso")]
NAMES += [f"{size}_srf_{kind}" for size in SIZES for kind in ("overlap", "deep")]
NAMES += [f"{size}_{levels}" for size in ("large", "xlarge", "huge") for levels in ("fl3", "fl4")]


def test_the_table_of_variants_is_complete():
  assert sorted(list_models("focalnet*")) == sorted(f"focalnet_{name}" for name in NAMES)


@pytest.mark.parametrize("name", list_models("focalnet*"))
def test_parameters_and_pyramid(name):
  contract.check_entry(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models("focalnet*"))
def test_multiply_adds(name):
  published = model_entry(name).published
  counted = contract.multiply_adds(name)
  if "ablations" not in published.source:
    assert abs(counted - published.multiply_adds) < 6e6, (counted, published.multiply_adds)
    return
  # The paper, which gives one decimal, counts overlapping embeddings as if they did not overlap.
  width = create_model(name).embed_dim
  overlap = 56**2 * width * 3 * (7**2 - 4**2)
  overlap += sum(
    (56 >> i) ** 2 * (width << i) * (width << i - 1) * (3**2 - 2**2) for i in (1, 2, 3)
  )
  assert abs(counted - overlap - published.multiply_adds) < 1e8, (counted, overlap)


def test_initial_values():
  model = with_options(embed_dim=32, layer_scale=1e-4)
  variables = contract.initialize(model, contract.images(1, 32, 32))
  for path, value in traverse_util.flatten_dict(variables["params"], sep="/").items():
    module, leaf = path.rsplit("/", 2)[-2:]
    convolution = module in ("conv", "projection_context") or module.startswith("focal_conv")
    if leaf == "kernel":
      std = np.prod(value.shape[:-1]) ** -0.5 / np.sqrt(3) if convolution else 0.02
      assert abs(float(value.std()) / std - 1.0) < 4 / np.sqrt(2 * value.size), path
    elif leaf == "bias" and convolution:
      assert 0.0 < float(np.abs(value).max()) <= value.shape[0] ** -0.5, path
    else:
      np.testing.assert_allclose(
        value, {"scale": 1.0, "gamma": 1e-4, "bias": 0.0}[leaf], err_msg=path
      )


def test_every_parameter_gets_a_gradient():
  contract.check_gradients(with_options(), (32, 32))


def test_recomputing_blocks_changes_nothing():
  contract.check_remat(small)


def test_bfloat16():
  contract.check_bfloat16(small)


def test_drop_path():
  contract.check_drop_path(small)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_trains(dtype):
  # Large patches: the mean over the map tells little of small ones.
  model = small(embed_dim=32, depths=(1, 1), patch_size=8, dtype=dtype)
  contract.check_trains(model, rate=1e-2)


@pytest.mark.parametrize("layout", list(keymap_focalnet.LAYOUTS))
@pytest.mark.parametrize("make", [small, with_options])
def test_weights_go_out_and_come_back(layout, make):
  contract.check_round_trip(make(), keymap_focalnet.LAYOUTS[layout])


def test_names_in_the_other_libraries():
  def name(layout, path, model=None):
    return keymap_focalnet.LAYOUTS[layout].key_map(model or with_options())(path).name

  block = "params/stage2_block1/"
  expected = {
    ("timm", "params/stem/conv/kernel"): "stem.proj.weight",
    ("timm", "params/stage2_embedding/norm/scale"): "layers.1.downsample.norm.weight",
    ("timm", block + "norm1/bias"): "layers.1.blocks.1.norm1_post.bias",
    ("timm", block + "layer_scale2/gamma"): "layers.1.blocks.1.ls2.gamma",
    ("timm", block + "modulation/norm/scale"): "layers.1.blocks.1.modulation.norm.weight",
    ("timm", "params/head/bias"): "head.fc.bias",
    ("transformers", "params/stem/norm/bias"): "focalnet.embeddings.norm.bias",
    ("transformers", "params/stage2_embedding/conv/bias"): (
      "focalnet.encoder.stages.0.downsample.projection.bias"
    ),
    ("transformers", block + "modulation/projection_out/bias"): (
      "focalnet.encoder.stages.1.layers.1.modulation.projection_out.bias"
    ),
    ("transformers", "params/head_norm/scale"): "focalnet.layernorm.weight",
    ("transformers", "params/head/kernel"): "classifier.weight",
  }
  for (layout, path), wanted in expected.items():
    assert name(layout, path) == wanted
  assert name("timm", block + "norm1/bias", small()) == "layers.1.blocks.1.norm1.bias"
  rename = keymap_focalnet.LAYOUTS["official"].rename
  assert rename("module.backbone.norm0.weight") == "norm0.weight"
  with pytest.raises(ValueError, match="FocalNet has no variable"):
    name("official", block + "attention/kernel")


def test_odd_sizes_lose_what_does_not_fill_a_patch():
  plain, overlapping = (
    jax.eval_shape(model.init_with_output, jax.random.key(0), contract.images(1, 70, 90))[0][1]
    for model in (create_model("focalnet_tiny_srf"), create_model("focalnet_tiny_srf_overlap"))
  )
  sizes = [(17, 22), (8, 11), (4, 5), (2, 2)]
  assert [plain[f"stage{i}"].shape[1:3] for i in (1, 2, 3, 4)] == sizes
  sizes = [(17, 22), (9, 11), (5, 6), (3, 3)]
  assert [overlapping[f"stage{i}"].shape[1:3] for i in (1, 2, 3, 4)] == sizes


def test_dense_tasks_pad_to_whole_patches():
  model = small(**DENSE)
  contract.check_sizes(small(pad_maps=True), [(37, 50)])
  logits, endpoints = contract.run(
    model, contract.drawn_variables(model), contract.images(1, 37, 50)
  )
  assert logits is None
  assert [f.name for f in model.features] == ["stage1_norm", "stage2_norm"]
  for f in model.features:
    assert endpoints[f.name].shape == (1, -(-37 // f.stride), -(-50 // f.stride), f.channels)
  # Beside the trunk: the next stage reads what is not normalised.
  normed = endpoints["stage1"] - endpoints["stage1"].mean(-1, keepdims=True)
  assert float(jnp.abs(normed.mean(-1)).max()) < 1e-5
  assert float(jnp.abs(endpoints["stage1"] - endpoints["stage1_norm"]).max()) > 0.1


def test_output_norms_choose_the_pyramid():
  model = create_model("focalnet_tiny_lrf", 0, output_norms=(2, 3, 4))
  assert [(f.stride, f.channels) for f in model.features] == [(8, 192), (16, 384), (32, 768)]
  shapes = jax.eval_shape(model.init, jax.random.key(0), contract.images(1, 64, 64))
  assert "stage1_norm" not in shapes["params"] and "stage2_norm" in shapes["params"]


def test_the_padding_of_the_stem_matters():
  x = contract.images(1, 32, 32)
  variables = contract.drawn_variables(with_options())
  two = contract.run(with_options(), variables, x)[1]["stem"]
  three = contract.run(with_options(stem_padding=3), variables, x)[1]["stem"]
  assert two.shape == (1, 8, 8, 8) == three.shape
  assert float(jnp.abs(two - three).max()) > 0.1


def test_without_a_classifier():
  whole = contract.drawn_variables(small())
  model = small(num_classes=0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), contract.images(1, 32, 32))
  assert set(whole["params"]) - set(shapes["params"]) == {"head", "head_norm"}
  params = {k: v for k, v in whole["params"].items() if k in shapes["params"]}
  logits, endpoints = contract.run(model, {"params": params}, contract.images(1, 32, 32))
  assert logits is None
  np.testing.assert_allclose(
    endpoints["pre_logits"], endpoints["stage2"].mean((1, 2)), rtol=1e-4, atol=1e-5
  )


def test_modulation_by_its_definition():
  """Nested levels, one gate for each and for the mean over the map, neither of them activated."""
  x = np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype(np.float32)
  layer = focalnet.FocalModulation((3, 5), False, True, dtype=jnp.float32)
  params = contract.initialize(layer, x)["params"]
  params = jax.tree.map(lambda p: p + jax.random.normal(jax.random.key(1), p.shape), params)
  p = jax.device_get(params)
  y = x @ p["projection_in"]["kernel"] + p["projection_in"]["bias"]
  query, context, gates = y[0, ..., :6], y[0, ..., 6:12], y[0, ..., 12:]
  gathered = np.zeros_like(context)
  for level, size in enumerate((3, 5)):
    kernel, r = p[f"focal_conv_{level}"]["kernel"][:, :, 0], size // 2
    padded = np.pad(context, ((r, r), (r, r), (0, 0)))
    convolved = [
      [(padded[i : i + size, j : j + size] * kernel).sum((0, 1)) for j in range(5)]
      for i in range(4)
    ]
    context = np.asarray(jax.nn.gelu(jnp.asarray(convolved), approximate=False))
    gathered += context * gates[..., level : level + 1]
  everywhere = np.asarray(jax.nn.gelu(jnp.asarray(context.mean((0, 1))), approximate=False))
  gathered = (gathered + everywhere * gates[..., 2:]) / 3
  modulator = gathered @ p["projection_context"]["kernel"] + p["projection_context"]["bias"]
  expected = query * modulator @ p["projection_out"]["kernel"] + p["projection_out"]["bias"]
  out = jax.jit(layer.apply)({"params": params}, x)[0]
  np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
  ("overrides", "size", "message"),
  [
    ({"focal_levels": (2,)}, 32, "depths names 2 stages but focal_levels has 1 values"),
    ({"focal_windows": (3, 4)}, 32, "odd side.*found 4"),
    ({"output_norms": (0,)}, 32, "names stage 0; the stages are 1 to 2"),
    ({}, 7, "stage2_embedding needs a map of at least 2 rows and columns, got 1 x 1"),
  ],
)
def test_errors_say_what_is_wrong(overrides, size, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(small(**overrides).init, jax.random.key(0), contract.images(1, size, size))
