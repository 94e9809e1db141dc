"""What is checked of every depth head."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.weights.convert import KeyMap, export_weights


def assert_gradient(
  head: Any, maps: Mapping[str, np.ndarray], may_vanish: Sequence[str] = ()
) -> np.ndarray:
  """Depth in training has a finite gradient of every parameter and changes the statistics.

  Args:
    head: the head.
    maps: what it reads.
    may_vanish: parts of names of parameters whose gradient may be 0.

  Returns:
    The answer.
  """

  @jax.jit
  def run(key):
    variables = head.init(key, maps)

    def loss(params):
      depth, stats = head.apply(
        {**variables, "params": params}, maps, True, rngs={"dropout": key}, mutable=["batch_stats"]
      )
      # Not the same everywhere, so that biases matter, too.
      weight = jnp.arange(depth.size, dtype=jnp.float32).reshape(depth.shape) / depth.size
      return jnp.sum(weight * jnp.square(depth)), (depth, stats)

    return jax.grad(loss, has_aux=True)(variables["params"])

  gradient, (depth, stats) = run(jax.random.key(0))
  assert depth.dtype == jnp.float32
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    assert np.isfinite(leaf).all(), name
    assert np.abs(leaf).max() > 0 or any(part in name for part in may_vanish), name
  for leaf in jax.tree.leaves(stats):
    assert np.isfinite(leaf).all()
  return np.asarray(depth)


def assert_round_trip(
  variables: Mapping[str, Any], key_map: KeyMap, weights: Mapping[str, np.ndarray]
) -> None:
  """What was imported is exported under the same names with the same numbers."""
  found = export_weights(variables, key_map)
  assert set(found) == {name for name in weights if not name.endswith("num_batches_tracked")}
  for name, value in found.items():
    np.testing.assert_array_equal(value, weights[name], err_msg=name)


def captured(collections: Mapping[str, Any]) -> dict[str, Any]:
  """The maps that a head noted down, by name, of itself and of its decoder."""
  noted = dict(collections["intermediates"])
  noted |= noted.pop("decoder", {})
  return {name: values[0] for name, values in noted.items()}
