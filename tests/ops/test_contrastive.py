"""Losses of pairs: by their definitions, chunked as plain, float32 logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_vit import sharding
from hybrid_vit.ops import contrastive

SIZE, WIDTH = 48, 16


def unit(rng, *shape):
  values = rng.normal(size=shape).astype(np.float32)
  return values / np.linalg.norm(values, axis=-1, keepdims=True)


def given(loss, seed=0):
  """Arguments of a loss, and its chunked and plain forms."""
  rng = np.random.default_rng(seed)
  image, text = unit(rng, SIZE, WIDTH), unit(rng, SIZE, WIDTH)
  text = text + image  # Some pairs are right.
  text /= np.linalg.norm(text, axis=-1, keepdims=True)
  if loss == "softmax":
    rest = (np.float32(20.0),)
  elif loss == "sigmoid":
    rest = (np.float32(10.0), np.float32(-10.0))
  else:
    rest = (np.float32(20.0), unit(rng, SIZE, 2, 8), unit(rng, SIZE, 2, 8))
  forms = getattr(contrastive, f"{loss}_loss"), getattr(contrastive, f"{loss}_loss_plain")
  return (image, text, *rest), *forms


def log_softmax(x):
  x = x - x.max(axis=1, keepdims=True)
  return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def by_definition(loss, image, text, scale, *rest):
  """In float64, pair by pair."""
  logits = float(scale) * image.astype(np.float64) @ text.astype(np.float64).T
  if loss == "softmax":
    return -(np.diag(log_softmax(logits)) + np.diag(log_softmax(logits.T))).mean() / 2
  if loss == "sigmoid":
    total = 0.0
    for i in range(SIZE):
      for j in range(SIZE):
        sign = 1 if i == j else -1
        total += np.log1p(np.exp(-sign * (logits[i, j] + float(rest[0]))))
    return total / SIZE
  cosines = np.einsum("ite,jte->tij", *(r.astype(np.float64) for r in rest))
  total = 0.0
  for student, teachers in ((logits, cosines), (logits.T, cosines.transpose(0, 2, 1))):
    targets = np.mean([np.exp(log_softmax(100 * t)) for t in teachers], axis=0)
    total -= (targets * log_softmax(student)).sum(axis=1).mean() / 2
  return total


LOSSES = ("softmax", "sigmoid", "distillation")


@pytest.mark.parametrize("loss", LOSSES)
def test_by_definition(loss):
  arguments, chunked, plain = given(loss)
  expected = by_definition(loss, *arguments)
  np.testing.assert_allclose(plain(*arguments), expected, rtol=2e-6)
  np.testing.assert_allclose(chunked(*arguments, chunk=7), expected, rtol=2e-6)


@pytest.mark.parametrize("mesh", [None, dict(data=8), dict(data=2, fsdp=2, tensor=2)])
@pytest.mark.parametrize("loss", LOSSES)
def test_chunked_is_plain_with_gradients(loss, mesh):
  arguments, chunked, plain = given(loss, seed=1)
  learnt = tuple(range(4 if loss == "sigmoid" else 3))
  value, gradients = jax.value_and_grad(plain, learnt)(*arguments)

  def run(*arguments):
    return jax.value_and_grad(lambda *a: chunked(*a, chunk=4), learnt)(*arguments)

  if mesh is None:
    found = jax.jit(run)(*arguments)
  else:
    made = sharding.make_mesh(mesh)
    rows = NamedSharding(made, PartitionSpec(sharding.BATCH_AXES))
    placed = [jax.device_put(a, rows) if np.ndim(a) else a for a in arguments]
    with jax.set_mesh(made):
      lowered = jax.jit(run).lower(*placed)
    assert "collective_permute" in lowered.as_text()
    found = lowered.compile()(*placed)
  np.testing.assert_allclose(found[0], value, rtol=1e-6)
  for ours, theirs in zip(found[1], gradients):
    assert np.max(np.abs(theirs)) > 1e-4
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_are_float32_of_bfloat16_features(loss):
  arguments, chunked, plain = given(loss)
  low = [jnp.asarray(a, jnp.bfloat16) if np.ndim(a) else a for a in arguments]
  rounded = [np.asarray(a, np.float32) if np.ndim(a) else a for a in low]
  for form in (chunked, plain):
    found = form(*low)
    assert found.dtype == jnp.float32
    # Logits of bfloat16 would be off by 1e-2.
    np.testing.assert_allclose(found, by_definition(loss, *rounded), rtol=3e-6)


def test_teachers_get_no_gradient():
  arguments, chunked, plain = given("distillation")
  for form in (chunked, plain):
    for gradient in jax.grad(form, (3, 4))(*arguments):
      assert not np.any(gradient)


def test_unequal_pairs_are_refused():
  with pytest.raises(ValueError, match=r"\(4, 2\).*\(3, 2\)"):
    contrastive.softmax_loss(jnp.ones((4, 2)), jnp.ones((3, 2)), jnp.float32(1))
