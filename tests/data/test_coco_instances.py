"""Objects in COCO's JSON and its kin: layouts, forms of masks, and what is wrong with files."""

import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from hybrid_vit.data import instances
from hybrid_vit.data.errors import CorruptExampleError, MissingDataError
from hybrid_vit.data.mask_encoding import encode_mask, write_segmentation
from hybrid_vit.data.sources import create_source
from hybrid_vit.data.tfds_source import COCO_IDS
from hybrid_vit.data.transforms import decode_picture, parse_transform
from hybrid_vit.tools import prepare_data
from tests.data.pictures import encoded, photo, shared_data, write_zip

COCO128 = shared_data("coco128.zip")
NAME = "annotations/instances_train2017.json"
SIZE = (40, 60)  # of `photo`
CATEGORIES = [dict(id=90, name="toothbrush"), dict(id=1, name="person"), dict(id=18, name="dog")]


def put(path, data):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)


def image(number, **more):
  return dict(id=number, file_name=f"{number:012}.jpg", height=40, width=60, license=3) | more


def thing(identifier, image_id, box=(5, 6, 20, 10), category=18, **more):
  x, y, w, h = box
  polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
  made = dict(
    id=identifier, image_id=image_id, category_id=category, bbox=list(box), iscrowd=0,
    area=w * h / 2, segmentation=[polygon],
  )  # fmt: skip
  return made | more


def write(root, images, annotations, name=NAME, photos="train2017"):
  described = dict(
    info={}, images=images, annotations=annotations, categories=CATEGORIES, licenses=[]
  )
  put(root / name, json.dumps(described).encode())
  for one in images:
    if photos and "file_name" in one:
      put(root / photos / one["file_name"], encoded(photo(one["id"])))
  return root


def rectangle(top, left, bottom, right, size=SIZE):
  mask = np.zeros(size, np.uint8)
  mask[top:bottom, left:right] = 1
  return mask


def opened(root, split="all", options=""):
  return create_source(f"coco:{root}{options}", split)


@pytest.mark.parametrize("packed", [False, True])
def test_an_example(tmp_path, packed):
  crowd = encode_mask(rectangle(0, 0, 9, 8))
  annotations = [
    thing(1, 7),
    thing(2, 9, box=(1.5, 2.25, 3, 4), category=1),
    thing(3, 7, box=(0, 0, 8, 9), category=90, iscrowd=1,
          segmentation=dict(size=[40, 60], counts=crowd.counts.tolist())),
    thing(4, 7, box=(10, 10, 10, 10), segmentation=write_segmentation(
      encode_mask(rectangle(10, 10, 20, 15)))),
  ]  # fmt: skip
  root = write(
    tmp_path / "c", [image(9), image(7), image(8)], annotations, photos="images/train2017"
  )
  place = write_zip(tmp_path / "c.zip", root, "coco/") if packed else root
  source = opened(place)
  assert len(source) == 3
  assert source.info["object_class_names"] == ("person", "dog", "toothbrush")
  assert source.info["category_ids"] == (1, 18, 90) and source.info["palette"].shape == (3, 3)
  np.testing.assert_array_equal(source.info["object_counts"], [1, 2, 1])
  assert source.info["most_objects"] == 3 and source.info["has_masks"]
  assert source.info["notes"] == {instances.EMPTY: 1}
  example = source[0]
  assert example["image"] == encoded(photo(7)) and source.describe(0).endswith("000000000007.jpg")
  assert example["image_id"] == 7 and example["size"] == SIZE
  assert [example[key].dtype.name for key in ("boxes", "box_labels", "crowd", "areas")] == [
    "float32", "int32", "bool", "float32",
  ]  # fmt: skip
  np.testing.assert_array_equal(example["boxes"], [[5, 6, 25, 16], [0, 0, 8, 9], [10, 10, 20, 20]])
  np.testing.assert_array_equal(
    example["given_boxes"], [[5, 6, 20, 10], [0, 0, 8, 9], [10, 10, 10, 10]]
  )
  np.testing.assert_array_equal(example["box_labels"], [1, 2, 1])
  np.testing.assert_array_equal(example["crowd"], [False, True, False])
  np.testing.assert_array_equal(example["areas"], [100, 36, 50])
  wanted = [rectangle(6, 5, 16, 25), rectangle(0, 0, 9, 8), rectangle(10, 10, 20, 15)]
  np.testing.assert_array_equal(np.asarray(example["masks"]), wanted)
  empty = source[1]
  assert empty["image_id"] == 8 and empty["boxes"].shape == (0, 4) and empty["crowd"].shape == (0,)
  assert empty["masks"].shape == (0, 40, 60) and np.asarray(empty["masks"]).shape == (0, 40, 60)
  np.testing.assert_array_equal(source[2]["boxes"], [[1.5, 2.25, 4.5, 6.25]])


