"""Points of maps against the definition of bilinear sampling."""

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.ops.point_sampling import sample_masks, sample_points


def _by_hand(plane, point):
  height, width = plane.shape
  x, y = point * (width, height) - 0.5
  rows = np.maximum(0, 1 - np.abs(y - np.arange(height)))
  columns = np.maximum(0, 1 - np.abs(x - np.arange(width)))
  return rows @ plane @ columns


def _draws():
  rng = np.random.default_rng(0)
  maps = rng.standard_normal((2, 5, 4, 3), np.float32)
  points = rng.uniform(-0.2, 1.2, (2, 9, 2)).astype(np.float32)
  points[0, :4] = [[0, 0], [1, 1], [0.125, 0.1], [1e9, 0.5]]
  return maps, points


def test_the_definition():
  maps, points = _draws()
  found = sample_points(maps, points)
  assert found.dtype == jnp.float32
  for b, n, c in np.ndindex(found.shape):
    expected = _by_hand(maps[b, :, :, c].astype(float), points[b, n].astype(float))
    np.testing.assert_allclose(found[b, n, c], expected, atol=1e-5)
  np.testing.assert_allclose(found[0, 2], maps[0, 0, 0], atol=1e-6)  # a cell's centre
  np.testing.assert_allclose(found[0, 0], maps[0, 0, 0] / 4, atol=1e-6)  # half outside, twice
  assert not found[0, 3].any()


def test_masks_share_points_or_have_their_own():
  maps, points = _draws()
  masks = maps.transpose(0, 3, 1, 2)
  shared = sample_masks(masks, points[:, None])
  np.testing.assert_allclose(shared, sample_points(maps, points).transpose(0, 2, 1), atol=1e-6)
  own = np.stack([points, points[:, ::-1], points], axis=1)
  np.testing.assert_allclose(
    sample_masks(masks, own)[:, 1], np.asarray(shared)[:, 1, ::-1], atol=1e-6
  )
  ones = sample_masks(np.ones((2, 3, 5, 4), np.uint8), np.full((2, 1, 1, 2), 0.5, np.float32))
  np.testing.assert_array_equal(ones, np.ones((2, 3, 1)))


def test_gradients_reach_maps_and_points():
  maps, points = _draws()
  inside = np.clip(points, 0.2, 0.8)
  of_maps, of_points = jax.grad(lambda *x: jnp.sum(jnp.sin(sample_points(*x))), argnums=(0, 1))(
    maps, inside
  )
  assert np.isfinite(of_maps).all() and np.abs(of_points).max() > 0
  step = np.zeros_like(inside)
  step[1, 7, 0] = 1e-3
  values = [np.sin(np.asarray(sample_points(maps, inside + s), float)).sum() for s in (step, -step)]
  np.testing.assert_allclose(of_points[1, 7, 0], (values[0] - values[1]) / 2e-3, rtol=1e-2)
