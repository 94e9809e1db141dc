"""Files of maps and depth: what is read, and what is refused with its remedy."""

import io

import numpy as np
import pytest
from PIL import Image

from hybrid_vit.data.errors import CorruptExampleError
from hybrid_vit.data.map_reading import (
  check_labels,
  check_size,
  read_depth,
  read_labels,
  read_segments,
)
from tests.data.pictures import encoded, photo

NUMBERS = np.arange(12, dtype=np.uint8).reshape(3, 4)


def npy(values):
  buffer = io.BytesIO()
  np.save(buffer, values)
  return buffer.getvalue()


def palette_png(values):
  picture = Image.fromarray(values, "L").convert("L")
  picture.putpalette([(7 * i) % 256 for i in range(768)])
  buffer = io.BytesIO()
  picture.save(buffer, "PNG")
  assert Image.open(buffer).mode == "P"
  return buffer.getvalue()


@pytest.mark.parametrize("write", [lambda v: encoded(v, "PNG"), palette_png])
def test_labels_are_numbers_and_never_colours(write):
  labels = read_labels(write(NUMBERS), "a.png")
  assert labels.dtype == np.int32
  np.testing.assert_array_equal(labels, NUMBERS)


def test_labels_of_16_bits():
  wide = NUMBERS.astype(np.uint16) * 100
  np.testing.assert_array_equal(read_labels(encoded(wide, "PNG"), "a.png"), wide)


def test_segments_are_three_bytes_of_one_number():
  colours = np.zeros((2, 2, 3), np.uint8)
  colours[0, 1] = (1, 2, 3)
  ids = read_segments(encoded(colours, "PNG"), "a.png")
  np.testing.assert_array_equal(ids, [[0, 1 + 2 * 256 + 3 * 65536], [0, 0]])


def test_depth_in_millimetres_and_metres():
  millimetres = np.array([[0, 1500], [65535, 250]], np.uint16)
  want = np.array([[0, 1.5], [65.535, 0.25]], np.float32)
  depth = read_depth(encoded(millimetres, "PNG"), "d.png", 1000)
  assert depth.dtype == np.float32
  np.testing.assert_allclose(depth, want, rtol=1e-6)
  capped = read_depth(encoded(millimetres, "PNG"), "d.png", 1000, cap=10.0)
  np.testing.assert_allclose(capped, [[0, 1.5], [0, 0.25]], rtol=1e-6)
  holes = np.where(want == 0, np.nan, want)[..., None]
  np.testing.assert_allclose(read_depth(npy(holes), "d.npy", 1.0), want, rtol=1e-6)


@pytest.mark.parametrize(
  ("read", "message"),
  [
    (lambda: read_labels(encoded(photo(0), "PNG"), "m.png"), "m.png is a picture of colours"),
    (lambda: read_labels(encoded(NUMBERS, "JPEG"), "m.png"), "JPEG, which changes numbers"),
    (lambda: read_labels(encoded(NUMBERS, "PNG")[:50], "m.png"), "m.png: "),
    (lambda: read_segments(encoded(NUMBERS, "PNG"), "m.png"), "m.png has mode L; a panoptic PNG"),
    (lambda: read_depth(encoded(NUMBERS, "PNG"), "d.png", 256), "d.png has mode L, 8 bits"),
    (lambda: read_depth(npy(np.zeros((2, 3))), "d.npy", 1), "no pixel is measured, all are 0"),
    (lambda: read_depth(npy(np.ones((2, 3))), "d.npy", 1, 0.5), "up to the cap of 0.5 m"),
    (lambda: read_depth(npy(-np.ones((2, 3))), "d.npy", 1), "depth -1 m"),
    (lambda: read_depth(npy(np.ones((2, 3, 2))), "d.npy", 1), r"shape \[2, 3, 2\]; \[H, W\]"),
    (lambda: read_depth(npy(np.array(["a"])), "d.npy", 1), "holds no numbers"),
    (lambda: read_depth(b"no array", "d.npy", 1), "d.npy is no array"),
    (lambda: check_labels(NUMBERS.astype(int), 6, 255, "m.png"), "m.png holds label 7, 8, 9"),
    (
      lambda: check_size(np.zeros((40, 61)), encoded(photo(0)), "m.png", "p.jpg"),
      "m.png is 40 x 61 and its photo p.jpg 40 x 60",
    ),
  ],
)  # fmt: skip
def test_refused(read, message):
  with pytest.raises(CorruptExampleError, match=message):
    read()


def test_what_belongs_together_passes():
  check_labels(np.array([[0, 6, 255]]), 6, 255, "m.png")
  check_size(np.zeros((40, 60)), encoded(photo(0)), "m.png", "p.jpg")
