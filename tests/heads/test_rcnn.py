"""What holds of R-CNN whatever its weights: counts, padding, gradients, sharding, bad input."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_vit.heads.atss import create_atss
from hybrid_vit.heads.mask_head import mask_targets
from hybrid_vit.heads.rcnn import VITDET, create_cascade_mask_rcnn, create_mask_rcnn
from hybrid_vit.heads.rcnn_settings import RCNNSettings, cascade_settings, detectron2_settings
from hybrid_vit.heads.retinanet import create_retinanet
from hybrid_vit.models.dense import dense_arguments
from hybrid_vit.models.registry import create_model
from hybrid_vit.sharding import make_mesh
from hybrid_vit.tools.summarize import count_multiply_adds, count_parameters
from hybrid_vit.weights import keymap_swin
from hybrid_vit.weights.convert import export_weights, import_weights
from hybrid_vit.weights.keymap_detectors import detector_key_map, detector_layouts
from tests.heads.detectors import Blank, ellipses
from tests.heads.pyramids import levels
from tests.models import contract

_SIZE, _CLASSES = (48, 64), 3
_NUMBERS = {"rpn_before": (50, 50), "rpn_after": (20, 20), "anchor_scales": (4.0,),
            "roi_samples": 48, "detections": 10, "sampling_ratio": 2,
            "roi_positive_fraction": 1.0, "rpn_samples": 4096}  # fmt: skip
_SMALL = {
  "neck": {"name": "fpn", "channels": 8, "extra": "max_pool", "num_extra": 1},
  "mask_head": {"channels": 8, "num_convs": 1},
}


def _swin(first_norm=1):
  arguments = dense_arguments("swin_tiny", 512)
  norms = tuple(range(first_norm, 5))
  return create_model("swin_tiny", num_classes=0, **{**arguments, "output_norms": norms})


def _counts(model):
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)["params"]
  return {name: count_parameters(part) for name, part in params.items()}


def test_mask_rcnn_counts():
  found = _counts(create_mask_rcnn(_swin(), 80))
  assert sum(found.values()) == 47_794_602
  assert found.pop("backbone") == 27_520_698
  assert found == {"neck": 2_729_984, "rpn": 593_935, "box_head0": 14_306_705,
                   "mask_head0": 2_643_280}  # fmt: skip
  assert sum(found.values()) == 20_273_904


def test_cascade_counts():
  found = _counts(create_cascade_mask_rcnn(Blank(levels((96, 192, 384, 768))), 80))
  assert sum(found.values()) == 58_109_106
  assert [found[f"box_head{i}"] for i in range(3)] == [15_618_449] * 3


def test_dense_detectors_counts():
  # The finest map is not read, and has no norm.
  found = _counts(create_retinanet(_swin(2), 80))
  assert sum(found.values()) == 38_458_606
  assert found["neck"] + found["head"] == 4_474_880 + 6_463_220
  assert _counts(create_atss(_swin(2), 80))["head"] == 2 * 4 * (589_824 + 512) + 195_930


def test_vitdet_counts():
  found = _counts(create_mask_rcnn(Blank(levels((768,), strides=(16,))), 80, **VITDET))
  assert found["rpn"] == 1_184_015
  assert found["box_head0"] + found["mask_head0"] == 18_262_753


@pytest.mark.parametrize(
  ("create", "settings", "expected"),
  [(create_mask_rcnn, RCNNSettings, 171.0), (create_cascade_mask_rcnn, cascade_settings, 649.2)],
)
def test_multiply_adds_of_the_heads(create, settings, expected):
  """1,000 proposals and 100 masks of a picture of 800x1280; pooling multiplies no matrices."""
  model = create(Blank(levels((96, 192, 384, 768))), 80, settings=settings(sampling_ratio=2))
  images = jax.ShapeDtypeStruct((1, 800, 1280, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
  found = count_multiply_adds(model.apply, variables, images)
  assert round(found / 1e9, 1) == expected


def _make(kind):
  backbone = Blank(levels((4, 6, 8, 10)))
  if kind == "mask":
    return create_mask_rcnn(
      backbone, _CLASSES, box_head={"fc_channels": 16}, settings=RCNNSettings(**_NUMBERS), **_SMALL
    )
  box = {"num_convs": 1, "conv_channels": 8, "fc_channels": 16}
  if kind == "detectron2":
    settings = detectron2_settings(3, **_NUMBERS)
    box |= {"norm": "layer", "class_agnostic": True}
    one = {"mask_head_per_stage": False}
    return create_mask_rcnn(backbone, _CLASSES, box_head=box, settings=settings, **one, **_SMALL)
  settings = cascade_settings(**_NUMBERS | {"rpn_allowed_border": -1.0})
  return create_cascade_mask_rcnn(backbone, _CLASSES, box_head=box, settings=settings, **_SMALL)


def _targets(batch=2, room=4, seed=0):
  rng = np.random.default_rng(seed)
  low = rng.uniform(0, 20, (batch, room, 2))
  boxes = np.concatenate([low, low + rng.uniform(10, 25, (batch, room, 2))], -1)
  boxes = boxes.astype(np.float32)
  return {
    "boxes": boxes,
    "labels": rng.integers(0, _CLASSES, (batch, room)).astype(np.int32),
    "valid": np.arange(room) < np.arange(2, 2 + batch)[:, None] % (room + 1),
    "masks": np.stack([ellipses(b, _SIZE) for b in boxes]),
  }


def _images(batch=2):
  return np.random.default_rng(1).standard_normal((batch, *_SIZE, 3)).astype(np.float32)


@functools.cache
def _variables(kind):
  model = _make(kind)
  variables = contract.initialize(model, _images(1))

  # Heads begin so small that nothing would be found and all losses were alike.
  def louder(path, x):
    return 20 * x if any(n in jax.tree_util.keystr(path) for n in ("classifier", "deltas")) else x

  return model, jax.tree_util.tree_map_with_path(louder, variables)


@functools.partial(jax.jit, static_argnums=0)
def _losses(model, variables, images, targets, sizes=None, key=0):
  return model.apply(
    variables, images, True, targets, jax.random.key(key), sizes, mutable=["batch_stats"]
  )[0]


@pytest.mark.parametrize("kind", ["mask", "cascade", "detectron2"])
def test_losses_have_gradients_and_detections_are_in_the_picture(kind):
  model, variables = _variables(kind)
  sizes = jnp.array([[48, 64], [41, 50]])

  @jax.jit
  def step(params):
    def loss(params):
      found = _losses(model, {**variables, "params": params}, _images(), _targets(), sizes)
      return sum(found.values()), found

    return jax.grad(loss, has_aux=True)(params)

  gradient, losses = step(variables["params"])
  stages = 1 if kind == "mask" else 3
  names = [f"{part}{i}" for part in ("class", "box") for i in range(stages)]
  names += [f"mask{i}" for i in range(1 if kind == "detectron2" else stages)]
  assert set(losses) == {"rpn_class", "rpn_box", *names}
  for name, value in losses.items():
    assert value.dtype == jnp.float32 and value.shape == (), name
    assert np.isfinite(value) and value > 0, name
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all(), path
    assert np.abs(leaf).max() > 0, path

  found = jax.jit(lambda v: model.apply(v, _images(), sizes=sizes))(variables)
  shape = (2, model.settings.detections)
  assert {k: v.shape for k, v in found.items()} == {
    "boxes": (*shape, 4), "scores": shape, "labels": shape, "valid": shape, "truncated": (2,),
    "masks": (*shape, 28, 28),
  }  # fmt: skip
  assert found["valid"].any(axis=1).all()
  boxes = np.asarray(found["boxes"])
  assert (boxes >= 0).all() and (boxes[..., [3, 2]].max(axis=1) <= sizes).all()
  assert (np.diff(found["scores"], axis=1) <= 0).all()
  for name in ("boxes", "scores", "labels", "masks"):
    assert not np.any(np.asarray(found[name])[~np.asarray(found["valid"])]), name


def test_more_room_changes_nothing():
  model, variables = _variables("mask")
  targets = _targets()
  roomy = {
    name: np.pad(x, [(0, 0), (0, 3)] + [(0, 0)] * (x.ndim - 2)) for name, x in targets.items()
  }
  # All that can be drawn is, so that draws do not matter.
  found = _losses(model, variables, _images(), targets)
  for key in range(2):
    again = _losses(model, variables, _images(), roomy, key=key)
    for name, value in found.items():
      np.testing.assert_allclose(again[name], value, rtol=1e-5, err_msg=name)


def test_masks_may_be_given_in_frames():
  model, variables = _variables("mask")
  targets = _targets()
  frames = dict(targets)
  masks = jnp.asarray(frames.pop("masks"))
  each = jnp.broadcast_to(jnp.arange(4), (2, 4))
  frames["box_masks"] = mask_targets(targets["boxes"], each, masks, size=56, binary=False)
  whole, found = (_losses(model, variables, _images(), t) for t in (targets, frames))
  for name, value in whole.items():
    tolerance = 0.02 if name == "mask0" else 1e-6
    np.testing.assert_allclose(found[name], value, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("room", [0, 2])
def test_pictures_without_objects(room):
  model, variables = _variables("cascade")
  targets = _targets(room=4)
  targets = {name: x[:, :room] for name, x in targets.items()}
  targets["valid"] = np.zeros_like(targets["valid"])

  def total(params):
    found = _losses(model, {**variables, "params": params}, _images(), targets)
    return sum(found.values()), found

  gradient, losses = jax.jit(jax.grad(total, has_aux=True))(variables["params"])
  for name, value in losses.items():
    assert np.isfinite(value), name
    assert (value > 0) == ("class" in name), name
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all(), path


def test_sharded_as_unsharded():
  model, variables = _variables("cascade")
  batch = 4
  targets, images = _targets(batch), _images(batch)
  expected = _losses(model, variables, images, targets)
  sharding = NamedSharding(make_mesh({"data": 4}, jax.devices()[:4]), PartitionSpec("data"))
  images, targets = jax.device_put((images, targets), sharding)
  found = _losses(model, variables, images, targets)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)
  program = _losses.lower(model, variables, images, targets).compile().as_text()
  assert not re.findall(r"= \S+ all-gather\(", program)


def test_masks_in_frames_are_as_those_of_whole_pictures():
  rng, count = np.random.default_rng(0), 12
  sides = rng.uniform(10, 60, (count, 2))
  low = rng.uniform(0, 1, (count, 2)) * (np.array([96, 80]) - sides)
  boxes = np.concatenate([low, low + sides], axis=1).astype(np.float32)
  masks = jnp.asarray(ellipses(boxes, (80, 96)))[None]
  moved = boxes + rng.uniform(-0.15, 0.15, (count, 4)) * np.tile(sides, 2)
  moved = jnp.asarray(np.clip(moved, 0, [96, 80, 96, 80]), jnp.float32)[None]
  # Not the order in which they are given.
  order = rng.permutation(count)
  gt, moved, boxes = jnp.asarray(order)[None], moved[:, order], jnp.asarray(boxes)[None]
  frames = mask_targets(boxes, jnp.arange(count)[None], masks, size=56, binary=False)
  whole = mask_targets(moved, gt, masks, size=28)
  found = mask_targets(moved, gt, frames, size=28, gt_boxes=boxes)
  assert 0.4 < whole.mean() < 0.9
  assert set(np.unique(found)) == {0.0, 1.0}
  assert np.mean(whole != found) < 0.005
  soft = [mask_targets(moved, gt, m, size=28, gt_boxes=b, binary=False)
          for m, b in ((masks, None), (frames, boxes))]  # fmt: skip
  assert np.abs(soft[0] - soft[1]).mean() < 0.01


@pytest.mark.parametrize("layout", ["mmdetection", "detectron2"])
def test_weights_go_out_and_come_back(layout):
  model, variables = _variables("cascade")
  key_map = detector_key_map(model, layout)
  weights = export_weights(variables, key_map)
  assert ("rpn_head.rpn_conv.weight" in weights) == (layout == "mmdetection")
  read, report = import_weights(weights, variables, key_map)
  assert not report.unused
  jax.tree.map(np.testing.assert_array_equal, read, variables)


@pytest.mark.parametrize(
  ("create", "expected"),
  [
    (create_mask_rcnn, {
      "mmdetection": {"backbone.norm0.weight", "neck.lateral_convs.0.conv.weight",
                      "rpn_head.rpn_reg.bias", "roi_head.bbox_head.shared_fcs.1.weight",
                      "roi_head.mask_head.convs.3.conv.bias"},
      "torchvision": {"backbone.body.norm0.weight", "backbone.fpn.layer_blocks.3.0.weight",
                      "roi_heads.mask_predictor.conv5_mask.weight"},
      "detectron2": {"backbone.bottom_up.norm3.bias", "backbone.fpn_lateral2.weight",
                     "backbone.fpn_output5.weight", "proposal_generator.rpn_head.conv.weight",
                     "roi_heads.mask_head.mask_fcn4.bias",
                     "roi_heads.box_predictor.cls_score.bias"},
      "openmmlab": {"backbone.stages.0.blocks.0.attn.w_msa.qkv.weight",
                    "roi_head.bbox_head.fc_cls.weight"},
    }),
    (create_cascade_mask_rcnn, {
      "mmdetection": {"roi_head.bbox_head.2.shared_convs.3.bn.running_var",
                      "roi_head.mask_head.2.upsample.weight"},
      "detectron2": {"roi_heads.box_head.1.conv4.norm.weight"},
      "openmmlab": {"backbone.norm0.weight", "roi_head.bbox_head.2.fc_reg.bias"},
    }),
    (create_atss, {
      "mmdetection": {"neck.fpn_convs.4.conv.weight", "bbox_head.scales.4.scale",
                      "bbox_head.reg_convs.3.gn.weight", "bbox_head.atss_centerness.weight"},
      "openmmlab": {"bbox_head.atss_cls.weight"},
    }),
  ],
)  # fmt: skip
def test_names_of_whole_checkpoints(create, expected):
  model = create(_swin(2 if create is create_atss else 1), 80)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
  paths = traverse_util.flatten_dict(dict(variables), sep="/")
  layouts = detector_layouts(model, keymap_swin.LAYOUTS)
  assert set(layouts) == set(expected)
  for name, some in expected.items():
    key_map, ignored = layouts[name].key_map(model), layouts[name].not_weights
    names = [one for path in paths for one in key_map(path).names]
    assert len(set(names)) == len(names)
    assert some <= set(names), some - set(names)
    assert not [one for one in names if re.search(ignored, one)]
    assert [layouts[name].rename(one) for one in names] == names
    assert re.search(ignored, "roi_head.bbox_head.0.shared_convs.0.bn.num_batches_tracked")


def test_bad_input_is_told():
  model, variables = _variables("mask")
  images, targets = _images(), _targets()
  with pytest.raises(ValueError, match="losses need a key"):
    model.apply(variables, images, True, targets)
  del targets["masks"]
  with pytest.raises(ValueError, match="mask heads need targets 'masks' or 'box_masks'"):
    model.apply(variables, images, True, targets, jax.random.key(0))
  with pytest.raises(ValueError, match="1 stage_ious, 2 stage_weights and 1 stage_stds"):
    RCNNSettings(stage_weights=(1.0, 0.5))
  with pytest.raises(ValueError, match="box_loss is 'iou'; one of l1, giou was expected"):
    RCNNSettings(box_loss="iou")
  with pytest.raises(ValueError, match="torchvision has no cascade"):
    detector_key_map(_make("cascade"), "torchvision")
  with pytest.raises(ValueError, match=r"fc_channels is \(8, 8, 8\) for 2 layers"):
    bad = create_mask_rcnn(Blank(levels((4, 6))), 3, box_head={"fc_channels": (8, 8, 8)})
    jax.eval_shape(lambda: bad.init(jax.random.key(0), _images()))


def test_groups_reach_every_part():
  model = _make("cascade").with_batch_norm_groups(2)
  assert model.batch_norm_groups == 2
  assert all(head.batch_norm_groups == 2 for head in (*model.stages, *model.mask_heads))
