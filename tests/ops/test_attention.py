"""Attention against its plain formula, in the forms of each platform; what its softmax keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.attention import add_bias, dot_product_attention, softmax, split_heads
from hybrid_vit.ops.platforms import tracing_for


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

  with tracing_for((platform,)):
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


@pytest.mark.parametrize("shape", [(2, 7, 5), (3, 1, 1, 5), (7, 1), (5,), (3, 2, 7, 5), ()])
def test_a_bias_of_any_shape_on_a_tpu(shape):
  query, key, value, _ = inputs(lead=(3,))
  bias = 2.0 * jax.random.normal(jax.random.key(1), shape).astype(jnp.bfloat16)

  def attend(query, key, value, bias):
    with tracing_for(("tpu",)):
      return dot_product_attention(query, key, value, scale=0.3, bias=bias)

  out, back = jax.vjp(attend, query, key, value, bias)
  expected, plain_back = jax.vjp(
    lambda q, k, v, b: plain(q, k, v, 0.3, b), query, key, value, bias.astype(jnp.float32)
  )
  np.testing.assert_allclose(out, expected, atol=1e-6)
  g = jax.random.normal(jax.random.key(2), out.shape)
  *found, of_bias = back(g)
  *rest, of_plain = plain_back(g)
  assert of_bias.dtype == jnp.bfloat16 and of_bias.shape == shape
  np.testing.assert_allclose(of_bias.astype(jnp.float32), of_plain, rtol=2**-8, atol=1e-5)
  for one, other in zip(found, rest, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_masked_keys_on_a_tpu_weigh_nothing_and_rows_of_them_all_alike():
  query, key, value, _ = inputs(lead=(3,))
  bias = np.zeros((3, 1, 7, 5), np.float32)
  bias[..., 3:] = bias[1] = np.finfo(np.float32).min

  def attend(query, key, value):
    with tracing_for(("tpu",)):
      return dot_product_attention(query, key, value, scale=0.3, bias=bias)

  out, back = jax.vjp(attend, query, key, value)
  expected = plain(query, key[:, :3], value[:, :3], 0.3)
  np.testing.assert_allclose(out[::2], expected[::2], atol=1e-6)
  np.testing.assert_allclose(out[1], np.broadcast_to(value[1].mean(0), out[1].shape), atol=1e-6)
  of_query, of_key, of_value = back(jnp.ones_like(out))
  assert not of_key[::2, 3:].any() and not of_value[::2, 3:].any()
  assert np.isfinite(of_query).all()


def test_bfloat16_on_a_tpu_is_about_as_far_from_float32_as_elsewhere():
  """The result is nearer, gradients up to a fifth farther."""
  shapes = [(2, 60, 3, 32)] * 3
  low = [
    2.0 * jax.random.normal(k, s, jnp.bfloat16)
    for k, s in zip(jax.random.split(jax.random.key(3), 3), shapes)
  ]
  g = jax.random.normal(jax.random.key(4), shapes[0])

  def answers(platform, arguments):
    def attend(*arguments):
      with tracing_for((platform,)):
        return dot_product_attention(*arguments, scale=32**-0.5)

    out, back = jax.vjp(attend, *arguments)
    return [np.asarray(x, np.float32) for x in (out, *back(g.astype(out.dtype)))]

  exact = answers("cpu", [x.astype(jnp.float32) for x in low])
  far = {
    platform: [np.abs(a - b).mean() for a, b in zip(answers(platform, low), exact)]
    for platform in ("tpu", "gpu")
  }
  ratios = [here / there for here, there in zip(far["tpu"], far["gpu"])]
  assert ratios[0] < 1.0 and max(ratios) < 1.25, ratios


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
  with tracing_for((platform,)):
    out, back = jax.vjp(add_bias, logits, bias)
  np.testing.assert_allclose(out, logits + bias, rtol=1e-6)
  of_logits, of_bias = back(g)
  np.testing.assert_array_equal(of_logits, g)
  assert of_bias.shape == shape
  np.testing.assert_allclose(of_bias, jax.vjp(jnp.add, logits, bias)[1](g)[1], rtol=1e-5, atol=1e-5)
