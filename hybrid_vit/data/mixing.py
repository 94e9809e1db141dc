"""Mixup and CutMix inside the compiled step, by the rules of timm's `Mixup`.

Mixup: Zhang et al., arXiv:1710.09412. CutMix: Yun et al., arXiv:1905.04899. Each picture is mixed
with its mirror in the batch (row i with row B-1-i), so that a batch split over devices needs one
exchange and no gather.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

MODES = ("batch", "elem")


def mix_batch(
  rng: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  *,
  mixup_alpha: float,
  cutmix_alpha: float,
  probability: float,
  switch_probability: float,
  mode: str = "batch",
) -> tuple[jax.Array, jax.Array]:
  """Mixes pictures and their labels by Mixup or CutMix.

  Args:
    rng: a PRNG key.
    images: `[B, H, W, C]`, floating.
    labels: `[B, K]`, one-hot or smoothed, floating.
    mixup_alpha: the part kept is drawn from Beta(alpha, alpha) for Mixup; 0 switches Mixup off.
    cutmix_alpha: the same for CutMix. With both 0 the batch comes back as it is.
    probability: of mixing at all.
    switch_probability: of CutMix rather than Mixup, where both are on.
    mode: "batch" draws once for the whole batch, "elem" for each picture.

  Returns:
    Images and labels, of the shapes and types given. With CutMix the label's weights follow the
    area of the box after clipping at the border (timm's `correct_lam`).

  Raises:
    ValueError: arguments out of range, or images and labels that do not belong together.
  """
  _check(images, labels, mixup_alpha, cutmix_alpha, probability, switch_probability, mode)
  if mixup_alpha == 0 and cutmix_alpha == 0:
    return images, labels
  batch, height, width, _ = images.shape
  draws = 1 if mode == "batch" else batch
  keys = jax.random.split(rng, 6)

  def uniform(key: jax.Array) -> jax.Array:
    return jax.random.uniform(key, (draws,))

  if mixup_alpha > 0 and cutmix_alpha > 0:
    use_cutmix = uniform(keys[0]) < switch_probability
    kept = jnp.where(
      use_cutmix,
      jax.random.beta(keys[1], cutmix_alpha, cutmix_alpha, (draws,)),
      jax.random.beta(keys[2], mixup_alpha, mixup_alpha, (draws,)),
    )
  else:
    use_cutmix = jnp.full((draws,), cutmix_alpha > 0)
    alpha = max(mixup_alpha, cutmix_alpha)
    kept = jax.random.beta(keys[1], alpha, alpha, (draws,))
  kept = jnp.where(uniform(keys[3]) < probability, kept, 1.0)

  top, bottom = _random_interval(keys[4], height, kept)
  left, right = _random_interval(keys[5], width, kept)
  rows, columns = jnp.arange(height), jnp.arange(width)
  in_rows = (rows >= top[:, None]) & (rows < bottom[:, None])
  in_columns = (columns >= left[:, None]) & (columns < right[:, None])
  in_box = in_rows[:, :, None] & in_columns[:, None, :]
  box_area = (bottom - top) * (right - left)
  kept = jnp.where(use_cutmix, 1.0 - box_area / (height * width), kept)

  # Weight of a picture's own pixels, [draws, H, W, 1]; its mirror has the rest.
  own = jnp.where(use_cutmix[:, None, None], ~in_box, kept[:, None, None])[..., None]
  return _blend(images, own), _blend(labels, kept[:, None])


def smooth_one_hot(labels: jax.Array, num_classes: int, label_smoothing: float) -> jax.Array:
  """One-hot labels with smoothing s: s/K off the label, 1 - s + s/K on it (timm's form).

  Args:
    labels: `[B]`, integer. A label outside [0, num_classes) has no "on" entry.
    num_classes: K.
    label_smoothing: s, in [0, 1).

  Returns:
    `[B, K]`, float32.
  """
  if not 0.0 <= label_smoothing < 1.0:
    raise ValueError(f"label_smoothing is {label_smoothing}; a number in [0, 1) was expected")
  hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
  return hot * (1.0 - label_smoothing) + label_smoothing / num_classes


def _random_interval(key: jax.Array, size: int, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Start and end of a box along one side, as timm's `rand_bbox` draws and clips it.

  The centre is uniform over the whole side, so that a box may stand out and be cut off.
  """
  half = jnp.floor(size * jnp.sqrt(1.0 - kept)).astype(jnp.int32) // 2
  centre = jax.random.randint(key, kept.shape, 0, size)
  return jnp.clip(centre - half, 0, size), jnp.clip(centre + half, 0, size)


def _blend(values: jax.Array, own: jax.Array) -> jax.Array:
  own = own.astype(jnp.float32)
  mixed = values * own + values[::-1] * (1.0 - own)
  return mixed.astype(values.dtype)


def _check(
  images: jax.Array,
  labels: jax.Array,
  mixup_alpha: float,
  cutmix_alpha: float,
  probability: float,
  switch_probability: float,
  mode: str,
) -> None:
  if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f"images are {images.dtype}{list(images.shape)}; floating [B, H, W, C] was expected "
      "(uint8 pictures are normalised first)"
    )
  if labels.ndim != 2 or labels.shape[0] != images.shape[0]:
    raise ValueError(
      f"labels have shape {list(labels.shape)}; [{images.shape[0]}, K] was expected: "
      "see smooth_one_hot"
    )
  for name, value in (("mixup_alpha", mixup_alpha), ("cutmix_alpha", cutmix_alpha)):
    if value < 0:
      raise ValueError(f"{name} is {value}; a number >= 0 was expected (0 switches it off)")
  for name, value in (("probability", probability), ("switch_probability", switch_probability)):
    if not 0.0 <= value <= 1.0:
      raise ValueError(f"{name} is {value}; a number in [0, 1] was expected")
  if mode not in MODES:
    raise ValueError(f"mode is {mode!r}; one of {', '.join(MODES)} was expected")
