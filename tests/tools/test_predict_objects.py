"""A detector asked: `tools.predict`, `load_task` and `tools.report` on weights of noise."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from hybrid_vit import checkpoints, stored_tasks
from hybrid_vit.data.mask_encoding import decode_mask, read_segmentation
from hybrid_vit.object_prediction import predict_objects
from hybrid_vit.tools import predict, report
from tests import dense
from tests.data.test_coco_instances import image, thing, write
from tests.heads.test_detector_imports import DETECTORS, made
from tests.tools.test_predict_maps import write_photos

# Of the set that `test_coco_instances` writes.
NAMES, IDS = ("person", "dog", "toothbrush"), (1, 18, 90)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """An export of a Mask R-CNN of noise."""
  _, variables = made("mask_rcnn")
  where = tmp_path_factory.mktemp("weights") / "detector"
  metadata = {
    "name": dense.NETWORK,
    "arguments": dense.ARGUMENTS,
    "preprocessing": dataclasses.asdict(dense.EXPECTS),
    "task": "detection",
    "task_settings": {
      "detector": {"name": "mask_rcnn", **DETECTORS["mask_rcnn"]},
      "mask_size": 28,
      # One program for all photos.
      "inference": {"scale": (64, 64), "canvases": ((64, 64),)},
    },
    "num_classes": 3,
    "object_class_names": list(NAMES),
    "category_ids": list(IDS),
  }
  checkpoints.export(where, variables, metadata)
  return where


@pytest.fixture(scope="module")
def stored(weights):
  return stored_tasks.load_task(weights)


def test_a_stored_detector_finds_objects_in_the_photos_pixels(stored):
  assert stored.name == "detection" and stored.task.object_class_names == NAMES
  photo = dense.example(1)[0]
  found = stored.objects(photo)
  height, width = photo.shape[:2]
  assert len(found.scores) and list(found.scores) == sorted(found.scores, reverse=True)
  assert found.boxes.min() >= 0 and (found.boxes <= [width, height] * 2).all()
  assert {mask.size for mask in found.masks} == {(height, width)}
  with pytest.raises(ValueError, match="of the task 'detection', not of 'depth'"):
    stored.depth(photo)


def test_results_of_the_command(weights, stored, tmp_path, capsys):
  photos = write_photos(tmp_path / "photos")
  bad = tmp_path / "photos" / "bad.jpg"
  bad.write_bytes(b"no picture")
  grey, cmyk = tmp_path / "grey.png", tmp_path / "cmyk.jpg"
  Image.fromarray(dense.example(2)[0]).convert("L").save(grey)
  Image.fromarray(dense.example(3)[0]).convert("CMYK").save(cmyk)
  given = [photos[0], bad, photos[1], grey, cmyk, photos[0]]
  sheet, file = tmp_path / "sheet.png", tmp_path / "new" / "objects.json"
  said = [f"--weights={weights}", "--task=detection", f"--output={sheet}", f"--objects={file}"]
  assert predict.main([*said, "--min_score=0.06", "--top=2", *map(str, given)]) == 2
  printed = capsys.readouterr()
  assert "convnext_tiny, detection, weights from" in printed.out
  assert f"drawn in {sheet}" in printed.out and f"written: {file}" in printed.out
  assert "with a score from 0.06" in printed.out and "%" in printed.out
  assert "bad.jpg" in printed.err and printed.err.count("\n") == 1
  assert sheet.stat().st_size > 1000
  rows = json.loads(file.read_text())
  assert {row["image_id"] for row in rows} <= {0, 2, 3, 4, 5} and {0, 2, 5} & {
    row["image_id"] for row in rows
  }
  for number, photo in ((0, photos[0]), (5, photos[0]), (2, photos[1])):
    image = np.asarray(Image.open(photo))
    found = stored.objects(image)
    own = [row for row in rows if row["image_id"] == number]
    kept = np.flatnonzero(found.scores >= 0.06)
    assert len(own) == len(kept)
    for i, row in zip(kept, own):
      assert row["file_name"] == photo.name
      assert row["category_id"] == IDS[found.labels[i]]
      assert row["category_name"] == NAMES[found.labels[i]]
      x, y, w, h = row["bbox"]
      np.testing.assert_allclose((x, y, x + w, y + h), found.boxes[i], atol=1e-4)
      assert np.float32(row["score"]) == found.scores[i]
      mask = decode_mask(read_segmentation(row["segmentation"], image.shape[:2]))
      np.testing.assert_array_equal(mask, decode_mask(found.masks[i]))


def test_the_least_score(stored, tmp_path):
  photos = write_photos(tmp_path, 1)
  (everything,), _ = predict_objects(stored, photos, min_score=0)
  (none,), _ = predict_objects(stored, photos, min_score=1)
  assert len(everything.found.scores) > len(none.found.scores) == 0
  assert none.summary == ("0 objects with a score from 1",)
  with pytest.raises(ValueError, match="min_score"):
    predict_objects(stored, photos, min_score=1.5)


def test_what_a_task_does_not_give_is_told(weights, tmp_path, capsys):
  (photo,) = write_photos(tmp_path, 1)
  for arguments, message in [
    (["--maps=maps"], "of the task 'detection', give no maps"),
    (["--task=segmentation"], "'detection', not 'segmentation'"),
    (["--min_score=2"], "min_score"),
  ]:
    assert predict.main([f"--weights={weights}", *arguments, str(photo)]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_sheet_without_objects_is_drawn_too(weights, tmp_path):
  (photo,) = write_photos(tmp_path, 1)
  sheet, file = tmp_path / "x.png", tmp_path / "x.json"
  arguments = [f"--weights={weights}", "--min_score=1", f"--output={sheet}", f"--objects={file}"]
  assert predict.main([*arguments, str(photo)]) == 0
  assert sheet.stat().st_size > 1000 and json.loads(file.read_text()) == []


def test_a_report_has_the_sets_own_ids(weights, tmp_path, capsys):
  things = [thing(1, 7), thing(2, 9, category=1), thing(3, 9, box=(0, 0, 8, 9), iscrowd=1)]
  root = write(tmp_path / "coco", [image(9), image(7)], things)
  out = tmp_path / "report"
  base = [f"--weights={weights}", f"--output={out}"]
  assert report.main([*base, f"--data=coco:{root}", "--split=all"]) == 0
  printed = capsys.readouterr().out
  assert "box_ap " in printed and "examples 2" in printed and "failures_all.html" in printed
  rows = json.loads((out / "detections_all.json").read_text())
  assert {row["image_id"] for row in rows} == {7, 9}
  assert {row["category_id"] for row in rows} <= set(IDS)
  table = (out / "classes_all.csv").read_text().splitlines()
  assert [line.split(",")[:2] for line in table[1:]] == [
    ["person", "1"], ["dog", "1"], ["toothbrush", "0"],
  ]  # fmt: skip
  page = (out / "failures_all.html").read_text()
  assert "000000000007.jpg" in page and "False alarms" in page
  for data, message in (
    ("scenes:size=64,count=20", "the classes of the data"),
    (f"coco:{tmp_path}/none", "is not there"),
    ("digits", "digits has no objects"),
  ):
    assert report.main([*base, f"--data={data}"]) == 1
    assert message in capsys.readouterr().err