def test_parts(tmp_path):
  for number, part in enumerate(("train2017", "val2017")):
    first = 10 * number
    write(tmp_path, [image(first + 1), image(first + 2)], [thing(1, first + 1)],
          f"annotations/instances_{part}.json", part)  # fmt: skip
  found = {split: opened(tmp_path, split) for split in ("train", "validation", "test", "all")}
  ids = {
    split: [source[i]["image_id"] for i in range(len(source))] for split, source in found.items()
  }
  assert ids == dict(train=[1, 2], validation=[11, 12], test=[11, 12], all=[1, 2, 11, 12])
  assert len(opened(tmp_path, "all[:50%]")) == 2
  # The file of another part is not looked into: COCO's takes ten seconds.
  (tmp_path / "annotations/instances_train2017.json").write_text("{")
  assert len(opened(tmp_path, "validation")) == 2
  with pytest.raises(ValueError, match=r"instances_train2017.json is no JSON, or is cut short"):
    opened(tmp_path, "train")


def test_a_tenth_is_held_out(tmp_path):
  images = [image(i) for i in range(1, 21)]
  write(
    tmp_path, images, [thing(i, i) for i in range(1, 21)], "annotations/instances_default.json", "x"
  )
  held = opened(tmp_path, "validation")
  assert [held[i]["image_id"] for i in range(len(held))] == [10, 20]
  assert len(opened(tmp_path, "train")) == 18 and held[1]["box_labels"].tolist() == [1]


def test_lvis(tmp_path):
  urls = [
    image(3, coco_url="http://images.cocodataset.org/train2017/000000000003.jpg"),
    image(4, coco_url="http://images.cocodataset.org/val2017/000000000004.jpg"),
  ]
  for one in urls:
    one.pop("file_name")
    for part in ("train2017", "val2017"):
      put(
        tmp_path / part / f"{one['id']:012}.jpg", encoded(photo(one["id"] + 10 * (part[0] == "v")))
      )
  for name in ("lvis_v1_train", "lvis_v1_val"):
    write(tmp_path, urls, [thing(1, 3)], f"{name}.json", "")
  source = opened(tmp_path, "validation")
  assert [source.describe(i).split("/")[-2] for i in (0, 1)] == ["train2017", "val2017"]
  assert source[0]["image"] == encoded(photo(3)) and source[1]["image"] == encoded(photo(14))


def test_objects365_has_no_masks(tmp_path):
  images = [image(5, file_name="images/v1/patch8/objects365_v1_00000005.jpg")]
  annotations = [thing(1, 5) | dict(isfake=0)]
  annotations[0].pop("segmentation")
  write(tmp_path, images, annotations, "zhiyuan_objv2_train.json", "")
  put(tmp_path / "train/patch8/objects365_v1_00000005.jpg", encoded(photo(5)))
  source = opened(tmp_path)
  assert "masks" not in source[0] and not source.info["has_masks"] and not source.info["notes"]


def test_exports_of_tools(tmp_path):
  for number, part in enumerate(("train", "valid")):
    images = [image(i, file_name=f"{i}.jpg") for i in range(2)]
    write(tmp_path, images, [thing(0, 1, segmentation=[])], f"{part}/_annotations.coco.json", "")
    for i in range(2):
      put(tmp_path / part / f"{i}.jpg", encoded(photo(10 * number + i)))
  source = opened(tmp_path, "validation")
  assert [source[i]["image"] == encoded(photo(10 + i)) for i in range(2)] == [True, True]
  assert source[1]["boxes"].shape == (1, 4) and "masks" not in source[1]


