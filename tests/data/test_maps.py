"""Photos with a map each, in the layouts in which they are handed out."""

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from hybrid_vit.data import loader, spec
from hybrid_vit.data.errors import CorruptExampleError, MissingDataError
from hybrid_vit.data.palettes import CITYSCAPES_PALETTE, spread_palette
from hybrid_vit.data.sources import create_source
from hybrid_vit.data.transforms import parse_transform
from tests.data.pictures import encoded, photo, write_zip

SIZE = (40, 60)  # of `photo`


def put(path, data):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)


def labels(seed, high):
  return np.random.default_rng(seed).integers(0, high, SIZE).astype(np.uint8)


def write_pair(root, photo_path, map_path, values, seed=0):
  put(root / photo_path, encoded(photo(seed), "PNG" if photo_path.endswith("png") else "JPEG"))
  put(root / map_path, encoded(values, "PNG"))


def plain(root, parts=("",), count=2, high=3):
  for number, part in enumerate(parts):
    for i in range(count):
      seed = 100 * number + i
      folder = f"{part}/" if part else ""
      write_pair(
        root, f"images/{folder}{i:03}.jpg", f"annotations/{folder}{i:03}.png", labels(seed, high),
        seed,
      )  # fmt: skip
  return root


@pytest.mark.parametrize("packed", [False, True])
def test_plain_layout_with_parts(tmp_path, packed):
  root = plain(tmp_path / "d", ("train", "val"), count=3)
  (root / "classes.txt").write_text("sky\nroad\ntree\n")
  place = write_zip(tmp_path / "d.zip", root, "d/") if packed else root
  for number, split in enumerate(("train", "validation")):
    source = create_source(f"maps:{place}", split)
    assert source.info["map_class_names"] == ("sky", "road", "tree") and len(source) == 3
    for i in range(3):
      example = source[i]
      assert example["map"].dtype == np.int32 and example.keys() == {"image", "map"}
      np.testing.assert_array_equal(example["map"], labels(100 * number + i, 3))
      assert example["image"] == encoded(photo(100 * number + i))
      assert source.describe(i).endswith(f"images/{('train', 'val')[number]}/{i:03}.jpg")
  assert len(create_source(f"maps:{place}", "all")) == 6
  assert len(create_source(f"maps:{place}", "train[:2]")) == 2


def test_a_tenth_is_held_out_where_nothing_is_apart(tmp_path):
  root = plain(tmp_path, count=10)
  spec = f"maps:{root}?classes=3"
  train, held = (create_source(spec, split) for split in ("train", "validation"))
  assert (len(train), len(held)) == (9, 1) and held.describe(0).endswith("009.jpg")
  assert train.info["map_class_names"] == ("0", "1", "2")
  np.testing.assert_array_equal(train.info["palette"], spread_palette(3))


def test_ignored_and_reduced_labels(tmp_path):
  values = np.tile(np.array([0, 1, 2, 255], np.uint8), (40, 15))
  write_pair(tmp_path, "images/a.jpg", "annotations/a.png", values)
  reduced = create_source(f"maps:{tmp_path}?classes=2,reduce_zero_label=true", "all")[0]["map"]
  np.testing.assert_array_equal(reduced[0, :4], [255, 0, 1, 255])
  ignored = create_source(f"maps:{tmp_path}?classes=3,ignore=255", "all")[0]["map"]
  np.testing.assert_array_equal(ignored[0, :4], [0, 1, 2, 255])
  with pytest.raises(CorruptExampleError, match=r"a.png holds label 255; 0 to 2, or 1 for"):
    create_source(f"maps:{tmp_path}?classes=3,ignore=1", "all")[0]


def test_ade20k(tmp_path):
  values = np.tile(np.array([0, 1, 150], np.uint8), (40, 20))
  for part, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
    write_pair(
      tmp_path, f"ADE/images/{part}/{name}.jpg", f"ADE/annotations/{part}/{name}.png", values
    )
  source = create_source(f"ade20k:{tmp_path}", "train")
  assert len(source) == 1 and source.info["map_class_names"][::149] == ("1", "150")
  np.testing.assert_array_equal(source[0]["map"][0, :3], [255, 0, 149])
  table = "Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "".join(
    f"{i}\t0.1\t1\t1\t0\tthing, {i}\n" for i in range(1, 151)
  )
  (tmp_path / "ADE" / "objectInfo150.txt").write_text(table)
  names = create_source(f"ade20k:{tmp_path}", "validation").info["map_class_names"]
  assert names[0] == "thing, 1" and len(names) == 150


