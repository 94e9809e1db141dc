"""Gradients of a loss over a whole batch whose activations are held for a part of it at a time.

Luyu Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup",
arXiv:2101.06983 (GradCache). First every part is embedded and nothing kept but the embeddings; the
loss of all of them gives their gradients; then each part is embedded again, by the same key, and
its embeddings' gradients go back through it. The price is one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def cached_gradients(
  embed: Callable[[Any, Any, jax.Array], tuple[Any, Any]],
  loss: Callable[[Any, Any], tuple[jax.Array, Any]],
  params: Any,
  parts: tuple[Any, jax.Array],
) -> tuple[jax.Array, Any, Any, Any]:
  """The loss of all parts together, and its gradient.

  Args:
    embed: `(params, rows, key) → (embeddings, statistics)`; leaves of embeddings are `[rows, …]`.
    loss: `(params, embeddings of all rows) → (loss, metrics)`.
    params: that are trained.
    parts: rows and keys, leaves `[parts, rows of a part, …]` and `[parts]`; row i of part k is row
      `i * parts + k` of the whole.

  Returns:
    Loss, metrics, the sum of the parts' statistics, gradients like `params`.
  """

  def first(_: None, part: Any) -> Any:
    return None, embed(params, *part)[0]

  _, found = jax.lax.scan(first, None, parts)
  embeddings = jax.tree.map(_joined, found)
  (value, metrics), (direct, wanted) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
    params, embeddings
  )
  count = jax.tree.leaves(found)[0].shape[0]
  wanted = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), wanted)

  def second(total: Any, part: Any) -> tuple[Any, None]:
    rows, gradient = part
    _, pull, statistics = jax.vjp(lambda p: embed(p, *rows), params, has_aux=True)
    return jax.tree.map(jnp.add, total, (pull(gradient)[0], statistics)), None

  one = jax.tree.map(lambda leaf: leaf[0], parts)
  statistics = jax.eval_shape(embed, params, *one)[1]
  begin = (direct, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), statistics))
  (gradients, statistics), _ = jax.lax.scan(second, begin, (parts, wanted))
  return value, metrics, statistics, gradients


def _joined(parts: jax.Array) -> jax.Array:
  """`[parts, rows, …]` → `[rows * parts, …]`, in the order of the whole."""
  return jnp.moveaxis(parts, 0, 1).reshape(-1, *parts.shape[2:])
