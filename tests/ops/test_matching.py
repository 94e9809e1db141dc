"""Assignments against scipy's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from hybrid_vit.ops.matching import linear_assignment

_solve = jax.jit(linear_assignment)


def _check(cost, found, row_valid=None, column_valid=None):
  """`found` is an assignment of valid ones, as many as there can be, at scipy's cost."""
  rows, columns = cost.shape
  row_valid = np.ones(rows, bool) if row_valid is None else row_valid
  column_valid = np.ones(columns, bool) if column_valid is None else column_valid
  assigned = np.flatnonzero(found >= 0)
  taken = found[assigned]
  assert len(set(taken)) == len(taken) == min(row_valid.sum(), column_valid.sum())
  assert row_valid[assigned].all() and column_valid[taken].all()
  part = cost[row_valid][:, column_valid].astype(np.float64)
  expected = part[linear_sum_assignment(part)].sum()
  np.testing.assert_allclose(
    cost[assigned, taken].astype(np.float64).sum(), expected, rtol=1e-6, atol=1e-5
  )


@pytest.mark.parametrize("shape", [(7, 7), (5, 12), (12, 5), (1, 4), (4, 1), (30, 80)])
def test_random_costs(shape):
  costs = np.random.default_rng(0).standard_normal((20, *shape)).astype(np.float32)
  for cost, found in zip(costs, np.asarray(_solve(costs))):
    _check(cost, found)
    rows, columns = linear_sum_assignment(cost)
    np.testing.assert_array_equal(found[rows], columns)  # no ties: the same one


@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (10, 6)])
def test_ties(shape):
  rng = np.random.default_rng(1)
  costs = rng.integers(0, 4, (40, *shape)).astype(np.float32)
  costs[:2] = 0
  for cost, found in zip(costs, np.asarray(_solve(costs))):
    _check(cost, found)


@pytest.mark.parametrize("shape", [(6, 11), (9, 5)])
def test_padded(shape):
  rng = np.random.default_rng(2)
  costs = 5 + rng.standard_normal((40, *shape)).astype(np.float32)
  rows, columns = (rng.random((40, n)) < 0.6 for n in shape)
  rows[0], columns[1] = False, False
  costs[:, 0, 0] = np.where(rows[:, 0] & columns[:, 0], costs[:, 0, 0], np.nan)
  for valid in ((rows, None), (rows, columns), (None, columns)):
    for i, found in enumerate(np.asarray(_solve(costs, *valid))):
      row, column = (None if v is None else v[i] for v in valid)
      _check(np.nan_to_num(costs[i], nan=1e4), found, row, column)


def test_sizes_of_detectors():
  # Costs of DINO's kind: many queries alike, few targets.
  rng = np.random.default_rng(3)
  base = rng.standard_normal((2, 60, 1))
  cost = (base + 0.01 * rng.standard_normal((2, 60, 900))).astype(np.float32)
  valid = np.arange(60) < np.array([[60], [23]])
  for i, found in enumerate(np.asarray(_solve(cost, valid))):
    _check(cost[i], found, valid[i])


def test_what_is_no_number_comes_last():
  cost = np.array([[np.nan, 5.0, np.inf], [1.0, 2.0, np.nan]], np.float32)
  np.testing.assert_array_equal(_solve(cost), [1, 0])
  found = np.asarray(_solve(np.full((2, 3), np.nan, np.float32)))
  assert sorted(set(found)) == sorted(found) and (found >= 0).all()


def test_leading_axes_and_no_gradient():
  cost = np.random.default_rng(4).standard_normal((2, 3, 4, 6)).astype(np.float32)
  found = _solve(cost)
  assert found.shape == (2, 3, 4) and found.dtype == jnp.int32
  np.testing.assert_array_equal(found[1, 2], _solve(cost[1, 2]))

  def loss(x):
    return jnp.take_along_axis(x, linear_assignment(x)[..., None], axis=-1).sum()

  gradient = np.asarray(jax.grad(loss)(jnp.asarray(cost)))
  np.testing.assert_array_equal(gradient.sum(-1), np.ones((2, 3, 4)))
