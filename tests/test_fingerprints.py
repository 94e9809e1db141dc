import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit import fingerprints
from tests.saved_states import layout_and_state


def test_fingerprints_see_every_change():
  x = jnp.arange(24.0).reshape(4, 6)
  seen = {int(fingerprints.fingerprint(x))}
  for changed in (x.at[2, 3].add(1e-5), x[::-1], x.T.reshape(4, 6), -x, x.at[0, 0].set(-0.0)):
    seen.add(int(fingerprints.fingerprint(changed)))
  assert len(seen) == 6
  # What earlier checkpoints hold stays valid.
  assert int(fingerprints.fingerprint(x)) == 1020063859
  assert int(fingerprints.fingerprint(jnp.zeros(()))) == 0
  _, spread = layout_and_state(4)
  assert fingerprints.fingerprints(spread) == fingerprints.fingerprints(layout_and_state()[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool", "uint32"])
def test_fingerprints_are_the_same_on_host_and_device(dtype):
  # More than one of the host's chunks, and not whole ones.
  values = np.random.default_rng(0).integers(-100, 100, (7, 3, 5003)).astype(jnp.dtype(dtype))
  assert int(fingerprints.fingerprint(jnp.asarray(values))) == fingerprints.host_fingerprint(values)
  transposed = values.T
  expected = int(fingerprints.fingerprint(jnp.asarray(transposed)))
  assert fingerprints.host_fingerprint(transposed) == expected
  assert fingerprints.host_fingerprint(values[:0]) == 0


def test_a_tensor_that_is_not_finite_is_named():
  tree = {"a": {"kernel": np.ones(3)}, "b": jnp.ones(2), "count": np.array([1]), "z": np.ones(0)}
  assert fingerprints.first_nonfinite(tree) is None
  assert fingerprints.first_nonfinite({**tree, "b": jnp.array([1.0, jnp.inf])}) == "b"
  assert fingerprints.first_nonfinite({**tree, "a": {"kernel": np.array([np.nan])}}) == "a/kernel"
