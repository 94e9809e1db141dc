"""A modulation's convolutions in both forms: the same numbers, gradients and counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops import mixed_convolution
from hybrid_vit.ops.mixed_convolution import grouped_product, mixed_depthwise_conv
from hybrid_vit.tools.summarize import count_multiply_adds
from tests.ops.forms import traced_for

_RNG = np.random.default_rng(0)
_X = _RNG.normal(size=(2, 6, 7, 12)).astype(np.float32)
_KERNELS = tuple(_RNG.normal(size=(k, k, 1, 4)).astype(np.float32) for k in (3, 5, 9))
_GROUPED = _RNG.normal(size=(3, 4 * 5)).astype(np.float32)


def _answers(function, *arguments):
  """Output and gradients of all arguments for one gradient of the output."""

  @jax.jit
  def run(*arguments):
    out, pull = jax.vjp(function, *arguments)
    return out, pull(jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape))

  return jax.tree.leaves(jax.device_get(run(*arguments)))


def test_runs_meet_their_own_kernels():
  separate, merged = (
    _answers(
      lambda x, *kernels, form=form: mixed_depthwise_conv(x, kernels, form=form), _X, *_KERNELS
    )
    for form in mixed_convolution.MIXED_FORMS
  )
  assert [leaf.shape for leaf in merged] == [_X.shape, _X.shape, *(k.shape for k in _KERNELS)]
  for one, other in zip(separate, merged):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
  # By the definition, at one cell of the last run, whose kernel reaches over the border.
  padded = np.pad(_X, ((0, 0), (4, 4), (4, 4), (0, 0)))
  expected = (padded[1, 2:11, 5:14, 8:] * _KERNELS[2][:, :, 0]).sum((0, 1))
  np.testing.assert_allclose(merged[0][1, 2, 5, 8:], expected, rtol=1e-4, atol=1e-4)


def test_groups_hold_a_channel_of_every_run():
  batched, dense = (
    _answers(lambda x, kernel, form=form: grouped_product(x, kernel, 4, form=form), _X, _GROUPED)
    for form in mixed_convolution.GROUPED_FORMS
  )
  for one, other in zip(batched, dense):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
  expected = np.einsum(
    "bhwng,ngm->bhwgm", _X.reshape(2, 6, 7, 3, 4), _GROUPED.reshape(3, 4, 5)
  ).reshape(2, 6, 7, 20)
  np.testing.assert_allclose(dense[0], expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_stays():
  x = jnp.asarray(_X, jnp.bfloat16)
  for form in mixed_convolution.MIXED_FORMS:
    assert mixed_depthwise_conv(x, _KERNELS, form=form).dtype == jnp.bfloat16
  for form in mixed_convolution.GROUPED_FORMS:
    assert grouped_product(x, _GROUPED, 4, form=form).dtype == jnp.bfloat16


def test_a_tpu_gets_one_convolution_and_one_product():
  def both(x, kernels, grouped):
    return mixed_depthwise_conv(x, kernels), grouped_product(x, grouped, 4)

  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (_X, _KERNELS, _GROUPED))
  with traced_for("tpu"):
    program = str(jax.make_jaxpr(both)(*shapes))
  assert program.count("conv_general_dilated[") == 1 and program.count("dot_general[") == 1
  assert "12,20" in program and "optimization_barrier" in program
  with traced_for("gpu"):
    program = str(jax.make_jaxpr(both)(*shapes))
  assert program.count("conv_general_dilated[") == 3


def test_zeros_are_not_counted():
  cells = 2 * 6 * 7
  counts = {
    form: count_multiply_adds(
      lambda x, *k, form=form: mixed_depthwise_conv(x, k, form=form), _X, *_KERNELS
    )
    for form in mixed_convolution.MIXED_FORMS
  }
  assert set(counts.values()) == {cells * 4 * (9 + 25 + 81)}
  counts = {
    form: count_multiply_adds(
      lambda x, k, form=form: grouped_product(x, k, 4, form=form), _X, _GROUPED
    )
    for form in mixed_convolution.GROUPED_FORMS
  }
  assert set(counts.values()) == {cells * 3 * 4 * 5}


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: mixed_depthwise_conv(_X, _KERNELS[:2]), r"2 kernels \[k, k, 1, 6\].*12 channels"),
    (lambda: mixed_depthwise_conv(_X, [np.zeros((2, 2, 1, 12))]), r"k odd.*\(2, 2, 1, 12\)"),
    (lambda: mixed_depthwise_conv(_X[..., :11], _KERNELS[:2]), "11 channels"),
    (lambda: mixed_depthwise_conv(_X, _KERNELS, form="both"), "'both'; known: separate, merged"),
    (lambda: grouped_product(_X, _GROUPED, 3), r"\[\.\.\., 3 x 3\]"),
    (lambda: grouped_product(_X, _GROUPED[:, :18], 4), r"\(3, 18\)"),
    (lambda: grouped_product(_X, _GROUPED, 4, form="no"), "'no'; known: batched, dense"),
  ],
)  # fmt: skip
def test_errors_say_what_would_be_right(call, message):
  with pytest.raises(ValueError, match=message):
    call()
