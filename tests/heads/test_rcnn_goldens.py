"""R-CNN against torchvision's, detectron2's and mmdetection's answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.heads.box_head import BoxHead
from hybrid_vit.heads.mask_head import MaskHead
from hybrid_vit.heads.rcnn import RCNN
from hybrid_vit.heads.rcnn_settings import (
  cascade_settings,
  detectron2_settings,
  level_anchors,
  torchvision_settings,
)
from hybrid_vit.heads.rpn import RPNHead
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.assignment import max_iou_assign
from hybrid_vit.ops.roi_align import roi_levels
from hybrid_vit.weights.convert import export_weights, import_weights
from hybrid_vit.weights.keymap_detectors import detector_key_map
from tests import golden
from tests.heads.detectors import (
  Blank,
  assert_detections,
  assert_near,
  golden_proposals,
  golden_targets,
  maps_of,
)

_STRIDES = (4, 8, 16, 32, 64)
_SIDES = ((16.0,), (24.0,), (32.0,), (48.0,), (64.0,))
_RPN = {"rpn_before": (60, 50), "rpn_after": (40, 30), "anchor_sides": _SIDES, "rpn_samples": 4096}
# All that can be drawn is.
_ROI = {"roi_samples": 64, "roi_positive_fraction": 1.0}


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision("float32"):
    yield


def _levels(count=5):
  return tuple(FeatureSpec(f"p{i + 2}", s, 8) for i, s in enumerate(_STRIDES[:count]))


def _model(settings, classes, box, mask, masks=1, levels=5):
  features = _levels(levels)
  return RCNN(
    Blank(features),
    None,
    RPNHead(features, channels=8),
    (BoxHead(classes, **box),) * len(settings.stage_ious),
    (MaskHead(classes, **mask),) * masks,
    settings,
  )


def _template(model, size):
  images = jnp.zeros((1, *size, 3))
  return jax.eval_shape(lambda: model.init(jax.random.key(0), images))


def _run(model, variables, maps, description, expected, **names):
  """(losses on the given proposals, detections on them)."""
  canvas, sizes = description["arguments"]["image"], description["arguments"]["image_sizes"]
  sizes, given = jnp.array(sizes), golden_proposals(expected)
  targets = golden_targets(expected, canvas, **names)

  @jax.jit
  def run(variables, maps, targets, given):
    shared = {"sizes": sizes, "canvas": tuple(canvas), "train": False, "proposals": given}
    losses = model.apply(
      variables, maps, targets, jax.random.key(0), **shared, method="losses"
    )  # fmt: skip
    return losses, model.apply(variables, maps, **shared, method="detect")

  return run(variables, maps, targets, given)


def _heads_on(model, variables, maps, boxes, stage=0):
  """Class logits and offsets of the given proposals, those of both pictures joined."""
  logits, deltas = model.apply(
    variables, maps, boxes.boxes, method=lambda m, maps, boxes: m._box(stage, maps, boxes, False)
  )
  return np.asarray(logits)[boxes.valid], np.asarray(deltas)[boxes.valid]


def _proposals(model, variables, maps, description):
  sizes, canvas = description["arguments"]["image_sizes"], description["arguments"]["image"]

  def propose(m, maps):
    objectness, deltas, anchors, _ = m._anchored(maps, jnp.array(sizes), tuple(canvas), False)
    return (
      objectness,
      deltas,
      m._propose(objectness, deltas, anchors, jnp.array(sizes), training=False),
    )

  return model.apply(variables, maps, method=propose)


def test_mask_rcnn_as_torchvision():
  description, expected = golden.load("dense/mask_rcnn", "mask_rcnn_torchvision_5classes")
  settings = torchvision_settings(**_RPN, **_ROI, score_threshold=0.02, detections=20)
  model = _model(settings, 4, {"fc_channels": 24}, {"num_convs": 2, "channels": 8})
  weights, key_map = golden.weights(description), detector_key_map(model, "torchvision")
  variables, _ = import_weights(weights, _template(model, (96, 128)), key_map)
  maps = maps_of(description, model.features)

  objectness, deltas, proposals = _proposals(model, variables, maps, description)
  answers = {"rpn_objectness_1": objectness[1], "rpn_objectness_3": objectness[3],
             "rpn_deltas_1": deltas[1], "rpn_deltas_3": deltas[3]}  # fmt: skip
  golden.assert_matches(
    {k: v for k, v in expected.items() if k.startswith("rpn_") and k[4] in "od"}, answers
  )
  for i in range(2):
    assert int(proposals.valid[i].sum()) == len(expected[f"proposals_{i}"])
    np.testing.assert_allclose(proposals.boxes[i], expected[f"proposals_{i}"], atol=1e-4)

  given = golden_proposals(expected)
  logits, deltas = _heads_on(model, variables, maps, given)
  golden.assert_matches(
    {"logits": np.roll(expected["class_logits"], -1, axis=1),
     "deltas": expected["box_regression"].reshape(-1, 5, 4)[:, 1:]},
    {"logits": logits, "deltas": deltas},
  )  # fmt: skip

  losses, found = _run(model, variables, maps, description, expected, first=1)
  for name, value in zip(("rpn_class", "rpn_box"), expected["loss_rpn"]):
    assert_near(value, losses[name])
  for name, value in zip(("class0", "box0", "mask0"), expected["loss_roi"]):
    assert_near(value, losses[name])
  assert_detections(expected, found, first=1)

  grids = [maps[level.name].shape[1:3] for level in model.features]
  anchors = np.concatenate(level_anchors(settings, grids, _STRIDES, (96, 128)))
  targets = golden_targets(expected, (96, 128), first=1)
  for i in range(2):
    assigned, _ = max_iou_assign(
      jnp.asarray(anchors), targets["boxes"][i], targets["valid"][i], positive_iou=0.7,
      negative_iou=0.3, low_quality="best",
    )  # fmt: skip
    np.testing.assert_array_equal(np.minimum(assigned, 1), expected["rpn_labels"][i])


def test_mask_logits_as_torchvision():
  description, expected = golden.load("dense/mask_rcnn", "mask_rcnn_torchvision_5classes")
  model = _model(
    torchvision_settings(**_RPN), 4, {"fc_channels": 24}, {"num_convs": 2, "channels": 8}
  )
  weights, key_map = golden.weights(description), detector_key_map(model, "torchvision")
  variables, _ = import_weights(weights, _template(model, (96, 128)), key_map)
  maps = maps_of(description, model.features)
  boxes = golden_proposals(expected).boxes[:, :3]
  all_labels = jnp.arange(4)
  found = jnp.stack(
    [
      model.apply(variables, maps, boxes, jnp.full((2, 3), label), method="masks")
      for label in all_labels
    ],
    axis=-1,
  ).reshape(6, 28, 28, 4)[:, ::3, ::3]
  wanted = jax.nn.sigmoid(expected["mask_logits"])
  wanted = wanted if wanted.shape[-1] == 4 else wanted[..., 1:]
  np.testing.assert_allclose(found, wanted, atol=2e-6)
  # What torchvision has of background is lost; the rest is as it was.
  for name, value in export_weights(variables, key_map).items():
    theirs = weights[name].copy()
    if "bbox_pred" in name and "rpn" not in name:
      theirs[:4] = 0
    if "mask_fcn_logits" in name:
      theirs[0] = 0
    np.testing.assert_array_equal(value, theirs)


def test_mask_rcnn_as_detectron2():
  description, expected = golden.load("dense/rcnn_detectron2", "mask_rcnn_d2_4classes")
  settings = detectron2_settings(**_RPN, **_ROI, score_threshold=0.02, detections=15)
  model = _model(settings, 4, {"fc_channels": (24, 20)}, {"num_convs": 2, "channels": 8})
  weights, key_map = golden.weights(description), detector_key_map(model, "detectron2")
  variables, _ = import_weights(weights, _template(model, (96, 128)), key_map)
  maps = maps_of(description, model.features)
  objectness, deltas, proposals = _proposals(model, variables, maps, description)
  given = golden_proposals(expected)
  logits, offsets = _heads_on(model, variables, maps, given)
  pooled = model.apply(
    variables, maps, given.boxes, method=lambda m, maps, boxes: m._pool(maps, boxes, 7)
  )
  named = ("rpn_objectness", "rpn_deltas", "box_features", "class_logits", "box_deltas")
  golden.assert_matches(
    {k: v for k, v in expected.items() if k.startswith(named)},
    dict(zip(named, (objectness[1], deltas[1], np.asarray(pooled)[given.valid], logits,
                     offsets.reshape(-1, 16)))),
  )  # fmt: skip
  losses, found = _run(model, variables, maps, description, expected, names="classes")
  _check_detectron2(expected, proposals, losses, found, ("box0", "class0", "mask0"))
  for name, value in export_weights(variables, key_map).items():
    np.testing.assert_array_equal(value, weights[name])


def test_cascade_as_detectron2():
  description, expected = golden.load("dense/rcnn_detectron2", "cascade_d2_3classes")
  settings = detectron2_settings(3, **_RPN, **_ROI, score_threshold=0.02, detections=15)
  box = {"fc_channels": (24, 20), "class_agnostic": True}
  model = _model(settings, 3, box, {"num_convs": 2, "channels": 8})
  weights, key_map = golden.weights(description), detector_key_map(model, "detectron2")
  variables, _ = import_weights(weights, _template(model, (96, 112)), key_map)
  maps = maps_of(description, model.features)
  proposals = _proposals(model, variables, maps, description)[-1]
  losses, found = _run(model, variables, maps, description, expected, names="classes")
  names = [f"{kind}{i}" for kind in ("box", "class") for i in range(3)]
  _check_detectron2(expected, proposals, losses, found, [*names, "mask0"])


def _check_detectron2(expected, proposals, losses, found, names):
  for i in range(2):
    np.testing.assert_allclose(proposals.boxes[i], expected[f"proposals_{i}"], atol=1e-4)
    masks = found["masks"][i, :3, ::2, ::2]
    np.testing.assert_allclose(masks, expected[f"det_masks_{i}"], atol=5e-6)
  for name, value in zip(("rpn_class", "rpn_box"), expected["loss_rpn"]):
    assert_near(value, losses[name])
  assert_detections(expected, found, labels="classes")
  for name, value in zip(names, expected["loss_roi"]):
    assert_near(value, losses[name])


def _paste(mask, box, size):
  """The binary mask over the picture: bilinear between cells' centres, zeros around."""
  x1, y1, x2, y2 = np.asarray(box, np.float64)
  y = (np.arange(size[0]) + 0.5 - y1) / (y2 - y1) * 28 - 0.5
  x = (np.arange(size[1]) + 0.5 - x1) / (x2 - x1) * 28 - 0.5
  weigh = lambda at: np.maximum(1 - np.abs(at[:, None] - np.arange(28)), 0)  # noqa: E731
  return weigh(y) @ np.asarray(mask, np.float64) @ weigh(x).T >= 0.5


