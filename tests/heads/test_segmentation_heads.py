"""Heads and necks of segmentation against their authors' answers, and what holds for each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.heads.deeplab import DeepLabV3Plus
from hybrid_vit.heads.feature_pyramid import Feature2Pyramid, SimplePyramid
from hybrid_vit.heads.fpn import FPN
from hybrid_vit.heads.registry import create_head, create_neck
from hybrid_vit.heads.semantic_fpn import SemanticFPN
from hybrid_vit.heads.upernet import UPerNet
from hybrid_vit.tools.summarize import count_parameters
from hybrid_vit.weights.convert import export_weights
from hybrid_vit.weights.keymap_heads import part_key_map
from tests import golden
from tests.heads.pyramids import golden_inputs, levels, noise, with_golden_weights

_LIGHT = {"upernet": {"channels": 8}, "segformer": {"channels": 8}, "fcn": {"channels": 8},
          "semantic_fpn": {"channels": 8},
          "deeplabv3plus": {"aspp_channels": 8, "decoder_channels": 8, "low_level_channels": 4,
                            "atrous_rates": (1, 2, 3)}}  # fmt: skip


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision("float32"):
    yield


def test_fpn_as_torchvision():
  description, expected = golden.load("dense/fpn", "fpn_maxpool_odd")
  features = levels((8, 12, 16, 20))
  maps = dict(zip([f.name for f in features], golden_inputs(description["input"]["features"])))
  neck = FPN(features, channels=16, extra="max_pool", num_extra=1)
  weights = golden.weights(description)
  variables = with_golden_weights(neck, part_key_map(neck, "torchvision"), weights, maps)
  found = neck.apply(variables, maps)
  names = ("c2", "c3", "c4", "c5", "pool")
  assert [level.stride for level in neck.outputs] == [4, 8, 16, 32, 64]
  golden.assert_matches(
    expected, {f"out_{name}": found[level.name] for name, level in zip(names, neck.outputs)}
  )


def test_semantic_fpn_as_mmseg():
  description, expected = golden.load("dense/semantic_fpn_mmseg", "semantic_fpn_64x96")
  arguments = description["arguments"]
  features = levels(arguments["in_channels"])
  maps = dict(zip([f.name for f in features], golden_inputs(description["input"]["features"])))
  neck = FPN(features, channels=arguments["neck_channels"])
  head = SemanticFPN(neck.outputs, arguments["num_classes"], channels=arguments["head_channels"])
  weights = golden.weights(description)
  of = lambda prefix: {k: v for k, v in weights.items() if k.startswith(prefix)}  # noqa: E731
  key_map = part_key_map(neck, "mmseg", "neck.")
  found = neck.apply(with_golden_weights(neck, key_map, of("neck."), maps), maps)
  key_map = part_key_map(head, "mmseg", "decode_head.")
  variables = with_golden_weights(head, key_map, of("decode_head."), found)
  logits = head.apply(variables, found)
  del expected["loss"]
  golden.assert_matches(expected, {**found, "logits_stride4": logits})
  round_trip = export_weights(variables, key_map)
  assert set(round_trip) == {k for k in of("decode_head.") if "tracked" not in k}
  for name, value in round_trip.items():
    np.testing.assert_array_equal(value, weights[name])


def test_feature2pyramid_as_mmseg():
  description, expected = golden.load("dense/feature2pyramid_mmseg", "feature2pyramid_6x8")
  features = levels((12,) * 4, strides=(16,) * 4)
  maps = dict(zip([f.name for f in features], golden_inputs(description["input"]["features"])))
  neck = Feature2Pyramid(features)
  key_map = part_key_map(neck, "mmseg")
  variables = with_golden_weights(neck, key_map, golden.weights(description), maps)
  golden.assert_matches(expected, neck.apply(variables, maps))
  assert [level.stride for level in neck.outputs] == [4, 8, 16, 32]


def test_deeplab_as_deeplab2():
  description, expected = golden.load("dense/deeplabv3plus", "deeplabv3plus_17x17")
  given = description["input"]
  features = levels((8, 16), strides=(4, 16))
  inputs = golden_inputs([given["res2"], given["res5"]])
  maps = dict(zip([f.name for f in features], inputs))
  head = DeepLabV3Plus(features, 7, aspp_channels=12, decoder_channels=12, low_level_channels=6,
                       atrous_rates=(1, 2, 3))  # fmt: skip
  key_map = part_key_map(head, "deeplab2")
  variables = with_golden_weights(head, key_map, golden.weights(description), maps)
  logits, captured = head.apply(
    variables, maps, capture_intermediates=lambda module, _: module.name == "aspp_dropout"
  )
  aspp = captured["intermediates"]["aspp_dropout"]["__call__"][0]
  golden.assert_matches(expected, {"aspp": aspp, "logits": logits[:, ::2, ::2]})
  assert set(export_weights(variables, key_map)) == set(description["parameters"])


@pytest.mark.parametrize(
  ("widths", "main", "auxiliary"),
  [
    ((96, 192, 384, 768), 31_497_366, 923_798),
    ((64, 128, 256, 512), 29_678_742, 628_886),
    ((128, 256, 512, 1024), 33_315_990, 1_218_710),
  ],
)
def test_upernet_counts_as_published(widths, main, auxiliary):
  features = levels(widths)
  maps = {f.name: jax.ShapeDtypeStruct((1, 8, 8, f.channels), jnp.float32) for f in features}
  for head, expected in (
    (UPerNet(features, 150), main),
    (create_head("fcn", features, 150), auxiliary),
  ):
    shapes = jax.eval_shape(lambda x, head=head: head.init(jax.random.key(0), x), maps)
    assert count_parameters(shapes["params"]) == expected


@pytest.mark.parametrize(
  ("widths", "expected"),
  [((96, 192, 384, 768), 2_729_984), ((64, 128, 256, 512), 2_607_104),
   ((128, 256, 512, 1024), 2_852_864)],
)  # fmt: skip
def test_fpn_counts(widths, expected):
  neck = FPN(levels(widths))
  maps = {f.name: jax.ShapeDtypeStruct((1, 8, 8, f.channels), jnp.float32) for f in neck.features}
  shapes = jax.eval_shape(lambda x: neck.init(jax.random.key(0), x), maps)
  assert count_parameters(shapes["params"]) == expected


@pytest.mark.parametrize("name", sorted(_LIGHT))
def test_every_head_takes_odd_maps_and_has_a_gradient(name):
  features = levels((4, 6, 8, 10))
  maps = noise(features, (57, 75))
  neck = create_neck("fpn", features, channels=8)
  if name == "semantic_fpn":
    maps = neck.apply(neck.init(jax.random.key(1), maps), maps)
    features = neck.outputs
  head = create_head(name, features, 3, **_LIGHT[name])

  @jax.jit
  def run(key):
    variables = head.init(key, maps)

    def loss(params):
      logits, stats = head.apply(
        {**variables, "params": params}, maps, True, rngs={"dropout": key}, mutable=["batch_stats"]
      )
      return jnp.sum(jnp.square(logits)), (logits, stats)

    return jax.grad(loss, has_aux=True)(variables["params"])

  gradient, (logits, stats) = run(jax.random.key(0))
  expected = maps[features[-2].name if name == "fcn" else features[0].name].shape[:3]
  assert logits.shape == (*expected, 3)
  assert logits.dtype == jnp.float32
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all(), path
    assert np.abs(leaf).max() > 0 or "bias" in str(path), path
  assert stats["batch_stats"]


def test_simple_pyramid_shapes():
  features = levels((16,), strides=(16,))
  neck = SimplePyramid(features, channels=8, extra=True)
  maps = noise(features, (160, 96))
  found = jax.eval_shape(lambda x: neck.init_with_output(jax.random.key(0), x)[0], maps)
  assert {name: value.shape[1:] for name, value in found.items()} == {
    "p2": (40, 24, 8), "p3": (20, 12, 8), "p4": (10, 6, 8), "p5": (5, 3, 8), "p6": (3, 2, 8),
  }  # fmt: skip


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda f: create_head("upernett", f, 3), "did you mean 'upernet'"),
    (lambda f: create_head("upernet", f, 3, chanels=8), "did you mean 'channels'"),
    (lambda f: create_neck("fpm", f), "did you mean 'fpn'"),
  ],
)
def test_unknown_names_are_told(make, message):
  with pytest.raises(ValueError, match=message):
    make(levels((4, 6, 8, 10)))


def test_wrong_levels_are_told():
  maps = noise(levels((4,)), (32, 32))
  with pytest.raises(ValueError, match="takes 2 or more maps; the backbone gives 1: stage1"):
    create_head("upernet", levels((4,)), 3).init(jax.random.key(0), maps)
  features = levels((4, 6), strides=(16, 32))
  with pytest.raises(ValueError, match="maps of one size; stage1 has stride 16 and 4 channels"):
    create_neck("feature2pyramid", features).init(jax.random.key(0), noise(features, (64, 64)))
