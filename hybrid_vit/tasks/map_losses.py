"""Losses of maps of classes: logits `[B, H, W, K]` at the maps' size, labels int32 `[B, H, W]`.

Everything is float32. Pixels of the label `ignore` (and any other that is no class) add nothing to
a loss or a gradient, whatever their logits are.

Deviations: mmsegmentation's dice loss leaves pixels without a class in its denominator, with the
last class as their truth; here they are left out of it, too. Its mining divides by "all" pixels or
by those with a class; here "valid" are those that were chosen, so that the loss is their mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  *,
  ignore: int,
  class_weights: Sequence[float] | None,
  average: str,
) -> jax.Array:
  """Softmax cross entropy of the pixels that have a class.

  Args:
    logits: `[B, H, W, K]`.
    labels: int32 `[B, H, W]`, 0 to K - 1, or `ignore`.
    ignore: label of pixels without a class.
    class_weights: of each class, K numbers: a pixel's loss is multiplied by its class's, and the
      divisor stays (mmsegmentation 0.x's; 1.2.2 and PyTorch divide by the sum of the pixels'
      weights). None for none.
    average: what the sum is divided by: "all" pixels, those without a class included
      (mmsegmentation's default), or the "valid" ones (PyTorch, transformers). Without one it is 0.

  Returns:
    float32 scalar.

  Raises:
    ValueError: an unknown average, or weights that are not one for each class.
  """
  losses, valid = _pixel_losses(logits, labels, ignore)
  if class_weights is not None:
    losses = losses * _weights_of(labels, class_weights, valid, logits.shape[-1])
  return jnp.sum(losses) / _divisor(valid, average)


def ohem_cross_entropy(
  logits: jax.Array,
  labels: jax.Array,
  *,
  ignore: int,
  threshold: float,
  min_kept: int,
  class_weights: Sequence[float] | None,
  average: str,
) -> jax.Array:
  """Cross entropy of hard pixels alone: online hard example mining, arXiv:1604.03540.

  mmsegmentation's OHEMPixelSampler: a pixel counts where the probability of its class is below
  `threshold`, or below that of pixel number `min_kept` * B of the batch, counted from the least
  certain one, if that is more. The others count as if they had no class.

  Args:
    logits: `[B, H, W, K]`.
    labels: int32 `[B, H, W]`, 0 to K - 1, or `ignore`.
    ignore: label of pixels without a class.
    threshold: of the probability.
    min_kept: pixels of one picture.
    class_weights: see `cross_entropy`.
    average: see `cross_entropy`; "valid" are the pixels that count.

  Returns:
    float32 scalar.

  Raises:
    ValueError: see `cross_entropy`.
  """
  losses, valid = _pixel_losses(logits, labels, ignore)
  # The probability of the class follows from its loss; it chooses and has no gradient.
  certainty = jax.lax.stop_gradient(jnp.where(valid, jnp.exp(-losses), jnp.inf)).ravel()
  kept = min(min_kept * labels.shape[0], certainty.size)
  in_order = jnp.sort(certainty)
  # Of fewer valid pixels than that, the last valid one.
  place = jnp.minimum(kept, jnp.maximum(jnp.sum(valid), 1) - 1)
  limit = jnp.maximum(in_order[place], threshold)
  hard = valid & (certainty.reshape(valid.shape) < limit)
  if class_weights is not None:
    losses = losses * _weights_of(labels, class_weights, valid, logits.shape[-1])
  return jnp.sum(jnp.where(hard, losses, 0.0)) / _divisor(hard, average)


def dice_loss(
  logits: jax.Array, labels: jax.Array, *, ignore: int, smooth: float = 1.0, exponent: int = 2
) -> jax.Array:
  """Mean over pictures and classes of 1 - (2 sum(p t) + s) / (sum(p^e + t^e) + s).

  p are softmax probabilities, t the one-hot labels, sums are over a picture's pixels that have a
  class (V-Net, arXiv:1606.04797, equation 3; exponent and smoothing of mmsegmentation's DiceLoss).

  Args:
    logits: `[B, H, W, K]`.
    labels: int32 `[B, H, W]`, 0 to K - 1, or `ignore`.
    ignore: label of pixels without a class.
    smooth: s.
    exponent: e.

  Returns:
    float32 scalar; 0 where no pixel has a class.
  """
  classes = logits.shape[-1]
  valid = _valid(labels, ignore, classes)[..., None]
  # Logits of what does not count must not make a NaN of the gradient either.
  safe = jnp.where(valid, logits.astype(jnp.float32), 0.0)
  probabilities = jnp.where(valid, jax.nn.softmax(safe), 0.0)
  truth = jax.nn.one_hot(labels, classes, dtype=jnp.float32) * valid
  both = jnp.sum(probabilities * truth, axis=(1, 2))
  sizes = jnp.sum(probabilities**exponent + truth**exponent, axis=(1, 2))
  return jnp.mean(1.0 - (2.0 * both + smooth) / (sizes + smooth))


def _valid(labels: jax.Array, ignore: int, classes: int) -> jax.Array:
  return (labels != ignore) & (labels >= 0) & (labels < classes)


def _pixel_losses(logits: jax.Array, labels: jax.Array, ignore: int) -> tuple[jax.Array, jax.Array]:
  """Cross entropy of each pixel, 0 where there is no class; and where there is one."""
  valid = _valid(labels, ignore, logits.shape[-1])
  safe = jnp.where(valid[..., None], logits.astype(jnp.float32), 0.0)
  chosen = jnp.where(valid, labels, 0)
  # By comparing, not by gathering, whose gradient would be a scatter.
  hit = chosen[..., None] == jnp.arange(logits.shape[-1])
  own = jnp.sum(jnp.where(hit, safe, 0.0), axis=-1)
  return jnp.where(valid, jax.nn.logsumexp(safe, axis=-1) - own, 0.0), valid


def _weights_of(
  labels: jax.Array, class_weights: Sequence[float], valid: jax.Array, classes: int
) -> jax.Array:
  # A place beyond the end would silently read the last one.
  if len(class_weights) != classes:
    raise ValueError(
      f"class_weights has {len(class_weights)} numbers; one for each of {classes} classes was "
      "expected"
    )
  return jnp.asarray(class_weights, jnp.float32)[jnp.where(valid, labels, 0)]


def _divisor(counted: jax.Array, average: str) -> jax.Array:
  if average == "all":
    return jnp.asarray(counted.size, jnp.float32)
  if average == "valid":
    return jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)
  raise ValueError(f"average is {average!r}; 'all' or 'valid' was expected")
