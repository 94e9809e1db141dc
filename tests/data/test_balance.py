"""Classes of unequal size: drawn more often, or weighed more."""

import numpy as np
import pytest

from hybrid_vit.data.balance import balanced_indices, class_weights
from hybrid_vit.data.pipeline import TrainingSettings, open_source, source_info

LABELS = np.array([0] * 16 + [1] * 4 + [3])


def counts(power):
  found = balanced_indices(LABELS, power)
  assert set(found) == set(range(len(LABELS)))  # nothing is left out
  times = np.bincount(found)
  for label in (0, 1, 3):
    assert np.ptp(times[label == LABELS]) <= 1  # each as often as its like
  return np.bincount(LABELS[found]).tolist()


def test_small_classes_come_more_often():
  assert counts(1.0) == [16, 16, 0, 16]
  assert counts(0.5) == [16, 8, 0, 4]  # n (16 / n)^0.5
  assert counts(0.0) == [16, 4, 0, 1]


def test_weights_by_inverse_frequency_are_1_in_the_mean():
  weights = class_weights(np.bincount(LABELS))
  assert weights == pytest.approx((21 / (3 * 16), 21 / (3 * 4), 0.0, 21 / 3))
  assert np.mean(np.array(weights)[LABELS]) == pytest.approx(1.0)


def test_a_source_knows_its_classes_where_a_slice_of_it_does():
  whole = open_source(TrainingSettings("digits"))
  part = open_source(TrainingSettings("digits", "train[:400]"))
  assert source_info(whole)["class_counts"].sum() == 1437
  assert np.array_equal(part.labels, [part[i]["label"] for i in range(400)])
  balanced = open_source(TrainingSettings("digits", "train[:400]", balance=1.0))
  found = source_info(balanced)["class_counts"]
  assert len(set(found[found > 0])) == 1
  index = len(balanced) - 1
  assert balanced[index]["label"] == balanced.labels[index]
  assert balanced.info["class_names"][1] == "one" and "digits" in balanced.describe(index)


def test_what_cannot_be_balanced_is_told():
  with pytest.raises(ValueError, match=r"config.data.balance` is 1.5; a number from 0 to 1"):
    open_source(TrainingSettings("digits", balance=1.5))
