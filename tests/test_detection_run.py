"""Every detector trained by the command's own function: killed and resumed, it is as unbroken."""

import shutil

import jax
import numpy as np
import pytest

from hybrid_vit import checkpoints, main
from hybrid_vit.heads.detectors import detector_names
from hybrid_vit.reporting import read_metrics
from tests import detection

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(detection.DETECTORS))
def test_it_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
  # One device: half the time to compile. That more of them change nothing, other tests show.
  device = jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda: device)
  whole, broken = tmp_path / "whole", tmp_path / "broken"
  results = main.train(detection.config(name), whole)
  assert {"held_out/box_ap", "held_out/box_ap50"} <= set(results)
  assert ("held_out/mask_ap" in results) == (name in detection.WITH_MASKS)
  shutil.copytree(whole, broken)
  shutil.rmtree(broken / "checkpoints" / "4")
  shutil.rmtree(broken / "export")
  main.train(detection.config(name), broken)
  assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
  losses = [line["loss"] for line in read_metrics(whole / "metrics.jsonl") if "loss" in line]
  assert len(losses) == 4 and np.isfinite(losses).all()
  (weights, metadata), (others, _) = (checkpoints.load_weights(d) for d in (whole, broken))
  assert metadata["object_class_names"][0] == "circle"
  equal = [np.array_equal(a, b) for a, b in zip(_leaves(weights), _leaves(others))]
  assert equal and all(equal)
  assert (whole / "predictions.png").is_file()


def test_every_detector_is_among_them():
  assert set(detection.DETECTORS) == set(detector_names())


def test_a_batch_that_the_devices_do_not_divide_is_told_before_anything_else(tmp_path):
  config = detection.config("mask_rcnn")
  config.data.batch_size = 12
  with pytest.raises(ValueError, match=r"batch of 12 cannot be split over 8 devices"):
    main.train(config, tmp_path)
  assert not (tmp_path / "checkpoints").exists()


def _leaves(tree):
  return [tree] if not isinstance(tree, dict) else [x for t in tree.values() for x in _leaves(t)]
