"""Batch norm against its plain formula: outputs, statistics, all gradients, types, groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.batch_norm import batch_norm

SHAPES = [(1, 6, 5, 4, 8), (3, 4, 2, 2, 8), (2, 9, 8)]


def plain(x, scale, bias, epsilon):
  y = x.astype(jnp.float32)
  axes = tuple(range(1, x.ndim - 1))
  mean = y.mean(axes, keepdims=True)
  var = jnp.square(y - mean).mean(axes, keepdims=True)
  return (y - mean) / jnp.sqrt(var + epsilon) * scale + bias


def inputs(shape, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 4)
  x, g = (2.0 * jax.random.normal(k, shape, jnp.float32) + 0.5 for k in keys[:2])
  scale, bias = (jax.random.normal(k, shape[-1:], jnp.float32) for k in keys[2:])
  return x.astype(dtype), scale, bias, g


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(shape):
  x, scale, bias, g = inputs(shape)
  found, back = jax.vjp(lambda *a: batch_norm(*a, 1e-5, jnp.float32)[0], x, scale, bias)
  expected, plain_back = jax.vjp(lambda *a: plain(*a, 1e-5), x, scale, bias)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  for one, other in zip(back(g), plain_back(g)):
    np.testing.assert_allclose(one, other, atol=1e-5 * max(1.0, np.abs(other).max()))


def test_statistics_of_each_group():
  x, scale, bias, _ = inputs(SHAPES[1])
  _, mean, var = batch_norm(x, scale, bias, 1e-5, jnp.float32)
  np.testing.assert_allclose(mean, x.mean((1, 2, 3)), atol=1e-6)
  np.testing.assert_allclose(var, x.var((1, 2, 3)), rtol=1e-5)


def test_bfloat16_is_kept_as_it_is():
  x, scale, bias, g = inputs((1, 32, 8, 8, 16), jnp.bfloat16)
  out, back = jax.vjp(lambda *a: batch_norm(*a, 1e-5, jnp.bfloat16)[0], x, scale, bias)
  assert out.dtype == jnp.bfloat16
  dx, dscale, dbias = back(g.astype(jnp.bfloat16))
  assert dx.dtype == jnp.bfloat16 and dscale.dtype == dbias.dtype == jnp.float32
  exact = jax.vjp(lambda *a: plain(*a, 1e-5), x.astype(jnp.float32), scale, bias)[1](g)
  np.testing.assert_allclose(dx.astype(jnp.float32), exact[0], atol=0.05)
  np.testing.assert_allclose(dscale, exact[1], rtol=0.02, atol=1.0)
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(back)) <= x.nbytes + 3 * 16 * 4


def test_a_constant_channel_gives_the_bias_and_a_finite_gradient():
  scale, bias = jnp.arange(1.0, 5.0), jnp.arange(4.0)
  call = lambda x: batch_norm(x, scale, bias, 1e-5, jnp.float32)[0]  # noqa: E731
  found, back = jax.vjp(call, jnp.full((1, 3, 4), 3.0))
  np.testing.assert_allclose(found[0], np.broadcast_to(bias, (3, 4)), atol=1e-5)
  assert np.isfinite(back(jnp.ones((1, 3, 4)))[0]).all()