def test_files_of_several_kinds(tmp_path):
  write(tmp_path, [image(1)], [thing(1, 1)])
  write(tmp_path, [image(1), image(2)], [thing(1, 1)], "annotations/lvis_v1_train.json")
  write(tmp_path, [image(i) for i in range(1, 5)], [thing(1, 1)], "annotations/mine.json")
  assert len(opened(tmp_path)) == 1
  assert len(opened(tmp_path, options="?annotations=lvis_v1")) == 2
  assert len(opened(tmp_path, options="?annotations=annotations/mine")) == 4
  with pytest.raises(MissingDataError, match=r"'other' in its path was looked .*there are anno"):
    opened(tmp_path, options="?annotations=other")


def test_photos_of_one_name(tmp_path):
  write(tmp_path, [image(1)], [thing(1, 1)], photos="a")
  put(tmp_path / "b/000000000001.jpg", encoded(photo(2)))
  with pytest.raises(ValueError, match=r"a/0+1.jpg and \S+b/0+1.jpg could both be .*'train2017'"):
    opened(tmp_path)
  put(tmp_path / "c/train2017/000000000001.jpg", encoded(photo(3)))
  assert opened(tmp_path)[0]["image"] == encoded(photo(3))


def test_what_is_wrong_is_counted_and_named(tmp_path, caplog):
  counts = encode_mask(rectangle(6, 5, 16, 25)).counts.tolist()
  bad = [
    thing(1, 1, box=(70, 5, 4, 4)),
    thing(2, 1, box=(5, 5, 0, 4)),
    thing(3, 1, box=(5, 5, -3, 4)),
    thing(4, 1, bbox=[1, 2, 3]),
    thing(5, 1, bbox=[1, 2, float("nan"), 3]),
    thing(6, 1, bbox=["1", 2, 3, 4]),
    thing(7, 1, category=5),
    thing(8, 77),
    thing(9, 3),
  ]
  mended = [
    thing(11, 2, box=(50, 30, 30, 30)),
    thing(12, 2, box=(55, 6, 5.5, 10)),
    thing(13, 2, segmentation=[]),
    thing(14, 2, segmentation=[[1, 2, 3, 4]]),
    thing(15, 2, segmentation=dict(size=[60, 40], counts=[2400])),
    thing(16, 2, segmentation=dict(size=[40, 60], counts=[*counts, 5])),
    thing(17, 2, segmentation=[[1, 2, 3], [5, 6, 25, 6, 25, 16, 5, 16]]),
  ]
  without_box = thing(18, 2, segmentation=[[5, 6, 25, 6, 25, 16]])
  without_box.pop("bbox")
  root = write(tmp_path, [image(1), image(2), image(3)], [*bad, *mended, without_box])
  (root / "train2017/000000000003.jpg").unlink()
  source = opened(root)
  assert len(source) == 2 and len(source[0]["boxes"]) == 0
  assert source.info["notes"] == {
    instances.NO_PHOTO: 1,
    instances.NO_AREA: 3,
    instances.NO_NUMBERS: 3,
    instances.NO_CATEGORY: 1,
    instances.NO_PICTURE: 2,
    instances.CUT: 1,
    instances.NO_MASK: 1,
    instances.BAD_MASK: 2,
    instances.OTHER_SIZE: 1,
    "polygons left out": 1,
    instances.EMPTY: 1,
  }
  for said in (
    "3 objects left out whose box has no area or lies outside the picture, e.g. annotation 1 of ",
    "e.g. 5 of annotation 7 of image 1",
    "annotation 8 of image 77",
    "e.g. 60 x 40 in 40 x 60, annotation 15",
    "000000000003.jpg",
  ):
    assert said in caplog.text, said
  boxes = source[1]["boxes"]
  np.testing.assert_array_equal(boxes[0], [50, 30, 60, 40])
  np.testing.assert_array_equal(boxes[1], [55, 6, 60, 16])
  np.testing.assert_array_equal(boxes[2:], [[5, 6, 25, 16]] * 6)
  found = np.asarray(source[1]["masks"])
  for i in range(2, 7):  # their box stands for them
    np.testing.assert_array_equal(found[i], rectangle(6, 5, 16, 25))


