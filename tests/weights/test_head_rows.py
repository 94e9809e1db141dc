"""Rows of a pretrained head for other classes."""

import numpy as np
import pytest

from hybrid_vit.weights.head_rows import carry_head, head_rows

OLD = ("n02119789", "ant", "bee", "crane", "tench, Tinca tinca")


def test_classes_of_one_name_or_meaning():
  new = ("bee", "n01440764", "kit fox", "gnu")
  assert head_rows("names", OLD, new, 5, 4).tolist() == [2, 4, 0, -1]
  # "crane" is a bird and a machine.
  assert head_rows("names", OLD, ("n02012849", "bee"), 5, 2).tolist() == [-1, 2]


def test_a_file_of_numbers_or_names(tmp_path):
  path = tmp_path / "map.txt"
  path.write_text("4\nn02119789\n-\n1\n")
  assert head_rows(str(path), OLD, (), 5, 4).tolist() == [4, 0, -1, 1]
  for text, message in (
    ("1\n", "has 1 lines; 2 were expected"),
    ("1\n5\n", "line 2 of .* is '5'; a number below 5"),
    ("1\nn9\n", "or one of their names, e.g. 'n02119789'"),
    ("-\n-\n", "no class of the data is one of the weights'"),
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
      head_rows(str(path), OLD, (), 5, 2)
  with pytest.raises(ValueError, match="cannot be read"):
    head_rows(str(tmp_path / "none.txt"), OLD, (), 5, 2)
  with pytest.raises(ValueError, match="the weights do not say what their classes are called"):
    head_rows("names", (), ("a", "b"), 5, 2)


def test_rows_are_carried_and_others_begin_anew():
  old = {"kernel": np.arange(15.0).reshape(3, 5), "bias": np.arange(5.0)}
  fresh = {"kernel": np.full((3, 3), -1.0), "bias": np.full(3, -2.0)}
  weights = {"params": {"head": old, "stem": 1}, "batch_stats": 2}
  found = carry_head(weights, np.array([4, -1, 0]), fresh)
  assert found["params"]["head"]["bias"].tolist() == [4.0, -2.0, 0.0]
  assert found["params"]["head"]["kernel"][1].tolist() == [9.0, -1.0, 5.0]
  assert found["params"]["stem"] == 1 and found["batch_stats"] == 2
  with pytest.raises(
    ValueError, match=r"head has \['bias', 'kernel'\], the network's \['kernel'\]"
  ):
    carry_head(weights, np.array([0]), {"kernel": np.zeros((3, 1))})
