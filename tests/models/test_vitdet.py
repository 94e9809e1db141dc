"""ViTDet's backbone against detectron2's answers, and what classifiers' weights become in it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from hybrid_vit import build
from hybrid_vit.build import DataFacts
from hybrid_vit.config import Config, load_config
from hybrid_vit.heads.feature_pyramid import SimplePyramid
from hybrid_vit.heads.rcnn import VITDET, create_mask_rcnn
from hybrid_vit.heads.rcnn_settings import detectron2_settings
from hybrid_vit.models.dense import vitdet_arguments
from hybrid_vit.models.registry import create_model
from hybrid_vit.models.vit import VisionTransformer
from hybrid_vit.models.vitdet import Reach, relative_bias
from hybrid_vit.table_resizing import resize_tables
from hybrid_vit.tools.summarize import count_parameters
from hybrid_vit.weights import keymap_vit
from hybrid_vit.weights.convert import export_weights, import_weights
from hybrid_vit.weights.keymap_detectors import detector_key_map, detector_layouts
from hybrid_vit.weights.transfer import transfer
from tests import golden
from tests.models import contract
from tests.tasks.test_detection import CONFIG

FORM = {
  "num_classes": 0,
  "class_token": False,
  "pool": "mean",
  "pad_maps": True,
  "window_size": 3,
  "global_blocks": (1,),
  "relative_size": 5,
  "output_blocks": (1,),
}


def small(**overrides):
  settings = {"width": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "position_size": 4}
  return VisionTransformer(**{**settings, **FORM, **overrides})


def classifier(**overrides):
  return small(**{"num_classes": 10, "output_blocks": (), **overrides})


@pytest.mark.parametrize("name", golden.names("dense/vitdet"))
def test_as_detectron2(name):
  description, expected = golden.load("dense/vitdet", name)
  a = description["arguments"]
  backbone = VisionTransformer(
    width=a["embed_dim"],
    depth=a["depth"],
    num_heads=a["num_heads"],
    patch_size=a["patch_size"],
    position_size=a["pretrain_img_size"] // a["patch_size"],
    mlp_ratio=a["mlp_ratio"],
    **{
      **FORM,
      "window_size": a["window_size"],
      "global_blocks": tuple(a["global_blocks"]),
      "relative_size": a["img_size"] // a["patch_size"],
      "output_blocks": (a["depth"] - 1,),
    },
  )
  neck = SimplePyramid(backbone.features, channels=a["out_channels"], extra=True)
  model = create_mask_rcnn(
    backbone, 3, **{**VITDET, "neck": {"name": "simple_pyramid", "channels": 16, "extra": True}}
  )
  x = golden.image(description)
  with jax.default_matmul_precision("float32"):
    of_backbone = jax.eval_shape(backbone.init, jax.random.key(0), x)
    of_neck = jax.eval_shape(
      lambda: neck.init(jax.random.key(0), backbone.init_with_output(jax.random.key(0), x)[0][1])
    )
    template = {"params": {"backbone": of_backbone["params"], "neck": of_neck["params"]}}
    layout = detector_layouts(model, keymap_vit.LAYOUTS)["detectron2"]
    weights = {f"backbone.{name}": x for name, x in golden.weights(description).items()}
    variables, report = import_weights(weights, template, layout.key_map(model))
    assert not report.unused and not report.initialised
    exported = export_weights(variables, layout.key_map(model))
    assert set(exported) == set(weights)
    # The row of the class token, which nothing reads.
    weights["backbone.net.pos_embed"][:, 0] = 0
    for name, value in exported.items():
      np.testing.assert_array_equal(value, weights[name], err_msg=name)

    @jax.jit
    def run(params, x):
      _, endpoints = backbone.apply({"params": params["backbone"]}, x)
      return endpoints, neck.apply({"params": params["neck"]}, endpoints)

    endpoints, maps = run(variables["params"], x)
  answers = {f"block{i}": endpoints[f"stage1_block{i}"] for i in range(a["depth"])}
  golden.assert_matches(expected, {**answers, **maps})


def test_a_whole_detector_goes_out_and_comes_back():
  settings = detectron2_settings(3)
  parts = {
    **VITDET,
    "neck": {"name": "simple_pyramid", "channels": 8, "extra": True},
    "box_head": {**VITDET["box_head"], "conv_channels": 8, "fc_channels": 8,
                 "class_agnostic": True},
    "mask_head": {**VITDET["mask_head"], "channels": 8},
  }  # fmt: skip
  backbone = small(patch_size=16)
  model = create_mask_rcnn(backbone, 3, settings=settings, mask_head_per_stage=False, **parts)
  template = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
  rng = np.random.default_rng(0)
  drawn = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), dict(template))
  layout = detector_layouts(model, keymap_vit.LAYOUTS)["detectron2"]
  weights = export_weights(drawn, layout.key_map(model))
  assert {
    "backbone.net.pos_embed",
    "backbone.net.patch_embed.proj.weight",
    "backbone.net.blocks.1.attn.rel_pos_h",
    "backbone.net.blocks.0.mlp.fc2.bias",
    "backbone.simfp_2.3.weight",
    "backbone.simfp_5.2.norm.bias",
    "proposal_generator.rpn_head.conv.conv1.bias",
    "proposal_generator.rpn_head.objectness_logits.weight",
    "roi_heads.box_head.2.conv4.norm.weight",
    "roi_heads.box_head.0.fc1.weight",
    "roi_heads.box_predictor.1.bbox_pred.bias",
    "roi_heads.mask_head.mask_fcn4.norm.bias",
    "roi_heads.mask_head.deconv.weight",
  } <= set(weights)
  assert weights["backbone.net.pos_embed"].shape == (1, 17, 24)
  assert not [name for name in weights if re.search(layout.not_weights, name)]
  assert re.search(layout.not_weights, "pixel_mean")
  read, report = import_weights(weights, template, layout.key_map(model))
  assert not report.unused and not report.initialised
  jax.tree.map(np.testing.assert_array_equal, read, drawn)
  weights["backbone.net.blocks.1.attn.rel_pos_x"] = weights.pop(
    "backbone.net.blocks.1.attn.rel_pos_w"
  )
  with pytest.raises(
    ValueError, match=r"no backbone\.net\.blocks\.1\.attn\.rel_pos_w(?s:.)*rel_pos_x"
  ):
    import_weights(weights, template, layout.key_map(model))
  # Of another grid: 25 positions and the class token's.
  weights["backbone.net.pos_embed"] = np.zeros((1, 26, 24), np.float32)
  with pytest.raises(ValueError, match=r"pos_embed has shape \(26, 24\), the model \(16, 24\)"):
    import_weights(weights, template, layout.key_map(model))


def test_counts_as_detectron2():
  backbone = create_model(
    "vit_base_patch16_224", 0, **vitdet_arguments("vit_base_patch16_224", 1024)
  )
  assert backbone.global_blocks == (2, 5, 8, 11) and backbone.relative_size == 64
  (feature,) = backbone.features
  assert feature == ("stage1_block11", 16, 768)
  model = create_mask_rcnn(backbone, 80, settings=detectron2_settings(), **VITDET)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)["params"]
  # detectron2 has a row of positions for a class token.
  assert count_parameters(shapes) + 768 == 110_895_792
  assert count_parameters({n: shapes[n] for n in ("backbone", "neck")}) + 768 == 91_449_024


def _attend(query, key, value, rows, columns, size):
  """Softmax attention `[L, H, D]` with decomposed positions, a pair at a time."""
  length, heads, width = query.shape
  out = np.zeros_like(value)
  for h in range(heads):
    logits = np.zeros((length, length))
    for i in range(length):
      for j in range(length):
        (y, x), (v, u) = divmod(i, size[1]), divmod(j, size[1])
        near = rows[y - v + size[0] - 1] + columns[x - u + size[1] - 1]
        logits[i, j] = query[i, h] @ key[j, h] / np.sqrt(width) + query[i, h] @ near
    weights = np.exp(logits - logits.max(1, keepdims=True))
    out[:, h] = weights / weights.sum(1, keepdims=True) @ value[:, h]
  return out


def test_relative_positions_by_their_definition():
  rng, size = np.random.default_rng(0), (2, 3)
  query, key, value = rng.normal(size=(3, 6, 2, 4))
  rows, columns = rng.normal(size=(3, 4)), rng.normal(size=(5, 4))
  bias = relative_bias(*map(jnp.float32, (query, rows, columns)), size)
  logits = np.einsum("qhd,khd->hqk", query, key) / 2 + bias
  found = np.einsum("hqk,khd->qhd", jax.nn.softmax(logits), value)
  np.testing.assert_allclose(found, _attend(query, key, value, rows, columns, size), atol=1e-5)
  # Tables of another size are read between their entries, as PyTorch's linear interpolation does.
  longer, shorter = rng.normal(size=(9, 4)), rng.normal(size=(3, 4))
  fitted = [_between(longer, 3), _between(shorter, 5)]
  found, wanted = (
    relative_bias(*map(jnp.float32, (query, *tables)), size)
    for tables in ((longer, shorter), fitted)
  )
  np.testing.assert_allclose(found, wanted, atol=1e-5)


def _between(table, length):
  places = (np.arange(length) + 0.5) * len(table) / length - 0.5
  return np.stack([np.interp(places, np.arange(len(table)), one) for one in table.T], axis=1)


def test_windows_are_filled_with_zeros_that_attend():
  reach = Reach((2, 4), 3, 3)
  x = jnp.arange(1.0, 9.0).reshape(1, 8, 1)
  windows = reach.split(x)
  assert windows.shape == (1, 2, 9, 1)
  np.testing.assert_array_equal(windows[0, 1, :, 0], [4, 0, 0, 8, 0, 0, 0, 0, 0])
  np.testing.assert_array_equal(reach.join(windows), x)


@pytest.mark.parametrize("form", [{}, {"window_size": 0, "global_blocks": ()}])
def test_gradients_and_sizes(form):
  contract.check_gradients(classifier(**form), (32, 48))
  contract.check_sizes(classifier(**form), [(48, 32), (16, 64), (45, 30)])


def test_the_structure():
  contract.check_bfloat16(classifier)
  contract.check_remat(functools.partial(classifier, depth=4), (64, 64))


@pytest.mark.parametrize(
  ("form", "unused"),
  [
    ({}, {"class_token", "head", "head_norm"}),
    ({"pool": "mean", "pool_before_norm": True}, {"class_token", "head", "head_norm"}),
    (
      {"distillation_token": True},
      {"class_token", "distillation_token", "head", "distillation_head", "head_norm"},
    ),
    (
      {"pre_norm": True, "stem_bias": False, "head_bias": False, "activation": "quick_gelu"},
      {"class_token", "head", "head_norm"},
    ),
    (
      {"stem": "convolutions", "positions": "sequence", "patch_size": 16, "position_size": 2,
       "head_bias": False},
      {"class_token", "head", "head_norm"},
    ),
  ],
)  # fmt: skip
def test_a_classifier_becomes_the_backbone(form, unused):
  whole = {"num_classes": 10, "class_token": True, "pool": "token"}
  plain = {name: VisionTransformer.__dataclass_fields__[name].default for name in FORM}
  source_model = small(**{**plain, **whole, **form})
  model = small(**{k: v for k, v in form.items() if k not in ("pool", "distillation_token")})
  source, target = (contract.drawn_variables(m) for m in (source_model, model))
  found, report = transfer(source, target)
  assert {name.split("/")[1] for name in report.unused if name.startswith("params/")} == unused
  new, old = (traverse_util.flatten_dict(dict(v["params"]), sep="/") for v in (found, source))
  begun = {line.split(" ")[0].removeprefix("params/") for line in report.initialised}
  assert begun == {f"stage1_block{i}/relative_{n}" for i in range(2) for n in ("rows", "columns")}
  for name in set(new) - begun:
    value = old[name]
    if name == "position_embedding":  # without the tokens'
      value = value[-16:]
    np.testing.assert_array_equal(new[name], value, err_msg=name)


def test_tables_begin_at_zero_and_change_nothing_then():
  x = contract.images(1, 32, 32)
  plain = classifier(window_size=0, global_blocks=(), relative_size=0)
  tables = classifier(window_size=0, global_blocks=())
  variables = contract.initialize(tables, x)
  assert not variables["params"]["stage1_block0"]["relative_rows"].any()
  found, _ = transfer(contract.drawn_variables(plain), variables)
  one, other = (
    contract.run(m, v, x)[0] for m, v in ((tables, found), (plain, contract.drawn_variables(plain)))
  )
  np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_under_a_decoder_and_between_sizes():
  source = contract.drawn_variables(classifier())
  table = {"params": {"backbone": contract.drawn_variables(small(relative_size=8))["params"],
                      "head": {"classifier": {"bias": np.zeros(3)}}}}  # fmt: skip
  found, report = transfer(source, table)
  longer = found["params"]["backbone"]["stage1_block1"]["relative_rows"]
  assert longer.shape == (15, 8)
  assert "(resized from (9, 8) to (15, 8))" in str(report)
  one = np.asarray(source["params"]["stage1_block1"]["relative_rows"])
  np.testing.assert_allclose(longer[[0, 7, -1]], one[[0, 4, -1]], rtol=1e-6)
  again = resize_tables(
    {"relative_rows": one}, {"relative_rows": jax.ShapeDtypeStruct((15, 8), jnp.float32)}
  )
  np.testing.assert_allclose(again["relative_rows"], longer, rtol=1e-6)
  # A source without any begins with zeros, under a decoder too.
  bare = traverse_util.flatten_dict(dict(source), sep="/")
  bare = {k: v for k, v in bare.items() if "relative" not in k}
  _, report = transfer(traverse_util.unflatten_dict(bare, sep="/"), table)
  assert any("stage1_block0/relative_rows (relative" in line for line in report.initialised)


@pytest.mark.parametrize(
  ("argument", "form"),
  [
    ("detector=mask_rcnn", "SimplePyramid"),
    ("detector=cascade_mask_rcnn,masks=False", "SimplePyramid"),
    ("detector=sparse_rcnn,masks=False", "SimplePyramid"),
    ("detector=atss,masks=False", "FPN"),
  ],
)
def test_pictures_of_ones_own_are_seen_in_this_form(argument, form):
  config = Config(load_config(CONFIG, f"arch=deit_tiny_patch16_224,res=512,{argument}"))
  preprocessing = build.preprocessing_of(config)
  curriculum = build.read_curriculum(config, 1000, preprocessing)
  facts = DataFacts(num_classes=10)
  ((task, *_), _) = build.build_tasks(config, facts, preprocessing, curriculum)
  model = task.model
  assert type(model.neck).__name__ == form
  assert model.backbone.window_size == (14 if form == "SimplePyramid" else 0)
  if form == "SimplePyramid":
    assert model.backbone.relative_size == 32
    images = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    found = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], images)
    assert found["boxes"].shape == (1, 100, 4)


def test_bad_arguments_are_told():
  x = contract.images(1, 32, 32)
  for form, message in (
    ({"class_token": True}, "of patches alone; they need class_token=False"),
    ({"window_size": 0}, "global_blocks need a window_size"),
    ({"global_blocks": (2,)}, "names block 2; the blocks are 0 to 1"),
  ):
    with pytest.raises(ValueError, match=message):
      jax.eval_shape(small(**form).init, jax.random.key(0), x)
  assert not small().takes_kept
  with pytest.raises(ValueError, match="swin_tiny is a Swin; a ViT is expected"):
    vitdet_arguments("swin_tiny", 1024)
  with pytest.raises(ValueError, match="image_size is 0; pixels are expected"):
    vitdet_arguments("vit_b16", 0)
  with pytest.raises(ValueError, match=r"no variable .*relative_rows"):
    keymap_vit.LAYOUTS["official"].key_map(small(pre_norm=True))(
      "params/stage1_block0/relative_rows"
    )
  with pytest.raises(ValueError, match="no layout"):
    detector_key_map(create_mask_rcnn(small(), 3, **VITDET), "mmdetection")
