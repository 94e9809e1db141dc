"""DPT against transformers' answers, the ViT below it from the registry."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.heads.dense_model import DenseModel, create_dense_model
from hybrid_vit.heads.dpt import DPTDepth, DPTSegmentation
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.models.vit import VisionTransformer
from hybrid_vit.tools.summarize import count_parameters
from hybrid_vit.weights import keymap_vit
from hybrid_vit.weights.convert import export_weights
from hybrid_vit.weights.keymap_heads import dense_layouts
from hybrid_vit.weights.keymap_heads_depth import dpt_depth_layout, dpt_segmentation_layout
from tests import golden
from tests.heads.depth_checks import assert_gradient, captured
from tests.heads.pyramids import levels, noise, with_golden_weights
from tests.models import contract

_SMALL = {"channels": 8, "level_channels": (4, 5, 6, 7)}


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision("float32"):
    yield


def test_as_transformers():
  description, expected = golden.load("dense/dpt", "dpt_depth_64")
  arguments = description["arguments"]
  backbone = VisionTransformer(
    width=arguments["hidden_size"],
    depth=arguments["num_hidden_layers"],
    num_heads=arguments["num_attention_heads"],
    num_classes=0,
    patch_size=arguments["patch_size"],
    position_size=arguments["image_size"] // arguments["patch_size"],
    mlp_ratio=arguments["intermediate_size"] / arguments["hidden_size"],
    layer_norm_epsilon=arguments["layer_norm_eps"],
    output_blocks=tuple(arguments["backbone_out_indices"]),
  )
  head = {
    "name": "dpt_depth",
    "answer": "inverse",
    "channels": arguments["fusion_hidden_size"],
    "level_channels": arguments["neck_hidden_sizes"],
    "factors": arguments["reassemble_factors"],
    "readout": arguments["readout_type"],
    "use_batch_norm": arguments["use_batch_norm_in_fusion_residual"],
  }
  model = create_dense_model(backbone, 1, head=head)
  layout = dense_layouts(model, keymap_vit.LAYOUTS)["transformers"]
  key_map = layout.key_map(model)
  weights, images = golden.weights(description), golden.image(description)
  used = {k: v for k, v in weights.items() if not re.search(layout.not_weights, k)}
  variables = with_golden_weights(model, key_map, used, images)
  (depth, found), noted = jax.jit(lambda v, x: model.apply(v, x, mutable=["intermediates"]))(
    variables, images
  )
  noted = captured({"intermediates": noted["intermediates"]["head"]})
  tokens = [
    jnp.concatenate([found[f"{f.name}_token"][:, None], found[f.name].reshape(2, 64, -1)], axis=1)
    for f in backbone.features
  ]
  for i, x in enumerate(tokens, start=1):
    corner, stats = expected.pop(f"tokens{i}_corner"), expected.pop(f"tokens{i}_stats")
    np.testing.assert_allclose(x[0, :8, :8], corner, atol=1e-5 * stats[1])
  del expected["tokens0_corner"], expected["tokens0_stats"]
  golden.assert_matches(
    expected,
    {**{f"fusion{i}": noted[f"fusion{i}"] for i in range(4)}, "depth": depth[:, ::2, ::2, 0]},
  )
  round_trip = export_weights(variables, key_map)
  constants = layout.constants(model)
  assert set(round_trip) | set(constants) == set(weights)
  for name, value in round_trip.items():
    np.testing.assert_array_equal(value, weights[name], err_msg=name)
  for name, value in constants.items():
    assert value.shape == weights[name].shape, name


def test_the_last_norm_of_a_vit_that_has_one():
  backbone = VisionTransformer(width=6, depth=1, num_heads=1, num_classes=0)
  model = DenseModel(backbone, DPTDepth(_blocks(6)))
  layout = dense_layouts(model, keymap_vit.LAYOUTS)["transformers"]
  key = layout.key_map(model)("params/backbone/head_norm/scale")
  assert key.name == "dpt.layernorm.weight"
  assert not re.search(layout.not_weights, key.name)
  assert key.name not in layout.constants(model)


def test_published_sizes():
  """DPT-Large's, without its ViT, counted by hand."""
  features = levels((1024,) * 4, strides=(16,) * 4)
  head = DPTDepth(features, level_channels=(256, 512, 1024, 1024))
  shapes = jax.eval_shape(
    lambda x: head.init(jax.random.key(0), x), _with_tokens(noise(features, (32, 32)))
  )
  widths = (256, 512, 1024, 1024)
  readouts = 4 * (2048 * 1024 + 1024)
  projections = sum(1024 * w + w for w in widths)
  resizing = 256 * 256 * 16 + 256 + 512 * 512 * 4 + 512 + 1024 * 1024 * 9 + 1024
  convs = sum(w * 256 * 9 for w in widths)
  unit = 2 * (256 * 256 * 9 + 256)
  fusions = 4 * (256 * 256 + 256) + 7 * unit
  depth = 256 * 128 * 9 + 128 + 128 * 32 * 9 + 32 + 32 + 1
  expected = readouts + projections + resizing + convs + fusions + depth
  assert count_parameters(shapes["params"]) == expected


