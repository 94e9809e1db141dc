"""Figures of a report against hand-computed ones."""

import numpy as np
import pytest

from hybrid_vit.measuring import (
  calibration,
  class_figures,
  confusion_matrix,
  probabilities,
  worst_mistakes,
)


def test_figures_of_each_class():
  labels = np.array([0, 0, 0, 1, 1, 2])
  predicted = np.array([0, 0, 1, 1, 0, 0])
  confusion = confusion_matrix(labels, predicted, 4)
  assert confusion.tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
  found = class_figures(confusion)
  np.testing.assert_allclose(found.precision, [2 / 4, 1 / 2, np.nan, np.nan])
  np.testing.assert_allclose(found.recall, [2 / 3, 1 / 2, 0, np.nan])
  np.testing.assert_allclose(found.f1, [4 / 7, 2 / 4, 0, np.nan])
  assert found.support.tolist() == [3, 2, 1, 0]


def test_calibration_bin_by_bin():
  confidence = np.array([0.0, 0.2, 0.25, 0.5, 0.9, 1.0])
  right = np.array([0, 1, 0, 1, 1, 1], bool)
  found = calibration(confidence, right, bins=4)
  # An upper edge belongs to its bin: 0.25 to the first, 0.5 to the second.
  assert found.count.tolist() == [3, 1, 0, 2]
  np.testing.assert_allclose(found.accuracy, [1 / 3, 1, np.nan, 1])
  np.testing.assert_allclose(found.confidence, [0.15, 0.5, np.nan, 0.95])
  gaps = [abs(1 / 3 - 0.15), 0.5, 0.05]
  assert found.ece == pytest.approx((3 * gaps[0] + gaps[1] + 2 * gaps[2]) / 6)
  assert found.mce == pytest.approx(0.5)
  with pytest.raises(ValueError, match="0 confidences in 4 bins"):
    calibration(np.array([]), np.array([]), 4)
  with pytest.raises(ValueError, match="numbers from 0 to 1"):
    calibration(np.array([1.2]), np.array([True]), 4)


def test_probabilities_by_the_loss():
  logits = np.array([[0.0, np.log(3.0)], [800.0, -800.0]])
  np.testing.assert_allclose(probabilities(logits, "softmax"), [[0.25, 0.75], [1, 0]])
  np.testing.assert_allclose(probabilities(logits, "sigmoid"), [[0.5, 0.75], [1, 0]])
  with pytest.raises(ValueError, match="the loss 'hinge'; softmax or sigmoid"):
    probabilities(logits, "hinge")


def test_the_surest_mistakes_come_first():
  probability = np.array([[0.9, 0.1, 0], [0.3, 0.6, 0.1], [0.2, 0.6, 0.2], [0.1, 0.1, 0.8]])
  labels = np.array([0, 0, 0, 1])
  assert worst_mistakes(probability, labels, 5).tolist() == [3, 2, 1]
  assert worst_mistakes(probability, labels, 1).tolist() == [3]
