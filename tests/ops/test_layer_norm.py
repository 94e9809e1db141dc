"""Layer norm against its plain formula: outputs, all gradients, types, means far from 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.layer_norm import layer_norm


def plain(x, scale, bias, epsilon, dtype):
  y = x.astype(jnp.float32)
  centred = y - y.mean(-1, keepdims=True)
  var = jnp.square(centred).mean(-1, keepdims=True)
  return (centred / jnp.sqrt(var + epsilon) * scale + bias).astype(dtype)


def inputs(shape, dtype, offset=0.0):
  keys = jax.random.split(jax.random.key(0), 4)
  x, g = (2.0 * jax.random.normal(k, shape, jnp.float32) for k in keys[:2])
  scale, bias = (jax.random.normal(k, shape[-1:], jnp.float32) for k in keys[2:])
  return (x + offset).astype(dtype), scale, bias, g


@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 5, 24), (7,)])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_outputs_and_gradients(shape, offset):
  x, scale, bias, g = inputs(shape, jnp.float32, offset)
  found, back = jax.vjp(lambda *a: layer_norm(*a, 1e-6, jnp.float32), x, scale, bias)
  expected, plain_back = jax.vjp(lambda *a: plain(*a, 1e-6, jnp.float32), x, scale, bias)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  for one, other in zip(back(g), plain_back(g)):
    np.testing.assert_allclose(one, other, atol=2e-5 * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize(("given", "wanted"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"),
                                               ("float32", "bfloat16")])  # fmt: skip
def test_types(given, wanted):
  x, scale, bias, g = inputs((4, 9, 64), given)
  found, back = jax.vjp(lambda *a: layer_norm(*a, 1e-5, wanted), x, scale, bias)
  assert found.dtype == wanted
  close = {"atol": 1e-5} if wanted == "float32" else {"rtol": 2**-8, "atol": 1e-5}
  expected = plain(x, scale, bias, 1e-5, jnp.float32)
  np.testing.assert_allclose(found.astype(jnp.float32), expected, **close)
  dx, dscale, dbias = back(g.astype(wanted))
  assert dx.dtype == given and dscale.dtype == dbias.dtype == jnp.float32
  exact = jax.vjp(lambda x: plain(x, scale, bias, 1e-5, jnp.float32), x.astype(jnp.float32))[1](g)
  np.testing.assert_allclose(dx.astype(jnp.float32), exact[0], atol=0.03)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_one_pass_of_sixteen_bits_rounds_less_than_they_do(dtype):
  """A mean of 30 deviations: what the sums lose is a hundredth of what the type has lost before."""
  exact, scale, bias, _ = inputs((64, 96), jnp.float32, offset=60.0)
  found = layer_norm(exact.astype(dtype), scale, bias, 1e-6, jnp.float32)
  of_rounded = plain(exact.astype(dtype), scale, bias, 1e-6, jnp.float32)
  lost_before = np.abs(of_rounded - plain(exact, scale, bias, 1e-6, jnp.float32)).max()
  assert np.abs(found - of_rounded).max() < (0.01 if dtype == jnp.bfloat16 else 0.1) * lost_before


def test_a_constant_row_gives_the_bias_and_a_finite_gradient():
  scale, bias = jnp.arange(1.0, 5.0), jnp.arange(4.0)
  found, back = jax.vjp(
    lambda x: layer_norm(x, scale, bias, 1e-6, jnp.float32), jnp.full((1, 4), 3.0)
  )
  np.testing.assert_array_equal(found[0], bias)
  assert np.isfinite(back(jnp.ones((1, 4)))[0]).all()


def test_what_is_kept_is_the_input_and_two_numbers_of_each_row():
  x, scale, bias, _ = inputs((8, 16, 128), jnp.bfloat16)
  back = jax.vjp(lambda x: layer_norm(x, scale, bias, 1e-6, jnp.bfloat16), x)[1]
  kept = sum(leaf.nbytes for leaf in jax.tree.leaves(back))
  assert kept <= x.nbytes + 2 * 8 * 16 * 4 + 2 * 128 * 4
