import numpy as np
import pytest

from hybrid_vit.data.splits import parse_split, part_slice, sample_indices, spread_order


def test_parse_split_knows_the_usual_names():
  assert parse_split("val[:5]") == ("validation", ":5")
  assert part_slice("10%:20%", 1000) == slice(100, 200)


@pytest.mark.parametrize("sizes", [[100, 100, 100], [1, 10, 100, 37], [5], [3] * 50])
def test_every_beginning_of_the_spread_order_holds_each_class_in_proportion(sizes):
  labels = np.repeat(np.arange(len(sizes)), sizes)
  order = spread_order(labels)
  assert sorted(order.tolist()) == list(range(len(labels)))
  for count in range(0, len(labels) + 1, 7):
    held = np.bincount(labels[order[:count]], minlength=len(sizes))
    assert np.abs(held - np.array(sizes) * count / len(labels)).max() <= 1


def test_within_a_class_the_spread_order_goes_through_all_names():
  order = spread_order(np.zeros(100, np.int64))
  assert order.tolist() != list(range(100))
  for count in (10, 25, 75):
    gaps = np.diff(np.sort(order[:count]), prepend=-1, append=100)
    assert gaps.max() <= 1.5 * 100 / count
  # It is the same for ever: a split of today is one of tomorrow.
  assert spread_order(np.array([0, 0, 0, 0, 1, 1, 0, 1])).tolist() == [
    6, 5, 1, 3, 4, 0, 7, 2,
  ]  # fmt: skip


def test_the_spread_order_of_nothing():
  assert spread_order(np.zeros(0, np.int64)).tolist() == []


def test_an_even_sample():
  assert sample_indices(100, 4) == [12, 37, 62, 87]
  assert sample_indices(3, 8) == [0, 1, 2]
  assert sample_indices(0, 8) == []
  assert sample_indices(7, 1) == [3]
