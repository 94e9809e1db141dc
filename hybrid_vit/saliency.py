"""What a network looked at, as arithmetic on its maps, gradients and attention weights."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.ops.resize import bilinear_matrix


def grad_cam(activations: jax.Array, gradients: jax.Array) -> jax.Array:
  """Grad-CAM of maps `[B, h, w, C]` and the gradients of a class's logit there: `[B, h, w]`.

  Selvaraju et al., "Grad-CAM", ICCV 2017, arXiv:1610.02391: a channel's weight is the mean of its
  gradient over the cells (eq. 1), the map ReLU of the channels' weighted sum (eq. 2). Float32.
  """
  weights = gradients.astype(jnp.float32).mean((1, 2), keepdims=True)
  return jax.nn.relu((weights * activations.astype(jnp.float32)).sum(-1))


def token_attention(weights: jax.Array) -> jax.Array:
  """How much the first token attends to each key, the mean over the heads.

  Args:
    weights: of softmax attention, `[B, H, Q, K]`.

  Returns:
    `[B, K]`; a row sums to 1.
  """
  return weights[:, :, 0].mean(1)


def received_attention(weights: jax.Array) -> jax.Array:
  """How much each key is attended to, the mean over heads and queries.

  Args:
    weights: of softmax attention, `[B, H, Q, K]`.

  Returns:
    `[B, K]`; a row sums to 1.
  """
  return weights.mean((1, 2))


def attention_rollout(weights: Sequence[jax.Array]) -> jax.Array:
  """What reaches each token through all blocks: Abnar and Zuidema, ACL 2020, arXiv:2005.00928.

  In each block half of a token is its own (the shortcut) and half what it attends to, the mean over
  the heads (section 3, A = 0.5 W + 0.5 I); the blocks' matrices are multiplied.

  Args:
    weights: of softmax attention in the blocks from first to last, each `[B, H, N, N]`.

  Returns:
    `[B, N, N]`: row i is what token i of the last block has of each token of the first; it sums
    to 1.

  Raises:
    ValueError: no block, or blocks of other numbers of tokens.
  """
  shapes = {w.shape[-2:] for w in weights}
  if len(shapes) != 1 or len(set(shapes.pop())) != 1:
    raise ValueError(
      f"rollout multiplies the attention of blocks of equally many tokens; found {len(weights)} of "
      f"{[list(w.shape[-2:]) for w in weights]}"
    )
  rolled = jnp.eye(weights[0].shape[-1], dtype=jnp.float32)
  for block in weights:
    mean = block.astype(jnp.float32).mean(1)
    rolled = (0.5 * mean + 0.5 * jnp.eye(mean.shape[-1])) @ rolled
  return rolled


def magnitude(maps: jax.Array) -> jax.Array:
  """The length (L2) of each cell's vector: `[B, h, w, C]` to `[B, h, w]`, float32."""
  return jnp.sqrt(jnp.square(maps.astype(jnp.float32)).sum(-1))


def principal_components(maps: Sequence[np.ndarray]) -> list[np.ndarray]:
  """The first three principal components of features as red, green and blue.

  As Oquab et al., "DINOv2", arXiv:2304.07193, figure 1, without their threshold that cuts out the
  background. All maps share one basis and one scale, so that equal colours are equal features. A
  component's sign is that by which its largest weight is positive, and each is stretched to [0, 1];
  one in which nothing differs is 0.

  Args:
    maps: each `[h, w, C]`, of one C.

  Returns:
    float32 `[h, w, 3]` of each.

  Raises:
    ValueError: no map, or maps of other numbers of channels.
  """
  if len({m.shape[-1] for m in maps}) != 1:
    raise ValueError(
      f"maps of {[list(m.shape) for m in maps]}; one number of channels was expected"
    )
  cells = np.concatenate([np.asarray(m, np.float64).reshape(-1, m.shape[-1]) for m in maps])
  centred = cells - cells.mean(0)
  _, values, directions = np.linalg.svd(centred, full_matrices=False)
  colours = np.zeros((len(cells), 3), np.float32)
  # What rounding leaves of features that do not differ is no component.
  least = 1e-6 * max(values[0], np.abs(cells).max() * np.sqrt(len(cells)))
  for i, direction in enumerate(directions[:3]):
    if values[i] > least:
      along = centred @ (direction * np.sign(direction[np.abs(direction).argmax()]))
      colours[:, i] = (along - along.min()) / (along.max() - along.min())
  ends = np.cumsum([m.shape[0] * m.shape[1] for m in maps])
  parts = np.split(colours, ends[:-1])
  return [part.reshape(*m.shape[:2], 3) for part, m in zip(parts, maps)]


def resize_map(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """Resizes `[h, w]` or `[h, w, C]` to `size` (H, W), float32.

  Bilinear with half-pixel centres (`align_corners=False`), borders repeated, no antialiasing.
  """
  rows = bilinear_matrix(values.shape[0], size[0], align_corners=False)
  columns = bilinear_matrix(values.shape[1], size[1], align_corners=False)
  return np.einsum("yh,xw,hw...->yx...", rows, columns, np.asarray(values, np.float32))
