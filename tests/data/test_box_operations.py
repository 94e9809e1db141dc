"""Operations on photos with objects, against their definitions."""

import math
from pathlib import Path

import numpy as np
import pytest

from hybrid_vit.data import loader, spec
from hybrid_vit.data.lazy_masks import LazyMasks
from hybrid_vit.data.mask_encoding import compress_counts, encode_mask
from hybrid_vit.data.sources import create_source
from hybrid_vit.data.transforms import parse_transform
from tests.data.pictures import photo, shared_data

KINDS = {"image": "image", "boxes": "boxes", "masks": "masks"}
COCO128 = shared_data("coco128.zip")


def example(height=48, width=64, boxes=((4, 6, 20, 30), (30, 10, 62, 40), (0, 0, 9, 48))):
  boxes = np.array(boxes, np.float32).reshape(-1, 4)
  masks = np.zeros((len(boxes), height, width), np.uint8)
  for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int)):
    y, x = np.mgrid[:height, :width] + 0.5
    y, x = y - (top + bottom) / 2, x - (left + right) / 2
    y, x = y / max(bottom - top, 1), x / max(right - left, 1)
    mask[x**2 + y**2 < 0.25] = 1
  return {
    "image": photo(1, height, width),
    "boxes": boxes,
    "masks": masks,
    "box_labels": np.arange(len(boxes), dtype=np.int32),
    "crowd": np.arange(len(boxes)) == 1,
    "areas": masks.sum((1, 2)).astype(np.float32),
  }


def run(text, given=None, seed=0, kinds=KINDS):
  given = example() if given is None else given
  return parse_transform(text, kinds=kinds)(given, np.random.default_rng(seed))


@pytest.mark.parametrize(
  ("size", "text", "want"),
  [
    ((480, 640), "resize_short_side(800)", (800, 1067)),
    ((427, 640), "resize_short_side(800)", (800, 1199)),
    ((640, 427), "resize_short_side(800)", (1199, 800)),
    ((300, 640), "resize_short_side(800)", (625, 1333)),
    ((375, 500), "resize_short_side(480, 500)", (375, 500)),
    ((375, 500), "resize_short_side((800,), 640)", (480, 640)),
    ((1, 3000), "resize_short_side(800)", (1, 1333)),
  ],
)
def test_resize_short_side_is_mmdetections_test(size, text, want):
  out = run(text, {"image": photo(0, *size)})
  assert out["image"].shape[:2] == want


def test_resize_short_side_draws_a_size():
  shorts = {
    run("resize_short_side", {"image": photo(0, 60, 80)}, seed)["image"].shape[0]
    for seed in range(80)
  }
  assert shorts == set(range(480, 801, 32))


def test_boxes_follow_each_side_by_itself():
  out = run("resize_short_side(37)")
  height, width = out["image"].shape[:2]
  assert (height, width) == (37, 49)
  factors = np.array([49 / 64, 37 / 48] * 2)
  np.testing.assert_allclose(out["boxes"], example()["boxes"] * factors, rtol=1e-6)
  assert out["masks"].shape == (3, 37, 49)


def test_detr_augmentation_crops_half_of_the_time():
  shapes, cropped = [], 0
  given = {"image": photo(0, 60, 80), "boxes": np.array([[0, 0, 80, 60.0]])}
  for seed in range(60):
    out = run("detr_augmentation((48, 52), 80, (40, 50), (30, 44))", given, seed)
    height, width = out["image"].shape[:2]
    assert min(height, width) in (48, 52) or max(height, width) == 80
    # The box of the whole picture tells where the crop was: it is cut to the whole of it.
    np.testing.assert_allclose(out["boxes"], [[0, 0, width, height]], atol=1e-4)
    cropped += abs(width / height - 4 / 3) > 0.03
    shapes.append((height, width))
  assert 18 <= cropped <= 40 and len(set(shapes)) > 10
  always = {
    run("detr_augmentation(48, 80, 40, (30, 44), 1.0)", given, s)["image"].shape for s in range(40)
  }
  never = {
    run("detr_augmentation(48, 80, 40, (30, 44), 0.0)", given, s)["image"].shape for s in range(9)
  }
  assert len(always) > 10 and never == {(48, 64, 3)}


