"""Detectors whose settings ask for soft suppression."""

import functools

import jax
import numpy as np
import pytest

from hybrid_vit.heads.atss import create_atss
from hybrid_vit.heads.detectors import create_detector
from hybrid_vit.heads.retinanet import create_retinanet
from hybrid_vit.ops.nms import soft_nms
from tests.heads.detectors import Blank
from tests.heads.pyramids import levels
from tests.models import contract

_LEVELS = levels((4, 6, 8), (8, 16, 32))
_SIZE = (48, 64)
_DENSE = {"before": 10_000, "candidates": 10_000, "detections": 30}
_RPN = {"rpn_before": (50, 50), "rpn_after": (20, 20), "anchor_scales": (4.0,), "detections": 30,
        "sampling_ratio": 2, "num_roi_levels": 3}  # fmt: skip


def _make(kind, **settings):
  backbone = Blank(_LEVELS)
  neck = {"name": "fpn", "channels": 8}
  if kind == "mask_rcnn":
    return create_detector(
      kind, backbone, 3, masks=False, neck={**neck, "extra": "max_pool", "num_extra": 1},
      box_head={"fc_channels": 16}, settings={**_RPN, **settings},
    )  # fmt: skip
  name, _, selection = kind.partition(" ")
  head = {"num_convs": 1} | ({"norm_groups": 4} if name == "atss" else {})
  extra = {"extra": "on_output", "num_extra": 1}
  return create_detector(
    name, backbone, 3, neck={**neck, **extra}, head=head,
    settings={**_DENSE, "selection": selection, **settings},
  )  # fmt: skip


_KINDS = ["mask_rcnn", "retinanet anchors", "retinanet pairs", "atss anchors", "atss pairs"]


@pytest.mark.parametrize("kind", _KINDS)
def test_scores_are_lowered_as_soft_nms_says(kind):
  images = np.random.default_rng(0).standard_normal((1, *_SIZE, 3)).astype(np.float32)
  model = _make(kind)
  variables = contract.initialize(model, images)

  # Heads begin so small that nothing would be found.
  def louder(path, x):
    name = jax.tree_util.keystr(path)
    x = 20 * x if "classifier" in name or "deltas" in name else x
    return x * (x.ndim > 1) if "classifier" in name else x

  variables = jax.tree_util.tree_map_with_path(louder, variables)
  run = functools.cache(lambda **s: jax.jit(_make(kind, **s).apply)(variables, images))
  hard = run(detections=100)
  # All that there is to be suppressed: no IoU is above 2.
  everything = run(nms=2.0, detections=10_000 if kind != "mask_rcnn" else 60)
  there = np.asarray(everything["valid"][0])
  assert everything["valid"].sum() > hard["valid"].sum()
  for method, sigma in (("linear", 0.5), ("gaussian", 0.3)):
    soft = run(nms_method=method, nms_sigma=sigma, nms_min_score=0.01, nms=0.3)
    expected = soft_nms(
      everything["boxes"][0], everything["scores"][0], method=method, iou_threshold=0.3,
      sigma=sigma, min_score=0.01, valid=there, labels=everything["labels"][0],
    )  # fmt: skip
    expected = -np.sort(-np.asarray(expected))[:30]
    found = np.zeros(30)
    count = int(soft["valid"].sum())
    found[:count] = soft["scores"][0][:count]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not np.any(soft["scores"][0][count:]) and not soft["truncated"].any()
    assert np.asarray(soft["scores"]).sum() < np.asarray(everything["scores"])[0, :30].sum()


def test_bad_settings_are_told():
  for create in (create_retinanet, create_atss):
    name = create.__name__.removeprefix("create_")
    with pytest.raises(ValueError, match="nms_method is 'soft'; one of hard, linear, gaussian"):
      create_detector(name, Blank(_LEVELS), 3, settings={"nms_method": "soft"})
  with pytest.raises(ValueError, match="nms_method is 'soft'; one of hard, linear, gaussian"):
    _make("mask_rcnn", nms_method="soft")