@pytest.mark.parametrize(
  ("readout", "use_batch_norm"), [("project", True), ("add", False), ("ignore", True)]
)
def test_every_readout_takes_odd_maps_and_learns(readout, use_batch_norm):
  features = _blocks(6)
  maps = noise(features, (5 * 16, 3 * 16))
  if readout != "ignore":
    maps = _with_tokens(maps)
  head = DPTDepth(
    features, max_depth=80.0, readout=readout, use_batch_norm=use_batch_norm, **_SMALL
  )
  depth = assert_gradient(head, maps)
  # 5 x 3 cells make 3 x 2 coarsest, each of which becomes 2^5 on a side.
  assert depth.shape == (2, 96, 64, 1)
  assert (depth > 0).all()
  assert (depth < 80).all()


def test_a_pyramid_is_taken_as_it_is():
  features = levels((4, 6, 8, 10))
  maps = noise(features, (64, 96))
  head = DPTDepth(features, **_SMALL)
  assert assert_gradient(head, maps).shape == (2, 64, 96, 1)
  names = jax.eval_shape(lambda: head.init(jax.random.key(0), maps))["params"]["decoder"]
  assert {name for name in names if name.startswith("level")} == {
    f"level{i}_conv" for i in range(4)
  }


def test_answers_of_one_value():
  features = _blocks(6)
  maps = noise(features, (32, 32))
  raw = {}
  for answer in ("inverse", "metric", "bounded"):
    head = DPTDepth(features, answer=answer, scale=0.5, shift=0.25, readout="ignore", **_SMALL)
    variables = head.init(jax.random.key(0), maps)
    variables["params"]["depth"]["bias"] = jnp.ones((1,))
    variables["params"]["depth"]["kernel"] = jnp.zeros_like(variables["params"]["depth"]["kernel"])
    raw[answer] = head.apply(variables, maps)
  np.testing.assert_allclose(raw["inverse"], 1.0)
  np.testing.assert_allclose(raw["metric"], 1 / 0.75, rtol=1e-6)
  np.testing.assert_allclose(raw["bounded"], 10 / (1 + np.exp(-1.0)), rtol=1e-6)


def test_segmentation():
  features = _blocks(6)
  maps = _with_tokens(noise(features, (64, 64)))
  head = DPTSegmentation(features, 5, auxiliary=True, **_SMALL)
  variables = contract.initialize(head, maps)
  logits, second = head.apply(variables, maps, with_auxiliary=True)
  assert logits.shape == (2, 64, 64, 5)
  assert second.shape == (2, 32, 32, 5)
  np.testing.assert_array_equal(logits, head.apply(variables, maps))
  names = set(export_weights(variables, dpt_segmentation_layout(head).key_map(head)))
  assert {"head.head.0.weight", "head.head.1.running_var", "head.head.4.bias"} <= names
  assert {"auxiliary_head.head.0.weight", "auxiliary_head.head.4.weight"} <= names
  assert "neck.fusion_stage.layers.3.residual_layer1.batch_norm2.running_mean" in names
  assert "neck.fusion_stage.layers.3.residual_layer1.convolution1.bias" not in names
  alone = DPTSegmentation(features, 5, **_SMALL)
  of_alone = assert_gradient(alone, maps)
  assert of_alone.shape == (2, 64, 64, 5)
  not_weights = dpt_segmentation_layout(alone).not_weights
  assert re.search(not_weights, "auxiliary_head.head.4.bias")
  constants = dpt_segmentation_layout(alone).constants(alone)
  assert constants["neck.fusion_stage.layers.0.residual_layer1.batch_norm1.running_var"].all()
  with pytest.raises(ValueError, match="need auxiliary=True"):
    alone.init(jax.random.key(0), maps, with_auxiliary=True)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"readout": "projekt"}, "readout is 'projekt'; one of"),
    ({"level_channels": (4, 4)}, "4 maps but level_channels has 2 values"),
    ({"factors": (4, 2, 1, 0.4)}, "factors has 0.4; n or 1 / n"),
    ({"answer": "depth"}, "answer is 'depth'; one of"),
    ({}, "needs the class token 'stage1_token', which the backbone does not give"),
    ({"num_outputs": 2}, "num_outputs is 2"),
  ],
)
def test_bad_arguments_are_told(arguments, message):
  features = levels((6,) * 4, strides=(16,) * 4)
  maps = noise(features, (32, 32))
  if arguments:
    maps = _with_tokens(maps)
  else:
    message = message.replace("stage1", "stage4")
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      lambda: DPTDepth(features, **{**_SMALL, **arguments}).init(jax.random.key(0), maps)
    )


def test_no_such_variable_is_told():
  head = DPTDepth(_blocks(6), **_SMALL)
  with pytest.raises(ValueError, match="DPTDepth has no variable 'decoder/levels/kernel'"):
    dpt_depth_layout(head).key_map(head)("params/decoder/levels/kernel")


def _blocks(width):
  return tuple(FeatureSpec(f"stage1_block{i}", 16, width) for i in range(4))


def _with_tokens(maps):
  return {**maps, **{f"{name}_token": x.mean((1, 2)) for name, x in maps.items()}}
