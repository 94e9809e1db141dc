"""What tests of operations in several forms share."""

import jax
import jax.numpy as jnp


def outputs_and_gradients(forms, x, kernel):
  """(output, input gradient, kernel gradient) of each form, for one gradient of the output."""
  answers = []
  for form in forms:

    @jax.jit
    def run(x, kernel, form=form):
      out, pull = jax.vjp(form, x, kernel)
      weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
      return out, *pull(weights.astype(out.dtype))

    answers.append(jax.device_get(run(x, kernel)))
  return answers


def traced_for(platform):
  """Within it functions are traced for a device of this kind."""
  device = jax.sharding.AbstractDevice("any", 1, platform=platform)
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)