def test_a_mask_that_cannot_be_read_is_told_with_its_picture(tmp_path):
  broken = thing(1, 1, segmentation=dict(size=[40, 60], counts="~~~"))
  short = thing(2, 1, segmentation=dict(size=[40, 60], counts="5"))
  for annotation, said in ((broken, "no compressed list"), (short, "add up to 5; 2400")):
    source = opened(write(tmp_path, [image(1)], [annotation]))
    with pytest.raises(CorruptExampleError, match=rf"0+1.jpg, object 0: .*{said}"):
      np.asarray(source[0]["masks"])


def test_numbers_that_are_none(tmp_path, caplog):
  whole = encode_mask(rectangle(6, 5, 16, 25)).counts.tolist()
  bad = [
    thing(1, 1, bbox=[1, 2, 10**400, 3]),
    thing(2, 1, bbox={"x": 1}),
    thing(3, 1, category=[18]),
    thing(4, 1, category="18"),
    thing(5, [1]),
  ]
  mended = [
    *(thing(10 + i, 1, area=area) for i, area in enumerate(("abc", [3], float("nan"), None))),
    *(
      thing(20 + i, 1, segmentation=dict(size=[40, 60], counts=counts))
      for i, counts in enumerate((["a", 3], 5, [-5, 2405], [100.5, 2299.5], [[2400]]))
    ),
    thing(30, 1, segmentation=dict(size=[40, 60], counts=[float(n) for n in whole])),
    thing(31, 1, iscrowd="0"),
    thing(32, 1, iscrowd="1"),
  ]
  source = opened(write(tmp_path, [image(1)], [*bad, *mended]))
  assert source.info["notes"] == {
    instances.NO_NUMBERS: 2,
    instances.NO_CATEGORY: 2,
    instances.NO_PICTURE: 1,
    instances.NO_AREA_GIVEN: 3,
    instances.BAD_MASK: 5,
  }
  assert "e.g. annotation 10 of image 1" in caplog.text
  example = source[0]
  assert example["areas"].tolist() == [200] * 4 + [100] * 8
  assert example["crowd"].tolist() == [False] * 11 + [True]
  np.testing.assert_array_equal(np.asarray(example["masks"]), [rectangle(6, 5, 16, 25)] * 12)


def test_a_polygon_far_away_is_told(tmp_path):
  far = thing(1, 1, segmentation=[[1, 2, 1e12, 4, 5, 1e12]])
  source = opened(write(tmp_path, [image(1)], [far]))
  with pytest.raises(CorruptExampleError, match=r"1.jpg, object 0: a polygon that reaches to 1e"):
    np.asarray(source[0]["masks"])
  outside = thing(1, 1, segmentation=[[-100, -100, -50, -100, -50, -50]])
  masks = np.asarray(opened(write(tmp_path, [image(1)], [outside]))[0]["masks"])
  assert masks.shape == (1, *SIZE) and not masks.any()


def test_a_thousand_objects(tmp_path):
  things = [thing(i, 1, box=(i % 50, i % 30, 5, 6)) for i in range(1000)]
  source = opened(write(tmp_path, [image(1)], things))
  example = source[0]
  assert source.info["most_objects"] == 1000 and not source.info["notes"]
  np.testing.assert_array_equal(example["boxes"][999], [49, 9, 54, 15])
  assert np.asarray(example["masks"]).sum() == 1000 * 30


def test_names_that_are_no_utf8(tmp_path):
  root = write(tmp_path, [image(1), image(2)], [thing(1, 1), thing(2, 2)])
  photos = os.fsencode(root / "train2017")
  os.rename(photos + b"/000000000001.jpg", photos + b"/caf\xe9.jpg")
  described = json.loads((root / NAME).read_text())
  described["images"][0]["file_name"] = "caf\xe9.jpg"
  (root / NAME).write_text(json.dumps(described))
  # The name in the file is another one: it is told, and the rest is read.
  source = opened(root)
  assert len(source) == 1 and source.info["notes"][instances.NO_PHOTO] == 1
  described["images"][0]["file_name"] = os.fsdecode(b"caf\xe9.jpg")
  (root / NAME).write_text(json.dumps(described))
  source = opened(root)
  assert len(source) == 2 and not source.info["notes"]
  assert {example["image_id"] for example in (source[0], source[1])} == {1, 2}


