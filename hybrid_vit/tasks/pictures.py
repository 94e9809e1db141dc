"""Pictures as a batch has them and as a network takes them, and what tasks of photos share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.data import arguments as check
from hybrid_vit.models import initialization
from hybrid_vit.ops.low_frequency_crop import lanczos_resize, low_frequency_crop
from hybrid_vit.tasks.base import Batch

SHRINKING = ("low_frequency", "lanczos")


@dataclasses.dataclass(frozen=True)
class Shrinking:
  """Training pictures made smaller on the device, before whatever else the step does to them.

  Attributes:
    size: of both sides.
    method: "low_frequency", the normalised picture's lowest frequencies (an even size), or
      "lanczos", PIL's filter, before normalising; see `hybrid_vit.ops.low_frequency_crop`.
  """

  size: int
  method: str = "lanczos"

  def __post_init__(self) -> None:
    check.whole("config.task.shrink.size", self.size)
    check.choice("config.task.shrink.method", self.method, SHRINKING)
    if self.method == "low_frequency" and self.size % 2:
      raise ValueError(f"config.task.shrink.size is {self.size}; an even number was expected")


@dataclasses.dataclass(frozen=True)
class PictureTask:
  """Photos of any size, and what is said of their places; dense tasks add the rest.

  Attributes:
    model: backbone and decoder, or a detector.
    mean: per channel.
    std: per channel.
  """

  model: Any
  mean: tuple[float, ...]
  std: tuple[float, ...]

  # Pictures keep their size: the task's inference says what is done to them.
  evaluation_transform = "decode"

  def init(self, rng: jax.Array, batch: Batch) -> dict[str, Any]:
    """See `Task`; the parameters do not depend on the batch's values or its size."""
    return initial_variables(self.model, rng, batch)

  def normalize(self, images: jax.Array) -> jax.Array:
    """uint8 `[B, H, W, 3]` → float32 with the network's mean and standard deviation."""
    return normalized(images, self.mean, self.std)

  def displayable(self, images: np.ndarray) -> np.ndarray:
    """Images as uint8, the normalisation undone."""
    return displayable(images, self.mean, self.std)

  def fill(self) -> tuple[int, int, int]:
    """The mean colour, with which pictures are padded."""
    red, green, blue = (round(255 * value) for value in self.mean)
    return red, green, blue


def initial_variables(model: Any, rng: jax.Array, batch: Batch) -> dict[str, Any]:
  """{"params", "batch_stats"} of a model that takes pictures, by the size of a batch's "image"."""
  images = jax.ShapeDtypeStruct((1, *batch["image"].shape[1:]), jnp.float32)
  variables = initialization.initial_variables(model, rng, images)
  return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def normalized(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """uint8 `[B, H, W, 3]` → float32 by `mean` and `std` (units of [0, 1]); floats as they are."""
  if images.dtype != jnp.uint8:
    return images
  scale = 1.0 / (jnp.asarray(std, jnp.float32) * 255.0)
  return (images.astype(jnp.float32) - jnp.asarray(mean, jnp.float32) * 255.0) * scale


def shrunk_and_normalized(
  images: jax.Array, mean: Sequence[float], std: Sequence[float], shrink: Shrinking | None
) -> jax.Array:
  """Training pictures `[B, H, W, 3]` → `normalized` ones, made smaller where that is asked for."""
  if shrink is not None and shrink.method == "lanczos":
    images = lanczos_resize(images, shrink.size)
  images = normalized(images, mean, std)
  if shrink is not None and shrink.method == "low_frequency":
    images = low_frequency_crop(images, shrink.size)
  return images


def displayable(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
  """Batch images as uint8, the normalisation undone."""
  if images.dtype == np.uint8:
    return images
  return np.clip((images * np.asarray(std) + np.asarray(mean)) * 255.0, 0, 255).astype(np.uint8)
