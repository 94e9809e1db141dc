"""Depth errors: the authors' own figures, sums over parts, crops and scaling."""

import dataclasses
import math

import numpy as np
import pytest

from hybrid_vit.metrics.depth import (
  CROPS,
  DEPTH_METRICS,
  DepthProtocol,
  depth_crop,
  depth_errors,
  depth_metrics,
  depth_sums,
)
from tests import golden

# MIM-Depth-Estimation's on NYU Depth v2.
PROTOCOL = DepthProtocol(crop="nyu_eigen", silog_weight=0.5, silog_scale=1.0)


def _enlarged(grid, size):
  """Bilinear without aligned corners, `[h, w]` → `size`."""

  def matrix(before, after):
    at = np.clip((np.arange(after) + 0.5) * before / after - 0.5, 0, before - 1)
    return np.clip(1 - np.abs(at[:, None] - np.arange(before)), 0, 1)

  return matrix(grid.shape[0], size[0]) @ grid @ matrix(grid.shape[1], size[1]).T


@pytest.fixture(scope="module")
def case():
  described, stored = golden.load("dense/depth_metrics", "depth_nyu_eigen")
  size = tuple(described["arguments"]["image"])
  truth = np.stack([_enlarged(grid[0], size) for grid in stored["gt_grid"]])
  ratio = np.stack([_enlarged(grid[0], size) for grid in stored["ratio_grid"]])
  holes = np.unpackbits(stored["holes"]).reshape(truth.shape).astype(bool)
  return ratio * truth + 0.05, np.where(holes, 0.0, truth), stored


def test_authors_figures(case):
  predicted, truth, stored = case
  for p, t, row in zip(predicted, truth, stored["metrics"]):
    np.testing.assert_allclose(depth_errors(p, t, PROTOCOL), row[:-1], rtol=1e-5)


def test_loss_form_and_kittis_form_of_silog(case):
  predicted, truth, stored = case
  kitti = DepthProtocol(crop="nyu_eigen")
  for p, t, row in zip(predicted, truth, stored["metrics"]):
    named = dict(zip(DEPTH_METRICS, row))
    # 0.5 m = a - b / 2 of the two means a = rmse_log^2, b: so KITTI's is 2 m^2 - a.
    want = 100 * math.sqrt(2 * named["silog"] ** 2 - named["rmse_log"] ** 2)
    assert depth_errors(p, t, kitti)[-1] == pytest.approx(want, rel=1e-4)


def test_parts_add_up_and_empty_pictures_are_left_out(case):
  predicted, truth, stored = case
  sums = sum(depth_sums(p[None], t[None], PROTOCOL) for p, t in zip(predicted, truth))
  sums = sums + depth_sums(predicted[:1], np.zeros_like(truth[:1]), PROTOCOL)
  sums = sums + depth_sums(predicted, truth, PROTOCOL, counts=np.array([0, 0]))
  assert sums[-1] == 2
  want = stored["metrics"][:, :-1].mean(0)
  found = depth_metrics(sums)
  np.testing.assert_allclose([found[name] for name in DEPTH_METRICS], want, rtol=1e-5)
  np.testing.assert_allclose(sums, depth_sums(predicted, truth, PROTOCOL), rtol=1e-12)


def test_no_picture_is_no_number():
  nothing = depth_sums(np.ones((1, 4, 4)), np.zeros((1, 4, 4)), DepthProtocol())
  assert all(math.isnan(value) for value in depth_metrics(nothing).values())


def test_median_scaling_takes_a_factor_away():
  truth = np.random.default_rng(0).uniform(1, 9, (20, 30))
  scaled = depth_errors(3 * truth, truth, DepthProtocol(median_scaling=True))
  np.testing.assert_allclose(scaled, [1, 1, 1, 0, 0, 0, 0, 0, 0], atol=1e-7)
  assert depth_errors(3 * truth, truth, DepthProtocol())[3] == pytest.approx(2)


def test_range_of_the_truth_and_odd_predictions():
  protocol = DepthProtocol(max_depth=10.0)
  truth = np.array([[0.0, 1e-4, 2.0, 2.0], [2.0, 2.0, 10.0, 40.0]])
  predicted = np.array([[9.0, 9.0, np.nan, np.inf], [-1.0, 20.0, 1.0, 1.0]])
  four = np.array([1e-3, 10, 1e-3, 20.0])  # the four that count
  rmse = DEPTH_METRICS.index("rmse")
  want = math.sqrt(np.mean((four - 2) ** 2))
  assert depth_errors(predicted, truth, protocol)[rmse] == pytest.approx(want)
  clipped = depth_errors(predicted, truth, dataclasses.replace(protocol, clip=True))[rmse]
  assert clipped == pytest.approx(math.sqrt(np.mean((np.minimum(four, 10) - 2) ** 2)))


def test_crops():
  # KITTI's usual height and width: bts' own whole numbers.
  assert depth_crop("kitti_garg", (375, 1242)) == (slice(153, 371), slice(44, 1197))
  assert depth_crop("kitti_eigen", (375, 1242)) == (slice(124, 342), slice(44, 1197))
  assert depth_crop("nyu_eigen", (480, 640)) == (slice(45, 471), slice(41, 601))
  assert depth_crop("none", (3, 4)) == (slice(None), slice(None))
  with pytest.raises(ValueError, match="480 x 640, and the depth is 240 x 320"):
    depth_crop("nyu_eigen", (240, 320))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [(dict(crop="middle"), ", ".join(CROPS)), (dict(min_depth=10.0), "0 < min_depth < max_depth")],
)
def test_wrong_protocols(arguments, message):
  with pytest.raises(ValueError, match=message):
    DepthProtocol(**arguments)


def test_two_sizes():
  with pytest.raises(ValueError, match="resize the prediction"):
    depth_errors(np.ones((2, 2)), np.ones((3, 2)), DepthProtocol())
