"""Mean IoU: mmsegmentation's own figures, sums over parts, and what is refused."""

import math

import numpy as np
import pytest

from hybrid_vit.metrics.segmentation import (
  class_accuracies,
  class_ious,
  confusion,
  segmentation_metrics,
)
from tests import golden


def _case():
  _, stored = golden.load("dense/mean_iou", "miou_7_classes")
  return stored


def test_authors_figures():
  stored = _case()
  matrix = confusion(stored["pred"], stored["gt"], 7)
  rows = np.stack(
    [np.diagonal(matrix), matrix.sum(0) + matrix.sum(1) - np.diagonal(matrix), matrix.sum(0),
     matrix.sum(1)]
  )  # fmt: skip
  np.testing.assert_array_equal(rows, stored["areas"])
  np.testing.assert_allclose(class_ious(matrix), stored["iou"], rtol=1e-7)
  accuracies = np.nan_to_num(class_accuracies(matrix), nan=-1)
  np.testing.assert_allclose(accuracies, stored["acc"], rtol=1e-6)
  metrics = segmentation_metrics(matrix)
  found = [metrics[name] for name in ("pixel_accuracy", "mean_iou", "mean_accuracy")]
  np.testing.assert_allclose(found, stored["summary"], rtol=1e-7)


def test_parts_add_up_to_the_whole():
  stored = _case()
  whole = confusion(stored["pred"], stored["gt"], 7)
  uneven = [slice(0, 1), slice(1, 3)]
  parts = sum(confusion(stored["pred"][part], stored["gt"][part], 7) for part in uneven)
  np.testing.assert_array_equal(parts, whole)
  # A mean of pictures' IoUs is another number.
  alone = [
    segmentation_metrics(confusion(p, t, 7))["mean_iou"]
    for p, t in zip(stored["pred"], stored["gt"])
  ]
  assert abs(np.mean(alone) - segmentation_metrics(whole)["mean_iou"]) > 1e-4


def test_ignored_pixels_may_be_predicted_anything():
  truth = np.array([[0, 255], [1, 255]])
  matrix = confusion(np.array([[0, 99], [0, -1]]), truth, 2)
  np.testing.assert_array_equal(matrix, [[1, 0], [1, 0]])


def test_nothing_counted_is_no_number():
  nothing = confusion(np.zeros((2, 2), int), np.full((2, 2), 255), 3)
  assert all(math.isnan(value) for value in segmentation_metrics(nothing).values())


@pytest.mark.parametrize(
  ("predicted", "truth", "error", "message"),
  [
    (np.zeros((2, 2), int), np.zeros((2, 3), int), ValueError, "resize the logits"),
    (np.full((2, 2), 3), np.zeros((2, 2), int), ValueError, "predicted class 3; 0 to 2"),
    (np.zeros((2, 2), int), np.full((2, 2), 7), ValueError, r"true class 7; 0 to 2 .* 255"),
    (np.zeros((2, 2)), np.zeros((2, 2), int), TypeError, "predicted is float64"),
  ],
)
def test_refused(predicted, truth, error, message):
  with pytest.raises(error, match=message):
    confusion(predicted, truth, 3)
