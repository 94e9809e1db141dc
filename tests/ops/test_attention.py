"""Attention against its plain formula, in the forms of each platform; what its softmax keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.attention import add_bias, dot_product_attention, softmax, split_heads
from tests.ops.forms import traced_for


def plain(query, key, value, scale, bias=None):
  logits = jnp.einsum("...qhd,...khd->...hqk", query * scale, key)
  weights = jax.nn.softmax(logits if bias is None else logits + bias, axis=-1)
  return jnp.einsum("...hqk,...khe->...qhe", weights, value)


def inputs(dtype=jnp.float32, lead=(2, 3)):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = ((*lead, 7, 2, 8), (*lead, 5, 2, 8), (*lead, 5, 2, 6), (2, 7, 5))
  return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes)]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("lead", [(2,), (2, 3)])
def test_outputs_and_gradients(platform, with_bias, lead):
  *arguments, bias = inputs(lead=lead)
  arguments += [bias] if with_bias else []

  def attend(query, key, value, bias=None):
    return dot_product_attention(query, key, value, scale=0.3, bias=bias)

  with traced_for(platform):
    traced = jax.make_jaxpr(lambda *a: jax.vjp(attend, *a)[1](jnp.ones((*lead, 7, 2, 6))))(
      *arguments
    )
    out = jax.make_jaxpr(attend)(*arguments)
  found = jax.core.eval_jaxpr(traced.jaxpr, traced.consts, *arguments)
  expected, back = jax.vjp(lambda q, k, v, b=None: plain(q, k, v, 0.3, b), *arguments)
  (value,) = jax.core.eval_jaxpr(out.jaxpr, out.consts, *arguments)
  np.testing.assert_allclose(value, expected, atol=1e-6)
  for one, other in zip(found, back(jnp.ones(expected.shape)), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_softmax_in_bfloat16_is_kept_once():
  logits = 3.0 * jax.random.normal(jax.random.key(1), (4, 9, 64))
  weights, back = jax.vjp(lambda x: softmax(x, jnp.bfloat16), logits)
  assert weights.dtype == jnp.bfloat16
  np.testing.assert_array_equal(weights, jax.nn.softmax(logits, axis=-1).astype(jnp.bfloat16))
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(back)) == weights.nbytes
  g = jax.random.normal(jax.random.key(2), weights.shape).astype(jnp.bfloat16)
  (found,) = back(g)
  (exact,) = jax.vjp(lambda x: jax.nn.softmax(x, axis=-1), logits)[1](g.astype(jnp.float32))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, exact, atol=0.01)


def test_heads_are_those_of_the_authors_order():
  x = jnp.arange(2.0 * 5 * 24).reshape(2, 5, 24)
  whole = x.reshape(2, 5, 3, 2, 4)
  for i, part in enumerate(split_heads(x, 3, 2)):
    np.testing.assert_array_equal(part, whole[:, :, i])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(
  "shape", [(3, 5, 4), (5, 4), (1, 5, 4), (3, 1, 4), (7, 1, 1, 4), (1, 3, 5, 4), (7, 3, 5, 4), ()]
)
def test_a_bias_of_any_shape(platform, shape):
  """Its gradient is summed over every axis that it is broadcast along, odd ones too."""
  logits = jax.random.normal(jax.random.key(0), (7, 3, 5, 4))
  bias = jax.random.normal(jax.random.key(1), shape)
  g = jax.random.normal(jax.random.key(2), logits.shape)
  with traced_for(platform):
    out, back = jax.vjp(add_bias, logits, bias)
  np.testing.assert_allclose(out, logits + bias, rtol=1e-6)
  of_logits, of_bias = back(g)
  np.testing.assert_array_equal(of_logits, g)
  assert of_bias.shape == shape
  np.testing.assert_allclose(of_bias, jax.vjp(jnp.add, logits, bias)[1](g)[1], rtol=1e-5, atol=1e-5)