@pytest.mark.parametrize("kind", ["labelTrainIds", "labelIds"])
def test_cityscapes(tmp_path, kind):
  ids, classes = [0, 7, 33, 14], [255, 0, 18, 255]
  written = ids if kind == "labelIds" else classes
  values = np.tile(np.array(written, np.uint8), (40, 15))
  for part in ("train", "val"):
    stem = f"{part}/ulm/ulm_000001_000019"
    write_pair(tmp_path, f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_{kind}.png",
               values)  # fmt: skip
  source = create_source(f"cityscapes:{tmp_path}", "validation")
  np.testing.assert_array_equal(source[0]["map"][0, :4], classes)
  assert source.info["map_class_names"][13] == "car" and len(source.info["map_class_names"]) == 19
  np.testing.assert_array_equal(source.info["palette"], CITYSCAPES_PALETTE)


def panoptic(root, with_photo=True):
  ids = np.zeros(SIZE, np.int64)
  ids[:10], ids[10:20], ids[20:30] = 70_000, 5, 300
  colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
  found = [
    dict(id=70_000, category_id=90),
    dict(id=5, category_id=1, iscrowd=1),
    dict(id=300, category_id=90),
  ]
  rug = dict(id=90, name="rug", color=[1, 2, 3])
  for part in ("train2017", "val2017"):
    put(root / f"annotations/panoptic_{part}/000000000009.png", encoded(colours, "PNG"))
    if with_photo:
      put(root / f"images/{part}/000000000009.jpg", encoded(photo(1)))
      put(root / f"images/{part}/000000000010.jpg", encoded(photo(2)))
    described = dict(
      images=[dict(id=9, file_name="000000000009.jpg")],
      annotations=[dict(image_id=9, file_name="000000000009.png", segments_info=found)],
      categories=[dict(id=1, name="person", color=[9, 8, 7]), rug],
    )
    put(root / f"annotations/panoptic_{part}.json", json.dumps(described).encode())
  return root


@pytest.mark.parametrize("packed", [False, True])
def test_coco_panoptic(tmp_path, packed):
  root = panoptic(tmp_path / "coco")
  place = write_zip(tmp_path / "coco.zip", root) if packed else root
  for split in ("train", "validation"):
    source = create_source(f"coco_panoptic:{place}", split)
    assert len(source) == 1 and source.info["map_class_names"] == ("person", "rug")
    np.testing.assert_array_equal(source.info["palette"], [[9, 8, 7], [1, 2, 3]])
    classes = source[0]["map"]
    assert classes.dtype == np.int32
    np.testing.assert_array_equal(classes[::10, 0], [1, 0, 1, 255])
    example = source[0]
    np.testing.assert_array_equal(example["segments"][::10, 0], [0, 1, 2, 255])
    np.testing.assert_array_equal(example["segment_labels"], [1, 0, 1])
    np.testing.assert_array_equal(example["segment_crowd"], [False, True, False])


def test_coco_without_its_photos_and_with_foreign_segments(tmp_path):
  with pytest.raises(MissingDataError, match=r"json names 000000000009.jpg, which is not there"):
    create_source(f"coco_panoptic:{panoptic(tmp_path / 'a', with_photo=False)}", "train")
  root = panoptic(tmp_path / "b")
  put(root / "annotations/panoptic_train2017/000000000009.png", encoded(photo(3), "PNG"))
  with pytest.raises(CorruptExampleError, match=r"9.png has segment \d+, which its annotation"):
    create_source(f"coco_panoptic:{root}", "train")[0]