def test_detr_augmentation_keeps_what_is_within_and_shrinks_what_is_not():
  """A canvas of a lying picture: only crops that stand are other than without it."""
  given = {"image": photo(0, 60, 80)}
  text, smaller = "detr_augmentation((48, 52), 84, (50, 60), (30, 60){})", 0
  for seed in range(80):
    free = run(text.format(""), given, seed)["image"].shape[:2]
    held = run(text.format(", within=(52, 84)"), given, seed)["image"].shape[:2]
    if free[0] <= 52:
      assert held == free
      continue
    smaller += 1
    assert held[0] == 52 and abs(held[1] / held[0] - free[1] / free[0]) < 0.05
  assert 3 < smaller < 40
  with pytest.raises(ValueError, match="within"):
    parse_transform("detr_augmentation(within=(0, 3))", kinds=KINDS)


def test_detr_augmentation_takes_all_sizes_of_the_range():
  """Shape after a resize that changes nothing: the crop itself."""
  found = set()
  for seed in range(300):
    plane = parse_transform("detr_augmentation(10, 1000, 12, (10, 12), 1.0)", kinds=KINDS)
    out = plane({"image": photo(0, 12, 12)}, np.random.default_rng(seed))
    height, width = out["image"].shape[:2]
    found.add((height, width))
  assert found == {(10, 10), (10, 11), (11, 10), (10, 12), (12, 10)}


def test_large_scale_jitter_is_as_large_as_drawn():
  sizes, offsets = [], []
  given = {"image": photo(0, 48, 64), "points": np.array([[0, 0.0]])}
  kinds = {"image": "image", "points": "points"}
  for seed in range(200):
    out = run("large_scale_jitter(64, (0.1, 2.0))", given, seed, kinds)
    scale = np.random.default_rng(seed).uniform(0.1, 2.0)
    whole = round(48 * scale), round(64 * scale)
    assert out["image"].shape[:2] == (min(whole[0], 64), min(whole[1], 64))
    sizes.append(scale)
    room = np.maximum(np.array(whole) - 64, 0)
    left, top = -out["points"][0]
    if room.min() > 8:  # one place for both sides
      assert abs(top / room[0] - left / room[1]) < 0.5 / room[0] + 0.5 / room[1] + 1e-6
      offsets.append(left / room[1])
    assert top in range(room[0] + 1) and left in range(room[1] + 1)
  assert min(sizes) < 0.2 and max(sizes) > 1.9
  assert min(offsets) < 0.1 and max(offsets) > 0.9


def test_pad_to_keeps_the_true_size():
  given = example() | {"map": np.zeros((48, 64), np.int32)}
  out = run("pad_to((50, 70), (1, 2, 3))", given, kinds={**KINDS, "map": "map"})
  assert out["image"].shape == (50, 70, 3) and out["masks"].shape == (3, 50, 70)
  assert (out["image"][48:] == (1, 2, 3)).all() and (out["image"][:, 64:] == (1, 2, 3)).all()
  assert (out["map"][48:] == 255).all() and not out["masks"][:, 48:].any()
  np.testing.assert_array_equal(out["true_size"], np.array([48, 64], np.float32))
  assert out["true_size"].dtype == np.float32
  np.testing.assert_array_equal(out["boxes"], given["boxes"])
  with pytest.raises(ValueError, match=r"pad_to\(60\) of a picture of 48 x 64: resize it"):
    run("pad_to(60)")


