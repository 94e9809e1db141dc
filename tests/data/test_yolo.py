"""Objects in YOLO's text files: layouts, classes, boxes, polygons, and what is wrong with them."""

import numpy as np
import pytest

from hybrid_vit.data import instances, yolo
from hybrid_vit.data.errors import MissingDataError
from hybrid_vit.data.sources import create_source
from tests.data.pictures import encoded, photo, shared_data, write_zip

COCO128 = shared_data("coco128.zip")
YAML = "path: .\ntrain: images/train\nnames:\n  0: cat\n  2: dog\n"
LINE = "2 0.5 0.25 0.5 0.25\n"
BOX = [15, 5, 45, 15]  # of it, in 40 x 60


def put(path, data):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data if isinstance(data, bytes) else data.encode())


def write(root, texts, photos="images", labels="labels", classes="data.yaml"):
  for number, (stem, text) in enumerate(texts.items()):
    put(root / photos / f"{stem}.jpg", encoded(photo(number)))
    if text is not None:
      put(root / labels / f"{stem}.txt", text)
  if classes:
    put(root / classes, YAML if classes.endswith("yaml") else "cat\nbird\n\ndog\n")
  return root


def opened(root, split="all", options=""):
  return create_source(f"yolo:{root}{options}", split)


@pytest.mark.parametrize("packed", [False, True])
def test_an_example(tmp_path, packed):
  texts = {"train/a": LINE + "0 0.1 0.1 0.2 0.2\r\n", "train/b": None, "val/c": "", "val/d": LINE}
  root = write(tmp_path / "y", texts)
  source = opened(write_zip(tmp_path / "y.zip", root) if packed else root)
  assert source.info["object_class_names"] == ("cat", "dog")
  assert source.info["category_ids"] == (0, 2) and not source.info["has_masks"]
  assert source.info["notes"] == {instances.EMPTY: 2}
  example = source[0]
  assert example["image"] == encoded(photo(0)) and example["size"] == (40, 60)
  np.testing.assert_allclose(example["boxes"], [BOX, [0, 0, 12, 8]], atol=1e-5)
  np.testing.assert_allclose(example["given_boxes"], [[15, 5, 30, 10], [0, 0, 12, 8]], atol=1e-5)
  np.testing.assert_allclose(example["areas"], [300, 96], rtol=1e-6)
  assert example["box_labels"].tolist() == [1, 0] and example["crowd"].tolist() == [False, False]
  assert source[1]["boxes"].shape == (0, 4) and source[2]["boxes"].shape == (0, 4)
  for split, stems in {"train": "ab", "validation": "cd", "test": "cd"}.items():
    part = opened(root, split)
    assert [part.describe(i)[-5] for i in range(len(part))] == list(stems)


@pytest.mark.parametrize(
  ("photos", "labels", "options"),
  [
    ("train/images", "train/labels", ""),
    ("x/images/train", "x/labels/train", ""),
    ("obj_train_data", "obj_train_data", ""),
    ("images/train2017", "yolo_labels/train2017", "?labels=yolo_labels"),
  ],
)
def test_layouts(tmp_path, photos, labels, options):
  write(tmp_path, {"7": LINE, "12": LINE}, photos, labels, "classes.txt")
  source = opened(tmp_path, options=options)
  assert source.info["object_class_names"] == ("cat", "bird", "dog") and len(source) == 2
  assert [source[i]["image_id"] for i in range(2)] == [12, 7]
  np.testing.assert_allclose(source[1]["boxes"], [BOX], atol=1e-5)


def test_polygons_give_masks(tmp_path):
  polygon = "0 0.1 0.2 0.5 0.2 0.5 0.7 0.1 0.7\n"
  source = opened(write(tmp_path, {"a": polygon + LINE, "b": LINE}))
  example = source[0]
  np.testing.assert_allclose(example["boxes"], [[6, 8, 30, 28], BOX], atol=1e-5)
  masks = np.asarray(example["masks"])
  assert masks.shape == (2, 40, 60) and masks[0].sum() == masks[0, 8:28, 6:30].sum() == 480
  assert masks[1].sum() == masks[1, 5:15, 15:45].sum() == 300
  assert np.asarray(source[1]["masks"]).sum() == 300


def test_keypoints_are_passed_over(tmp_path):
  root = write(tmp_path, {"a": f"{LINE.strip()} 0.1 0.2 2 0.3 0.4 1\n{LINE.strip()} 0.1 0.2 2\n"})
  (root / "data.yaml").write_text(YAML + "kpt_shape: [2, 3]\n")
  source = opened(root)
  np.testing.assert_allclose(source[0]["boxes"], [BOX, BOX], atol=1e-5)
  assert not source.info["has_masks"] and not source.info["notes"]


def test_a_tenth_is_held_out(tmp_path):
  root = write(tmp_path, {f"{i:02}": LINE for i in range(10)})
  assert (len(opened(root, "train")), len(opened(root, "validation"))) == (9, 1)