def test_cascade_as_mmdetection():
  description, expected = golden.load("dense/cascade_mmdet", "cascade_giou_class_specific")
  description["arguments"] |= {"image": [96, 128], "image_sizes": [[96, 128], [89, 123]]}
  settings = cascade_settings(**_ROI, score_threshold=0.02, detections=15)
  box = {"num_convs": 2, "num_fcs": 1, "conv_channels": 8, "fc_channels": 16, "norm": "batch"}
  model = _model(settings, 4, box, {"num_convs": 2, "channels": 8}, masks=3, levels=4)
  weights = {
    f"roi_head.{k}": v for k, v in golden.weights(description).items() if "tracked" not in k
  }
  key_map = detector_key_map(model, "mmdetection")
  template = _template(model, (96, 128))
  # The golden file has no proposals' head.
  rpn = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), template["params"].pop("rpn"))
  variables, _ = import_weights(weights, template, key_map)
  for name, value in export_weights(variables, key_map).items():
    np.testing.assert_array_equal(value, weights[name])
  variables["params"]["rpn"] = rpn
  maps, given = maps_of(description, model.features), golden_proposals(expected)
  logits, deltas = _heads_on(model, variables, maps, given)
  flat, corner = deltas.reshape(-1, 16), expected["stage0_deltas_corner"]
  np.testing.assert_allclose(flat[:8, :8], corner.reshape(8, 8), atol=1e-6)
  wanted = {k: v for k, v in expected.items() if k.startswith("stage0") and "corner" not in k}
  golden.assert_matches(wanted, {"stage0_class_logits": logits, "stage0_deltas": flat})
  levels = roi_levels(given.boxes, 4)[given.valid]
  np.testing.assert_array_equal(levels, expected["levels"].ravel())
  losses, found = _run(model, variables, maps, description, expected)
  assert_detections(expected, found)
  names = [f"{kind}{i}" for i in range(3) for kind in ("box", "class", "mask")]
  for name, value in zip(names, expected["losses"]):
    assert_near(value, losses[name])
  for i, size in enumerate(description["arguments"]["image_sizes"]):
    bits = np.unpackbits(expected[f"det_masks_{i}"])[: 4 * size[0] * size[1]]
    for k, mask in enumerate(bits.reshape(4, *size).astype(bool)):
      assert (_paste(found["masks"][i, k], found["boxes"][i, k], size) != mask).sum() == 0
