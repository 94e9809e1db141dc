"""Files of what a detector did: COCO's results, a table, a page with names that would break one."""

import csv
import json
import math

import numpy as np
import pytest

from hybrid_vit.box_inference import Objects
from hybrid_vit.coco_results import coco_results, write_results
from hybrid_vit.data.mask_encoding import decode_mask, encode_mask, read_segmentation
from hybrid_vit.detection_report import write_report
from hybrid_vit.metrics.coco_ap import evaluate_coco
from tests.metrics.test_detection_failures import DETECTED, TRUTH
from tests.tools.test_report import Page

NAMES = ("<script>alert(1)<b>", '猫 & "hund"', "none there")


def test_results_are_cocos():
  mask = np.zeros((8, 9), bool)
  mask[2:5, 1:7] = True
  boxes = np.array([[1.1, 2.3, 7, 5], [0, 0, 3.7, 4]], np.float32)
  scores = np.array([0.9, 0.1], np.float32)
  labels = np.array([1, 0], np.int32)
  masks = (encode_mask(mask), encode_mask(~mask))
  first, second = coco_results(Objects(boxes, scores, labels, masks), np.int64(42), (7, 90))
  assert first["image_id"] == 42 and first["category_id"] == 90 and second["category_id"] == 7
  assert first["score"] == 0.9 and second["bbox"] == [0.0, 0.0, 3.7, 4.0]
  np.testing.assert_allclose(first["bbox"], [1.1, 2.3, 5.9, 2.7], rtol=1e-6)
  assert isinstance(first["segmentation"]["counts"], str)
  np.testing.assert_array_equal(decode_mask(read_segmentation(first["segmentation"], (8, 9))), mask)
  (alone, _) = coco_results(Objects(boxes, scores, labels, None), "a.jpg")
  assert alone["image_id"] == "a.jpg" and alone["category_id"] == 1
  assert "segmentation" not in alone


@pytest.mark.parametrize("rows", [[], [{"image_id": 1}], [{"a": "é"}, {"b": [1.5]}]])
def test_a_list_of_json(tmp_path, rows):
  write_results(rows, tmp_path / "new" / "x.json")
  assert json.loads((tmp_path / "new" / "x.json").read_text(encoding="utf-8")) == rows


def test_one_set(tmp_path):
  seen = []

  def picture(index):
    seen.append(index)
    photo = np.full((100, 120, 3), 90, np.uint8)
    return photo, f"<i>{index}.png"

  files = write_report(
    tmp_path / "out",
    "val",
    results=[{"image_id": 3}],
    measures={"box": evaluate_coco(TRUTH, DETECTED, range(3))},
    truth=TRUTH,
    detected=DETECTED,
    names=NAMES,
    figures={"box_ap": 0.25, "examples": 3.0},
    picture=picture,
  )
  assert files == ["detections_val.json", "classes_val.csv", "classes_val.md", "failures_val.html"]
  assert json.loads((tmp_path / "out" / files[0]).read_text()) == [{"image_id": 3}]
  rows = list(csv.DictReader((tmp_path / "out" / files[1]).open(encoding="utf-8")))
  assert [row["class"] for row in rows] == list(NAMES)
  assert [row["objects"] for row in rows] == ["3", "1", "0"]  # without the crowd
  assert rows[2]["box_ap"] == "" and 0 < float(rows[0]["box_ap50"]) < 1
  assert math.isclose(float(rows[1]["box_ap"]), 0.0)
  page = Page((tmp_path / "out" / files[3]).read_text(encoding="utf-8"))
  assert "script" not in page.tags and "b" not in page.tags and "i" not in page.tags
  assert page.tags.count("figure") == 6
  assert all(source.startswith("data:image/png;base64,") for source in page.sources)
  assert f"{NAMES[1]}, 30 x 30 pixels" in page.text
  assert f"nearest: {NAMES[0]} 0.70 (IoU 0.97)" in page.text
  assert f"{NAMES[0]} 0.95" in page.text and "nothing was found there" in page.text
  assert "<i>2.png" in page.text and "0.2500" in page.text
  assert sorted(seen) == [0, 0, 0, 1, 1, 2]
