"""kMaX-DeepLab against its authors' answers, its published sizes, and what holds for any sizes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.heads.kmax import KMaX, gathered
from hybrid_vit.heads.kmax_layers import resize_map
from hybrid_vit.heads.kmax_pixel_decoder import PixelDecoder
from hybrid_vit.models.convnext import ConvNeXt
from hybrid_vit.tools.summarize import count_parameters
from hybrid_vit.weights import keymap_convnext
from hybrid_vit.weights.convert import export_weights, import_weights
from hybrid_vit.weights.keymap_kmax import head_key_map, kmax_layouts
from tests import golden
from tests.heads.kmax_golden import DECODER, HEAD, run_decoder, run_head
from tests.heads.pyramids import initialised, levels, noise
from tests.models import contract

_SMALL = {
  "channels": 32,
  "mask_channels": 8,
  "num_queries": 5,
  "num_heads": 2,
  "pixel_channels": (8, 8, 4, 4),
  "pixel_depths": (1, 1, 1, 1),
  "decoder_layers": (1, 1, 1),
  "decoder_hidden": 24,
}
_WIDTHS = (4, 6, 8, 16)


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision("float32"):
    yield


def _found(answer, size):
  """Answers under the golden files' names; auxiliary ones at the size of the last."""
  found = {}
  for i, prediction in enumerate([*answer["auxiliary"], answer]):
    last = i == len(answer["auxiliary"])
    prefix = "" if last else f"aux{i}_"
    found["class_logits" if last else f"{prefix}class"] = prediction["class_logits"]
    masks = prediction["mask_logits"].transpose(0, 2, 3, 1)
    name = "mask_logits" if last else f"{prefix}mask"
    found[name] = resize_map(masks, size, size[0])
    found[f"{prefix}pixel_feature"] = resize_map(prediction["pixel_features"], size, size[0])
  return found


def test_the_decoder_as_the_authors():
  _, expected = golden.load("dense/kmax", DECODER)
  found = _found(run_decoder(), (17, 17))
  answers = {k: v for k, v in expected.items() if not re.match("gt_|match_|losses", k)}
  # Of the layers' pixel features it has none.
  found = {k: v for k, v in found.items() if not re.fullmatch(r"aux\d_pixel_feature", k)}
  golden.assert_matches(answers, found)


def test_the_head_as_the_authors():
  _, expected = golden.load("dense/kmax", HEAD)
  _, weights, variables, (answer, pixels, semantic) = run_head()
  found = {f"pixel_level{i}": x for i, x in enumerate(pixels)}
  found |= _found(answer, (17, 25))
  found["semantic_logits"] = semantic
  # The largest value of one map was 1.2e-5 away on a processor with AMX, within 1e-5 on others.
  golden.assert_matches(expected, found, tolerance=3e-5)
  assert "semantic_logits" not in answer
  # Every tensor of the authors' head has one place, and the other way round.
  round_trip = export_weights(variables, head_key_map)
  assert set(round_trip) == set(weights)
  for key, value in round_trip.items():
    np.testing.assert_array_equal(value, weights[key])


@pytest.mark.parametrize(
  ("widths", "head", "semantic", "whole"),
  # Counted in the authors' modules; the last are the paper's, with a backbone and without the
  # semantic decoder: ResNet-50, ConvNeXt-T and ConvNeXt-L.
  [
    ((256, 512, 1024, 2048), 48_928_830, 15_856_742, 57),
    ((96, 192, 384, 768), 39_446_910, 6_328_422, 61),
    ((192, 384, 768, 1536), 47_655_102, 12_045_414, 232),
  ],
)
def test_counts_as_published(widths, head, semantic, whole):
  found = _template(KMaX(levels(widths), 133))["params"]
  assert count_parameters(found) == head
  assert count_parameters(found["semantic_decoder"]) == semantic
  backbone = {57: 23_508_032, 61: 27_820_128, 232: 196_230_336}[whole]
  assert round((head - semantic + backbone) / 1e6) == whole