def test_rows_are_dropped_together():
  out = run("filter_boxes(17)")
  assert out["box_labels"].tolist() == [1] and out["crowd"].tolist() == [True]
  assert out["boxes"].shape == (1, 4) and out["masks"].shape == (1, 48, 64)
  assert out["areas"].shape == (1,)
  assert run("drop_crowd")["box_labels"].tolist() == [0, 2]
  flat = example(boxes=[(1, 1, 1, 9), (1, 1, 3, 9), (5, 5, 5.5, 9)])
  assert run("filter_boxes", flat)["box_labels"].tolist() == [1]
  assert run("filter_boxes(0)", flat)["box_labels"].tolist() == [1, 2]
  without = {key: value for key, value in example().items() if key not in ("crowd", "masks")}
  assert run("drop_crowd|filter_boxes(12)", without)["box_labels"].tolist() == [0, 1]
  assert len(run("filter_boxes(1000)")["boxes"]) == 0
  with pytest.raises(ValueError, match=r"other numbers of rows each: .*'crowd': 2"):
    run("filter_boxes", example() | {"crowd": np.zeros(2, bool)})


def test_the_largest_are_kept_and_the_others_counted(caplog):
  rng = np.random.default_rng(0)
  corners = rng.uniform(0, 40, (1000, 2))
  boxes = np.concatenate([corners, corners + rng.uniform(1, 8, (1000, 2))], axis=1)
  given = {
    "image": photo(0, 48, 64),
    "boxes": boxes.astype(np.float32),
    "box_labels": np.arange(1000, dtype=np.int32),
    "crowd": np.zeros(1000, bool),
  }
  out = run("keep_largest(100)", given)
  assert len(out["boxes"]) == len(out["crowd"]) == 100 and out["objects_left_out"] == 900
  kept = out["box_labels"]
  assert (np.diff(kept) > 0).all()
  areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
  assert areas[kept].min() >= np.sort(areas)[-100] - 1e-4
  assert "a picture has 1,000 objects, of which the 100 largest stay" in caplog.text
  few = run("keep_largest(100)")
  assert few["objects_left_out"] == 0 and few["objects_left_out"].dtype == np.int32
  assert len(few["boxes"]) == 3


def test_boxes_from_masks_after_a_crop():
  out = run("random_crop(30)|boxes_from_masks|filter_boxes", seed=4)
  masks = np.asarray(out["masks"])
  assert len(masks) and masks.shape[1:] == (30, 30)
  for mask, box in zip(masks, out["boxes"]):
    rows, columns = np.nonzero(mask)
    around = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    np.testing.assert_array_equal(box, around)
  # An ellipse of which only the corner of its box is left is gone.
  given = example(boxes=[(0, 0, 40, 40)])
  given["masks"][:, :8, :8] = 0
  lost = run("crop_box(0, 0, 5, 5)|boxes_from_masks", given)
  np.testing.assert_array_equal(lost["boxes"], [[0, 0, 0, 0]])
  assert len(run("crop_box(0, 0, 5, 5)|boxes_from_masks|filter_boxes", given)["boxes"]) == 0


def bilinear(mask, y, x):
  """torchvision's sample at a place in pixels, the first of whose centres is at 0."""
  height, width = mask.shape
  y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
  top, left = min(int(y), height - 2), min(int(x), width - 2)
  v, u = y - top, x - left
  a, b, c, d = (mask[top + i, left + j] for i in (0, 1) for j in (0, 1))
  return (1 - v) * ((1 - u) * a + u * b) + v * ((1 - u) * c + u * d)


@pytest.mark.parametrize("size", [5, 16])
@pytest.mark.parametrize("lazy", [False, True])
def test_crop_masks_is_roi_align_of_the_mask(size, lazy):
  boxes = [
    (4.3, 6.8, 20.1, 30.9),
    (30, 10, 62, 40),
    (0, 0, 9, 48),
    (10, 10, 11.5, 12),
    (5, 5, 5, 9),
  ]
  given = example(boxes=boxes)
  masks = given["masks"]
  if lazy:
    given["masks"] = LazyMasks((48, 64), [lambda m=m: encode_mask(m) for m in masks])
  out = run(f"crop_masks({size})", given)["masks"]
  assert out.shape == (5, size, size) and out.dtype == np.uint8 and not out[4].any()
  for mask, box, found in zip(masks, np.array(boxes), out[:4]):
    across, down = box[2] - box[0], box[3] - box[1]
    n, m = max(math.ceil(down / size), 1), max(math.ceil(across / size), 1)
    for i in range(size):
      for j in range(size):
        cell = [
          bilinear(
            mask.astype(float),
            box[1] + (i + (a + 0.5) / n) * down / size - 0.5,
            box[0] + (j + (b + 0.5) / m) * across / size - 0.5,
          )
          for a in range(n)
          for b in range(m)
        ]
        assert abs(found[i, j] - 255 * np.mean(cell)) <= 0.51


