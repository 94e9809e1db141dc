"""Panoptic quality: panopticapi's own figures, and what is refused."""

import math

import numpy as np
import pytest

from hybrid_vit.metrics.panoptic_quality import (
  Segments,
  class_qualities,
  panoptic_metrics,
  panoptic_sums,
)
from tests import golden


def _sums():
  _, stored = golden.load("dense/panoptic_quality", "pq_4_images")
  each = []
  for i in range(4):
    predicted = stored["pred_segments"][stored["pred_segments"][:, 0] == i]
    truth = stored["gt_segments"][stored["gt_segments"][:, 0] == i]
    each.append(
      panoptic_sums(
        stored["pred_ids"][i],
        Segments(predicted[:, 1], predicted[:, 2] - 1),
        stored["gt_ids"][i],
        Segments(truth[:, 1], truth[:, 2] - 1, truth[:, 3]),
        7,
      )
    )
  return sum(each), stored


def test_panopticapis_figures():
  sums, stored = _sums()
  np.testing.assert_allclose(sums, stored["per_category"], rtol=1e-12)
  metrics = panoptic_metrics(sums, np.arange(7) < 3)
  for row, suffix in zip(stored["pq"], ("", "_things", "_stuff")):
    found = [metrics[name + suffix] for name in ("pq", "sq", "rq")]
    np.testing.assert_allclose(found, row[:3], rtol=1e-12)
  assert np.isnan(class_qualities(sums)[:, 0]).sum() == 7 - stored["pq"][0, 3]


def test_void_and_crowds_excuse():
  truth = np.zeros((2, 10), int)
  truth[0] = 5  # a crowd of class 0
  truth[1, :4] = 9
  predicted = np.zeros((2, 10), int)
  predicted[0] = 1  # on the crowd
  predicted[1, :4] = 2  # right, but for
  predicted[1, 4:10] = 3  # on void
  segments = Segments(np.array([1, 2, 3]), np.array([0, 1, 1]))
  sums = panoptic_sums(
    predicted, segments, truth, Segments(np.array([9, 5]), np.array([1, 0]), np.array([0, 1])), 2
  )
  np.testing.assert_array_equal(sums, [[0, 0, 0, 0], [1, 1, 0, 0]])
  # A crowd of another class does not.
  other = Segments(np.array([9, 5]), np.array([1, 1]), np.array([0, 1]))
  sums = panoptic_sums(predicted, segments, truth, other, 2)
  np.testing.assert_array_equal(sums, [[0, 0, 1, 0], [1, 1, 0, 0]])


def test_nothing_is_no_number():
  none = Segments(np.zeros(0, int), np.zeros(0, int))
  blank = np.zeros((3, 3), int)
  sums = panoptic_sums(blank, none, blank, none, 4)
  assert sums.shape == (4, 4) and not sums.any()
  assert all(math.isnan(value) for value in panoptic_metrics(sums, np.ones(4, bool)).values())


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(predicted=np.ones((2, 3), int)), r"\[2, 3\] and the truth \[2, 2\]"),
    (dict(predicted=np.full((2, 2), 7)), "predicted map has segment 7"),
    (dict(truth=np.full((2, 2), 7)), "true map has segment 7"),
    (dict(predicted_segments=Segments(np.array([1, 2]), np.array([0, 0]))), "segment 2 has no pix"),
    (dict(truth_segments=Segments(np.array([1]), np.array([3]))), "class 3; 0 to 2"),
    (dict(truth_segments=Segments(np.array([1, 1]), np.array([0, 0]))), "different and above 0"),
  ],
)
def test_what_does_not_fit_is_named(change, message):
  ones, segments = np.ones((2, 2), int), Segments(np.array([1]), np.array([0]))
  arguments = dict(
    predicted=ones, predicted_segments=segments, truth=ones, truth_segments=segments, classes=3
  )
  with pytest.raises(ValueError, match=message):
    panoptic_sums(**{**arguments, **change})
