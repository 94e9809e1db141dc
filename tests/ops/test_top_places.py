"""The places of the largest: against NumPy's stable sort, under every map, and where rows lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_vit.collectives import collectives_of
from hybrid_vit.ops.nms import select_top
from hybrid_vit.ops.top_places import reference_top_places, top_places
from hybrid_vit.sharding import make_mesh


def _numbers(*shape):
  # Many are equal, some infinite.
  x = np.random.default_rng(0).integers(0, 9, shape).astype(np.float32)
  return np.where(x == 4, -np.inf, np.where(x == 5, np.inf, x)).astype(np.float32)


def _expected(x, count):
  return np.argsort(-x, axis=-1, kind="stable")[..., :count]


@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_largest_first_and_the_earlier_of_equals(count):
  x = _numbers(3, 2, 40)
  for form in (top_places, reference_top_places):
    found = form(x, count)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, _expected(x, count))
  whole = np.nan_to_num(_numbers(40), posinf=99, neginf=-99).astype(np.int32)
  np.testing.assert_array_equal(top_places(whole, count), _expected(whole.astype(float), count))


def test_under_maps_loops_and_gradients():
  x = _numbers(4, 3, 20)
  run = functools.partial(top_places, count=5)
  for form in (jax.vmap(jax.vmap(run)), jax.vmap(run, 1, 1), lambda x: lax.map(run, x)):
    np.testing.assert_array_equal(jax.jit(form)(x), _expected(x, 5))
  # The numbers at the places have a gradient, the places have none.
  y = jnp.arange(6.0)
  gradient = jax.grad(lambda y: jnp.sum(y[top_places(y, 2)] ** 2))(y)
  np.testing.assert_array_equal(gradient, [0, 0, 0, 0, 8, 10])


def test_rows_stay_on_their_devices():
  mesh = make_mesh({"data": 4}, jax.devices()[:4])
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  x = jax.device_put(_numbers(8, 3, 50), rows)
  forms = {"own": lambda x: top_places(x, 6), "mapped": jax.vmap(lambda x: top_places(x, 6))}
  for form in forms.values():
    compiled = jax.jit(form).lower(x).compile()
    assert collectives_of(compiled.as_text()) == []
    np.testing.assert_array_equal(compiled(x), _expected(np.asarray(x), 6))
  # What it is there for: XLA's own gathers all rows.
  plain = jax.jit(lambda x: reference_top_places(x, 6)).lower(x).compile()
  assert [item.kind for item in collectives_of(plain.as_text())] == ["all-gather"]
  # A row that is split is put together, and right.
  split = jax.device_put(_numbers(3, 48), NamedSharding(mesh, PartitionSpec(None, "data")))
  found = jax.jit(lambda x: top_places(x, 6))(split)
  np.testing.assert_array_equal(found, _expected(np.asarray(split), 6))
  # As the detectors use it.
  chosen = jax.jit(jax.vmap(lambda s: select_top(s, s > 2, 6)))
  flat = jax.device_put(_numbers(8, 50), rows)
  assert collectives_of(chosen.lower(flat).compile().as_text()) == []


def test_more_than_there_are():
  with pytest.raises(ValueError, match="7 of 5 numbers"):
    top_places(jnp.zeros((2, 5)), 7)