def test_odd_forms_of_masks(tmp_path):
  odd = [
    thing(1, 1, segmentation=[5, 6, 25, 6, 25, 16, 5, 16]),
    thing(2, 1, segmentation=dict(counts=[2400])),
    thing(3, 1, segmentation=dict(size=3, counts=[2400])),
    thing(4, 1, segmentation=[["a", 1, 2, 3, 4, 5]]),
    thing(5, 1, segmentation=[[[5, 6], [25, 6], [25, 16]]]),
    thing(6, 1, segmentation="x"),
  ]
  source = opened(write(tmp_path, [image(1)], odd))
  assert source.info["notes"] == {instances.BAD_MASK: 5}
  np.testing.assert_array_equal(np.asarray(source[0]["masks"]), [rectangle(6, 5, 16, 25)] * 6)


def test_a_photo_of_another_size(tmp_path):
  source = opened(write(tmp_path, [image(1, height=60, width=40)], [thing(1, 1)]))
  with pytest.raises(CorruptExampleError, match=r"1.jpg is 40 x 60 and its annotations .* 60 x 40"):
    source[0]
  source = opened(write(tmp_path, [image(1, height=None)], [thing(1, 1, box=(50, 30, 20, 20))]))
  np.testing.assert_array_equal(source[0]["boxes"], [[50, 30, 60, 40]])


def test_grey_and_cmyk_photos(tmp_path):
  root = write(tmp_path, [image(1), image(2)], [thing(1, 1), thing(2, 2)])
  for number, mode in ((1, "L"), (2, "CMYK")):
    buffer = io.BytesIO()
    Image.fromarray(photo(number)).convert(mode).save(buffer, "JPEG")
    put(root / f"train2017/{number:012}.jpg", buffer.getvalue())
  source = opened(root)
  for decoder in ("pil", "opencv"):
    transform = parse_transform(
      "decode|flip_lr(1.0)", decoder, {"image": "image", "boxes": "boxes"}
    )
    for i in range(2):
      out = transform(source[i], np.random.default_rng(0))
      assert out["image"].shape == (40, 60, 3)
      near = decode_picture(encoded(photo(i + 1)))[:, ::-1].astype(int)
      grey = np.repeat(near.mean(-1, keepdims=True), 3, -1)
      assert np.abs(out["image"] - (grey if i == 0 else near)).mean() < 25
      np.testing.assert_array_equal(out["boxes"], [[35, 6, 55, 16]])


def test_pictures_are_left_out_on_request(tmp_path):
  images = [image(1), image(2), image(3, height=20, width=60)]
  root = write(tmp_path, images, [thing(1, 1), thing(2, 3)])
  left = opened(root, options="?empty=false")
  assert [left._pictures[i].image_id for i in range(len(left))] == [1, 3]
  assert left.info["notes"] == {f"{instances.EMPTY}, left out": 1}
  both = opened(root, options="?empty=false,min_size=32")
  assert len(both) == 1 and both.info["notes"][instances.SMALL] == 1
  np.testing.assert_array_equal(both[0]["boxes"], [[5, 6, 25, 16]])


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("[]", "has no images, annotations, categories; lists of"),
    ('{"images": [], "annotations": []}', "has no categories"),
    ('{"images": [], "annotations": [{"id": 1}], "categories": []}', r"\{'id': 1\} among its anno"),
    ('{"images": [{"name": 1}], "annotations": [], "categories": []}', "among its images"),
    ('{"images": [{"id": 1}, {"id": 1}], "annotations": [], "categories": []}', "have the id 1"),
    ('{"images": [{"id": [1]}], "annotations": [], "categories": []}', "among its images"),
    ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', 'without "id" or "name"'),
    ('{"images": [], "annotations": [], "categories": [3]}', 'categories whose "id" are not all'),
    (
      '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"},'
      '{"id": "b", "name": "b"}]}',
      'categories whose "id" are not all',
    ),
    (
      '{"images": [], "annotations": [{"image_id": 1, "segments_info": null}], "categories": []}',
      '"segments_info", each with',
    ),
    (
      '{"images": [], "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info":'
      '[{"id": 1}]}], "categories": []}',
      '"segments_info", each with',
    ),
    (
      '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"},'
      '{"id": 1, "name": "b"}]}',
      "categories 'a' and 'b' have one id",
    ),
  ],
)
def test_files_that_are_refused(tmp_path, content, message):
  put(tmp_path / "annotations/instances_train2017.json", content.encode())
  with pytest.raises(ValueError, match=message):
    opened(tmp_path)


