"""Anchors: torchvision's and mmdetection's own, and which a picture uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.anchors import (
  anchors_within,
  base_anchors,
  grid_anchors,
  octave_scales,
  pyramid_anchors,
  torchvision_anchors,
  valid_anchors,
)
from tests import golden

_GRIDS = ((12, 16), (6, 8), (3, 4))


def test_torchvisions_anchors():
  description, stored = golden.load("dense/anchors", "anchors_torchvision_96x64")
  given = description["arguments"]
  grids = [tuple(grid) for grid in given["grids"]]
  for ratios in (given["aspect_ratios"], given["aspect_ratios"][0]):
    levels = torchvision_anchors(grids, tuple(given["image"]), given["sizes"], ratios)
    np.testing.assert_array_equal(np.concatenate(levels), stored["anchors"])


def test_mmdetections_anchors():
  _, stored = golden.load("dense/assign_mmdet", "assign_96x128")
  levels = pyramid_anchors(_GRIDS, (8, 16, 32), (4.0,))
  assert [len(level) for level in levels] == [576, 144, 36]
  np.testing.assert_array_equal(np.concatenate(levels), stored["anchors"])


def test_retinanets_anchors():
  _, stored = golden.load("dense/assign_mmdet", "assign_96x128")
  levels = pyramid_anchors(_GRIDS[:2], (8, 16), octave_scales())
  found = np.concatenate([level[:18] for level in levels])
  np.testing.assert_allclose(found, stored["retina_anchors"], rtol=1e-6)


def test_detectron2s_order_and_centres():
  scales, ratios = (2.0, 3.0), (0.5, 2.0)
  by_ratio = base_anchors(8, scales, ratios)
  by_scale = base_anchors(8, scales, ratios, order="scales_first")
  np.testing.assert_array_equal(by_scale, by_ratio[[0, 2, 1, 3]])
  np.testing.assert_array_equal(base_anchors(8, scales, ratios, centre=0.5), by_ratio + 4)
  widths, heights = (by_ratio[:, 2:] - by_ratio[:, :2]).T
  np.testing.assert_allclose(heights / widths, [0.5, 0.5, 2, 2], rtol=1e-6)
  np.testing.assert_allclose(widths * heights, [256, 576, 256, 576], rtol=1e-6)
  with pytest.raises(ValueError, match=r"'any'.*ratios_first, scales_first"):
    base_anchors(8, scales, order="any")


def test_strides_may_differ_by_direction():
  boxes = grid_anchors(np.zeros((1, 4)), (2, 3), (10, 4))
  np.testing.assert_array_equal(boxes[:, 0], [0, 4, 8, 0, 4, 8])
  np.testing.assert_array_equal(boxes[:, 1], [0, 0, 0, 10, 10, 10])


def test_valid_cells():
  sizes = jnp.array([[96, 128], [65, 97]])
  found = jax.jit(lambda sizes: valid_anchors(_GRIDS, (8, 16, 32), 3, sizes))(sizes)
  assert found.shape == (2, 756)
  assert found[0].all()
  expected = []
  for (rows, columns), stride in zip(_GRIDS, (8, 16, 32)):
    for y in range(rows):
      for x in range(columns):
        expected += [y < np.ceil(65 / stride) and x < np.ceil(97 / stride)] * 3
  np.testing.assert_array_equal(found[1], expected)
  np.testing.assert_array_equal(valid_anchors(_GRIDS, (8, 16, 32), 3, (65, 97)), expected)


def test_allowed_border():
  boxes = np.array([[0, 0, 9.5, 9.5], [0, 0, 10, 9], [-2, 0, 5, 5], [0, 0, 5, 21]], np.float32)
  size = (20, 10)
  np.testing.assert_array_equal(anchors_within(boxes, size, 0), [True, False, False, False])
  np.testing.assert_array_equal(anchors_within(boxes, size, 2), [True] * 4)
  np.testing.assert_array_equal(anchors_within(boxes, size, -1), [True] * 4)
  many = anchors_within(boxes, jnp.array([size, (30, 30)]), 0)
  np.testing.assert_array_equal(many[1], [True, True, False, True])


def test_unequal_numbers_are_named():
  with pytest.raises(ValueError, match="3 maps and 2 strides"):
    pyramid_anchors(_GRIDS, (8, 16))
  with pytest.raises(ValueError, match="3 maps, sizes of 5 levels and ratios of 3"):
    torchvision_anchors(_GRIDS, (96, 128))
