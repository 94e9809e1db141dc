"""COCO's masks: pycocotools' own answers, its present ones where installed, and round trips."""

import numpy as np
import pytest

from hybrid_vit.data.mask_encoding import (
  Rle,
  compress_counts,
  decode_mask,
  decompress_counts,
  draw_polygons,
  encode_mask,
  mask_area,
  mask_box,
  merge_masks,
  read_segmentation,
  write_segmentation,
)
from tests import golden


def _masks(seed, count, size=(19, 23)):
  """Empty, full, and blobs of any density."""
  rng = np.random.default_rng(seed)
  yield np.zeros(size, bool)
  yield np.ones(size, bool)
  for _ in range(count):
    yield np.repeat(rng.random((size[0], -(-size[1] // 3))) < rng.random(), 3, axis=1)[:, : size[1]]


def test_pycocotools_polygons():
  description, stored = golden.load("dense/mask_encoding", "polygons_37x53")
  size = tuple(description["arguments"]["size"])
  for i, polygons in enumerate(description["arguments"]["polygons"]):
    rle = read_segmentation(polygons, size)
    compressed = stored[f"compressed_{i}"].tobytes()
    assert write_segmentation(rle) == {"size": list(size), "counts": compressed.decode()}
    np.testing.assert_array_equal([mask_area(rle), *mask_box(rle)], stored[f"area_box_{i}"])
    again = read_segmentation({"size": size, "counts": compressed}, size)
    np.testing.assert_array_equal(decode_mask(again), decode_mask(rle))


def test_polygons_of_thousands_of_shapes():
  masks = pytest.importorskip("pycocotools.mask")
  rng = np.random.default_rng(1)
  for case in range(1500):
    size = (int(rng.integers(1, 90)), int(rng.integers(1, 90)))
    polygons = []
    for _ in range(rng.integers(1, 4)):
      points = rng.uniform(-8, 95, (rng.integers(3, 12), 2))
      points = np.round(points, rng.integers(0, 4))
      if case % 3 == 0:
        points = np.repeat(points, 2, axis=0)
      polygons.append(points.ravel().tolist())
    expected = masks.merge(masks.frPyObjects(polygons, *size))
    found = draw_polygons(polygons, size)
    assert compress_counts(found.counts) == expected["counts"].decode(), (polygons, size)


def test_runs_of_pycocotools():
  masks = pytest.importorskip("pycocotools.mask")
  for mask in _masks(2, 60):
    expected = masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    rle = encode_mask(mask)
    assert compress_counts(rle.counts) == expected["counts"].decode()
    np.testing.assert_array_equal(masks.toBbox(expected), mask_box(rle))
    plain = {"size": list(rle.size), "counts": rle.counts.tolist()}
    assert masks.frPyObjects(plain, *rle.size)["counts"] == expected["counts"]


def test_round_trips():
  for mask in _masks(0, 40):
    rle = encode_mask(mask)
    np.testing.assert_array_equal(decode_mask(rle), mask)
    np.testing.assert_array_equal(decompress_counts(compress_counts(rle.counts)), rle.counts)
    assert mask_area(rle) == mask.sum()
    box = (0, 0, 0, 0)
    if mask.any():
      y, x = np.nonzero(mask)
      box = (x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1)
    assert mask_box(rle) == box


def test_long_runs_and_falling_ones():
  counts = np.array([0, 1, 31, 32, 1023, 2**20, 5, 0, 2**31, 7, 2**40])
  np.testing.assert_array_equal(decompress_counts(compress_counts(counts)), counts)
  assert decompress_counts(b"").size == 0 and compress_counts(np.zeros(0, int)) == ""


def test_unions():
  masks = list(_masks(3, 6))
  for count in range(1, len(masks) + 1):
    union = merge_masks([encode_mask(m) for m in masks[1 - count :]], masks[0].shape)
    np.testing.assert_array_equal(decode_mask(union), np.any(masks[1 - count :], axis=0))
  assert not decode_mask(draw_polygons([], (4, 5))).any()


def test_runs_of_no_length():
  rle = Rle((2, 3), np.array([1, 0, 2, 2, 1, 0]))
  np.testing.assert_array_equal(decode_mask(rle), [[0, 0, 1], [0, 1, 0]])
  assert mask_box(rle) == (1, 0, 2, 2)


@pytest.mark.parametrize(
  ("segmentation", "message"),
  [
    ([[1.0, 2.0, 3.0, 4.0]], "a polygon of 4 numbers"),
    ([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]], "a polygon of 7 numbers"),
    ([[1.0, 2.0, 3.0, float("nan"), 5.0, 6.0]], "all finite"),
    ({"size": [5, 4], "counts": [20]}, "a mask of 5 x 4 for a picture of 4 x 5"),
    ({"size": [4, 5], "counts": [19]}, "add up to 19; 20 were expected of 4 x 5"),
    ({"size": [4, 5], "counts": [-1, 21]}, "run lengths"),
    ({"size": [4, 5], "counts": "P"}, "breaks off"),
    ({"size": [4, 5], "counts": "\n"}, "no compressed list"),
  ],
)
def test_what_is_no_mask(segmentation, message):
  with pytest.raises(ValueError, match=message):
    read_segmentation(segmentation, (4, 5))


def test_a_bitmap_has_two_axes():
  with pytest.raises(ValueError, match=r"\[H, W\]; got \(2, 3, 1\)"):
    encode_mask(np.zeros((2, 3, 1), bool))