def test_nothing_there(tmp_path):
  with pytest.raises(MissingDataError, match=r"instances_train2017.json .* which is not there"):
    opened(tmp_path / "no")
  with pytest.raises(MissingDataError, match=r"was looked for in"):
    opened(tmp_path)
  root = write(tmp_path / "a", [image(1)], [thing(1, 1)], photos="")
  with pytest.raises(MissingDataError, match=r"none of the photos that .* names is below"):
    opened(root)
  with pytest.raises(
    ValueError, match="'size=3' is none of its options; there are annotations, emp"
  ):
    opened(root, options="?size=3")


@pytest.mark.skipif(COCO128 is None, reason="real photos are not there")
@pytest.mark.parametrize("kind", ["coco", "coco_panoptic"])
def test_things_of_real_panoptic_annotations(kind):
  source = create_source(f"{kind}:{COCO128}", "validation")
  assert len(source) == 100 and len(source.info["object_class_names"]) == 80
  assert source.info["category_ids"][-1] == 90
  for i in range(12):
    example = source[i]
    masks = np.asarray(example["masks"])
    np.testing.assert_array_equal(masks.sum((1, 2)), example["areas"])
    for mask, box in zip(masks, example["boxes"]):
      rows, columns = np.nonzero(mask)
      around = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
      assert np.abs(np.array(around) - box).max() <= 1
    if kind == "coco_panoptic":
      for mask, label in zip(masks, example["box_labels"]):
        assert (example["map"][mask > 0] == source.info["thing_classes"][label]).all()


def test_as_array_record(tmp_path):
  """Stored and read back: the same objects, whatever their order in the data set."""
  names = [dict(id=3, name="dog"), dict(id=5, name="cat"), dict(id=9, name="dog")]
  crowd = encode_mask(rectangle(0, 0, 9, 8)).counts.tolist()
  annotations = [
    thing(1, 1, category=3),
    thing(2, 1, box=(0, 0, 8, 9), category=9, iscrowd=1,
          segmentation=dict(size=[40, 60], counts=crowd)),
    thing(3, 3, box=(1.5, 2.25, 3.5, 4), category=5),
  ]  # fmt: skip
  root = write(tmp_path / "c", [image(1), image(2), image(3)], annotations)
  described = json.loads((root / NAME).read_text()) | dict(categories=names)
  (root / NAME).write_text(json.dumps(described))
  write(root, [image(4)], [], "annotations/instances_val2017.json", "val2017")
  (root / "annotations/instances_val2017.json").write_text(
    json.dumps(dict(images=[image(4)], annotations=[], categories=names))
  )
  to = tmp_path / "data" / "mine" / "1.0.0"
  assert prepare_data.main([f"--from=coco:{root}", f"--to={to}"]) == 0
  assert len(create_source(f"tfds:{to}", "validation")) == 1
  stored, source = create_source(f"tfds:{to}", "train"), opened(root, "train")
  assert stored.info["object_class_names"] == ("dog (3)", "cat", "dog (9)")
  assert stored.info["category_ids"] == (3, 5, 9) and stored.info["has_masks"]
  kinds = {"image": "image", "boxes": "boxes", "masks": "masks"}
  transform = parse_transform("decode|decode_objects", kinds=kinds)
  read = [transform(stored[i], np.random.default_rng(0)) for i in range(len(stored))]
  read.sort(key=lambda example: example["image_id"])
  for i, found in enumerate(read):
    want = source[i]
    assert found["image_id"] == want["image_id"] and found["size"] == want["size"]
    assert stored[0]["image"][:2] == b"\xff\xd8"
    np.testing.assert_allclose(found["boxes"], want["boxes"], atol=1e-4)
    np.testing.assert_allclose(found["given_boxes"], want["given_boxes"], atol=1e-4)
    for key in ("box_labels", "crowd", "areas"):
      np.testing.assert_array_equal(found[key], want[key])
      assert found[key].dtype == want[key].dtype
    np.testing.assert_array_equal(np.asarray(found["masks"]), np.asarray(want["masks"]))


@pytest.mark.skipif(COCO128 is None, reason="real photos are not there")
def test_cocos_numbers():
  assert create_source(f"coco:{COCO128}", "train").info["category_ids"] == COCO_IDS
