"""Mask2Former against transformers' answers, its published sizes, and what holds for any sizes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.heads.mask2former import Mask2Former, blocked_cells
from hybrid_vit.heads.sine_positions import sine_positions
from hybrid_vit.models.swin import Swin
from hybrid_vit.tools.summarize import count_parameters
from hybrid_vit.weights import keymap_swin
from hybrid_vit.weights.convert import export_weights, import_weights
from hybrid_vit.weights.keymap_mask2former import head_key_map, mask2former_layouts
from tests import golden
from tests.heads.mask2former_golden import run_golden, shapes_of
from tests.heads.pyramids import initialised, levels, noise
from tests.models import contract

_SMALL = {
  "channels": 32,
  "mask_channels": 16,
  "num_queries": 5,
  "num_heads": 4,
  "encoder_layers": 1,
  "encoder_hidden": 24,
  "decoder_layers": 4,
  "decoder_hidden": 24,
}


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision("float32"):
    yield


@pytest.mark.parametrize("name", golden.names("dense/mask2former"))
def test_as_transformers(name):
  _, expected = golden.load("dense/mask2former", name)
  backbone, key_map, weights, variables, (endpoints, pixels, answer) = run_golden(name)
  found = {f"feature{i}": endpoints[f.name] for i, f in enumerate(backbone.features)}
  found |= {f"pixel_level{i}": x for i, x in enumerate(pixels.levels)}
  found["mask_features"] = pixels.mask_features
  for i, prediction in enumerate([*answer["auxiliary"], answer]):
    prefix = f"aux{i}_" if i < len(answer["auxiliary"]) else ""
    found[f"{prefix}class_logits"] = prediction["class_logits"]
    found[f"{prefix}mask_logits"] = prediction["mask_logits"].transpose(0, 2, 3, 1)
  inputs = r"gt_|uniform_|loss"
  golden.assert_matches({k: v for k, v in expected.items() if not re.match(inputs, k)}, found)
  round_trip = export_weights(variables, key_map)
  assert set(round_trip) == set(weights)
  for key, value in round_trip.items():
    np.testing.assert_array_equal(value, weights[key])


@pytest.mark.parametrize(
  ("widths", "classes", "queries", "expected"),
  [
    ((96, 192, 384, 768), 133, 100, 19_914_566),
    ((96, 192, 384, 768), 150, 100, 19_918_935),
  ],
)
def test_counts_as_published(widths, classes, queries, expected):
  head = Mask2Former(levels(widths), classes, num_queries=queries)
  assert count_parameters(_template(head)["params"]) == expected


def test_count_of_a_whole_model():
  backbone = Swin(num_classes=0, output_norms=(1, 2, 3, 4))
  head = Mask2Former(backbone.features, 133)
  found = shapes_of(backbone, head, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
  # transformers keeps the classifier's norm, which nothing reads.
  assert count_parameters(found) + 2 * 768 == 47_436_800


def _template(head, size=64):
  maps = {
    f.name: jax.ShapeDtypeStruct((1, size // f.stride, size // f.stride, f.channels), jnp.float32)
    for f in head.features
  }
  return jax.eval_shape(lambda x: head.init(jax.random.key(0), x), maps)


def test_the_official_names():
  head = Mask2Former(levels((4, 6, 8, 10)), 3, **_SMALL)
  variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), _template(head))
  official = export_weights(variables, head_key_map("official"))
  back, _ = import_weights(official, _template(head), head_key_map("official"))
  assert jax.tree.structure(back) == jax.tree.structure(variables)
  pixels, predictor = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
  shapes = {
    # The coarsest map comes first.
    pixels + "input_proj.0.0.weight": (32, 10, 1, 1),
    pixels + "input_proj.2.1.bias": (32,),
    pixels + "transformer.level_embed": (3, 32),
    pixels + "transformer.encoder.layers.0.self_attn.sampling_offsets.weight": (96, 32),
    pixels + "transformer.encoder.layers.0.linear1.weight": (24, 32),
    pixels + "transformer.encoder.layers.0.norm2.weight": (32,),
    pixels + "adapter_1.weight": (32, 4, 1, 1),
    pixels + "adapter_1.norm.weight": (32,),
    pixels + "layer_1.weight": (32, 32, 3, 3),
    pixels + "mask_features.weight": (16, 32, 1, 1),
    predictor + "query_feat.weight": (5, 32),
    predictor + "query_embed.weight": (5, 32),
    predictor + "level_embed.weight": (3, 32),
    predictor + "transformer_cross_attention_layers.3.multihead_attn.in_proj_weight": (96, 32),
    predictor + "transformer_cross_attention_layers.3.multihead_attn.out_proj.bias": (32,),
    predictor + "transformer_self_attention_layers.0.self_attn.in_proj_bias": (96,),
    predictor + "transformer_self_attention_layers.0.norm.weight": (32,),
    predictor + "transformer_ffn_layers.1.linear2.weight": (32, 24),
    predictor + "decoder_norm.bias": (32,),
    predictor + "class_embed.weight": (4, 32),
    predictor + "mask_embed.layers.2.weight": (16, 32),
  }
  for name, shape in shapes.items():
    assert official[name].shape == shape, name
  with pytest.raises(ValueError, match="Mask2Former has no variable"):
    head_key_map("official")("params/decoder0/attention/kernel")
  with pytest.raises(ValueError, match="Mask2Former has no variable"):
    head_key_map("transformers")("params/position")
  layouts = mask2former_layouts(Swin(), keymap_swin.LAYOUTS)
  old = layouts["official"].rename("sem_seg_head.predictor.static_query.weight")
  assert old == "sem_seg_head.predictor.query_feat.weight"
  key = layouts["official"].key_map(None)("params/backbone/stage1_block0/norm1/scale")
  assert key.name == "backbone.layers.0.blocks.0.norm1.weight"
  renamed = layouts["transformers"].rename(
    "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self.query.weight"
  )
  attention = layouts["transformers"].key_map(None)(
    "params/backbone/stage1_block0/attention/qkv/kernel"
  )
  assert attention.names[0] == renamed


def test_odd_maps_gradients_and_recomputation():
  features = levels((4, 6, 8, 10))
  maps = noise(features, (57, 75))
  plain, saving = (
    Mask2Former(features, 3, remat=remat, **{**_SMALL, "decoder_layers": 3})
    for remat in (False, True)
  )
  # At first no place depends on a query: the first kernels are 0.
  params = jax.tree.map(
    lambda x: x + np.random.default_rng(0).normal(0, 0.1, x.shape).astype(np.float32),
    contract.initialize(plain, maps)["params"],
  )

  def loss(params, maps):
    answer = saving.apply({"params": params}, maps, True)
    parts = [answer, *answer["auxiliary"]]
    total = sum(jnp.sum(jnp.sin(x[k])) for x in parts for k in ("class_logits", "mask_logits"))
    return total, answer

  gradient, answer = jax.jit(jax.grad(loss, has_aux=True))(params, maps)
  assert answer["class_logits"].shape == (2, 5, 4)
  assert answer["mask_logits"].shape == (2, 5, 15, 19)
  assert len(answer["auxiliary"]) == 3
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all(), path
    assert np.abs(leaf).max() > 0, path
  expected = jax.jit(plain.apply)({"params": params}, maps)
  for one, other in zip(jax.tree.leaves(answer), jax.tree.leaves(expected)):
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_half_precision():
  features = levels((4, 6, 8, 10))
  maps = noise(features, (64, 64))
  head = Mask2Former(features, 3, dtype=jnp.bfloat16, **_SMALL)
  answer, _ = initialised(head, maps)
  for part in (answer, *answer["auxiliary"]):
    for key in ("class_logits", "mask_logits"):
      assert part[key].dtype == jnp.float32 and np.isfinite(part[key]).all()


def test_a_query_sees_its_mask_or_everything():
  logits = np.full((1, 3, 4, 4), -1.0, np.float32)
  logits[0, 0, :2] = 1.0
  logits[0, 1] = 0.0  # a sigmoid of 0.5 is inside
  blocked = np.asarray(blocked_cells(logits, (2, 2)))
  np.testing.assert_array_equal(blocked[0, 0], [False, False, True, True])
  assert not blocked[0, 1].any() and not blocked[0, 2].any()


def test_sine_positions():
  table = sine_positions((2, 3), 8, temperature=10000.0, offset=0.0)
  y, x = 2 / (2 + 1e-6) * 2 * np.pi, 1 / (3 + 1e-6) * 2 * np.pi
  expected = [np.sin(y), np.cos(y), np.sin(y / 100), np.cos(y / 100),
              np.sin(x), np.cos(x), np.sin(x / 100), np.cos(x / 100)]  # fmt: skip
  np.testing.assert_allclose(table[1, 0], expected, atol=1e-6)
  shifted = sine_positions((2, 3), 8, temperature=20.0, offset=-0.5)
  np.testing.assert_allclose(shifted[0, 0, 0], np.sin(np.pi / 2), atol=1e-6)
  with pytest.raises(ValueError, match="6 channels; a multiple of 4"):
    sine_positions((2, 3), 6, temperature=20.0, offset=0.0)


def test_too_few_maps_are_told():
  with pytest.raises(ValueError, match="mask2former takes 2 or more maps"):
    _template(Mask2Former(levels((4,)), 3, **_SMALL))
