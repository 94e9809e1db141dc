"""Relative position bias: by its definition in both forms, the gradient a sum, a TPU's choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.relative_position import FORMS, relative_position_bias
from tests.ops.forms import traced_for

WINDOWS = [(1, 1), (3, 2), (4, 5), (1, 6), (6, 1)]


def pairs(window):
  """(query, key, row of the table, column of the table) of all pairs of cells."""
  height, width = window
  cells = list(np.ndindex(height, width))
  for q, (query_row, query_column) in enumerate(cells):
    for k, (key_row, key_column) in enumerate(cells):
      yield q, k, key_row - query_row + height - 1, key_column - query_column + width - 1


def drawn(window):
  height, width = window
  rng = np.random.default_rng(0)
  table = rng.normal(size=(2, 2 * height - 1, 2 * width - 1)).astype(np.float32)
  return table, rng.normal(size=(2, height * width, height * width)).astype(np.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", WINDOWS)
def test_by_definition(window, form):
  table, weights = drawn(window)
  bias, pull = jax.vjp(lambda t: relative_position_bias(t, window, form), jnp.asarray(table))
  expected, gradient = np.zeros_like(weights), np.zeros(table.shape, np.float64)
  for q, k, row, column in pairs(window):
    expected[:, q, k] = table[:, row, column]
    gradient[:, row, column] += weights[:, q, k]
  np.testing.assert_array_equal(bias, expected)
  np.testing.assert_allclose(pull(jnp.asarray(weights))[0], gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_type_stays(form):
  table = jnp.ones((2, 5, 3), jnp.bfloat16)
  assert relative_position_bias(table, (3, 2), form).dtype == jnp.bfloat16


def test_tpus_take_slices():
  def traced(platform, **options):
    with traced_for(platform):
      program = jax.make_jaxpr(lambda t: relative_position_bias(t, (3, 2), **options))
      return str(program(jnp.ones((2, 5, 3))))

  by_form = {form: traced("cpu", form=form) for form in FORMS}
  assert by_form["slices"] != by_form["repetition"]
  assert traced("tpu") == by_form["slices"]
  assert traced("cpu") == traced("gpu") == by_form["repetition"]


def test_errors_say_what_is_wrong():
  with pytest.raises(ValueError, match=r"\(2, 3, 3\) does not belong to a window of \(3, 2\)"):
    relative_position_bias(jnp.zeros((2, 3, 3)), (3, 2))
  with pytest.raises(ValueError, match="'gather'; known: repetition, slices"):
    relative_position_bias(jnp.zeros((2, 5, 3)), (3, 2), "gather")
