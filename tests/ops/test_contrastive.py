"""Contrastive losses: by their definition, and around the ring as in one piece."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_vit import sharding
from hybrid_vit.ops.contrastive import (
  Teachers,
  plain_sigmoid_loss,
  plain_softmax_loss,
  sigmoid_loss,
  softmax_loss,
)

BATCH, WIDTH = 32, 12


def unit(*shape, seed):
  x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


IMAGES, TEXTS = unit(BATCH, WIDTH, seed=0), unit(BATCH, WIDTH, seed=1)
THEIRS = Teachers(unit(BATCH, 2, 7, seed=2), unit(BATCH, 2, 7, seed=3), 20.0)
LOSSES = {
  "softmax": (
    lambda i, t, s, b, **k: softmax_loss(i, t, s, **k) + 0 * b,
    lambda i, t, s, b: plain_softmax_loss(i, t, s) + 0 * b,
  ),
  "teachers": (
    lambda i, t, s, b, **k: softmax_loss(i, t, s, THEIRS, **k) + 0 * b,
    lambda i, t, s, b: plain_softmax_loss(i, t, s, THEIRS) + 0 * b,
  ),
  "sigmoid": (sigmoid_loss, plain_sigmoid_loss),
}
GIVEN = (IMAGES, TEXTS, jnp.float32(14.0), jnp.float32(-3.0))
ALL = (0, 1, 2, 3)


def log_softmax(x, axis):
  x = x - x.max(axis, keepdims=True)
  return x - np.log(np.exp(x).sum(axis, keepdims=True))


def test_the_references_are_the_definitions():
  a, b = IMAGES.astype(np.float64), TEXTS.astype(np.float64)
  logits = 14.0 * a @ b.T
  rows, columns = log_softmax(logits, 1), log_softmax(logits, 0)
  clip = -(np.trace(rows) + np.trace(columns)) / (2 * BATCH)
  assert plain_softmax_loss(*GIVEN[:3]) == pytest.approx(clip, rel=1e-5)
  theirs = [20.0 * THEIRS.images[:, k] @ THEIRS.texts[:, k].T for k in range(2)]
  row_target = np.mean([np.exp(log_softmax(x, 1)) for x in theirs], 0)
  column_target = np.mean([np.exp(log_softmax(x, 0)) for x in theirs], 0)
  soft = -(np.sum(row_target * rows) + np.sum(column_target * columns)) / (2 * BATCH)
  assert plain_softmax_loss(*GIVEN[:3], THEIRS) == pytest.approx(soft, rel=1e-5)
  signs = 2 * np.eye(BATCH) - 1
  sigmoid = np.sum(np.log1p(np.exp(-signs * (logits - 3.0)))) / BATCH
  assert plain_sigmoid_loss(*GIVEN) == pytest.approx(sigmoid, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("axes", [None, (8, 1, 1), (2, 4, 1), (2, 2, 2)])
@pytest.mark.parametrize("chunk", [1024, 3])
def test_the_ring_is_the_whole(name, axes, chunk):
  ours, plain = LOSSES[name]
  expected = jax.value_and_grad(plain, ALL)(*GIVEN)
  function = jax.jit(jax.value_and_grad(lambda *x: ours(*x, chunk=chunk), ALL))
  if axes is None:
    found = function(*GIVEN)
  else:
    mesh = sharding.make_mesh(dict(zip(("data", "fsdp", "tensor"), axes)))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    images, texts = (jax.device_put(x, rows) for x in GIVEN[:2])
    with jax.set_mesh(mesh):
      found = function(images, texts, *GIVEN[2:])
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
    # Values near 1 to 1e-6; the scale's gradient is a sum of a thousand terms.
    np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-6)


def largest(jaxpr):
  """Elements of the largest array that a program makes, inside of loops and shards too."""
  most = 0
  for equation in jaxpr.eqns:
    most = max([most, *(np.prod(v.aval.shape, dtype=int) for v in equation.outvars)])
    for inner in jaxprs_in_params(equation.params):
      most = max(most, largest(inner))
  return most


@pytest.mark.parametrize("name", LOSSES)
def test_no_matrix_of_all_pairs_is_made(name):
  """Of 64 rows and 8 columns at a time, nothing is larger than the features."""
  wide = [unit(64, 8, seed=k) for k in range(2)]
  theirs = Teachers(unit(64, 2, 4, seed=2), unit(64, 2, 4, seed=3))
  ours, plain = {
    "softmax": (softmax_loss, plain_softmax_loss),
    "teachers": (
      lambda *x, **k: softmax_loss(*x, theirs, **k),
      lambda *x: plain_softmax_loss(*x, theirs),
    ),
    "sigmoid": LOSSES["sigmoid"],
  }[name]
  given = (*wide, *GIVEN[2 : 4 if name == "sigmoid" else 3])

  def program(loss, **options):
    f = jax.value_and_grad(lambda *x: loss(*x, **options), tuple(range(len(given))))
    return jax.make_jaxpr(f)(*given).jaxpr

  assert largest(program(plain)) >= 64 * 64
  assert largest(program(ours, chunk=8)) == 64 * 8


def test_logits_are_float32_whatever_the_features_are():
  half = [jnp.asarray(x, jnp.bfloat16) for x in GIVEN[:2]]
  for ours, plain in LOSSES.values():
    value, gradients = jax.value_and_grad(ours, (0, 1))(*half, *GIVEN[2:])
    assert value.dtype == jnp.float32 and gradients[0].dtype == jnp.bfloat16
    expected = plain(*(x.astype(jnp.float32) for x in half), *GIVEN[2:])
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_large_scales_do_not_overflow():
  same = unit(16, 4, seed=5)
  value, gradient = jax.value_and_grad(softmax_loss)(same, same, jnp.float32(1e4))
  assert np.isfinite(value) and np.isfinite(gradient).all()
  # A NaN is not hidden.
  broken = same.copy()
  broken[0, 0] = np.nan
  assert np.isnan(softmax_loss(broken, same, jnp.float32(10.0)))


def test_what_does_not_fit_is_named():
  with pytest.raises(ValueError, match=r"images \(32, 12\) and texts \(31, 12\)"):
    softmax_loss(IMAGES, TEXTS[:-1], jnp.float32(1.0))
  many = [unit(31, 4, seed=k) for k in range(2)]
  with pytest.raises(ValueError, match="31 rows of a device fall into equal pieces of 1 at most"):
    softmax_loss(*many, jnp.float32(1.0), chunk=8)
  mesh = sharding.make_mesh({"data": 8})
  with pytest.raises(ValueError, match="batch of 31 is not split evenly"), jax.set_mesh(mesh):
    softmax_loss(IMAGES[:-1], TEXTS[:-1], jnp.float32(1.0))


def test_the_value_of_large_logits_is_not_lost_in_the_sum():
  """Each row's logit is taken from its own log-sum-exp: sums of 70,000 differ by thousandths."""
  images = unit(512, 256, seed=6)
  texts = images + 0.3 * unit(512, 256, seed=7)
  texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
  logits = 100.0 * images.astype(np.float64) @ texts.astype(np.float64).T
  expected = -(np.trace(log_softmax(logits, 1)) + np.trace(log_softmax(logits, 0))) / 1024
  assert softmax_loss(images, texts, jnp.float32(100.0)) == pytest.approx(expected, abs=1e-6)