def test_odd_numbers_of_panoptic_annotations(tmp_path, caplog):
  root = panoptic(tmp_path)
  place = root / "annotations/panoptic_train2017.json"
  described = json.loads(place.read_text())
  first, crowd, last = described["annotations"][0]["segments_info"]
  crowd["iscrowd"] = "0"
  first |= {"bbox": [0, 0, 20, 10], "area": "many"}
  last["iscrowd"] = "1"
  place.write_text(json.dumps(described))
  example = create_source(f"coco_panoptic:{root}", "train")[0]
  np.testing.assert_array_equal(example["segment_crowd"], [False, False, True])
  np.testing.assert_array_equal(example["areas"], [200])
  assert "whose area is no number" in caplog.text
  del crowd["category_id"]
  place.write_text(json.dumps(described))
  with pytest.raises(ValueError, match=r'panoptic_train2017.json: .* each with "id" and'):
    create_source(f"coco_panoptic:{root}", "train")


MILLIMETRES = np.tile(np.array([0, 1000, 20_000], np.uint16), (40, 20))


@pytest.mark.parametrize(
  ("kind", "photo_path", "depth_path", "want"),
  [
    ("depth", "images/a.jpg", "depth/a.png", [0, 1, 20]),
    ("depth", "a.png", "a_depth.png", [0, 1, 20]),
    ("nyu_depth", "test/bath/rgb_00045.jpg", "test/bath/sync_depth_00045.png", [0, 1, 20]),
    (
      "kitti_depth",
      "2011_09_26/2011_09_26_drive_0002_sync/image_02/data/0000000005.png",
      "val/2011_09_26_drive_0002_sync/proj_depth/groundtruth/image_02/0000000005.png",
      [0, 1000 / 256, 20_000 / 256],
    ),
    ("kitti_depth", "rgb_5.png", "depth_5.png", [0, 1000 / 256, 20_000 / 256]),
  ],
)
def test_depth_in_its_layouts(tmp_path, kind, photo_path, depth_path, want):
  write_pair(tmp_path, photo_path, depth_path, MILLIMETRES)
  source = create_source(f"{kind}:{tmp_path}", "all")
  example = source[0]
  assert example["depth"].dtype == np.float32
  np.testing.assert_allclose(example["depth"][0, :3], want, rtol=1e-6)
  assert source.describe(0).endswith(photo_path)
  capped = create_source(f"{kind}:{tmp_path}?cap=10", "all")[0]["depth"]
  np.testing.assert_allclose(capped[0, :3], [value * (value <= 10) for value in want], rtol=1e-6)


def test_depth_as_arrays_is_in_metres(tmp_path):
  metres = np.full(SIZE, 2.5, np.float32)
  put(tmp_path / "images/a.jpg", encoded(photo(0)))
  buffer = io.BytesIO()
  np.save(buffer, metres)
  put(tmp_path / "depth/a.npy", buffer.getvalue())
  source = create_source(f"depth:{tmp_path}?scale=256", "all")
  np.testing.assert_array_equal(source[0]["depth"], metres)


def test_a_list_of_pairs_stands_for_every_split(tmp_path):
  for i in (1, 2, 3):
    write_pair(tmp_path / "nyu", f"k/rgb_{i}.jpg", f"k/sync_depth_{i}.png", MILLIMETRES, i)
  listed = tmp_path / "list.txt"
  listed.write_text("/k/rgb_3.jpg /k/sync_depth_3.png 518.8\n/k/rgb_2.jpg None 518.8\n")
  spec = f"nyu_depth:{tmp_path / 'nyu'}?list={listed}"
  for split in ("train", "test"):
    source = create_source(spec, split)
    assert len(source) == 1 and source.describe(0).endswith("rgb_3.jpg")
  listed.write_text("k/rgb_9.jpg k/sync_depth_9.png\n")
  with pytest.raises(MissingDataError, match=r"list.txt, line 1: k/rgb_9.jpg is not there"):
    create_source(spec, "train")


def test_frames_of_kitti_without_depth_are_left_out(tmp_path, caplog):
  stem = "2011_09_26_drive_0002_sync"
  put(tmp_path / f"raw/{stem}/image_02/data/0000000001.png", encoded(photo(0), "PNG"))
  write_pair(
    tmp_path,
    f"raw/{stem}/image_02/data/0000000005.png",
    f"train/{stem}/proj_depth/groundtruth/image_02/0000000005.png",
    MILLIMETRES,
  )
  assert len(create_source(f"kitti_depth:{tmp_path}", "all")) == 1
  assert "1 photos without depth" in caplog.text


