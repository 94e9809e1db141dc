"""Which proposals are trained on, and on what."""

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.heads.roi_sampling import match_rois, sample_rois
from hybrid_vit.ops.boxes import pairwise_iou

_CLASSES = 5


def _picture(proposals=60, room=4, there=3, seed=0):
  rng = np.random.default_rng(seed)
  gt_valid = np.arange(room) < there
  low = rng.uniform(0, 60, (room, 2))
  gt_boxes = np.concatenate([low, low + rng.uniform(15, 30, (room, 2))], axis=1)
  gt_boxes *= gt_valid[:, None]
  near = gt_boxes[rng.integers(0, there, proposals)] + rng.uniform(-9, 9, (proposals, 4))
  valid = np.arange(proposals) < proposals - 10
  labels = rng.integers(0, _CLASSES, room)
  arrays = (near.astype(np.float32), valid, gt_boxes.astype(np.float32), labels, gt_valid)
  return tuple(map(jnp.asarray, arrays))


def _check(sample, boxes, valid, gt_boxes, gt_labels, gt_valid, iou=0.5):
  """Every box is trained on what it overlaps most."""
  del boxes, valid
  overlap = np.where(gt_valid, pairwise_iou(sample.boxes, gt_boxes), -1)
  kept = np.asarray(sample.valid)
  best = overlap.max(axis=1)
  np.testing.assert_array_equal(np.asarray(sample.positive)[kept], best[kept] >= iou)
  own = np.asarray(sample.positive) & kept
  np.testing.assert_array_equal(np.asarray(sample.gt)[own], overlap.argmax(axis=1)[own])
  np.testing.assert_array_equal(sample.gt_boxes[own], gt_boxes[sample.gt[own]])
  np.testing.assert_array_equal(sample.labels[own], gt_labels[sample.gt[own]])
  assert (np.asarray(sample.labels)[~own] == _CLASSES).all()


def _draw(key, given, **changes):
  options = {"num_classes": _CLASSES, "iou": 0.5, "low_quality": "none", "samples": 24,
             "positive_fraction": 0.25, **changes}  # fmt: skip
  return jax.jit(lambda key: sample_rois(key, *given, **options))(key)


def test_a_quarter_is_positive_and_each_is_drawn_once():
  given = _picture()
  seen = np.zeros(len(given[0]))
  for i in range(20):
    sample = _draw(jax.random.key(i), given, iou=0.6)
    _check(sample, *given, iou=0.6)
    assert sample.valid.all()
    assert sample.positive.sum() == 6
    assert sample.positive[:6].all()
    assert len(np.unique(np.asarray(sample.boxes), axis=0)) == 24
    seen += (np.asarray(given[0])[:, None] == np.asarray(sample.boxes)).all(axis=-1).any(axis=1)
  assert not seen[-10:].any()
  assert (seen[:-10] > 0).mean() > 0.9


def test_true_boxes_join():
  given = _picture()
  sample = _draw(jax.random.key(0), given, samples=100, positive_fraction=1.0)
  _check(sample, *given)
  assert sample.valid.sum() == 50 + 3
  assert sample.added.sum() == 3
  np.testing.assert_array_equal(
    sample.gt_boxes[sample.added], np.asarray(sample.boxes)[np.asarray(sample.added)]
  )
  alone = _draw(jax.random.key(0), given, samples=100, positive_fraction=1.0, add_gt=False)
  assert alone.valid.sum() == 50
  assert not alone.added.any()


def test_padding_repeats_what_was_drawn():
  given = _picture(proposals=20)
  sample = _draw(jax.random.key(0), given, samples=40, positive_fraction=1.0)
  count = int(sample.valid.sum())
  assert count == 13
  np.testing.assert_array_equal(sample.valid, np.arange(40) < count)
  np.testing.assert_array_equal(sample.boxes[count:], sample.boxes[np.arange(count, 40) % count])
  assert not sample.positive[count:].any()
  assert not sample.added[count:].any()


def test_a_true_box_claims_its_best_proposal_before_it_joins():
  """One proposal lies exactly on the first true box, and is the second's best too."""
  boxes = jnp.array([[0.0, 0, 10, 11]])
  gt = jnp.array([[0.0, 0, 10, 11], [0, 0, 10, 12]])
  given = (boxes, jnp.ones(1, bool), gt, jnp.array([1, 2]), jnp.ones(2, bool))
  for low_quality, expected in (("none", [1, 1, 2]), ("own", [1, 2, 2])):
    sample = _draw(jax.random.key(0), given, samples=3, positive_fraction=1.0,
                   low_quality=low_quality)  # fmt: skip
    assert sorted(map(int, sample.labels)) == expected


def test_matching_keeps_the_order():
  given = _picture()
  sample = match_rois(*given, num_classes=_CLASSES, iou=0.7)
  _check(sample, *given, iou=0.7)
  np.testing.assert_array_equal(sample.boxes, given[0])
  np.testing.assert_array_equal(sample.valid, given[1])