def _template(head, size=64):
  maps = {
    f.name: jax.ShapeDtypeStruct((1, size // f.stride, size // f.stride, f.channels), jnp.float32)
    for f in head.features
  }
  return jax.eval_shape(lambda x: head.init(jax.random.key(0), x), maps)


def test_the_official_names():
  head = KMaX(levels(_WIDTHS), 3, **_SMALL)
  variables = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), _template(head))
  official = export_weights(variables, head_key_map)
  back, report = import_weights(official, _template(head), head_key_map)
  assert jax.tree.structure(back) == jax.tree.structure(variables) and not report.unused
  pixels, predictor = "sem_seg_head.pixel_decoder.", "sem_seg_head.predictor."
  axis = pixels + "_stages.0._blocks.0._attention._height_axis."
  layer = predictor + "_kmax_transformer_layers.2."
  semantic = predictor + "_auxiliary_semantic_predictor."
  shapes = {
    # The coarsest map comes first.
    pixels + "_in_norms.0.weight": (16,),
    pixels + "_stages.0._blocks.0._shortcut.conv.weight": (32, 16, 1, 1),
    axis + "qkv_transform.conv.weight": (32, 16, 1),
    axis + "_value_rpe._embeddings.weight": (509, 8),
    axis + "_batch_norm_similarity.running_var": (6,),
    pixels + "_stages.3._blocks.0._conv2_bn_act.conv.weight": (4, 4, 3, 3),
    pixels + "_resized_fuses.0._conv_bn_low.conv.weight": (8, 32, 1, 1),
    predictor + "_cluster_centers.weight": (32, 5),
    layer + "_query_qkv_conv_bn.conv.weight": (64, 32, 1),
    layer + "_query_self_attention._batch_norm_similarity.weight": (2,),
    layer + "_kmeans_query_conv3_bn.norm.running_mean": (32,),
    layer + "_query_ffn_conv2_bn.conv.weight": (32, 24, 1),
    layer + "_predcitor._pixel_space_head_conv0bnact.conv.weight": (32, 1, 5, 5),
    predictor + "_predcitor._transformer_class_head.conv.weight": (4, 32, 1),
    predictor + "_predcitor._pixel_space_mask_batch_norm.bias": (1,),
    semantic + "_aspp._aspp_conv3.conv.weight": (256, 16, 3, 3),
    semantic + "_low_level_projection_os8.conv.weight": (64, 6, 1, 1),
    semantic + "final_conv.conv.weight": (4, 256, 1, 1),
  }
  for name, shape in shapes.items():
    assert official[name].shape == shape, name
  for path in ("params/decoder/queries", "params/pixel_decoder/stage0_block0/height/query_table"):
    with pytest.raises(ValueError, match="kMaX has no variable"):
      head_key_map(path)
  layout = kmax_layouts(ConvNeXt(depths=(1,), widths=(4,)), keymap_convnext.LAYOUTS)["official"]
  key_map = layout.key_map(None)
  key = key_map("params/backbone/stage1_block0/depthwise_conv/kernel")
  assert key.name == "backbone.stages.0.0.dwconv.weight"
  assert key_map("params/head/decoder/cluster_centers").name == (
    predictor + "_cluster_centers.weight"
  )
  assert re.search(layout.not_weights, pixels + "_in_norms.0.norm.num_batches_tracked")
  with pytest.raises(ValueError, match="kMaX has no variable"):
    key_map("params/neck/kernel")


@pytest.fixture(scope="module")
def trained():
  """(variables, gradient, new statistics, answer, answer of the head that stores all)."""
  features = levels(_WIDTHS)
  # Of four pictures one keeps each branch.
  maps = noise(features, (57, 75), batch=4)
  plain, saving = (
    KMaX(features, 3, remat=remat, drop_path_rate=0.2, **_SMALL) for remat in (False, True)
  )
  variables = contract.initialize(plain, maps)
  # At first no branch adds anything: their last scales are 0.
  variables = {
    **variables,
    "params": jax.tree.map(
      lambda x: x + np.random.default_rng(0).normal(0, 0.1, x.shape).astype(np.float32),
      variables["params"],
    ),
  }

  def run(params, head):
    return head.apply(
      {**variables, "params": params},
      maps,
      True,
      rngs={"dropout": jax.random.key(1)},
      mutable=["batch_stats"],
    )

  def loss(params):
    answer, updated = run(params, saving)
    parts = [answer, *answer["auxiliary"]]
    total = sum(jnp.sum(jnp.sin(x[k])) for x in parts for k in ("class_logits", "mask_logits"))
    return total + jnp.sum(jnp.sin(answer["semantic_logits"])), (answer, updated["batch_stats"])

  with jax.default_matmul_precision("float32"):
    gradient, (answer, stats) = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    other, _ = jax.jit(lambda params: run(params, plain))(variables["params"])
  return variables, gradient, stats, answer, other


