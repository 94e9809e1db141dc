"""Losses of depth against arithmetic in float64, the authors' figures and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.resize import resize_bilinear
from hybrid_vit.tasks import depth_losses
from tests import golden

_LOSSES = {
  "silog": lambda p, t: depth_losses.silog(p, t, weight=0.5),
  "silog_of_kitti": lambda p, t: depth_losses.silog(p, t, weight=1.0),
  "sig_loss": depth_losses.sig_loss,
  "l1": depth_losses.l1,
  "berhu": depth_losses.berhu,
  "gradient_matching": depth_losses.gradient_matching,
}


def _case(seed=0, shape=(2, 9, 11)):
  rng = np.random.default_rng(seed)
  truth = rng.uniform(0.5, 9.5, shape).astype(np.float32)
  predicted = (truth * np.exp(0.3 * rng.standard_normal(shape)) + 0.1).astype(np.float32)
  return predicted, np.where(rng.random(shape) < 0.3, 0, truth).astype(np.float32)


def _valid(predicted, truth):
  measured = truth > 0
  return predicted[measured].astype(np.float64), truth[measured].astype(np.float64)


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.85, 1.0])
def test_silog_is_over_the_whole_batch(weight):
  predicted, truth = _case()
  predicted[1] *= 2
  p, t = _valid(predicted, truth)
  d = np.log(t) - np.log(p)
  want = np.sqrt(np.mean(d**2) - weight * np.mean(d) ** 2)
  found = depth_losses.silog(predicted, truth, weight=weight)
  assert found.dtype == jnp.float32 and found.shape == ()
  np.testing.assert_allclose(found, want, rtol=1e-5)


def test_silog_of_the_authors():
  described, stored = golden.load("dense/depth_metrics", "depth_nyu_eigen")
  size = tuple(described["arguments"]["image"])
  truth, ratio = (
    np.asarray(resize_bilinear(np.moveaxis(stored[name], 1, 3), size, align_corners=False))[..., 0]
    for name in ("gt_grid", "ratio_grid")
  )
  holes = np.unpackbits(stored["holes"]).reshape(truth.shape).astype(bool)
  predicted, truth = ratio * truth + 0.05, np.where(holes, 0, truth)
  found = [depth_losses.silog(predicted, truth, weight=weight) for weight in (0.5, 0.85)]
  np.testing.assert_allclose(found, stored["silog_loss"], rtol=1e-5)


@pytest.mark.parametrize("epsilon", [1e-3, 0.0])
def test_sig_loss(epsilon):
  predicted, truth = _case()
  p, t = _valid(predicted, truth)
  g = np.log(p + epsilon) - np.log(t + epsilon)
  want = 10 * np.sqrt(np.var(g, ddof=1) + 0.15 * np.mean(g) ** 2)
  np.testing.assert_allclose(
    depth_losses.sig_loss(predicted, truth, epsilon=epsilon), want, rtol=1e-5
  )


def test_sig_loss_of_one_pixel():
  truth = np.zeros((1, 3, 3), np.float32)
  truth[0, 1, 1] = 2.0
  found, slope = jax.value_and_grad(depth_losses.sig_loss)(jnp.full((1, 3, 3), 3.0), truth)
  np.testing.assert_allclose(found, 10 * np.sqrt(0.15) * np.log(3.001 / 2.001), rtol=1e-5)
  assert np.isfinite(slope).all() and np.count_nonzero(slope) == 1


def test_l1():
  predicted, truth = _case()
  p, t = _valid(predicted, truth)
  np.testing.assert_allclose(depth_losses.l1(predicted, truth), np.mean(np.abs(p - t)), rtol=1e-5)


@pytest.mark.parametrize("part", [0.2, 0.5])
def test_berhu(part):
  predicted, truth = _case()
  p, t = _valid(predicted, truth)
  error = np.abs(p - t)
  limit = part * error.max()
  each = [e if e <= limit else (e * e + limit * limit) / (2 * limit) for e in error]
  assert 0 < np.sum(error <= limit) < len(error)
  np.testing.assert_allclose(
    depth_losses.berhu(predicted, truth, part=part), np.mean(each), rtol=1e-5
  )


def test_gradient_matching():
  predicted, truth = _case()
  want = 0.0
  for k in range(4):
    steps, number = 0.0, 0
    for b in range(2):
      p, t = (x[b, :: 2**k, :: 2**k].astype(np.float64) for x in (predicted, truth))
      for i, j in np.ndindex(t.shape):
        if t[i, j] == 0:
          continue
        number += 1
        for y, x in ((i + 1, j), (i, j + 1)):
          if y < t.shape[0] and x < t.shape[1] and t[y, x]:
            steps += abs(np.log(p[i, j] / t[i, j]) - np.log(p[y, x] / t[y, x]))
    want += steps / number
  np.testing.assert_allclose(depth_losses.gradient_matching(predicted, truth), want, rtol=1e-5)
  # A factor has no edges.
  assert float(depth_losses.gradient_matching(2 * truth, truth)) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", _LOSSES)
def test_gradient_is_the_slope(name):
  predicted, truth = _case(1)
  loss = jax.jit(_LOSSES[name])
  slope = np.asarray(jax.grad(_LOSSES[name])(jnp.asarray(predicted), truth))
  # Uphill everywhere, so that a step that passes few kinks still shows above the rounding.
  direction = np.random.default_rng(2).uniform(0.5, 2, truth.shape) * np.sign(slope)
  if name == "berhu":  # The limit has no gradient: the largest error stays.
    direction[np.unravel_index(np.argmax(np.abs(predicted - truth) * (truth > 0)), truth.shape)] = 0
  step = 1e-4 if name == "gradient_matching" else 1e-3
  ends = [
    float(loss((predicted + sign * step * direction).astype(np.float32), truth)) for sign in (1, -1)
  ]
  assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(np.sum(slope * direction), rel=1e-2)


@pytest.mark.parametrize("name", _LOSSES)
@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -3.0])
def test_what_was_not_measured_does_not_count(name, value):
  predicted, truth = _case()
  outside = truth == 0
  spoiled = np.where(outside, np.float32(value), predicted)
  # Nor does a truth that is no number.
  none = np.where(outside & (np.arange(truth.shape[2]) % 2 == 0), np.float32(np.nan), truth)
  before = jax.value_and_grad(_LOSSES[name])(jnp.asarray(predicted), truth)
  after = jax.value_and_grad(_LOSSES[name])(jnp.asarray(spoiled), none)
  np.testing.assert_array_equal(after[0], before[0])
  np.testing.assert_array_equal(after[1], before[1])
  assert not np.asarray(after[1])[outside].any()


@pytest.mark.parametrize("name", _LOSSES)
def test_nothing_measured(name):
  predicted, truth = _case()
  value, slope = jax.value_and_grad(_LOSSES[name])(jnp.asarray(predicted), np.zeros_like(truth))
  assert float(value) == 0
  assert not np.asarray(slope).any()


@pytest.mark.parametrize("name", _LOSSES)
def test_the_truth_itself(name):
  _, truth = _case()
  value, slope = jax.value_and_grad(_LOSSES[name])(jnp.asarray(truth), truth)
  assert float(value) == 0
  assert np.isfinite(slope).all()


@pytest.mark.parametrize("name", ["silog", "sig_loss", "gradient_matching"])
def test_predictions_without_a_logarithm(name):
  predicted, truth = _case()
  predicted[:, ::2] = 0.0
  value, slope = jax.value_and_grad(_LOSSES[name])(jnp.asarray(predicted), truth)
  assert np.isfinite(value) and np.isfinite(slope).all()


@pytest.mark.parametrize("name", _LOSSES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_are_summed_in_long_ones(name, dtype):
  predicted, truth = _case(3, (1, 60, 80))
  short = jnp.asarray(predicted, dtype)
  found, slope = jax.value_and_grad(_LOSSES[name])(short, truth)
  assert found.dtype == jnp.float32 and slope.dtype == dtype
  np.testing.assert_allclose(found, _LOSSES[name](short.astype(jnp.float32), truth), rtol=1e-6)


def _chamfer(centers, truth):
  total = []
  for bins, depths in zip(centers.astype(np.float64), truth):
    depths = depths[depths > 0].astype(np.float64)
    if not len(depths):
      total.append(0.0)
      continue
    apart = (bins[:, None] - depths) ** 2
    total.append(apart.min(0).mean() + apart.min(1).mean())
  return np.mean(total)


def _bins(rows=2, number=6):
  return np.sort(np.random.default_rng(5).uniform(0, 10, (rows, number)), 1).astype(np.float32)


@pytest.mark.parametrize("pixels", [99, 2048])
def test_chamfer(pixels):
  _, truth = _case()
  centers = _bins()
  found = depth_losses.bins_chamfer(centers, truth, pixels=pixels)
  np.testing.assert_allclose(found, _chamfer(centers, truth), rtol=1e-5)


def test_chamfer_looks_at_all_of_few_measured_depths():
  rng = np.random.default_rng(6)
  truth = np.zeros((2, 64, 64), np.float32)
  for row in truth:
    row.ravel()[rng.choice(64 * 64, 50, replace=False)] = rng.uniform(1, 9, 50)
  found = depth_losses.bins_chamfer(_bins(), truth, pixels=64)
  np.testing.assert_allclose(found, _chamfer(_bins(), truth), rtol=1e-5)


def test_chamfer_looks_at_all_columns_and_rows():
  # As many pixels as rows: at a constant step they would be one column.
  depth = np.linspace(1, 9, 64, dtype=np.float32)
  centers = np.full((2, 1), 1.0, np.float32)
  truth = np.stack([np.tile(depth, (64, 1)), np.tile(depth[:, None], (1, 64))])
  for part in (slice(0, 1), slice(1, 2)):
    found = depth_losses.bins_chamfer(centers[part], truth[part], pixels=64)
    np.testing.assert_allclose(found, _chamfer(centers[part], truth[part]), rtol=0.05)


def test_chamfer_gradient():
  _, truth = _case()
  truth[1] = 0
  centers = _bins()
  slope = np.asarray(jax.grad(depth_losses.bins_chamfer)(jnp.asarray(centers), truth))
  assert np.isfinite(slope).all() and not slope[1].any()
  direction = np.random.default_rng(7).standard_normal(centers.shape)
  step = 1e-3
  ends = [_chamfer(centers + sign * step * direction, truth) for sign in (1, -1)]
  assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(np.sum(slope * direction), rel=1e-2)


def test_chamfer_of_nothing_measured():
  value, slope = jax.value_and_grad(depth_losses.bins_chamfer)(
    jnp.asarray(_bins()), np.zeros((2, 9, 11), np.float32)
  )
  assert float(value) == 0 and not np.asarray(slope).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_chamfer_of_short_floats(dtype):
  _, truth = _case()
  centers = jnp.asarray(_bins(), dtype)
  found = depth_losses.bins_chamfer(centers, truth)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, _chamfer(np.asarray(centers, np.float32), truth), rtol=1e-5)
