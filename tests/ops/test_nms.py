"""Suppression: torchvision's own answers, and the greedy loop written out in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.nms import (
  SoftNMS,
  multiclass_nms,
  nms,
  reference_nms,
  select_top,
  soft_nms,
  soft_or_none,
)
from tests import golden

_NMS = jax.jit(nms)
_REFERENCE = jax.jit(reference_nms)


def _iou(a, b):
  w = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
  h = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
  union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
  return w * h / union if union > 0 else 0.0


def _greedy(boxes, scores, threshold, valid, labels):
  boxes = boxes.astype(np.float64)
  kept = []
  for i in np.argsort(-scores, kind="stable"):
    clear = all(labels[i] != labels[j] or not _iou(boxes[i], boxes[j]) > threshold for j in kept)
    if valid[i] and clear:
      kept.append(i)
  return np.isin(np.arange(len(boxes)), kept)


def _random(seed, count):
  """Crowded boxes on a grid of quarters, whose IoUs are far from the thresholds or exact."""
  rng = np.random.default_rng(seed)
  corner = rng.integers(0, 100, (count, 2)) / 4
  boxes = np.concatenate([corner, corner + rng.integers(1, 80, (count, 2)) / 4], 1)
  return boxes.astype(np.float32), rng.integers(0, 30, count).astype(np.float32) / 30, rng


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7])
def test_torchvisions_answers(threshold):
  _, stored = golden.load("dense/nms", "nms_80_boxes")
  boxes, scores, labels = stored["boxes"], stored["scores"], stored["labels"]
  for form in (_NMS, _REFERENCE):
    kept = form(boxes, scores, threshold)
    np.testing.assert_array_equal(np.flatnonzero(kept), np.sort(stored[f"keep_{threshold}"]))
    kept = form(boxes, scores, threshold, None, labels)
    expected = np.sort(stored[f"keep_batched_{threshold}"])
    np.testing.assert_array_equal(np.flatnonzero(kept), expected)


@pytest.mark.parametrize("threshold", [0.0, 0.31, 0.57])
def test_greedy_definition(threshold):
  for seed in range(4):
    boxes, scores, rng = _random(seed, 150)
    valid, labels = rng.random(150) < 0.8, rng.integers(0, 2, 150)
    for which in (valid, np.ones(150, bool)):
      for classes in (labels, np.zeros(150, int)):
        expected = _greedy(boxes, scores, threshold, which, classes)
        for form in (_NMS, _REFERENCE):
          kept = form(boxes, scores, threshold, which, classes)
          np.testing.assert_array_equal(kept, expected)


def test_a_chain_in_which_each_box_decides_about_the_next():
  # Box i overlaps box i + 1 alone: every other one stays, after as many rounds as boxes.
  left = 6.0 * np.arange(40)
  boxes = np.stack([left, 0 * left, left + 10, 0 * left + 10], 1).astype(np.float32)
  scores = np.linspace(1, 0.5, 40).astype(np.float32)
  np.testing.assert_array_equal(_NMS(boxes, scores, 0.2), np.arange(40) % 2 == 0)


def test_thousands_of_boxes_and_batches():
  cases = [_random(seed, 1500)[:2] for seed in range(2)]
  boxes, scores = (np.stack(rows) for rows in zip(*cases))
  kept = jax.jit(jax.vmap(lambda b, s: nms(b, s, 0.57)))(boxes, scores)
  for b, s, k in zip(boxes, scores, kept):
    np.testing.assert_array_equal(k, _REFERENCE(b, s, 0.57))


def test_the_threshold_itself_does_not_suppress():
  boxes = np.array([[0, 0, 2, 2], [0, 0, 2, 4], [0, 0, 0, 0], [0, 0, 0, 0]], np.float32)
  scores = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
  np.testing.assert_array_equal(nms(boxes, scores, 0.5), [True] * 4)
  np.testing.assert_array_equal(nms(boxes, scores, 0.499), [True, False, True, True])


def test_select_top():
  scores = np.array([0.2, 0.9, 0.9, 0.5], np.float32)
  indices, there = select_top(scores, np.array([True, True, True, False]), 6)
  np.testing.assert_array_equal(indices[:3], [1, 2, 0])
  np.testing.assert_array_equal(there, [True] * 3 + [False] * 3)


@pytest.mark.parametrize("each_class", [False, True])
def test_multiclass(each_class):
  boxes, _, rng = _random(5, 30 * 4)
  boxes = boxes.reshape(30, 4, 4) if each_class else boxes[:30]
  scores = rng.permutation(120).reshape(30, 4).astype(np.float32) / 120
  valid = rng.random(30) < 0.9
  run = functools.partial(multiclass_nms, score_threshold=0.3, iou_threshold=0.31)
  found = jax.jit(functools.partial(run, max_candidates=120, max_detections=12))(
    boxes, scores, valid=valid
  )
  rows = []
  for label in range(4):
    own = boxes[:, label] if each_class else boxes
    which = valid & (scores[:, label] > 0.3)
    kept = _greedy(own, scores[:, label], 0.31, which, np.zeros(30))
    rows += [(scores[i, label], label, i, own[i]) for i in np.flatnonzero(kept)]
  rows = sorted(rows, key=lambda row: -row[0])[:12]
  assert found.valid.all() and not found.truncated
  np.testing.assert_array_equal(found.scores, [row[0] for row in rows])
  np.testing.assert_array_equal(found.labels, [row[1] for row in rows])
  np.testing.assert_array_equal(found.indices, [row[2] for row in rows])
  np.testing.assert_array_equal(found.boxes, [row[3] for row in rows])


def test_too_few_candidates_are_reported():
  boxes = np.tile(np.array([0, 0, 4, 4], np.float32), (6, 1))
  boxes[5] += 9
  scores = np.linspace(0.9, 0.4, 6, dtype=np.float32)[:, None]
  run = functools.partial(multiclass_nms, score_threshold=0.1, iou_threshold=0.5)
  few = run(boxes, scores, max_candidates=5, max_detections=2)
  assert few.truncated and list(few.valid) == [True, False]
  assert few.scores[1] == 0 and not few.boxes[1].any()
  enough = run(boxes, scores, max_candidates=6, max_detections=2)
  assert not enough.truncated and list(enough.indices) == [0, 5]
  assert not run(boxes, scores, max_candidates=5, max_detections=1).truncated


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft(method):
  boxes, scores, rng = _random(7, 40)
  labels, valid = rng.integers(0, 2, 40), rng.random(40) < 0.9
  run = jax.jit(functools.partial(soft_nms, method=method, min_score=0.05))
  found = run(boxes, scores, valid=valid, labels=labels)
  expected = np.zeros(40)
  for label in range(2):
    left = {i: float(scores[i]) for i in np.flatnonzero((labels == label) & valid)}
    while left:
      best = max(left, key=lambda i: (left[i], -i))
      score = left.pop(best)
      if score < 0.05:
        break
      expected[best] = score
      for i in left:
        iou = _iou(boxes[best].astype(float), boxes[i].astype(float))
        soft = (1 - iou if iou >= 0.3 else 1) if method == "linear" else np.exp(-(iou**2) / 0.5)
        left[i] *= soft
  assert 0 < np.count_nonzero(expected) < valid.sum()
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_detections_of_several_classes(method):
  boxes, _, rng = _random(6, 30)
  scores = rng.permutation(90).reshape(30, 3).astype(np.float32) / 90
  run = functools.partial(
    multiclass_nms, score_threshold=0.2, iou_threshold=0.1, max_candidates=90, max_detections=40
  )
  soft = SoftNMS(method, sigma=0.4, min_score=0.1)
  found, hard = (jax.jit(functools.partial(run, soft=s))(boxes, scores) for s in (soft, None))
  rows = []
  for label in range(3):
    own = np.where(scores[:, label] > 0.2, scores[:, label], 0)
    lowered = soft_nms(
      boxes, own, method=method, iou_threshold=0.1, sigma=0.4, min_score=0.1, valid=own > 0
    )
    rows += [(float(x), label, i) for i, x in enumerate(lowered) if x > 0]
  rows = sorted(rows, key=lambda row: -row[0])[:40]
  assert len(rows) == 40
  np.testing.assert_allclose(found.scores, [row[0] for row in rows], rtol=1e-6)
  np.testing.assert_array_equal(found.labels, [row[1] for row in rows])
  np.testing.assert_array_equal(found.indices, [row[2] for row in rows])
  np.testing.assert_array_equal(found.boxes, boxes[[row[2] for row in rows]])
  assert found.valid.all() and not found.truncated
  assert not np.array_equal(found.indices, hard.indices)


def test_soft_detections_that_fall_behind_what_was_left_out_are_reported():
  boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 3], [9, 9, 12, 12]], np.float32)
  scores = np.array([[0.9], [0.8], [0.7]], np.float32)
  run = functools.partial(
    multiclass_nms, score_threshold=0.1, iou_threshold=0.5, soft=SoftNMS("linear")
  )
  # The second box is lowered to 0.2, below the third that was no candidate.
  few = run(boxes, scores, max_candidates=2, max_detections=2)
  assert few.truncated and few.valid.all()
  np.testing.assert_allclose(few.scores, [0.9, 0.2], rtol=1e-5)
  whole = run(boxes, scores, max_candidates=3, max_detections=2)
  assert not whole.truncated and list(whole.indices) == [0, 2]
  assert not run(boxes, scores, max_candidates=2, max_detections=1).truncated


def test_an_unknown_method_is_named():
  with pytest.raises(ValueError, match=r"nms_method is 'soft'; one of hard, linear, gaussian was"):
    soft_or_none("soft", 0.5, 0.0)
  with pytest.raises(ValueError, match="nms_sigma is 0; a number above 0 was expected"):
    soft_or_none("gaussian", 0, 0.0)
  assert soft_or_none("hard", 0.5, 0.0) is None
  with pytest.raises(ValueError, match=r"'hard'.*linear, gaussian"):
    soft_nms(jnp.zeros((1, 4)), jnp.zeros(1), method="hard")