def test_two_files_of_one_name(tmp_path):
  root = plain(tmp_path)
  put(root / "images/000.png", encoded(photo(9), "PNG"))
  with pytest.raises(ValueError, match=r"000.jpg and \S+000.png would belong to the same pair"):
    create_source(f"maps:{root}?classes=3", "train")


def test_what_a_layout_has_no_place_for_is_told(tmp_path, caplog):
  for stem in ("images/a.jpg", "other/b.jpg"):
    put(tmp_path / stem, encoded(photo(0)))
  for stem in ("annotations/a.png", "annotations/c.png"):
    put(tmp_path / stem, encoded(labels(0, 3), "PNG"))
  assert len(create_source(f"maps:{tmp_path}?classes=3", "all")) == 1
  assert "1 files of map without a photo, e.g. " in caplog.text and "c.png" in caplog.text
  assert "1 other pictures, e.g. " in caplog.text and "b.jpg" in caplog.text


def test_a_photo_without_a_map(tmp_path):
  plain(tmp_path, ("train", "val"))
  (tmp_path / "annotations/val/001.png").unlink()
  with pytest.raises(MissingDataError, match=r"1 of 4 photos have no map: \S+val/001.jpg"):
    create_source(f"maps:{tmp_path}?classes=3", "train")


def test_bad_maps_are_named_when_they_are_read(tmp_path):
  root = plain(tmp_path, ("train", "val"), high=5)
  with pytest.raises(CorruptExampleError, match=r"train/000.png holds label 3, 4; 0 to 2"):
    create_source(f"maps:{root}?classes=3", "train")[0]
  put(root / "annotations/train/000.png", encoded(labels(0, 3)[1:], "PNG"))
  with pytest.raises(CorruptExampleError, match=r"39 x 60 and its photo \S+000.jpg 40 x 60"):
    create_source(f"maps:{root}?classes=5", "train")[0]
  coloured = Image.fromarray(labels(0, 3)).convert("RGB")
  put(root / "annotations/train/000.png", encoded(np.asarray(coloured), "PNG"))
  with pytest.raises(CorruptExampleError, match="a picture of colours"):
    create_source(f"maps:{root}?classes=5", "train")[0]
  write_pair(tmp_path / "z", "images/a.jpg", "depth/a.png", np.zeros(SIZE, np.uint16))
  with pytest.raises(CorruptExampleError, match=r"a.png: no pixel is measured"):
    create_source(f"depth:{tmp_path / 'z'}", "all")[0]


@pytest.mark.parametrize(
  ("spec", "error", "message"),
  [
    ("maps:{}", MissingDataError, "nothing tells the classes .* classes.txt beside images/"),
    ("maps:{}?classes=0", ValueError, "classes is '0'; a number from 1 to 255"),
    ("maps:{}?class=3", ValueError, "'class=3' is none of its options; there are classes, ignore"),
    ("maps:{}?classes=3,reduce_zero_label=yes", ValueError, "'yes'; true or false"),
    ("cityscapes:{}?classes=3", ValueError, "it has none"),
    ("cityscapes:{}", MissingDataError, "leftImg8bit/.* was looked for in"),
    ("nyu_depth:{}", MissingDataError, "depth/.*was looked for in"),
    ("nyu_depth:{}?list=/no/file", MissingDataError, "looked for at /no/file"),
    ("coco_panoptic:{}", MissingDataError, "panoptic_train2017.json"),
    ("ade20k:{}/none", MissingDataError, "none, which is not there"),
    ("maps:", ValueError, "names no path"),
  ],
)
def test_refused(tmp_path, spec, error, message):
  with pytest.raises(error, match=message):
    create_source(spec.format(plain(tmp_path)), "train")


