"""What features are worth without training the network: nearest neighbours, and a few examples.

k-NN is that of DINO (arXiv:2104.14294, `eval_knn.py`): cosine similarity, the k nearest vote with
the weight exp(similarity / temperature). The few-shot probe is a multinomial logistic regression on
standardised features of n examples of each class, drawn anew for each seed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Queries whose similarities to all of the bank are held at once.
_CHUNK = 1024
# Steps of L-BFGS; the problem is convex and small.
_STEPS = 100


def knn_votes(
  bank: np.ndarray,
  bank_labels: np.ndarray,
  queries: np.ndarray,
  *,
  num_classes: int,
  k: int = 20,
  temperature: float = 0.07,
) -> np.ndarray:
  """Votes of the k nearest of `bank` for each query.

  Args:
    bank: `[M, D]` features; their length does not matter.
    bank_labels: int `[M]`.
    queries: `[N, D]`.
    num_classes: K.
    k: neighbours; all of them where the bank has fewer.
    temperature: of the weights exp(cosine / temperature).

  Returns:
    float64 `[N, K]`; rows add up to 1.

  Raises:
    ValueError: k or temperature not above 0, or no example in the bank.
  """
  if k < 1 or not temperature > 0 or not len(bank):
    raise ValueError(
      f"k is {k}, the temperature {temperature} and the bank has {len(bank)} examples; all of them "
      "above 0 were expected"
    )
  bank, k = _unit(bank), min(k, len(bank))
  votes = np.zeros((len(queries), num_classes))
  for start in range(0, len(queries), _CHUNK):
    similarity = _unit(queries[start : start + _CHUNK]) @ bank.T
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    close = np.take_along_axis(similarity, nearest, axis=1).astype(np.float64)
    # Relative to the nearest one, which changes no share of the votes and cannot overflow.
    weight = np.exp((close - close[:, :1]) / temperature)
    rows = np.arange(start, start + len(close))[:, None]
    np.add.at(votes, (rows, np.asarray(bank_labels)[nearest]), weight)
  return votes / votes.sum(1, keepdims=True)


def _unit(features: np.ndarray) -> np.ndarray:
  features = np.asarray(features, np.float32)
  return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def shots(labels: np.ndarray, n: int, seed: int) -> np.ndarray:
  """Indices of n examples of each class, drawn by a seed.

  Raises:
    ValueError: a class with fewer.
  """
  labels, chosen = np.asarray(labels), []
  rng = np.random.default_rng(seed)
  for label in np.unique(labels):
    members = np.flatnonzero(labels == label)
    if len(members) < n:
      raise ValueError(
        f"{n} examples of each class are asked for, and class {label} has {len(members)}: choose "
        "fewer shots"
      )
    chosen.append(rng.choice(members, n, replace=False))
  return np.concatenate(chosen)


def linear_probe(
  features: np.ndarray, labels: np.ndarray, *, num_classes: int, l2: float = 1e-2
) -> tuple[np.ndarray, np.ndarray]:
  """Multinomial logistic regression, by L-BFGS from 0.

  It minimises mean cross-entropy + l2 / 2 * |kernel|^2 on features of mean 0 and deviation 1.

  Args:
    features: `[N, D]`.
    labels: int `[N]`.
    num_classes: K.
    l2: strength of the regularisation; the bias has none.

  Returns:
    (kernel `[D, K]`, bias `[K]`), for features as they were given.
  """
  features = np.asarray(features, np.float64)
  mean, deviation = features.mean(0), features.std(0)
  # A feature that is the same everywhere says nothing.
  scale = np.where(deviation > 1e-6, 1.0 / np.maximum(deviation, 1e-6), 0.0)
  x = ((features - mean) * scale).astype(np.float32)
  kernel, bias = jax.device_get(_fit(x, np.asarray(labels, np.int32), l2, num_classes))
  kernel = kernel.astype(np.float64) * scale[:, None]
  return kernel, bias.astype(np.float64) - mean @ kernel


@functools.partial(jax.jit, static_argnums=3)
def _fit(x: jax.Array, labels: jax.Array, l2: float, num_classes: int):
  def loss(weights):
    kernel, bias = weights
    logits = jnp.matmul(x, kernel, precision="highest") + bias
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return entropy.mean() + 0.5 * l2 * jnp.sum(kernel**2)

  optimizer = optax.lbfgs()
  weights = jnp.zeros((x.shape[1], num_classes)), jnp.zeros(num_classes)
  value_and_gradient = optax.value_and_grad_from_state(loss)

  def step(carry, _):
    weights, state = carry
    value, gradient = value_and_gradient(weights, state=state)
    updates, state = optimizer.update(
      gradient, state, weights, value=value, grad=gradient, value_fn=loss
    )
    return (optax.apply_updates(weights, updates), state), None

  (weights, _), _ = jax.lax.scan(step, (weights, optimizer.init(weights)), length=_STEPS)
  return weights


def top1(scores: np.ndarray, labels: np.ndarray) -> float:
  """Part of the rows whose own class scores strictly above all others."""
  own = np.take_along_axis(scores, np.asarray(labels)[:, None], 1)
  return float(np.mean((~(scores < own)).sum(1) == 1))