def test_masks_in_boxes_hold_what_detectors_learn_from():
  """28 x 28 targets of shifted boxes: from the stored crop, and from the mask itself."""
  given = example(200, 300, [(20, 30, 150, 180), (100, 10, 290, 120)])
  out = run("crop_masks(112)", dict(given))
  for mask, stored, box in zip(given["masks"], out["masks"], given["boxes"]):
    for shift in ((-8, 5, 9, -4), (0, 0, 0, 0), (10, 10, -10, -10)):
      proposal = box + np.array(shift)
      y, x = (
        (np.arange(28) + 0.5) / 28 * (proposal[k + 2] - proposal[k]) + proposal[k] for k in (1, 0)
      )
      within = [
        ((places - box[k]) / (box[k + 2] - box[k]) * 112 - 0.5) for k, places in ((1, y), (0, x))
      ]
      wrong = 0
      for i in range(28):
        for j in range(28):
          whole = bilinear(mask.astype(float), y[i] - 0.5, x[j] - 0.5) >= 0.5
          v, u = within[0][i], within[1][j]
          inside = -0.5 <= v <= 111.5 and -0.5 <= u <= 111.5
          wrong += whole != (inside and bilinear(stored / 255, v, u) >= 0.5)
      assert wrong <= 8  # of 784


def test_nothing_on_the_plane_may_follow_crop_masks():
  with pytest.raises(ValueError, match="'image' is 48 x 64 and 'masks' 16 x 16"):
    run("crop_masks(16)|flip_lr")


FIELDS = {
  "image": spec.Field("image", "uint8", (None, None, 3)),
  "boxes": spec.Field("boxes", "float32", (4, 4), ragged=True),
  "box_labels": spec.Field("value", "int32", (4,), ragged=True, pad=-1),
  "crowd": spec.Field("value", "bool", (4,), ragged=True),
  "masks": spec.Field("masks", "uint8", (4, None, None), ragged=True),
  "true_size": spec.Field("value", "float32", (2,)),
}


class Objects:
  """Pictures of 0, 3 and 7 objects; box i of one is at x = i."""

  counts = (0, 3, 7)

  def __len__(self):
    return len(self.counts)

  def __getitem__(self, index):
    count = self.counts[index]
    boxes = [(i, 2, i + 10 + i, 20) for i in range(count)]
    return example(boxes=boxes) | {"image": photo(index, 48, 64)}

  def describe(self, index):
    return f"picture {index}"


@pytest.mark.parametrize("limit", ["", "keep_largest(4)|"])
def test_rows_of_a_batch_line_up(limit):
  text = f"pad_to(64)|{limit}crop_masks(8)"
  transform = parse_transform(text, kinds=spec.kinds(FIELDS))
  known = spec.resolve(FIELDS, parse_transform(f"resize(64)|{text}", kinds=spec.kinds(FIELDS)))
  assert known["masks"].shape == (4, 8, 8) and known["image"].shape == (64, 64, 3)
  ((batch, _),) = loader.eval_batches(Objects(), loader.Reading(3, transform, known), num_threads=2)
  kept = [0, 1, 2, 3] if not limit else [3, 4, 5, 6]  # without it the first ones stay
  for row, labels in enumerate(([-1] * 4, [0, 1, 2, -1], kept)):
    assert batch["box_labels"][row].tolist() == labels
    for place, label in enumerate(labels):
      box = batch["boxes"][row, place]
      if label < 0:
        assert not box.any() and not batch["masks"][row, place].any()
        assert not batch["crowd"][row, place]
      else:
        assert box.tolist() == [label, 2, 2 * label + 10, 20]
        assert batch["crowd"][row, place] == (label == 1)
        assert batch["masks"][row, place].any()
  np.testing.assert_array_equal(batch["true_size"], [[48, 64]] * 3)


