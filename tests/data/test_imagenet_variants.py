"""ImageNet's other sets, made up in small, against figures worked out by hand."""

import json
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from hybrid_vit.data import imagenet_variants as variants
from hybrid_vit.data.classes import wordnet_numbers
from hybrid_vit.data.errors import MissingDataError
from hybrid_vit.data.sources import create_source
from hybrid_vit.tasks.classification import Classification, ClassificationEvaluator

WNIDS = wordnet_numbers()


def picture(path):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (4, 4)).save(path)


def test_classes_by_their_numbers_whatever_they_lie_in(tmp_path):
  for number in (0, 7, 999):
    picture(tmp_path / "v2" / "inner" / str(number) / "x.jpg")
    picture(tmp_path / "r" / WNIDS[number] / "x.jpg")
    picture(tmp_path / "r" / WNIDS[number] / "y.jpg")
  v2 = create_source(f"imagenet_v2:{tmp_path / 'v2'}", "validation")
  assert v2.labels.tolist() == [0, 7, 999] and "class_subset" not in v2.info
  assert v2.info["class_names"] == WNIDS
  r = create_source(f"imagenet_r:{tmp_path / 'r'}", "test")
  assert sorted(r.labels.tolist()) == [0, 0, 7, 7, 999, 999]
  assert r.info["class_subset"] == (0, 7, 999)
  for i in range(len(r)):
    assert WNIDS[r[i]["label"]] in r.describe(i)
  part = create_source(f"imagenet_r:{tmp_path / 'r'}", "validation[:3]")
  assert part.labels.tolist() == [0, 7, 999] and part.info["class_subset"] == (0, 7, 999)
  picture(tmp_path / "v2" / "inner" / "1000" / "x.jpg")
  with pytest.raises(ValueError, match=r"lies in '1000', which is no class of ImageNet-1K"):
    variants.open_variant("imagenet_v2", str(tmp_path / "v2"))
  with pytest.raises(MissingDataError):
    create_source(f"imagenet_a:{tmp_path / 'none'}", "validation")


def real(tmp_path, sets, pictures=(1, 2, 3, 4)):
  for number in pictures:
    picture(tmp_path / "val" / f"ILSVRC2012_val_{number:08}.JPEG")
  (tmp_path / "real.json").write_text(json.dumps(sets))
  return f"imagenet_real:{tmp_path / 'val'}?labels={tmp_path / 'real.json'}"


def test_real_leaves_out_pictures_without_labels(tmp_path):
  spec = real(tmp_path, [[5], [], [970, 795], [2]])
  source = create_source(spec, "validation")
  assert len(source) == 3 and source.info["label_sets"] == ((5,), (970, 795), (2,))
  assert [source[i]["label"] for i in range(3)] == [5, 970, 2]
  assert source.describe(1).endswith("00000003.JPEG")
  assert create_source(spec, "validation[:1]").info["label_sets"] == ((2,),)
  with pytest.raises(MissingDataError, match=r"real needs its labels, real\.json"):
    create_source(spec.partition("?")[0], "validation")
  picture(tmp_path / "val" / "ILSVRC2012_val_00000005.JPEG")
  with pytest.raises(ValueError, match="none of the 4 validation pictures"):
    create_source(spec, "validation")


class Set:
  """An evaluation set in memory: a batch of pictures that count, and one that does not."""

  def __init__(self, labels, info):
    self.name, self.info, self._labels = "set", info, labels

  def batches(self):
    n = len(self._labels)
    for start in range(0, n, 2):
      index = np.arange(start, start + 2)
      mask = (index < n).astype(np.float32)
      labels = np.where(index < n, np.resize(self._labels, n + 2)[np.minimum(index, n - 1)], 0)
      yield {"image": index, "label": labels.astype(np.int32), "index": index, "mask": mask}, {}


def measured(logits, labels, info, loss="softmax"):
  """A network whose answer to picture i is row i."""
  table = jnp.concatenate([jnp.asarray(logits, jnp.float32), jnp.zeros((2, len(logits[0])))])
  model = types.SimpleNamespace(apply=lambda _, index, train: (table[index], {}))
  task = Classification(model, len(logits[0]), (0,) * 3, (1,) * 3, loss_name=loss)
  evaluator = ClassificationEvaluator(task, Set(labels, info), task.evaluate_batch, task.predict)
  return evaluator.run({})


LOGITS = [[9, 5, 4, 0, 0, 0], [0, 1, 2, 3, 4, 9], [9, 8, 7, 6, 5, 0]]


def test_only_the_classes_of_a_subset_compete():
  labels = np.array([1, 4, 5])
  assert measured(LOGITS, labels, {})["top1"] == 0.0
  found = measured(LOGITS, labels, {"class_subset": (1, 2, 4, 5)})
  # The first is right without class 0; the second loses to class 5, the third to 1, 2 and 4.
  assert found["top1"] == pytest.approx(1 / 3) and found["examples"] == 3
  assert found["top5"] == 1.0
  rows = [(5, [5, 4, 0, 0]), (4, [1, 2, 4, 9]), (0, [8, 7, 5, 0])]
  expected = np.mean([np.log(np.exp(all_).sum()) - own for own, all_ in rows])
  assert found["loss"] == pytest.approx(expected, rel=1e-6)
  assert np.isfinite(measured(LOGITS, labels, {"class_subset": (1, 4, 5)}, "sigmoid")["loss"])


def test_a_prediction_in_the_set_of_labels_is_right():
  sets = ((1, 0), (3, 4), (5,))
  found = measured(LOGITS, np.array([1, 3, 5]), {"label_sets": sets})
  # Right; 5 is not in the set, but 4 is second; 5 is the last of six.
  assert found == {"top1": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3), "examples": 3.0}
  # Ties with a class outside the set, and NaN, count against the network.
  nan = [[1, 1, 0, 0, 0, 0], [np.nan] * 6, [2, 2, 0, 0, 0, 0]]
  found = measured(nan, np.array([0, 0, 0]), {"label_sets": ((0,), (0,), (0, 1))})
  assert found["top1"] == pytest.approx(1 / 3)


def test_errors_of_corruptions_are_divided_by_alexnets(tmp_path):
  top1 = {"snow/1": 0.8, "snow/2": 0.7, "snow/3": 0.6, "snow/4": 0.5, "snow/5": 0.4, "fog/1": 1.0}
  found = variants.corruption_errors(top1)
  assert found == {
    "error/snow": pytest.approx(0.4), "ce/snow": pytest.approx(0.4 / 0.866816)
  }  # fmt: skip
  alexnet = {
    f"{name}/{severity}": 1 - error
    for name, error in variants.ALEXNET_ERRORS.items()
    for severity in variants.SEVERITIES
  }
  found = variants.corruption_errors(alexnet)
  assert found["mce"] == pytest.approx(1.0)
  assert found["mean_error"] == pytest.approx(np.mean(list(variants.ALEXNET_ERRORS.values())))
  picture(tmp_path / "weather" / "snow" / "3" / WNIDS[3] / "x.jpg")
  picture(tmp_path / "fog" / "1" / WNIDS[3] / "x.jpg")
  sets = variants.corruption_sets(tmp_path)
  assert set(sets) == {"snow/3", "fog/1"}
  assert create_source(sets["snow/3"], "validation").labels.tolist() == [3]
  with pytest.raises(MissingDataError, match="ImageNet-C was looked for in"):
    variants.corruption_sets(tmp_path / "weather" / "snow")