def test_odd_maps_and_recomputation(trained):
  _, _, _, answer, other = trained
  assert answer["class_logits"].shape == (4, 5, 4)
  assert answer["mask_logits"].shape == (4, 5, 15, 19)
  assert answer["pixel_features"].shape == (4, 15, 19, 8)
  assert answer["semantic_logits"].shape == (4, 15, 19, 4)
  sizes = [x["mask_logits"].shape[2:] for x in answer["auxiliary"]]
  assert sizes == [(2, 3), (4, 5), (8, 10)]
  lengths = np.linalg.norm(answer["pixel_features"], axis=-1)
  np.testing.assert_allclose(lengths, 1.0, rtol=1e-5)
  for one, same in zip(jax.tree.leaves(answer), jax.tree.leaves(other)):
    np.testing.assert_allclose(one, same, atol=1e-4)


def test_gradients_and_statistics(trained):
  variables, gradient, stats, _, _ = trained
  # A constant that batch norm takes away, and one that a softmax does.
  nothing = re.compile(r"pixel_feature/conv/bias|similarity_norm/bias")
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    name = "/".join(str(key.key) for key in path)
    assert np.isfinite(leaf).all(), name
    assert np.abs(leaf).max() > 0 or nothing.search(name), name
  before = jax.tree_util.tree_leaves_with_path(variables["batch_stats"])
  for (path, old), new in zip(before, jax.tree.leaves(stats)):
    assert np.isfinite(new).all() and (np.asarray(old) != new).any(), path


def test_half_precision():
  features = levels(_WIDTHS)
  maps = noise(features, (64, 64))
  head = KMaX(features, 3, dtype=jnp.bfloat16, **_SMALL)
  answer, variables = initialised(head, maps)
  for part in (answer, *answer["auxiliary"]):
    for key in ("class_logits", "mask_logits", "pixel_features"):
      assert part[key].dtype == jnp.float32 and np.isfinite(part[key]).all()
  training = functools.partial(head.apply, train=True, mutable="batch_stats")
  rngs = {"dropout": jax.random.key(0)}
  answered, _ = jax.eval_shape(lambda: training(variables, maps, rngs=rngs))
  assert answered["semantic_logits"].dtype == jnp.float32
  # At first nearly every query says "no object".
  assert jax.nn.softmax(answer["class_logits"])[..., -1].min() > 0.6


def test_pixels_are_gathered_by_their_nearest_centre():
  logits = np.zeros((1, 3, 2, 2), np.float32)
  logits[0, 1, 0] = 1.0
  logits[0, 2, 1, 1] = 5.0
  values = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)
  # Of equal logits the first counts.
  expected = [[4, 5], [0 + 2, 1 + 3], [6, 7]]
  np.testing.assert_array_equal(gathered(logits, values)[0], expected)
  gradient = jax.grad(lambda x: gathered(x, jnp.asarray(values)).sum())(jnp.asarray(logits))
  assert not gradient.any()


def test_wrong_settings_are_told():
  def shapes(**arguments):
    return _template(KMaX(levels(_WIDTHS), 3, **{**_SMALL, **arguments}))

  with pytest.raises(ValueError, match="kmax takes 4 maps; the backbone gives 3"):
    _template(KMaX(levels(_WIDTHS[:3]), 3, **_SMALL))
  with pytest.raises(ValueError, match="kmax: depths has 2 values"):
    shapes(pixel_depths=(1, 1))
  with pytest.raises(ValueError, match="a block of type 'linear'; axial or bottleneck"):
    shapes(pixel_blocks=("axial", "linear", "bottleneck", "bottleneck"))
  with pytest.raises(ValueError, match=r"decoder_layers is .1, 1. for 4 maps"):
    shapes(decoder_layers=(1, 1))
  with pytest.raises(ValueError, match="3 heads do not divide 8 channels"):
    shapes(num_heads=3)
  wide = PixelDecoder(levels((4,), (4,)), (8,), (1,), ("axial",), 2)
  with pytest.raises(ValueError, match="axial attention over 256 cells"):
    jax.eval_shape(lambda x: wide.init(jax.random.key(0), {"stage1": x}), jnp.zeros((1, 4, 256, 4)))
