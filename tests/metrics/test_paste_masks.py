"""Pasting: detectron2's own bitmaps, and sampling written out pixel by pixel."""

import numpy as np
import pytest

from hybrid_vit.metrics.paste_masks import paste_mask, paste_masks
from hybrid_vit.ops.resize import bilinear_matrix
from tests import golden


def test_detectron2s_bitmaps():
  description, stored = golden.load("dense/paste_masks", "paste_7_masks")
  size = description["arguments"]["image"]
  up = bilinear_matrix(5, 28, False)
  masks = 1 / (1 + np.exp(-3 * (up @ stored["mask_grid"][:, 0] @ up.T)))
  found = paste_masks(masks, stored["boxes"], size)
  assert found.shape == (7, *size) and found.dtype == bool
  np.testing.assert_array_equal(np.packbits(found), stored["pasted"])
  np.testing.assert_array_equal(found.sum((1, 2)), stored["areas"])


def test_values_pixel_by_pixel():
  rng = np.random.default_rng(0)
  mask = rng.random((4, 6)).astype(np.float32)
  box = np.array([-3.2, 2.6, 12.9, 19.4], np.float32)
  values, (top, left) = paste_mask(mask, box, (17, 20))
  assert (top, left) == (1, 0) and values.shape == (16, 14)
  padded = np.pad(mask, 2)
  for y, x in np.ndindex(values.shape):
    v = (y + top + 0.5 - box[1]) / (box[3] - box[1]) * 4 - 0.5
    u = (x + left + 0.5 - box[0]) / (box[2] - box[0]) * 6 - 0.5
    i, j = int(np.floor(v)), int(np.floor(u))
    expected = sum(
      (1 - abs(v - r)) * (1 - abs(u - c)) * padded[r + 2, c + 2]
      for r in (i, i + 1) for c in (j, j + 1)
    )  # fmt: skip
    np.testing.assert_allclose(values[y, x], expected, atol=1e-5)


@pytest.mark.parametrize(
  "box",
  [[30, 30, 40, 40], [-20, -20, -10, -10], [np.nan, 0, 5, 5], [0, 0, np.inf, 5], [5, 5, 2, 2]],
)
def test_boxes_elsewhere_paste_nothing(box):
  pasted = paste_masks(np.ones((1, 3, 3)), np.array([box], np.float32), (12, 12))
  assert not pasted.any()


def test_unequal_numbers_are_named():
  with pytest.raises(ValueError, match=r"\[2, 3, 3\] and boxes \[1, 4\]"):
    paste_masks(np.ones((2, 3, 3)), np.ones((1, 4)), (4, 4))
