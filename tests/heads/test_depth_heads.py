"""What holds for every depth head by its name in the registry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.heads.depth_layers import bounded_depth
from hybrid_vit.heads.registry import create_head, head_arguments, head_names
from tests.heads.pyramids import initialised, levels, noise

_LIGHT = {
  "mim_depth": {},
  "glpn": {"channels": 8},
  "dpt_depth": {"channels": 8},
  "adabins": {
    "decoder_channels": 8, "channels": 8, "num_queries": 4, "queries": "tokens", "num_bins": 8,
  },
}  # fmt: skip


def test_all_are_here():
  """The depth task knows a head of depth by this attribute."""
  found = {name for name in head_names() if "max_depth" in head_arguments(name)}
  assert found == set(_LIGHT)


@pytest.mark.parametrize("name", sorted(_LIGHT))
def test_half_precision_answers_metres_in_float32(name):
  features = levels((4, 6, 8, 16))
  maps = {k: x.astype(jnp.bfloat16) for k, x in noise(features, (64, 96)).items()}
  head = create_head(name, features, 1, max_depth=20.0, dtype=jnp.bfloat16, **_LIGHT[name])
  depth, variables = initialised(head, maps)
  size = (32, 48) if name == "adabins" else (64, 96)
  assert depth.shape == (2, *size, 1)
  assert depth.dtype == jnp.float32
  assert (depth > 0).all()
  assert (depth <= 20).all()
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


def test_bounded_depth_stays_a_number():
  x = jnp.array([-1e30, -100.0, -3.0, 0.0, 3.0, 100.0, 1e30])
  depth = np.asarray(bounded_depth(x, 10.0))
  np.testing.assert_allclose(depth[2:5], 10 / (1 + np.exp(-np.array([-3.0, 0.0, 3.0]))), rtol=1e-6)
  assert (depth > 0).all()
  assert (depth <= 10).all()
  slopes = jax.vmap(jax.grad(lambda y: bounded_depth(y, 10.0)))(x)
  assert np.isfinite(slopes).all()
  np.testing.assert_allclose(slopes[3], 2.5)
