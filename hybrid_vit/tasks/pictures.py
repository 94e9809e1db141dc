"""Pictures as a batch has them and as a network takes them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def normalized(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """uint8 `[B, H, W, 3]` → float32 by `mean` and `std` (units of [0, 1]); floats as they are."""
  if images.dtype != jnp.uint8:
    return images
  scale = 1.0 / (jnp.asarray(std, jnp.float32) * 255.0)
  return (images.astype(jnp.float32) - jnp.asarray(mean, jnp.float32) * 255.0) * scale


def displayable(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
  """Batch images as uint8, the normalisation undone."""
  if images.dtype == np.uint8:
    return images
  return np.clip((images * np.asarray(std) + np.asarray(mean)) * 255.0, 0, 255).astype(np.uint8)
