"""Assignment: mmdetection's own, the rules written out as loops, and the law of the sampler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.anchors import pyramid_anchors
from hybrid_vit.ops.assignment import atss_assign, max_iou_assign, random_sample
from hybrid_vit.ops.boxes import pairwise_iou
from tests import golden

_GRIDS = ((12, 16), (6, 8), (3, 4))
_SETTINGS = {
  "rpn": dict(positive_iou=0.7, negative_iou=0.3, min_positive_iou=0.3),
  "rcnn": dict(positive_iou=0.5, negative_iou=0.5, min_positive_iou=0.5, low_quality="none"),
  "retina": dict(positive_iou=0.5, negative_iou=0.4, min_positive_iou=0.0),
}
_ASSIGN = jax.jit(
  max_iou_assign,
  static_argnames=(
    "positive_iou", "negative_iou", "min_positive_iou", "low_quality", "ignore_iof",
    "ignore_by_box",
  ),
)  # fmt: skip


def _case():
  return golden.load("dense/assign_mmdet", "assign_96x128")[1]


def _padded(boxes, count=9):
  """Padding within: a flag is what counts, not the place."""
  rows = np.zeros((count, 4), np.float32)
  rows[:] = [0, 0, 60, 60]
  places = np.sort(np.random.default_rng(0).permutation(count)[: len(boxes)])
  rows[places] = boxes
  return rows, np.isin(np.arange(count), places), np.concatenate([[-1, 0], places + 1])


def _loops(iou, valid, positive_iou, negative_iou, min_positive_iou=0.0, low_quality="own"):
  """From IoUs `[G, N]` of valid true boxes alone."""
  assigned = []
  for column, takes_part in zip(iou.T, valid):
    best = column.max()
    value = -1
    if best < negative_iou:
      value = 0
    if best >= positive_iou:
      value = int(column.argmax()) + 1
    assigned.append(value if takes_part else -1)
  for i, row in enumerate(iou):
    best = row[valid].max()
    for j in np.flatnonzero((row == best) & valid):
      if low_quality != "none" and best >= min_positive_iou:
        assigned[j] = i + 1 if low_quality == "own" else int(iou[:, j].argmax()) + 1
  return np.array(assigned)


@pytest.mark.parametrize("name", _SETTINGS)
def test_mmdetections_answers(name):
  stored = _case()
  gt = stored["gt_boxes"]
  found, largest = _ASSIGN(stored["anchors"], gt, np.ones(len(gt), bool), **_SETTINGS[name])
  np.testing.assert_array_equal(found, stored[f"assigned_{name}"])
  np.testing.assert_allclose(largest, stored["max_iou"], atol=1e-6)
  rows, valid, number = _padded(gt)
  found, largest = _ASSIGN(stored["anchors"], rows, valid, **_SETTINGS[name])
  np.testing.assert_array_equal(found, number[stored[f"assigned_{name}"] + 1])
  np.testing.assert_allclose(largest, stored["max_iou"], atol=1e-6)


@pytest.mark.parametrize("low_quality", ["own", "best", "none"])
@pytest.mark.parametrize("least", [0.0, 0.3])
def test_rules_on_ties(low_quality, least):
  rng = np.random.default_rng(3)
  corner = rng.integers(0, 6, (80, 2)) * 2.0
  boxes = np.concatenate([corner, corner + rng.integers(1, 4, (80, 2)) * 2.0], 1)
  boxes, gt = boxes[:74].astype(np.float32), boxes[74:].astype(np.float32)
  gt[5] = gt[0]
  valid = rng.random(74) < 0.8
  kwargs = dict(positive_iou=0.7, negative_iou=0.3, min_positive_iou=least, low_quality=low_quality)
  expected = _loops(np.asarray(pairwise_iou(gt, boxes)), valid, **kwargs)
  found, largest = _ASSIGN(boxes, gt, np.ones(6, bool), valid=valid, **kwargs)
  np.testing.assert_array_equal(found, expected)
  assert (np.asarray(largest)[~valid] == -1).all() and (np.asarray(largest)[valid] >= 0).all()


def test_pictures_without_boxes_are_background():
  stored = _case()
  valid = np.arange(756) % 5 > 0
  for gt in (stored["gt_boxes"], stored["gt_boxes"][:0]):
    found, largest = _ASSIGN(
      stored["anchors"], gt, np.zeros(len(gt), bool), valid=valid, **_SETTINGS["retina"]
    )
    np.testing.assert_array_equal(found, np.where(valid, 0, -1))
    np.testing.assert_array_equal(largest, np.where(valid, 0.0, -1.0))
    counts = (576, 144, 36)
    found, _ = atss_assign(stored["anchors"], counts, gt, np.zeros(len(gt), bool), valid=valid)
    np.testing.assert_array_equal(found, np.where(valid, 0, -1))


@pytest.mark.parametrize("by_box", [True, False])
def test_ignored_regions(by_box):
  boxes = np.array([[0, 0, 4, 4], [2, 0, 6, 4], [20, 0, 24, 4], [0, 0, 40, 8]], np.float32)
  gt, flags = np.array([[0, 0, 4, 4]], np.float32), np.ones(1, bool)
  regions = np.array([[0, 0, 5, 8], [20, 0, 30, 30]], np.float32)
  found, largest = _ASSIGN(
    boxes, gt, flags, ignore_boxes=regions, ignore_valid=np.array([True, False]), ignore_iof=0.5,
    ignore_by_box=by_box, **_SETTINGS["rcnn"],
  )  # fmt: skip
  # Parts of the boxes in the first region: 1, 3/4, 0, 1/8; of the region: 0.4, 0.3, 0, 1.
  ignored = np.array([True, True, False, False] if by_box else [False, False, False, True])
  plain = np.array([1, 0, 0, 0])
  np.testing.assert_array_equal(found, np.where(ignored, -1, plain))
  np.testing.assert_array_equal(np.asarray(largest) == -1, ignored)


def test_atss_answers_of_mmdetection():
  stored = _case()
  counts = tuple(rows * columns for rows, columns in _GRIDS)
  anchors = np.concatenate(pyramid_anchors(_GRIDS, (8, 16, 32), (4.0,), (1.0,)))
  run = jax.jit(functools.partial(atss_assign, level_counts=counts))
  gt = stored["gt_boxes"]
  found, _ = run(anchors, gt_boxes=gt, gt_valid=np.ones(len(gt), bool))
  np.testing.assert_array_equal(found, stored["assigned_atss"])
  rows, valid, number = _padded(gt)
  found, overlap = run(anchors, gt_boxes=rows, gt_valid=valid)
  np.testing.assert_array_equal(found, number[stored["assigned_atss"] + 1])
  own = np.asarray(pairwise_iou(rows, anchors))[np.asarray(found) - 1, np.arange(252)]
  np.testing.assert_allclose(overlap, np.where(np.asarray(found) > 0, own, 0), atol=1e-6)


@pytest.mark.parametrize("image", [0, 1])
def test_atss_by_loops(image):
  _, stored = golden.load("dense/atss_mmdet", "atss_3classes")
  gt = stored[f"gt_boxes_{image}"]
  grids = (*_GRIDS, (2, 2), (1, 1))
  levels = pyramid_anchors(grids, (8, 16, 32, 64, 128), (4.0,), (1.0,))
  anchors = np.concatenate(levels)
  valid = np.ones(len(anchors), bool)
  valid[[0, 30, 31, 32, 33, 200, 201, 202, 240, 241, 245, 255]] = False
  counts = tuple(len(level) for level in levels)
  found, _ = atss_assign(anchors, counts, gt, np.ones(len(gt), bool), valid=valid)

  iou = np.asarray(pairwise_iou(gt, anchors), np.float64)
  centre = (anchors[:, :2] + anchors[:, 2:]) / 2
  best, expected = np.full(len(anchors), -np.inf), np.where(valid, 0, -1)
  for i, box in enumerate(gt):
    apart = np.linalg.norm(centre - (box[:2] + box[2:]) / 2, axis=1)
    chosen: list[int] = []
    for start, count in zip(np.cumsum((0, *counts)), counts):
      own = [j for j in range(start, start + count) if valid[j]]
      chosen += sorted(own, key=lambda j: apart[j])[:9]
    threshold = iou[i, chosen].mean() + iou[i, chosen].std(ddof=1)
    for j in chosen:
      inside = min(*(centre[j] - box[:2]), *(box[2:] - centre[j])) > 0.01
      if iou[i, j] >= threshold and inside and iou[i, j] > best[j]:
        best[j], expected[j] = iou[i, j], i + 1
  assert (expected > 0).sum() > 3
  np.testing.assert_array_equal(found, expected)


_SAMPLE = jax.jit(
  jax.vmap(random_sample, in_axes=(0, None, None, None, None)), static_argnums=(2, 3, 4)
)


@pytest.mark.parametrize(
  ("positives", "negatives", "expected"),
  [(10, 30, (4, 12)), (3, 30, (3, 13)), (3, 5, (3, 5)), (0, 30, (0, 16)), (9, 2, (4, 2))],
)
def test_sampler_fills_up(positives, negatives, expected):
  assigned = np.random.default_rng(0).permutation(
    [7] * positives + [0] * negatives + [-1] * (45 - positives - negatives)
  )
  drawn = _SAMPLE(jax.random.split(jax.random.key(0), 3), assigned, 16, 0.25, -1.0)
  for indices, positive, valid in zip(*(np.asarray(x) for x in drawn)):
    assert (positive.sum(), (valid & ~positive).sum()) == expected
    np.testing.assert_array_equal(positive, np.arange(16) < expected[0])
    np.testing.assert_array_equal(valid, np.arange(16) < sum(expected))
    assert (assigned[indices[positive]] == 7).all()
    assert (assigned[indices[valid & ~positive]] == 0).all()
    assert len(set(indices[valid])) == sum(expected)


def test_sampler_is_uniform_and_its_own_with_each_key():
  assigned = np.array([1] * 8 + [0] * 12 + [-1] * 4)
  drawn = _SAMPLE(jax.random.split(jax.random.key(1), 4000), assigned, 8, 0.5, -1.0)
  counts = np.bincount(np.asarray(drawn.indices).ravel(), minlength=24)
  np.testing.assert_allclose(counts[:8] / 4000, 4 / 8, atol=0.04)
  np.testing.assert_allclose(counts[8:20] / 4000, 4 / 12, atol=0.04)
  assert not counts[20:].any()


def test_sampler_limits_and_sizes():
  assigned = np.array([1, 0, 0, 0, 0, 0])
  keys = jax.random.split(jax.random.key(2), 1)
  few = _SAMPLE(keys, assigned, 4, 0.25, 2.0)
  assert list(few.valid[0]) == [True, True, True, False]
  many = _SAMPLE(keys, assigned, 512, 0.25, -1.0)
  assert many.indices.shape == (1, 512) and many.valid.sum() == 6


def test_what_does_not_fit_is_named():
  boxes = jnp.zeros((5, 4))
  with pytest.raises(ValueError, match=r"'all'.*none, own, best"):
    max_iou_assign(
      boxes, boxes, jnp.ones(5, bool), positive_iou=1, negative_iou=0, low_quality="all"
    )
  with pytest.raises(ValueError, match=r"\[2, 2\] anchors are 4; 5 were expected"):
    atss_assign(boxes, (2, 2), boxes, jnp.ones(5, bool))
