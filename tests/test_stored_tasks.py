"""Stored weights of segmentation and depth: read back as the task that they were trained for."""

import dataclasses

import numpy as np
import pytest

import hybrid_vit
from hybrid_vit import checkpoints, stored_tasks
from hybrid_vit.map_inference import MapInference
from hybrid_vit.stored_predictions import ASKED
from hybrid_vit.weights import stored
from tests import dense

NAMES = ("sky", "road", "tree", "cat")
SETTINGS = {
  "segmentation": {
    "head": dense.HEAD,
    "auxiliary": dense.AUXILIARY,
    "inference": {"mode": "slide", "crop": (16, 16), "stride": (12, 12), "flip": True},
  },
  "depth": {"head": dense.DEPTH_HEAD, "protocol": {"max_depth": 8.0}},
}


def made(name):
  """(task, its variables, metadata as a run writes it)."""
  info = {"map_class_names": NAMES} if name == "segmentation" else {}
  task = dense.make_task(name, None, info=info, **SETTINGS[name])
  metadata = {
    "name": dense.NETWORK,
    "arguments": dense.ARGUMENTS,
    "preprocessing": dataclasses.asdict(dense.EXPECTS),
    "task": name,
    "task_settings": SETTINGS[name],
    **task.stored_info(),
  }
  return task, dense.drawn(task, dense.make_batch(name)), metadata


def written(directory, name, **changes):
  """An export of weights of noise."""
  _, variables, metadata = made(name)
  checkpoints.export(directory, variables, {**metadata, **changes})
  return directory


def test_an_export_is_the_task_that_was_trained(tmp_path):
  task, variables, _ = made("segmentation")
  loaded = hybrid_vit.load_task(written(tmp_path / "w", "segmentation"))
  assert loaded.task == task and loaded.network == dense.NETWORK
  assert loaded.task.map_class_names == NAMES and loaded.task.inference.flip
  assert loaded.preprocessing == dense.EXPECTS
  photo = dense.example(1)[0]
  expected = MapInference(task.answers, task.inference, softmax=True).classes(variables, photo)
  np.testing.assert_array_equal(loaded.classes(photo), expected)
  task, _, _ = made("depth")
  loaded = hybrid_vit.load_task(written(tmp_path / "depth", "depth"))
  assert loaded.task == task and loaded.task.model.head.max_depth == 8.0
  metres = loaded.depth(photo)
  assert metres.shape == photo.shape[:2] and metres.min() > 0 and metres.max() <= 8.0


def test_what_cannot_be_read_is_told(tmp_path):
  classifier = written(tmp_path / "c", "segmentation", task="classification")
  with pytest.raises(
    ValueError, match=r"of the task 'classification'; segmentation or depth or detection or"
  ):
    stored_tasks.load_task(classifier)
  _, variables, metadata = made("depth")
  variables["params"]["head"]["depth"]["bias"] = np.full_like(
    variables["params"]["head"]["depth"]["bias"], np.nan
  )
  checkpoints.export(tmp_path / "nan", variables, metadata)
  with pytest.raises(ValueError, match=r"NaN or infinity, first in '.*head/depth/bias'"):
    stored_tasks.load_task(tmp_path / "nan")
  (tmp_path / "empty").mkdir()
  with pytest.raises(checkpoints.CheckpointError, match="no weights in"):
    stored_tasks.load_task(tmp_path / "empty")


def test_a_network_alone_is_not_looked_for_under_a_decoder(tmp_path):
  directory = written(tmp_path / "w", "segmentation")
  with pytest.raises(ValueError, match=r"convnext_tiny under a decoder, .*hybrid_vit\.load_task"):
    stored.load_network(directory)


def test_every_stored_task_can_be_asked_by_the_command():
  assert set(ASKED) == set(stored_tasks.DENSE_TASKS)


def test_which_task_metadata_names():
  assert stored_tasks.task_of({}) == "classification"
  assert stored_tasks.task_of({"task": "depth"}) == "depth"
  assert stored_tasks.task_of({"config": {"task": {"name": "segmentation"}}}) == "segmentation"
