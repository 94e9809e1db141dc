"""Networks cut at an endpoint: what is behind it is what the network itself would have made."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.endpoint_splits import map_and_gradient, split_network
from hybrid_vit.saliency import grad_cam
from tests.models import contract, test_cvt, test_vit


class Pooled(nn.Module):
  """A convolution, a side map that nothing reads, and a linear layer over the pooled map."""

  num_classes: int = 3

  @nn.compact
  def __call__(self, images, train=False):
    x = nn.Conv(4, (3, 3), strides=2, padding="SAME", name="conv")(images)
    endpoints = {"stem": x, "side": 2.0 * x, "pre_logits": x.mean((1, 2))}
    if not self.num_classes:
      return None, endpoints
    return nn.Dense(self.num_classes, name="head")(x.mean((1, 2))), endpoints


@pytest.fixture(scope="module")
def pooled():
  """(network, variables, pictures)."""
  model, images = Pooled(), contract.images(2, 8, 6)
  variables = model.init(jax.random.key(0), images)
  return model, variables, images


def test_grad_cam_of_a_linear_layer_over_a_pooled_map_has_a_closed_form(pooled):
  model, variables, images = pooled
  split = split_network(model, variables, images.shape)
  assert split.last_read() == "stem" and split.read == ("stem",)
  logits, activations, gradient = map_and_gradient(
    split, "stem", variables, images, lambda logits: logits[:, 1]
  )
  expected_logits, endpoints = model.apply(variables, images)
  np.testing.assert_allclose(logits, expected_logits, rtol=1e-5)
  np.testing.assert_array_equal(activations, endpoints["stem"])
  weights = variables["params"]["head"]["kernel"][:, 1]
  cells = activations.shape[1] * activations.shape[2]
  np.testing.assert_allclose(gradient, jnp.broadcast_to(weights / cells, gradient.shape), rtol=1e-5)
  closed = jnp.maximum((weights / cells * activations).sum(-1), 0)
  assert 0 < (closed > 0).mean() < 1
  np.testing.assert_allclose(grad_cam(activations, gradient), closed, rtol=1e-5, atol=1e-7)


def test_what_cannot_be_cut_is_named(pooled):
  model, variables, images = pooled
  split = split_network(model, variables, images.shape)
  change = jnp.zeros((2, 4, 3, 4))
  with pytest.raises(ValueError, match="the logits do not depend on the endpoint 'side'"):
    split.behind("side", variables, images, change)
  with pytest.raises(ValueError, match=r"no map is named 'stam'; did you mean 'stem'.*stem, side"):
    split.behind("stam", variables, images, change)
  bare = split_network(Pooled(0), {"params": {"conv": variables["params"]["conv"]}}, images.shape)
  assert list(bare.endpoints) == ["stem", "side"]
  with pytest.raises(ValueError, match="without a classifier has no logits"):
    bare.last_read()


# A class token answers: it reads the map before the last block, and no map after it.
@pytest.mark.parametrize(
  ("family", "options", "expected", "unread"),
  [
    (test_vit, {}, "stage1_block0", ("stage1_block1", "stage1", "head_norm")),
    (test_vit, {"distillation_token": True}, "stage1_block0", ("stage1_block1", "stage1")),
    (test_vit, {"pool": "mean"}, "head_norm", ()),
    (test_cvt, {}, "stage2_block0", ("stage2_block1", "stage2")),
  ],
)
def test_a_map_of_tokens_changes_without_the_tokens_beside_it(family, options, expected, unread):
  model, images = family.small(**options), contract.images(1, 32, 32)
  variables = contract.drawn_variables(model)
  split = split_network(model, variables, images.shape)
  assert split.last_read() == expected
  assert not set(unread) & set(split.read) and set(split.endpoints) >= set(unread)
  shape = split.endpoints[expected].shape
  change = jnp.asarray(np.random.default_rng(2).normal(size=shape), jnp.float32)

  def intercepted(variables, images, change):
    """Linen's own way: what the module of this name gives, with the change on its patches."""

    def changed(call, args, kwargs, context):
      out = call(*args, **kwargs)
      if context.module.name != expected or context.method_name != "__call__":
        return out
      cells = change.reshape(1, -1, change.shape[-1])
      return out.at[:, out.shape[1] - cells.shape[1] :].add(cells)

    with nn.intercept_methods(changed):
      return model.apply(variables, images)[0]

  found = jax.jit(lambda v, x, c: split.behind(expected, v, x, c)[0])(variables, images, change)
  wanted = jax.jit(intercepted)(variables, images, change)
  assert np.abs(wanted - contract.run(model, variables, images)[0]).max() > 1e-2
  np.testing.assert_allclose(found, wanted, atol=1e-5)
