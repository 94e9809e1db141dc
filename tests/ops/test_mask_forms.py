"""Masks in fewer bytes are read as their bitmaps are."""

import jax
import numpy as np
import pytest

from hybrid_vit.ops import mask_forms
from hybrid_vit.ops.point_sampling import sample_masks

_sampled = jax.jit(mask_forms.sample_any_masks)


def _points(own, rng):
  # Some of them beyond the border, where there is nothing.
  return rng.uniform(-0.05, 1.05, (2, 3 if own else 1, 50, 2)).astype(np.float32)


@pytest.mark.parametrize("own", [True, False])
def test_numbers_in_a_map(own):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 5, (2, 6, 10)).astype(np.int32)
  # A number that no pixel has, and the same twice.
  masks = mask_forms.LabelMasks(labels, np.array([[0, 3, 9], [4, 4, 1]], np.int32))
  whole = (labels[:, None] == masks.numbers[:, :, None, None]).astype(np.uint8)
  assert masks.shape == whole.shape
  np.testing.assert_array_equal(mask_forms.bitmaps(masks), whole)
  points = _points(own, rng)
  np.testing.assert_allclose(_sampled(masks, points), sample_masks(whole, points), atol=1e-6)


@pytest.mark.parametrize("own", [True, False])
def test_bits(own):
  rng = np.random.default_rng(1)
  whole = rng.integers(0, 2, (2, 3, 5, 16)).astype(np.uint8)
  masks = mask_forms.PackedMasks(np.packbits(whole, axis=-1))
  assert masks.shape == whole.shape and masks.bits.nbytes * 8 == whole.nbytes
  np.testing.assert_array_equal(mask_forms.bitmaps(masks), whole)
  points = _points(own, rng)
  np.testing.assert_allclose(_sampled(masks, points), sample_masks(whole, points), atol=1e-6)


def test_bitmaps_stay_what_they_are():
  whole = np.random.default_rng(2).integers(0, 2, (2, 3, 4, 5)).astype(np.uint8)
  points = _points(True, np.random.default_rng(3))
  np.testing.assert_array_equal(mask_forms.bitmaps(whole), whole)
  np.testing.assert_allclose(_sampled(whole, points), sample_masks(whole, points), atol=1e-6)


@pytest.mark.parametrize("steps", [(1, 1), (2, 4), (3, 5), (7, 20)])
def test_every_cell_is_that_of_the_bitmaps(steps):
  rng = np.random.default_rng(4)
  labels = rng.integers(0, 5, (2, 7, 16)).astype(np.int32)
  by_number = mask_forms.LabelMasks(labels, np.array([[0, 3, 9], [4, 4, 1]], np.int32))
  whole = rng.integers(0, 2, (2, 3, 7, 16)).astype(np.uint8)
  for masks in (by_number, mask_forms.PackedMasks(np.packbits(whole, axis=-1)), whole):
    expected = np.asarray(mask_forms.bitmaps(masks))[:, :, :: steps[0], :: steps[1]]
    found = mask_forms.every_cell(masks, steps)
    assert tuple(found.shape) == expected.shape
    np.testing.assert_array_equal(mask_forms.bitmaps(found), expected)
