"""RetinaNet and ATSS against mmdetection's answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.heads.atss import ATSSSettings, create_atss
from hybrid_vit.heads.dense_detection import SELECTIONS
from hybrid_vit.heads.retinanet import RetinaNetSettings, create_retinanet
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.anchors import octave_scales
from hybrid_vit.weights.convert import export_weights, import_weights
from hybrid_vit.weights.keymap_detectors import detector_key_map
from tests import golden
from tests.heads.detectors import Blank, assert_detections, assert_near, golden_targets
from tests.models import contract

_C3_C5 = tuple(FeatureSpec(f"c{i}", 2**i, w) for i, w in ((3, 8), (4, 12), (5, 16)))
_TEST = {"before": 40, "detections": 15, "selection": "pairs"}
_SMALL = {"name": "fpn", "channels": 8, "num_extra": 2}


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision("float32"):
    yield


def _retinanet():
  settings = RetinaNetSettings(**_TEST, anchor_scales=octave_scales(2.0))
  neck = {**_SMALL, "extra": "on_input"}
  return create_retinanet(Blank(_C3_C5), 3, neck=neck, head={"num_convs": 2}, settings=settings)


def _atss():
  settings = ATSSSettings(**_TEST, anchor_scales=(4.0,))
  neck, head = {**_SMALL, "extra": "on_output"}, {"num_convs": 2, "norm_groups": 4}
  return create_atss(Blank(_C3_C5), 3, neck=neck, head=head, settings=settings)


@pytest.mark.parametrize(
  ("folder", "make", "losses"),
  [("retina", _retinanet, ("box", "class")), ("atss", _atss, ("box", "centerness", "class"))],
)
def test_as_mmdetection(folder, make, losses):
  description, expected = golden.load(f"dense/{folder}_mmdet", f"{folder}_3classes")
  model, weights = make(), golden.weights(description)
  key_map = detector_key_map(model, "mmdetection")
  template = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 96, 128, 3))))
  variables, _ = import_weights(weights, template, key_map)
  assert set(weights) == set(export_weights(variables, key_map))
  for name, value in export_weights(variables, key_map).items():
    np.testing.assert_array_equal(value, weights[name])
  inputs = [golden.image({"input": one}) for one in description["input"]["features"]]
  sizes = jnp.array(description["arguments"]["image_sizes"])

  @jax.jit
  def run(variables, inputs, targets):
    given = {level.name: x for level, x in zip(_C3_C5, inputs)}
    maps = model.apply(variables, given, method=lambda m, given: m.neck(given))
    found = model.apply(variables, maps, method=lambda m, maps: m.head(maps))
    return (
      maps,
      found,
      model.apply(variables, maps, targets, sizes, train=False, method="losses"),
      model.apply(variables, maps, sizes, method="detect"),
    )

  maps, found, of_ours, detections = run(
    variables, inputs, golden_targets(expected, description["arguments"]["image"])
  )
  answers = {**maps, "cls_p3": found["classes"][0], "reg_p4": found["deltas"][1],
             "cls_p6": found["classes"][3]}  # fmt: skip
  if folder == "atss":
    answers["centerness_p5"] = found["centerness"][2]
  parts = ("gt_", "det_", "losses")
  golden.assert_matches({k: v for k, v in expected.items() if not k.startswith(parts)}, answers)
  assert_detections(expected, detections)
  for name, value in zip(losses, expected["losses"].sum(axis=-1)):
    assert_near(value, of_ours[name])


def _loud(model, images):
  """Variables of a head that does not begin quiet."""
  variables = contract.initialize(model, images)
  head = dict(variables["params"]["head"])
  head["classifier"] = jax.tree.map(lambda x: 20 * x * (x.ndim > 1), head["classifier"])
  head["deltas"] = jax.tree.map(lambda x: 20 * x, head["deltas"])
  return {"params": {**variables["params"], "head": head}}


def _full_pyramid(make, **changes):
  model = make()
  given = Blank(tuple(FeatureSpec(f"c{i}", 2**i, 4 * i) for i in (3, 4, 5)))
  neck = model.neck.clone(features=given.features)
  settings = dataclasses.replace(model.settings, **changes)
  return model.clone(backbone=given, neck=neck, settings=settings)


@pytest.mark.parametrize("make", [_retinanet, _atss])
@pytest.mark.parametrize("there", [True, False])
def test_every_parameter_has_a_gradient(make, there):
  model = _full_pyramid(make)
  images = np.random.default_rng(0).standard_normal((2, 57, 75, 3)).astype(np.float32)
  boxes = np.array([[[4, 6, 30, 40], [30, 5, 60, 50]], [[0, 0, 40, 41], [0, 0, 0, 0]]], np.float32)
  targets = {
    "boxes": boxes, "labels": np.array([[0, 2], [1, 0]]),
    "valid": np.array([[True, True], [True, False]]) & there,
  }  # fmt: skip
  variables = _loud(model, images)

  @jax.jit
  def run(params):
    def loss(params):
      found = model.apply(
        {"params": params}, images, True, targets, sizes=jnp.array([[57, 75]] * 2)
      )
      return sum(found.values()), found

    return jax.grad(loss, has_aux=True)(params)

  gradient, losses = run(variables["params"])
  for name, value in losses.items():
    assert value.dtype == jnp.float32 and np.isfinite(value), name
    assert (value > 0) == (there or name == "class"), name
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all(), path
    # A level may be without positives, and its number without a gradient.
    assert np.abs(leaf).max() > 0 or not there or "scale" in jax.tree_util.keystr(path), path


@pytest.mark.parametrize("make", [_retinanet, _atss])
def test_both_selections_agree_where_nothing_is_left_out(make):
  images = np.random.default_rng(0).standard_normal((2, 57, 75, 3)).astype(np.float32)
  found = []
  for selection in SELECTIONS:
    model = _full_pyramid(make, before=10_000, candidates=10_000, selection=selection)
    variables = _loud(model, images)
    found.append(jax.jit(model.apply)(variables, images))
  assert found[0]["valid"].all()
  for name, value in found[0].items():
    np.testing.assert_allclose(value, found[1][name], rtol=1e-5, atol=1e-5, err_msg=name)


def test_bad_input_is_told():
  with pytest.raises(ValueError, match="selection is 'all'; one of anchors, pairs was expected"):
    RetinaNetSettings(selection="all")
  with pytest.raises(ValueError, match="RetinaNet has no layout 'detectron2'"):
    detector_key_map(_retinanet(), "detectron2")
