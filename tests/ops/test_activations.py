"""GELUs against their formulas: values, slopes, types, what the backward pass keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.activations import gelu, quick_gelu

FORMULAS = {
  gelu: lambda x: 0.5 * x * (1.0 + jax.lax.erf(x / jnp.sqrt(2.0))),
  quick_gelu: lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("activation", FORMULAS, ids=["gelu", "quick_gelu"])
def test_values_and_slopes(activation):
  x = jnp.concatenate([jnp.linspace(-9, 9, 1001), jnp.array([-1e4, 1e4, 0.0, -0.0])])
  plain = FORMULAS[activation]
  np.testing.assert_allclose(activation(x), plain(x), rtol=1e-6, atol=1e-6)
  found, expected = (jax.vmap(jax.grad(f))(x) for f in (activation, plain))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
  second = jax.vmap(jax.grad(jax.grad(activation)))(x)
  np.testing.assert_allclose(second, jax.vmap(jax.grad(jax.grad(plain)))(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", FORMULAS, ids=["gelu", "quick_gelu"])
def test_bfloat16_is_computed_in_float32_and_kept_alone(activation):
  x = jnp.linspace(-6, 6, 4096).astype(jnp.bfloat16)
  out, back = jax.vjp(activation, x)
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out, FORMULAS[activation](x.astype(jnp.float32)).astype(out.dtype))
  (slope,) = back(jnp.ones_like(x))
  assert slope.dtype == jnp.bfloat16
  exact = jax.vmap(jax.grad(FORMULAS[activation]))(x.astype(jnp.float32))
  np.testing.assert_allclose(slope.astype(jnp.float32), exact, atol=2**-8)
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(back)) == x.nbytes
