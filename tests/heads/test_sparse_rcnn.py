"""Sparse R-CNN against mmdetection's head, its losses' definition, and its published sizes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from scipy.optimize import linear_sum_assignment

from hybrid_vit import build
from hybrid_vit.build import DataFacts
from hybrid_vit.config import Config, load_config
from hybrid_vit.data.scenes import open_scenes
from hybrid_vit.data.spec import on_device, row
from hybrid_vit.heads.detectors import create_detector, detector_names
from hybrid_vit.heads.sparse_rcnn import (
  DynamicStage,
  SparseRCNNSettings,
  create_sparse_rcnn,
  sparse_losses,
)
from hybrid_vit.models.dense import dense_arguments
from hybrid_vit.models.registry import create_model
from hybrid_vit.ops.boxes import decode_boxes
from hybrid_vit.sharding import make_mesh
from hybrid_vit.tools.summarize import count_multiply_adds, count_parameters
from hybrid_vit.weights import keymap_swin, torch_keys
from hybrid_vit.weights.convert import export_weights, import_weights
from hybrid_vit.weights.keymap_detectors import detector_key_map, detector_layouts
from hybrid_vit.weights.keymap_sparse_rcnn import stage_rules
from hybrid_vit.weights.transfer import is_head
from tests import golden
from tests.heads.detectors import Blank
from tests.heads.pyramids import levels
from tests.models import contract
from tests.tasks.test_detection import CONFIG

_SMALL = {
  "num_proposals": 7,
  "num_stages": 3,
  "num_heads": 2,
  "hidden": 16,
  "dynamic_hidden": 4,
}
_NECK = {"name": "fpn", "channels": 8}


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision("float32"):
    yield


@pytest.mark.parametrize("name", golden.names("dense/sparse_rcnn_mmdet"))
def test_a_stage_as_mmdetection(name):
  description, expected = golden.load("dense/sparse_rcnn_mmdet", name)
  a, given = description["arguments"], description["input"]
  stage = DynamicStage(
    a["num_classes"],
    num_heads=a["num_heads"],
    hidden=a["feedforward_channels"],
    dynamic_hidden=a["dynamic_feat_channels"],
  )
  pooled, x = (golden.image({"input": given[f"{n}_features"]}) for n in ("roi", "proposal"))
  shape = (a["images"], a["proposals"])
  pooled, x = pooled.reshape(*shape, *pooled.shape[1:]), x[0]
  rules = stage_rules(stage)

  def key_map(path):
    return torch_keys.by_rules(rules, path.partition("/")[2], "stage")

  template = jax.eval_shape(lambda: stage.init(jax.random.key(0), x, pooled))
  weights = golden.weights(description)
  variables, report = import_weights(weights, template, key_map)
  assert not report.initialised and not report.unused
  exported = export_weights(variables, key_map)
  assert set(exported) == set(weights)
  for key, value in exported.items():
    np.testing.assert_array_equal(value, weights[key])

  @jax.jit
  def run(variables, x, pooled):
    return stage.apply(
      variables, x, pooled, capture_intermediates=lambda m, _: m.name == "self_norm"
    )

  (logits, deltas, features), inside = run(variables, x, pooled)
  attended = inside["intermediates"]["self_norm"]["__call__"][0]
  # The file's corner is of tokens.
  expected["attended"] = expected.pop("attention_features_corner")
  stats = expected.pop("attention_features_stats")
  std = stats[1]
  first = np.asarray(attended)[0, : len(expected["attended"]), :8]
  assert np.abs(first - expected.pop("attended")).max() < 1e-5 * std
  own = np.array([attended.mean(), attended.std(), np.abs(attended).max()])
  assert np.abs(own - stats).max() < 1e-5 * std
  answers = {"class_logits": logits, "box_deltas": deltas, "object_features": features}
  golden.assert_matches(expected, answers)


def _small(settings=None, dtype=jnp.float32, **head):
  return create_sparse_rcnn(
    Blank(levels((4, 6, 8, 10))), 3, neck={**_NECK, "dtype": dtype},
    head={**_SMALL, "dtype": dtype, **head}, settings=settings,
  )  # fmt: skip


def _images(batch=2, size=(64, 96)):
  return np.random.default_rng(0).standard_normal((batch, *size, 3)).astype(np.float32)


def _targets(batch=2):
  boxes = np.array([[0, 0, 0, 0], [10, 5, 40, 30], [20, 30, 90, 60]], np.float32)
  valid = np.array([[False, True, True], [False, True, False]])
  return {
    "boxes": np.broadcast_to(boxes, (batch, 3, 4)).copy(),
    "labels": np.broadcast_to(np.array([0, 2, 1], np.int32), (batch, 3)).copy(),
    "valid": np.resize(valid, (batch, 3)),
  }


@functools.cache
def _variables():
  model = _small()
  return model, jax.jit(lambda x: model.init(jax.random.key(0), x))(_images())


@functools.partial(jax.jit, static_argnums=0)
def _losses(model, variables, images, targets, sizes=None):
  return model.apply(variables, images, True, targets, None, sizes)


@functools.partial(jax.jit, static_argnums=0)
def _predictions(model, variables, images, sizes):
  def run(model, images):
    maps = model.neck(model.backbone(images)[1])
    return model.head(maps, sizes), model.detect(maps, sizes)

  return model.apply(variables, images, method=run)


def _by_definition(logits, boxes, targets, sizes):
  """Class, L1 and GIoU loss of one stage, in float64."""
  total, objects = np.zeros(3), max(targets["valid"].sum(), 1)
  for i, size in enumerate(sizes):
    sides = np.array([size[1], size[0]] * 2, np.float64)
    own = targets["valid"][i]
    true, labels = targets["boxes"][i][own].astype(np.float64), targets["labels"][i][own]
    p = 1 / (1 + np.exp(-logits[i].astype(np.float64)))
    found = boxes[i].astype(np.float64)
    cost = np.zeros((len(p), len(true)))
    giou = np.zeros_like(cost)
    for q in range(len(p)):
      for g in range(len(true)):
        pq = p[q, labels[g]]
        focal = 0.25 * (1 - pq) ** 2 * -np.log(pq + 1e-12)
        focal -= 0.75 * pq**2 * -np.log(1 - pq + 1e-12)
        giou[q, g] = _giou(found[q], true[g])
        cost[q, g] = 2 * focal + 5 * np.abs((found[q] - true[g]) / sides).sum() - 2 * giou[q, g]
    rows, columns = linear_sum_assignment(cost)
    wanted = np.zeros_like(p)
    wanted[rows, labels[columns]] = 1
    right = np.where(wanted > 0, p, 1 - p)
    weight = np.where(wanted > 0, 0.25, 0.75)
    total[0] += (weight * (1 - right) ** 2 * -np.log(right)).sum()
    total[1] += np.abs((found[rows] - true[columns]) / sides).sum()
    total[2] += (1 - giou[rows, columns]).sum()
  return total / objects


def _giou(a, b):
  def area(x):
    return max(x[2] - x[0], 0) * max(x[3] - x[1], 0)

  shared = area(np.concatenate([np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])]))
  hull = area(np.concatenate([np.minimum(a[:2], b[:2]), np.maximum(a[2:], b[2:])]))
  union = area(a) + area(b) - shared
  return shared / union - (hull - union) / hull


@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_losses_by_their_definition(spread):
  rng, sizes = np.random.default_rng(1), np.array([[64, 96], [50, 70]])
  low = rng.uniform(-10, 60, (2, 2, 7, 2))
  found = type("Found", (), {})()
  found.boxes = jnp.asarray(np.concatenate([low, low + rng.uniform(2, 50, low.shape)], -1))
  found.logits = jnp.asarray(spread * rng.normal(size=(2, 2, 7, 3)) - 1)
  losses = sparse_losses(found, _targets(), sizes, SparseRCNNSettings())
  assert set(losses) == {f"{n}{i}" for n in ("class", "l1_", "giou") for i in range(2)}
  for i in range(2):
    logits, boxes = np.asarray(found.logits[i]), np.asarray(found.boxes[i])
    wanted = np.array([2, 5, 2]) * _by_definition(logits, boxes, _targets(), sizes)
    ours = [float(losses[name]) for name in (f"class{i}", f"l1_{i}", f"giou{i}")]
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)


def test_stages_hand_their_boxes_on_and_the_last_ones_are_detections():
  model, variables = _variables()
  sizes = jnp.array([[64, 96], [50, 70]])
  found, detections = _predictions(model, variables, _images(), sizes)
  assert found.logits.shape == (3, 2, 7, 3) and found.boxes.shape == (3, 2, 7, 4)
  whole = np.stack([[[0, 0, 96, 64]] * 7, [[0, 0, 70, 50]] * 7]).astype(np.float32)
  # A stage alone, its offsets made anew: without weights for them, boxes stay.
  still = jax.tree_util.tree_map_with_path(
    lambda path, x: 0 * x if "deltas" in jax.tree_util.keystr(path) else x, variables
  )
  unmoved, _ = _predictions(model, still, _images(), sizes)
  np.testing.assert_allclose(unmoved.boxes, np.broadcast_to(whole, (3, 2, 7, 4)), rtol=1e-6)
  assert np.abs(found.boxes[0] - whole).max() > 1
  pushed = jax.tree.map(lambda x: x, still)
  bias = jnp.array([0.2, 0.0, -1.0, 0.0])
  pushed["params"]["head"]["stage1"]["deltas"]["bias"] = bias
  moved, _ = _predictions(model, pushed, _images(), sizes)
  expected = decode_boxes(jnp.asarray(whole), bias * jnp.array([0.5, 0.5, 1, 1]), two_sided=True)
  np.testing.assert_allclose(moved.boxes[1], expected, rtol=1e-6)
  np.testing.assert_allclose(moved.boxes[2], expected, rtol=1e-6)
  # The best pairs of a box and a class.
  p = np.asarray(jax.nn.sigmoid(found.logits[-1]))
  for i in range(2):
    best = np.argsort(-p[i].reshape(-1), kind="stable")[:7]
    np.testing.assert_allclose(detections["scores"][i], p[i].reshape(-1)[best], rtol=1e-6)
    np.testing.assert_array_equal(detections["labels"][i], best % 3)
    np.testing.assert_allclose(detections["boxes"][i], found.boxes[-1][i][best // 3], rtol=1e-6)
  assert detections["valid"].all() and detections["labels"].dtype == jnp.int32
  few = model.clone(settings=SparseRCNNSettings(detections=4))
  assert _predictions(few, variables, _images(), sizes)[1]["scores"].shape == (2, 4)


@pytest.mark.parametrize("head", [{}, {"remat": True, "dtype": jnp.bfloat16}])
def test_losses_have_gradients(head):
  model, variables = _small(**head), _variables()[1]
  sizes = jnp.array([[64, 96], [50, 70]])

  def total(params):
    found = _losses(model, {"params": params}, _images(), _targets(), sizes)
    return sum(found.values()), found

  gradient, losses = jax.jit(jax.grad(total, has_aux=True))(variables["params"])
  assert set(losses) == {f"{n}{i}" for n in ("class", "l1_", "giou") for i in range(3)}
  for name, value in losses.items():
    assert value.dtype == jnp.float32 and np.isfinite(value) and value > 0, name
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path


def test_the_learned_boxes_learn_by_the_first_stage_alone():
  model, variables = _variables()

  def of(name):
    def loss(params):
      return _losses(model, {"params": params}, _images(), _targets())[name]

    gradient = jax.jit(jax.grad(loss))(variables["params"])["head"]
    return [np.abs(gradient[n]).max() for n in ("proposal_boxes", "proposal_features")]

  first, later = of("giou0"), of("giou2")
  assert first[0] > 0 and first[1] > 0
  assert later[0] == 0 and later[1] > 0


def test_pictures_without_objects():
  model, variables = _variables()
  targets = _targets()
  targets["valid"] = np.zeros_like(targets["valid"])

  def total(params):
    found = _losses(model, {"params": params}, _images(), targets, jnp.array([[1, 3], [64, 96]]))
    return sum(found.values()), found

  gradient, losses = jax.jit(jax.grad(total, has_aux=True))(variables["params"])
  for name, value in losses.items():
    assert np.isfinite(value) and (value > 0) == ("class" in name), name
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all(), path


def test_sharded_as_unsharded():
  model, variables = _variables()
  images, targets = _images(4), _targets(4)
  expected = _losses(model, variables, images, targets)
  sharding = NamedSharding(make_mesh({"data": 4}, jax.devices()[:4]), PartitionSpec("data"))
  images, targets = jax.device_put((images, targets), sharding)
  found = _losses(model, variables, images, targets)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)


def test_sizes_as_published():
  """AFeng-x/SMT, README: Sparse R-CNN on SMT-S, 300 proposals: 102M parameters, 171G.

  The README's sizes of SMT-S fit one block in the last stage, the authors' code has two.
  """
  backbone = create_model("smt_s", 0, depths=(3, 4, 18, 1))
  model = create_sparse_rcnn(backbone, 80, head={"num_proposals": 300})
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
  assert round(count_parameters(variables["params"]) / 1e6) == 102
  head = variables["params"]["head"]
  stage = 256 * 768 + 768 + 256 * 256 + 256 + 3 * 512 + 2 * 256 * 2048 + 2048 + 256
  stage += 256 * 32768 + 32768 + 128 + 512 + 49 * 256 * 256 + 256 + 512
  stage += 4 * (256 * 256 + 512) + 257 * 84
  assert count_parameters(head["stage0"]) == stage
  assert count_parameters(head) == 6 * stage + 300 * 260
  bare = create_sparse_rcnn(Blank(levels((64, 128, 256, 512))), 80, head={"num_proposals": 300})
  images = jax.ShapeDtypeStruct((1, 800, 1280, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: bare.init(jax.random.key(0), x), images)
  heads = count_multiply_adds(bare.apply, variables, images)
  # mmcv counts no product of two computed matrices: the dynamic kernels' and the attention's.
  heads -= 6 * 300 * (2 * 49 * 256 * 64 + 2 * 300 * 256)
  assert abs(heads / 1e9 + 4.7 * 800 * 1280 / 224**2 - 171) < 1.5, heads


def test_names_of_whole_checkpoints():
  arguments = dense_arguments("swin_tiny", 512)
  model = create_sparse_rcnn(create_model("swin_tiny", 0, **arguments), 80)
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)
  layouts = detector_layouts(model, keymap_swin.LAYOUTS)
  assert set(layouts) == {"mmdetection", "openmmlab"}
  layout = layouts["mmdetection"]
  paths = traverse_util.flatten_dict(dict(variables), sep="/")
  names = [one for path in paths for one in layout.key_map(model)(path).names]
  assert len(set(names)) == len(names)
  assert {
    "backbone.norm0.weight",
    "neck.fpn_convs.3.conv.bias",
    "rpn_head.init_proposal_bboxes.weight",
    "rpn_head.init_proposal_features.weight",
    "roi_head.bbox_head.5.fc_cls.weight",
    "roi_head.bbox_head.0.attention.attn.in_proj_weight",
    "roi_head.bbox_head.3.reg_fcs.7.bias",
    "roi_head.bbox_head.3.instance_interactive_conv.dynamic_layer.bias",
  } <= set(names)
  assert not [one for one in names if re.search(layout.not_weights, one)]
  # Only what goes by the classes begins anew for others.
  anew = [path for path in paths if is_head(path, dense=True)]
  assert sorted(anew) == sorted(
    f"params/head/stage{i}/classifier/{leaf}" for i in range(6) for leaf in ("bias", "kernel")
  )


def test_weights_go_out_and_come_back():
  model, variables = _variables()
  key_map = detector_key_map(model, "mmdetection")
  weights = export_weights(variables, key_map)
  read, report = import_weights(weights, variables, key_map)
  assert not report.unused and not report.initialised
  jax.tree.map(np.testing.assert_array_equal, read, dict(variables))
  with pytest.raises(ValueError, match="SparseRCNN has no layout 'detectron2'"):
    detector_key_map(model, "detectron2")
  with pytest.raises(ValueError, match=r"no variable .*proposal_sizes"):
    key_map("params/head/proposal_sizes")


def test_it_is_a_detector_by_name():
  assert "sparse_rcnn" in detector_names()
  backbone = Blank(levels((4, 6, 8, 10)))
  model = create_detector(
    "sparse_rcnn", backbone, 3, neck=_NECK, head=_SMALL,
    settings={"detections": 5, "giou_weight": 1.0}, batch_norm_groups=2,
  )  # fmt: skip
  assert model.settings == SparseRCNNSettings(giou_weight=1.0, detections=5)
  assert model.with_batch_norm_groups(2).batch_norm_groups == 2
  with pytest.raises(ValueError, match="sparse_rcnn finds boxes alone"):
    create_detector("sparse_rcnn", backbone, 3, masks=True)
  with pytest.raises(ValueError, match="3 heads do not divide a width of 8"):
    bad = create_sparse_rcnn(backbone, 3, neck=_NECK, head={**_SMALL, "num_heads": 3})
    jax.eval_shape(lambda: bad.init(jax.random.key(0), _images()))


def test_a_step_of_the_task():
  loaded = load_config(CONFIG, "runlocal")
  loaded.task.detector = {"name": "sparse_rcnn", "neck": {**_NECK, "channels": 16}, "head": _SMALL}
  loaded.task.mask_size = 0
  loaded.data.transform = loaded.data.transform.replace("|crop_masks(28)", "")
  config, scenes = Config(loaded), open_scenes("size=64,count=64", "train")
  made = build.build(
    config, DataFacts(info=scenes.info, num_examples=len(scenes), example=lambda: scenes[0])
  )
  config.assert_all_read()
  task, reading, rows = made.task, made.readings[0], []
  for i in range(4):
    example = reading.transform(dict(scenes[i]), np.random.default_rng(i))
    rows.append({n: row(f, n, example[n]) for n, f in on_device(reading.fields).items()})
  batch = {name: np.stack([r[name] for r in rows]) for name in rows[0]}
  variables = contract.initialize(task, batch)

  @jax.jit
  def step(params, key):
    def loss(params):
      return task.loss({**variables, "params": params}, task.augment(batch, key, 0), key)

    (total, _), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient)))
    return jax.tree.map(lambda p, g: p - 0.02 * g / norm, params, gradient), total, gradient

  params, losses = variables["params"], []
  for i in range(3):
    params, total, gradient = step(params, jax.random.key(i))
    losses.append(float(total))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
      assert np.isfinite(leaf).all(), path
  for part in ("backbone", "neck", "head"):
    assert max(float(np.abs(g).max()) for g in jax.tree.leaves(gradient[part])) > 0, part
  assert np.isfinite(losses).all() and losses[-1] < losses[0], losses