def test_objects_of_tfds():
  masks = example()["masks"]
  given = {
    "image": photo(1, 48, 64),
    "objects": {
      "bbox": np.array([[0.125, 0.0625, 0.625, 0.3125], [0, 0, 0.5, 0.25]], np.float32),
      "label": np.array([3, 0]),
      "is_crowd": np.array([False, True]),
      "area": np.array([7, 8]),
      "id": np.array([1, 2]),
    },
  }
  kinds = {"image": "image", "boxes": "boxes"}
  out = run("decode_objects|flip_lr(1.0)|drop_crowd", given, kinds=kinds)
  np.testing.assert_array_equal(out["boxes"], [[44, 6, 60, 30]])
  assert out["box_labels"].tolist() == [3] and out["areas"].tolist() == [7]
  given["objects"]["segmentation"] = [compress_counts(encode_mask(masks[0]).counts), ""]
  found = np.asarray(run("decode_objects", given)["masks"])
  np.testing.assert_array_equal(found[0], masks[0])
  assert found[1].sum() == found[1, :24, :16].sum() == 24 * 16
  with pytest.raises(ValueError, match="the examples have no 'things'; they have: image, objects"):
    run("decode_objects('things')", given)


@pytest.mark.parametrize(
  ("text", "kinds", "message"),
  [
    ("resize_short_side(())", KINDS, "sizes is .*; whole numbers from 1 were expected"),
    ("resize_short_side(0)", KINDS, "sizes is 0"),
    ("resize_short_side(800, 0)", KINDS, "long is 0"),
    ("detr_augmentation(crop=(600, 384))", KINDS, "crop is .* rising pair"),
    ("large_scale_jitter(1024, (0, 1))", KINDS, "scale is"),
    ("filter_boxes", {"image": "image"}, "0 keys of kind 'boxes'"),
    ("crop_masks", {"image": "image", "boxes": "boxes"}, "0 keys of kind 'masks'"),
    ("keep_largest(0)", KINDS, "count is 0"),
  ],
)
def test_refused(text, kinds, message):
  with pytest.raises(ValueError, match=message):
    parse_transform(text, kinds=kinds)


@pytest.mark.skipif(COCO128 is None, reason="real photos are not there")
@pytest.mark.parametrize(
  "text",
  [
    "flip_lr|detr_augmentation(long=1333)|drop_crowd|filter_boxes|pad_to(1344)",
    "flip_lr|large_scale_jitter(512)|pad_to(512)|drop_crowd|boxes_from_masks|filter_boxes",
  ],
)
def test_objects_of_real_photos_stay_on_what_they_show(text):
  source = create_source(f"coco:{COCO128}", "train")
  found = 0
  for i in range(0, 30, 3):
    out = parse_transform(f"decode|{text}", kinds=KINDS)(source[i], np.random.default_rng(i))
    masks = np.asarray(out["masks"])
    assert len(out["boxes"]) == len(masks) == len(out["box_labels"]) == len(out["crowd"])
    for mask, box in zip(masks, out["boxes"]):
      rows, columns = np.nonzero(mask)
      if rows.size:
        around = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        outside = np.maximum(box[:2] - around[:2], around[2:] - box[2:])
        assert outside.max() <= 4  # a pixel of the photo, enlarged
      found += rows.size > 0
  assert found > 15


def test_the_documents_transforms_can_be_parsed():
  text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
  code = text.partition("## Boxes and masks")[2].partition("```python\n")[2].partition("```")[0]
  found = {}
  exec(code, found)
  strings = {k: v for k, v in found.items() if isinstance(v, str) and k != "batch" and k[0] != "_"}
  assert len(strings) == 4
  for name, string in strings.items():
    given = {key: value for key, value in example(90, 120).items() if key != "crowd"}
    out = run(string, given)
    side = 1024 if name == "jitter" else 1344
    assert out["image"].shape == (side, side, 3) and out["true_size"].shape == (2,)
    if name != "test":
      assert out["masks"].shape[1:] == (112, 112)