def test_what_is_wrong_is_counted_and_named(tmp_path, caplog):
  lines = (
    "1 0.5 0.5 0.1 0.1\n7 0.5 0.5 0.1 0.1\n2 0.5 0.5 0.1\n2 a b c d\n2 0.5 0.5 0.0 0.1\n"
    "2 320 240 50 50\n2 nan 0.5 0.1 0.1\n2 0.95 0.5 0.3 0.1\n2 0.5 0.5 1.004 1.0\n"
  )
  root = write(tmp_path, {"a": lines})
  put(root / "labels/alone.txt", LINE)
  put(root / "plots/curve.png", encoded(photo(5), "PNG"))
  source = opened(root)
  assert source.info["notes"] == {
    yolo.NO_PHOTO: 1,
    instances.NO_CATEGORY: 2,
    yolo.NO_LINE: 3,
    instances.NO_AREA: 2,
    instances.CUT: 1,
  }
  assert (
    "e.g. 1 of labels/a.txt, line 1; data.yaml lists them" in caplog.text
    and "labels/alone.txt" in caplog.text
  )
  assert "'2 0.5 0.5 0.1' of labels/a.txt, line 3" in caplog.text
  np.testing.assert_allclose(source[0]["boxes"], [[48, 18, 60, 22], [0, 0, 60, 40]], atol=1e-4)


def test_pictures_are_left_out_on_request(tmp_path):
  root = write(tmp_path, {"a": LINE, "b": "", "c": LINE})
  put(root / "images/c.jpg", encoded(photo(0, 20, 30)))
  assert len(opened(root, options="?empty=false")) == 2
  assert len(opened(root, options="?empty=false,min_size=32")) == 1
  put(root / "images/c.jpg", b"no photo")
  source = opened(root, options="?min_size=32")
  assert [source.describe(i)[-5] for i in range(len(source))] == ["a", "b"]
  assert source.info["notes"] == {instances.BAD_PHOTO: 1, instances.EMPTY: 1}
  assert len(source[0]["boxes"]) == 1
  with pytest.raises(MissingDataError, match="no photo is left with the options"):
    opened(root, options="?min_size=100")


@pytest.mark.parametrize(
  ("classes", "message"),
  [
    (None, r"nothing tells the classes .* put data.yaml"),
    ("names: [a", "is no YAML"),
    ("names: {a: b}", "numbers of classes were expected"),
    ("names: 3", "nothing tells the classes"),
    (b"names: [caf\xe9]", "is no YAML"),
  ],
)
def test_classes_that_are_not_told(tmp_path, classes, message):
  root = write(tmp_path, {"a": LINE}, classes=None)
  if classes:
    put(root / "data.yaml", classes)
  with pytest.raises((ValueError, MissingDataError), match=message):
    opened(root)


def test_texts_that_are_no_utf8(tmp_path):
  latin, wide = b"caf\xe9 0.5 0.5 0.1 0.1\n", LINE.encode("utf-16")
  root = write(tmp_path, {"a": latin + LINE.encode(), "b": wide})
  source = opened(root)
  # Of the second text the line, and the half of the line feed behind it.
  assert source.info["notes"] == {yolo.NO_LINE: 3, instances.EMPTY: 1}
  assert len(source[0]["boxes"]) == 1
  (root / "data.yaml").unlink()
  put(root / "classes.txt", b"caf\xe9\n")
  with pytest.raises(ValueError, match=r"classes.txt is no text in UTF-8"):
    opened(root)


def test_names_in_a_list(tmp_path):
  root = write(tmp_path, {"a": LINE}, classes=None)
  put(root / "data.yaml", "names: [x, 3, z]")
  assert opened(root).info["object_class_names"] == ("x", "3", "z")


def test_nothing_there(tmp_path):
  with pytest.raises(MissingDataError, match="which is not there"):
    opened(tmp_path / "no")
  root = write(tmp_path, {"a": LINE}, labels="my_labels")
  with pytest.raises(MissingDataError, match=r"directories my_labels: say which, \?labels=…"):
    opened(root)


@pytest.mark.skipif(COCO128 is None, reason="real photos are not there")
def test_boxes_of_real_photos_are_those_of_the_masks():
  by_text = create_source(f"yolo:{COCO128}?labels=yolo_labels", "validation")
  by_segments = create_source(f"coco:{COCO128}", "validation")
  ids = {by_text[i]["image_id"]: i for i in range(len(by_text))}
  near = total = 0
  for i in range(20):
    example = by_segments[i]
    other = by_text[ids[example["image_id"]]]
    for box, crowd in zip(example["boxes"], example["crowd"]):
      distance = np.abs(other["boxes"] - box).max(-1)
      near, total = near + bool(distance.min() < 3) * (not crowd), total + (not crowd)
  assert near > 0.7 * total > 20
