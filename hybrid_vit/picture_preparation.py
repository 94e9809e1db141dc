"""What an evaluation does to a photo before the network, as a part of the network's program.

The transform that `recipes.eval_transform` writes, for pictures whose size a program may not know
before it runs; a test holds one to the other.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from hybrid_vit.models.registry import Preprocessing
from hybrid_vit.ops.pillow_resize import resize_like_pillow


def prepared(images: jax.Array, preprocessing: Preprocessing) -> jax.Array:
  """Pictures resized and cropped as the weights expect it, not normalised.

  Args:
    images: uint8 `[B, H, W, 3]`; any of B, H and W may be symbolic.
    preprocessing: of the weights.

  Returns:
    uint8 `[B, image_size, image_size, 3]`, the pixels of the evaluation with Pillow 13.

  Raises:
    ValueError: pictures of another type or rank, or an unknown interpolation.
  """
  size, interpolation = preprocessing.image_size, preprocessing.interpolation
  if preprocessing.resize == "squash":
    return resize_like_pillow(images, (size, size), interpolation)
  height, width = (jnp.asarray(side, jnp.int32) for side in images.shape[1:3])
  short = math.floor(size / preprocessing.crop_ratio)
  lies = height <= width
  whole = (
    jnp.where(lies, short, short * height // width),
    jnp.where(lies, short * width // height, short),
  )
  corner = (_start(whole[0], size), _start(whole[1], size))
  return resize_like_pillow(images, whole, interpolation, corner, (size, size))


def _start(side: jax.Array, size: int) -> jax.Array:
  """Where the middle begins: half of what is too much, a half to even as torchvision rounds it."""
  half = (side - size) // 2
  odd = (side - size) % 2
  # Of a side that is too short, the border before it is the smaller one.
  return jnp.where(side >= size, half + odd * (half % 2), half + odd)
