"""Boxes: torchvision's and mmdetection's own numbers, and round trips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.boxes import (
  box_areas,
  centres_to_corners,
  clip_boxes,
  corners_to_centres,
  decode_boxes,
  elementwise_giou,
  encode_boxes,
  pairwise_iou,
)
from tests import golden

_CODINGS = {
  "unit": (0.3, (1.0, 1.0, 1.0, 1.0)),
  "rcnn": (3.0, (10.0, 10.0, 5.0, 5.0)),
  "cascade3": (3.0, (30.0, 30.0, 15.0, 15.0)),
}


def _case():
  return golden.load("dense/box_coding", "box_coding_24")[1]


def _random(rng, *shape):
  corners = rng.uniform(0, 60, (*shape, 2, 2))
  return np.sort(corners, axis=-2).reshape(*shape, 4).astype(np.float32)


@pytest.mark.parametrize("name", _CODINGS)
def test_coding_of_torchvision(name):
  stored = _case()
  scale, weights = _CODINGS[name]
  stds = tuple(1 / w for w in weights)
  encoded = encode_boxes(stored["anchors"], stored["gt"], stds=stds)
  expected = stored[f"encode_{name}"]
  np.testing.assert_allclose(encoded, expected, rtol=2e-6, atol=1e-5 * expected.std())
  deltas = scale * stored["deltas"].reshape(24, 2, 4)
  decoded = decode_boxes(stored["anchors"][:, None], deltas, stds=stds, two_sided=False)
  expected = stored[f"decode_{name}"].reshape(24, 2, 4)
  np.testing.assert_allclose(decoded, expected, rtol=2e-6, atol=1e-5 * expected.std())


def test_decoding_of_mmdetection():
  _, stored = golden.load("dense/assign_mmdet", "assign_96x128")
  decoded = decode_boxes(
    stored["anchors"][::7][:20],
    5 * stored["deltas"],
    stds=(0.1, 0.1, 0.2, 0.2),
    two_sided=True,
    size=(93, 126),
  )
  np.testing.assert_allclose(decoded, stored["decoded"], atol=1e-4)


def test_the_clamp_has_one_side_or_two():
  anchor = np.array([0, 0, 10, 10], np.float32)
  deltas = np.array([0, 0, -9, 9], np.float32)
  for two_sided, width in ((False, 10 * np.exp(-9)), (True, 10 * 16 / 1000)):
    box = decode_boxes(anchor, deltas, two_sided=two_sided)
    np.testing.assert_allclose(box[2] - box[0], width, atol=1e-6)
    np.testing.assert_allclose(box[3] - box[1], 625, rtol=1e-5)


def test_overlaps_of_torchvision():
  stored = _case()
  first, second = stored["anchors"][:12], stored["gt"][:9]
  for kind in ("iou", "giou"):
    found = pairwise_iou(first, second, kind)
    np.testing.assert_allclose(found, stored[kind], atol=2e-6)
  shared = np.asarray(stored["iou"], np.float64)
  areas = np.asarray(box_areas(first))[:, None] + np.asarray(box_areas(second))
  shared = shared * areas / (1 + shared)
  iof = pairwise_iou(first, second, "iof")
  np.testing.assert_allclose(iof, shared / box_areas(first)[:, None], atol=1e-5)


def test_overlaps_are_rounded_step_by_step():
  # As PyTorch and NumPy round: equal overlaps of different anchors stay equal, or do not.
  rng = np.random.default_rng(2)
  a, b = _random(rng, 60), _random(rng, 60)
  size = np.maximum(
    np.minimum(a[:, None, 2:], b[:, 2:]) - np.maximum(a[:, None, :2], b[:, :2]), np.float32(0)
  )
  shared = size[..., 0] * size[..., 1]
  first, second = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b))
  expected = shared / (first[:, None] + second - shared)
  np.testing.assert_array_equal(jax.jit(pairwise_iou)(a, b), expected)


def test_clipping():
  stored = _case()
  boxes = 1.5 * stored["anchors"] - 10
  np.testing.assert_array_equal(clip_boxes(boxes, (96, 128)), stored["clipped"])
  sizes = jnp.array([[[96, 128]], [[50, 20]]])
  each = clip_boxes(jnp.stack([boxes, boxes]), sizes)
  np.testing.assert_array_equal(each[0], stored["clipped"])
  np.testing.assert_array_equal(each[1], clip_boxes(boxes, (50, 20)))


def test_forms_agree_and_batches_are_batches():
  rng = np.random.default_rng(0)
  a, b = _random(rng, 2, 5), _random(rng, 2, 5)
  table = pairwise_iou(a, b, "giou")
  assert table.shape == (2, 5, 5)
  np.testing.assert_allclose(
    elementwise_giou(a, b), np.diagonal(table, axis1=1, axis2=2), atol=1e-6
  )
  np.testing.assert_allclose(pairwise_iou(a[1], b[1], "giou"), table[1], atol=1e-6)


def test_empty_boxes_overlap_nothing_and_have_finite_gradients():
  boxes = np.array([[3, 3, 3, 3], [0, 0, 8, 8]], np.float32)
  np.testing.assert_array_equal(pairwise_iou(boxes, boxes), [[0, 0], [0, 1]])
  gradient = jax.grad(lambda b: jnp.sum(elementwise_giou(b, boxes)))(jnp.asarray(boxes))
  assert np.isfinite(gradient).all()
  assert np.isfinite(encode_boxes(boxes, boxes, eps=1e-6)).all()


def test_round_trips():
  rng = np.random.default_rng(1)
  anchors, boxes = _random(rng, 7), _random(rng, 7)
  means, stds = (0.1, -0.1, 0.2, 0.0), (0.1, 0.1, 0.2, 0.2)
  deltas = encode_boxes(anchors, boxes, means, stds)
  decode = functools.partial(decode_boxes, two_sided=True, max_log_ratio=20.0)
  np.testing.assert_allclose(decode(anchors, deltas, means, stds), boxes, atol=1e-4)
  np.testing.assert_allclose(centres_to_corners(corners_to_centres(boxes)), boxes, atol=1e-5)
  np.testing.assert_allclose(corners_to_centres(np.float32([1, 2, 5, 10])), [3, 6, 4, 8])


def test_an_unknown_kind_is_named():
  with pytest.raises(ValueError, match=r"'diou'.*iou, giou, iof"):
    pairwise_iou(np.zeros((1, 4)), np.zeros((1, 4)), "diou")
