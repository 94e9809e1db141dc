"""HOG by its definition, pixel by pixel, and what it is blind to."""

import numpy as np
import pytest

from hybrid_vit.ops.hog import hog


def by_hand(image, cell, orientations):
  """One channel `[H, W]`, with loops."""
  height, width = image.shape
  x = np.pad(image, 1, mode="reflect")
  sobel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
  sums = np.zeros((height // cell, width // cell, orientations))
  for i in range(height):
    for j in range(width):
      part = x[i : i + 3, j : j + 3]
      gx, gy = (part * sobel).sum(), (part * sobel.T).sum()
      k = int(np.floor(np.arctan2(gx, gy) / np.pi * orientations)) % orientations
      sums[i // cell, j // cell, k] += np.hypot(gx, gy)
  return sums / np.maximum(np.linalg.norm(sums, axis=-1, keepdims=True), 1e-12)


def test_by_its_definition():
  # Whole numbers: at the reflected border one part of the gradient is 0, which is a bin's edge.
  images = np.random.default_rng(0).integers(0, 256, (2, 16, 8, 3)).astype(float)
  found = hog(images, cell=4)
  assert found.shape == (2, 4, 2, 3, 9)
  for row, channel in ((0, 0), (1, 2)):
    expected = by_hand(images[row, ..., channel], 4, 9)
    np.testing.assert_allclose(found[row, :, :, channel], expected, rtol=1e-4, atol=1e-4)


def test_a_ramp_has_one_direction_and_a_flat_cell_none():
  ramp = np.arange(16.0)[:, None, None].repeat(16, 1).repeat(3, 2)[None]
  found = np.asarray(hog(ramp))
  # Brighter downwards: the gradient's angle is half a turn, in the bin of 0.
  np.testing.assert_allclose(found[..., 0], 1.0, atol=1e-6)
  np.testing.assert_array_equal(hog(np.full((1, 8, 8, 3), 0.7)), 0.0)


def test_normalising_a_channel_changes_nothing():
  images = np.random.default_rng(1).normal(size=(1, 16, 16, 3))
  other = (images - np.array([0.1, 0.2, 0.3])) / np.array([0.2, 0.5, 2.0])
  np.testing.assert_allclose(hog(images), hog(other), atol=1e-4)


def test_half_a_cell_is_refused():
  with pytest.raises(ValueError, match="20x16 is not whole cells of 8x8"):
    hog(np.zeros((1, 20, 16, 3)))
