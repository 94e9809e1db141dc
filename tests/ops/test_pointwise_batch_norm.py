"""A 1x1 convolution with its batch norm in one against the two: outputs, statistics, gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.models import layers
from hybrid_vit.models.freezing import running_statistics
from hybrid_vit.models.smt import GroupedPointwiseConv
from hybrid_vit.ops.activations import gelu
from hybrid_vit.ops.batch_norm import batch_norm
from hybrid_vit.ops.platforms import tracing_for
from hybrid_vit.ops.pointwise_batch_norm import pays, pointwise_batch_norm
from hybrid_vit.tools.summarize import count_multiply_adds

EPSILON = 1e-3


def separate(x, kernel, scale, bias, activation):
  y = jnp.matmul(x, kernel.astype(x.dtype))
  out, mean, var = batch_norm(y[None], scale, bias, EPSILON, x.dtype)
  return (out if activation is None else activation(out))[0], mean[0], var[0]


def inputs(shape=(3, 6, 5, 8), outputs=20, dtype=jnp.float32):
  keys = jax.random.split(jax.random.key(0), 5)
  # Channels that are correlated and away from zero, as after an activation.
  x = jax.random.normal(keys[0], shape) @ jax.random.normal(keys[1], (shape[-1],) * 2) + 1.5
  kernel = jax.random.normal(keys[2], (shape[-1], outputs))
  scale, bias = (jax.random.normal(key, (outputs,)) for key in keys[3:])
  return x.astype(dtype), kernel, scale, bias


def answers(function, activation, arguments):
  """(output, mean, variance, gradients of all four) for one gradient of the output."""

  @jax.jit
  def run(*arguments):
    out, pull, figures = jax.vjp(
      lambda *a: (lambda y, *figures: (y, figures))(*function(*a, activation)),
      *arguments,
      has_aux=True,
    )
    weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return out, *figures, *pull(weights.astype(out.dtype))

  return jax.device_get(run(*arguments))


def merged(x, kernel, scale, bias, activation):
  return pointwise_batch_norm(x, kernel, scale, bias, EPSILON, activation)


@pytest.mark.parametrize("activation", [None, gelu])
def test_it_is_what_the_two_give(activation):
  for one, other in zip(
    answers(merged, activation, inputs()), answers(separate, activation, inputs()), strict=True
  ):
    assert one.dtype == other.dtype
    np.testing.assert_allclose(one, other, atol=2e-5 * max(1.0, np.abs(other).max()))


def test_bfloat16_is_nearer_to_float32_than_the_two():
  low = inputs((4, 16, 16, 32), 64, jnp.bfloat16)
  exact = answers(separate, gelu, (low[0].astype(jnp.float32), *low[1:]))
  far = [
    [float(np.abs(np.asarray(a, np.float32) - b).mean()) for a, b in zip(found, exact)]
    for found in (answers(merged, gelu, low), answers(separate, gelu, low))
  ]
  for name, here, there in zip(("out", "mean", "var", "x", "kernel", "scale", "bias"), *far):
    assert here <= 1.1 * there + 1e-6, name


def test_what_is_kept_is_as_narrow_as_the_input():
  x, *others = inputs((4, 16, 16, 8), 64, jnp.bfloat16)
  _, back = jax.vjp(lambda *a: merged(*a, gelu)[0], x, *others)
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(back)) < x.nbytes + 8 * others[0].nbytes


def test_a_channel_without_variance_gives_the_bias_and_finite_gradients():
  x, kernel, scale, bias = inputs()
  found = answers(merged, None, (jnp.ones_like(x), kernel, scale, bias))
  np.testing.assert_allclose(found[0], np.broadcast_to(bias, found[0].shape), atol=2e-2)
  assert all(np.isfinite(leaf).all() for leaf in found)


def test_a_kernel_of_groups_is_one_of_all_channels_with_zeros_between():
  x, _, scale, bias = inputs((3, 6, 5, 8), 12)
  kernel = jax.random.normal(jax.random.key(7), (2, 4, 3))
  whole = np.zeros((2, 4, 4, 3), np.float32)
  whole[:, range(4), range(4)] = kernel
  found = answers(merged, gelu, (x, kernel, scale, bias))
  expected = answers(merged, gelu, (x, whole.reshape(8, 12), scale, bias))
  of_kernel = expected[4].reshape(2, 4, 4, 3)[:, range(4), range(4)]
  for i, (one, other) in enumerate(zip(found, (*expected[:4], of_kernel, *expected[5:]))):
    np.testing.assert_allclose(
      one, other, atol=1e-5 * max(1.0, np.abs(other).max()), err_msg=str(i)
    )


class _Block(nn.Module):
  """As MOAT and ResNet call it, and with a bias and groups as SMT does."""

  groups: int
  grouped: bool

  @nn.compact
  def __call__(self, x, train):
    conv = (
      GroupedPointwiseConv(4, 3, jnp.float32, name="conv")
      if self.grouped
      else layers.PointwiseConv(12, use_bias=False, name="conv")
    )
    norm = layers.BatchNorm(EPSILON, 0.9, self.groups, unbiased_variance=True, name="norm")
    return layers.pointwise_conv_norm(x, train, conv, norm, layers.gelu)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_in_a_network_it_is_what_the_two_give(groups, grouped):
  """On a GPU it is two operations: the same parameters, answers, figures, gradients and counts."""
  block, x = _Block(groups, grouped), inputs((4, 6, 5, 8))[0]
  variables = block.init(jax.random.key(0), x, False)
  if grouped:
    bias = jnp.linspace(-1.0, 1.0, 12)
    variables["params"]["conv"]["bias"] = bias

  def run(params, platform):
    with tracing_for((platform,)):
      out, changed = block.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])
    return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), (out, changed)

  found = {
    platform: jax.jit(jax.value_and_grad(run, has_aux=True), static_argnums=1)(
      variables["params"], platform
    )
    for platform in ("tpu", "cpu", "gpu")
  }
  for platform in ("tpu", "cpu"):
    assert jax.tree.structure(found[platform]) == jax.tree.structure(found["gpu"])
    for one, other in zip(jax.tree.leaves(found[platform]), jax.tree.leaves(found["gpu"])):
      np.testing.assert_allclose(one, other, atol=5e-5 * max(1.0, np.abs(other).max()))
  counts = {
    platform: count_multiply_adds(lambda params, p=platform: run(params, p)[0], variables["params"])
    for platform in ("tpu", "cpu", "gpu")
  }
  assert (
    counts["tpu"] == counts["cpu"] == counts["gpu"] == 4 * 6 * 5 * (12 * 2 if grouped else 8 * 12)
  )
  for platform in ("tpu", "cpu", "gpu"):
    with tracing_for((platform,)):
      shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, True))
      text = str(jax.make_jaxpr(lambda: block.apply(variables, x, True, mutable=["batch_stats"]))())
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    assert ("normalised_product" in text) == (platform != "gpu")


@pytest.mark.parametrize("grouped", [False, True])
def test_a_frozen_norm_is_called_as_in_an_evaluation(grouped):
  """As a probe does it: the norm's own `train` is made False in the midst of a training."""
  block, x = _Block(1, grouped), inputs((4, 6, 5, 8))[0]
  variables = block.init(jax.random.key(0), x, False)
  if grouped:
    variables["params"]["conv"]["bias"] = jnp.linspace(-1.0, 1.0, 12)
  statistics = jax.tree.map(lambda leaf: leaf + 0.25, variables["batch_stats"])
  variables = {**variables, "batch_stats": statistics}

  for platform in ("cpu", "tpu"):
    with tracing_for((platform,)), running_statistics(lambda path: path == "norm"):
      found, changed = block.apply(variables, x, True, mutable=["batch_stats"])
    np.testing.assert_allclose(found, block.apply(variables, x, False), atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, changed["batch_stats"], statistics)


def test_where_it_pays():
  for platforms, few, many in ((("tpu",), 1, 1), (("cpu",), 1, 0), (("gpu",), 0, 0),
                               (("cpu", "tpu"), 0, 0)):  # fmt: skip
    with tracing_for(platforms):
      assert (pays(64), pays(512)) == (few, many)