def test_colours_of_classes_are_told_apart():
  palette = spread_palette(255).astype(int)
  assert len(np.unique(palette, axis=0)) == 255
  few = palette[:12]
  apart = np.abs(few[:, None] - few[None]).max(-1) + 255 * np.eye(12)
  assert apart.min() >= 40
  np.testing.assert_array_equal(spread_palette(5), palette[:5])


def test_a_batch_of_photos_of_any_size_with_their_maps(tmp_path):
  for i, size in enumerate([(40, 60), (70, 50), (64, 64)]):
    put(tmp_path / f"images/{i}.jpg", encoded(photo(i, *size)))
    values = np.random.default_rng(i).integers(0, 3, size).astype(np.uint8)
    put(tmp_path / f"annotations/{i}.png", encoded(values, "PNG"))
  source = create_source(f"maps:{tmp_path}?classes=3", "all")
  fields = {
    "image": spec.Field("image", "uint8", (None, None, 3)),
    "map": spec.Field("map", "int32", (None, None), minimum=0, maximum=255),
  }
  transform = parse_transform(
    "decode|resize_range((256, 48), (0.5, 2.0))|random_crop_map(48)|flip_lr|pad(48)",
    kinds=spec.kinds(fields),
  )
  known = spec.resolve(fields, transform, lambda: source[0])
  assert known["image"].shape == (48, 48, 3) and known["map"].shape == (48, 48)
  batches = loader.eval_batches(
    source,
    loader.Reading(2, transform, known),
    process_index=0,
    process_count=1,
    num_threads=2,
    max_corrupt_fraction=0.0,
  )
  arrays = [batch for batch, _ in itertools.islice(batches, 2)]
  assert [int(batch["mask"].sum()) for batch in arrays] == [2, 1]
  assert arrays[0]["map"].shape == (2, 48, 48) and set(np.unique(arrays[0]["map"])) <= {
    0,
    1,
    2,
    255,
  }


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"\xff\xfe", r"classes.txt is no text in UTF-8"),
    (b" \n\n", r"classes.txt names no class"),
    (b"sky\n", r"holds label 1, 2; 0 to 0, .* since .*classes.txt names 1 classes"),
  ],
)
def test_a_list_of_classes_that_is_damaged_is_named(tmp_path, content, message):
  write_pair(tmp_path, "images/a.jpg", "annotations/a.png", np.resize(np.uint8([0, 1, 2]), SIZE))
  write_pair(tmp_path, "images/b.jpg", "annotations/b.png", np.resize(np.uint8([0, 1, 2]), SIZE))
  put(tmp_path / "classes.txt", content)
  with pytest.raises(ValueError, match=message):
    create_source(f"maps:{tmp_path}", "all")[0]


def test_a_list_of_pairs_that_is_no_text_is_named(tmp_path):
  write_pair(tmp_path, "images/a.jpg", "depth/a.png", np.full(SIZE, 900, np.uint16))
  put(tmp_path / "list.txt", b"images/a.jpg \xff\n")
  with pytest.raises(ValueError, match=r"list.txt is no text in UTF-8"):
    create_source(f"depth:{tmp_path}?list={tmp_path / 'list.txt'}", "all")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda text: text[:-20], "is no JSON, or is cut short"),
    (lambda text: text.replace('"images"', '"imagos"'), "has no images; lists of images,"),
    (lambda text: text.replace('"id": 90, "name"', '"ie": 90, "name"'), "among its categories"),
    (lambda text: text.replace("[9, 8, 7]", "[9, 8, 777]"), "among its categories; .*255"),
    (lambda text: text.replace('"segments_info"', '"segment_info"'), "among its annotations"),
    (lambda text: text.replace("70000", "70000000000"), "among its annotations"),
    (lambda text: text.replace('"image_id": 9', '"image_id": [9]'), "names image "),
  ],
)
def test_damaged_annotations_of_panoptic_data_are_named(tmp_path, change, message):
  path = panoptic(tmp_path) / "annotations" / "panoptic_train2017.json"
  changed = change(path.read_text())
  assert changed != path.read_text()
  path.write_text(changed)
  with pytest.raises((ValueError, MissingDataError), match=rf"panoptic_train2017.json.*{message}"):
    create_source(f"coco_panoptic:{tmp_path}", "train")
