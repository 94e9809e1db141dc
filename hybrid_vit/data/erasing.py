"""Random erasing on the device: after a picture was made smaller there, before mixup and cutmix.

The transform `random_erasing` does the same on the host, to pictures of the loader's size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# Boxes that are drawn for a picture until one fits, timm's.
_ATTEMPTS = 10


def random_erase(
  rng: jax.Array,
  images: jax.Array,
  *,
  probability: float,
  area: Sequence[float],
  aspect: Sequence[float],
) -> jax.Array:
  """Fills a box of some pictures with normal noise for each pixel (timm's pixel mode).

  Args:
    rng: a key.
    images: floating `[B, H, W, C]`, normalised, so that the noise has their deviation.
    probability: that a picture gets a box.
    area: (least, most) of a box, over the picture's.
    aspect: (least, most) height over width, drawn evenly in its logarithm.

  Returns:
    `[B, H, W, C]`. A picture for which no box fits (one in a million at the usual areas) stays.
  """
  batch, height, width, _ = images.shape
  keys = jax.random.split(rng, 6)
  shape = (batch, _ATTEMPTS)
  part = jax.random.uniform(keys[0], shape, minval=area[0], maxval=area[1]) * (height * width)
  low, high = math.log(aspect[0]), math.log(aspect[1])
  ratio = jnp.exp(jax.random.uniform(keys[1], shape, minval=low, maxval=high))
  h, w = jnp.round(jnp.sqrt(part * ratio)), jnp.round(jnp.sqrt(part / ratio))
  fits = (h < height) & (w < width)
  first = jnp.argmax(fits, axis=1)[:, None]
  h, w = (jnp.take_along_axis(x, first, axis=1)[:, 0].astype(jnp.int32) for x in (h, w))
  top = jax.random.randint(keys[2], (batch,), 0, jnp.maximum(height - h + 1, 1))
  left = jax.random.randint(keys[3], (batch,), 0, jnp.maximum(width - w + 1, 1))
  erased = fits.any(1) & (jax.random.uniform(keys[4], (batch,)) < probability)
  rows, columns = jnp.arange(height), jnp.arange(width)
  in_rows = (rows >= top[:, None]) & (rows < (top + h)[:, None])
  in_columns = (columns >= left[:, None]) & (columns < (left + w)[:, None])
  box = in_rows[:, :, None] & in_columns[:, None, :] & erased[:, None, None]
  noise = jax.random.normal(keys[5], images.shape, images.dtype)
  return jnp.where(box[..., None], noise, images)
