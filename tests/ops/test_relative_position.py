"""Relative position bias: both forms give the same, their gradients too; a TPU's choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.relative_position import FORMS, relative_position_bias
from tests.ops.forms import traced_for

WINDOWS = [(1, 1), (3, 2), (4, 5), (1, 6), (6, 1)]


@pytest.mark.parametrize("window", WINDOWS)
def test_the_forms_agree(window):
  height, width = window
  rng = np.random.default_rng(0)
  table = rng.normal(size=(2, 2 * height - 1, 2 * width - 1)).astype(np.float32)
  weights = rng.normal(size=(2, height * width, height * width)).astype(np.float32)

  def bias_and_gradient(form):
    bias, pull = jax.vjp(lambda t: relative_position_bias(t, window, form), jnp.asarray(table))
    return bias, pull(jnp.asarray(weights))[0]

  expected, found = (bias_and_gradient(form) for form in FORMS)
  # Numbers of the table, by definition in tests/models/test_layers.py, and sums of the weights.
  np.testing.assert_array_equal(found[0], expected[0])
  np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(found[1].sum(), weights.sum(dtype=np.float64), rtol=1e-4, atol=1e-4)


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


def test_another_form_is_refused():
  with pytest.raises(ValueError, match="'gather'; known: repetition, slices"):
    relative_position_bias(jnp.zeros((2, 5, 3)), (3, 2), "gather")
