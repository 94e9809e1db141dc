"""Resizing against PyTorch's rules, written out cell by cell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.resize import (
  adaptive_average_pool,
  reference_bilinear,
  resize_bilinear,
  resize_nearest,
)
from hybrid_vit.tools.summarize import count_multiply_adds

_SIZES = [((5, 7), (10, 14)), ((5, 7), (15, 28)), ((6, 8), (11, 5)), ((3, 4), (3, 9)),
          ((1, 1), (4, 6)), ((9, 9), (1, 1)), ((4, 4), (64, 4))]  # fmt: skip


def _cell_by_cell(x: np.ndarray, size, align_corners: bool) -> np.ndarray:
  (old_h, old_w), (new_h, new_w) = x.shape[1:3], size
  out = np.zeros((x.shape[0], new_h, new_w, x.shape[3]))

  def places(i, old, new):
    if align_corners:
      at = i * (old - 1) / (new - 1) if new > 1 else 0.0
    else:
      at = max((i + 0.5) * old / new - 0.5, 0.0)
    low = int(at)
    return low, min(low + 1, old - 1), at - low

  for i in range(new_h):
    y0, y1, v = places(i, old_h, new_h)
    for j in range(new_w):
      x0, x1, u = places(j, old_w, new_w)
      top = (1 - u) * x[:, y0, x0] + u * x[:, y0, x1]
      bottom = (1 - u) * x[:, y1, x0] + u * x[:, y1, x1]
      out[:, i, j] = (1 - v) * top + v * bottom
  return out


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("old", "new"), _SIZES)
def test_bilinear(old, new, align_corners):
  x = np.random.default_rng(0).standard_normal((2, *old, 3)).astype(np.float32)
  expected = _cell_by_cell(x, new, align_corners)
  for form in (resize_bilinear, reference_bilinear):
    np.testing.assert_allclose(form(x, new, align_corners=align_corners), expected, atol=2e-6)


@pytest.mark.parametrize(("old", "new"), _SIZES[:2])
def test_gradients_of_both_forms(old, new):
  rng = np.random.default_rng(1)
  x = rng.standard_normal((2, *old, 3)).astype(np.float32)
  weights = rng.standard_normal((2, *new, 3)).astype(np.float32)
  of = lambda form: jax.grad(  # noqa: E731
    lambda x: jnp.sum(weights * form(x, new, align_corners=False))
  )(x)
  np.testing.assert_allclose(of(resize_bilinear), of(reference_bilinear), atol=1e-5)


def test_half_precision_is_kept_and_summed_in_float32():
  x = jnp.ones((1, 3, 3, 2), jnp.bfloat16)
  y = resize_bilinear(x, (6, 9), align_corners=False)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(y, np.float32), 1.0)


def test_nearest():
  x = np.arange(24, dtype=np.float32).reshape(1, 4, 6, 1)
  for new in ((8, 12), (5, 9), (3, 2), (4, 6)):
    rows, columns = (np.arange(n) * old // n for n, old in zip(new, (4, 6)))
    np.testing.assert_array_equal(resize_nearest(x, new), x[:, rows][:, :, columns])


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
def test_adaptive_average_pool(bins):
  x = np.random.default_rng(2).standard_normal((2, 7, 11, 3)).astype(np.float32)
  found = adaptive_average_pool(x, bins)
  for i in range(bins):
    for j in range(bins):
      rows = slice(i * 7 // bins, -(-(i + 1) * 7 // bins))
      columns = slice(j * 11 // bins, -(-(j + 1) * 11 // bins))
      np.testing.assert_allclose(found[:, i, j], x[:, rows, columns].mean((1, 2)), atol=1e-6)


def test_no_multiply_adds_are_counted():
  x = jax.ShapeDtypeStruct((1, 5, 7, 3), jnp.float32)
  resize = lambda x: resize_bilinear(x, (11, 13), align_corners=True)  # noqa: E731
  assert count_multiply_adds(resize, x) == 0
  assert count_multiply_adds(lambda x: adaptive_average_pool(x, 3), x) == 0
