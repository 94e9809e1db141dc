import numpy as np
import pytest

from hybrid_vit.models.layers import resize_relative_table
from hybrid_vit.weights.transfer import transfer


def tree(classes=3, table=(3, 3), extra=None, seed=0):
  draw = lambda *shape: np.random.default_rng(seed).normal(size=shape).astype(np.float32)  # noqa: E731
  params = {
    "stem": {"kernel": draw(2, 2)},
    "attention": {"position_table": draw(2, *table)},
    "head": {"kernel": draw(2, classes), "bias": draw(classes)},
    **(extra or {}),
  }
  return {"params": params, "batch_stats": {"norm": {"mean": draw(4)}}}


def test_alike_weights_are_loaded_whole():
  source, target = tree(seed=1), tree(extra={}, seed=2)
  source["params"]["old"] = {"bias": np.zeros(1)}
  variables, report = transfer(source, target)
  np.testing.assert_array_equal(
    variables["params"]["stem"]["kernel"], source["params"]["stem"]["kernel"]
  )
  np.testing.assert_array_equal(
    variables["batch_stats"]["norm"]["mean"], source["batch_stats"]["norm"]["mean"]
  )
  assert len(report.loaded) == 5 and report.initialised == ()
  assert report.unused == ("params/old/bias",)
  assert "loaded: 5, of which resized: 0" in str(report) and "unused: 1" in str(report)


def test_a_head_of_another_width_begins_anew_only_when_asked():
  source, target = tree(classes=3, seed=1), tree(classes=5, seed=2)
  with pytest.raises(ValueError, match=r"another width: params/head/.*reinitialize_head=True"):
    transfer(source, target)
  variables, report = transfer(source, target, reinitialize_head=True)
  np.testing.assert_array_equal(
    variables["params"]["head"]["bias"], target["params"]["head"]["bias"]
  )
  assert sorted(report.initialised) == [
    "params/head/bias ((3,) in the source, (5,) here)",
    "params/head/kernel ((2, 3) in the source, (2, 5) here)",
  ]


def test_position_tables_are_resized():
  source, target = tree(table=(3, 3), seed=1), tree(table=(5, 7), seed=2)
  variables, report = transfer(source, target)
  old = source["params"]["attention"]["position_table"]
  np.testing.assert_array_equal(
    variables["params"]["attention"]["position_table"], resize_relative_table(old, (5, 7))
  )
  assert "of which resized: 1" in str(report)


def test_weights_of_another_network_are_refused():
  target = tree(extra={"stage1": {"bias": np.zeros(2)}})
  with pytest.raises(
    ValueError, match=r"another network: 1 leaves are missing.*params/stage1/bias"
  ):
    transfer(tree(), target, reinitialize_head=True)


def test_a_head_of_equal_width_begins_anew_when_asked():
  source, target = tree(seed=1), tree(seed=2)
  variables, report = transfer(source, target, reinitialize_head=True)
  for name in ("kernel", "bias"):
    np.testing.assert_array_equal(variables["params"]["head"][name], target["params"]["head"][name])
  np.testing.assert_array_equal(
    variables["params"]["stem"]["kernel"], source["params"]["stem"]["kernel"]
  )
  assert len(report.initialised) == 2 and not report.unused
  source["params"]["auxiliary_head0"] = {"bias": np.zeros(3)}
  target["params"]["auxiliary_head0"] = {"bias": np.ones(3)}
  target["params"]["auxiliary_head1"] = {"bias": np.ones(3)}
  variables, report = transfer(source, target, reinitialize_head=True)
  assert variables["params"]["auxiliary_head0"]["bias"][0] == 1
  assert "params/auxiliary_head1/bias (as asked)" in report.initialised
  del target["params"]["auxiliary_head1"]
  kept, _ = transfer(source, target)
  np.testing.assert_array_equal(kept["params"]["head"]["bias"], source["params"]["head"]["bias"])


def test_what_is_loaded_has_the_types_of_the_target(recwarn):
  """float64, as NumPy makes it, and halves become the target's floats, without a word."""
  source, target = tree(table=(3, 3), seed=1), tree(table=(5, 7), seed=2)
  source["params"]["stem"]["kernel"] = source["params"]["stem"]["kernel"].astype(np.float64)
  source["params"]["head"]["bias"] = source["params"]["head"]["bias"].astype(np.float16)
  target["params"]["stem"]["kernel"] = target["params"]["stem"]["kernel"].astype(np.float64)
  variables, _ = transfer(source, target)
  found = {
    "stem": variables["params"]["stem"]["kernel"],
    "head": variables["params"]["head"]["bias"],
    "table": variables["params"]["attention"]["position_table"],
  }
  assert all(isinstance(leaf, np.ndarray) for leaf in found.values())
  assert {k: v.dtype.name for k, v in found.items()} == {
    "stem": "float64",
    "head": "float32",
    "table": "float32",
  }
  assert not recwarn.list
