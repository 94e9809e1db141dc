"""Changes of an 8-bit picture's colours by OpenCV's conventions, as dense recipes have them.

OpenCV's HSV of 8 bits has hues of 0 to 179. Every step is rounded to 8 bits, as the libraries do.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np


def distort(
  image: np.ndarray,
  brightness: float,
  contrast: tuple[float, float],
  saturation: tuple[float, float],
  hue: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """mmsegmentation's PhotoMetricDistortion.

  Brightness, then saturation and hue, with contrast before or behind these two by chance; each
  happens with probability 0.5, and rounds down to 8 bits.

  Args:
    image: uint8 RGB `[H, W, 3]`.
    brightness: what is added comes from [-x, x].
    contrast: factors come from between the two.
    saturation: the same.
    hue: a whole number from [-x, x), of 180, is added.
    rng: where chance comes from.
  """
  _check(image)
  if rng.random() < 0.5:
    image = _linear(image, 1.0, rng.uniform(-brightness, brightness))
  last = rng.random() < 0.5
  if not last:
    image = _contrast(image, contrast, rng)
  if rng.random() < 0.5:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = _linear(hsv[..., 1], rng.uniform(*saturation), 0.0)
    image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
  if hue and rng.random() < 0.5:
    image = _turned(image, int(rng.integers(-hue, hue)))
  return _contrast(image, contrast, rng) if last else image


def brightness_contrast(
  image: np.ndarray, brightness: float, contrast: float, rng: np.random.Generator
) -> np.ndarray:
  """x (1 + c) + 255 b of uint8 `[H, W, 3]`, c and b drawn from [-limit, limit]."""
  factor = 1 + rng.uniform(-contrast, contrast)
  return _linear(image, factor, 255 * rng.uniform(-brightness, brightness))


def gamma(image: np.ndarray, power: float) -> np.ndarray:
  """(x / 255)^power of uint8 `[H, W, 3]`."""
  _check(image)
  return (((np.arange(256) / 255) ** power) * 255).astype(np.uint8)[image]


def hue_saturation_value(
  image: np.ndarray, limits: Sequence[float], rng: np.random.Generator
) -> np.ndarray:
  """Adds to OpenCV's HSV of uint8 `[H, W, 3]`, each from [-limit, limit]; the hue goes round."""
  _check(image)
  turn, *shifts = (rng.uniform(-limit, limit) for limit in limits)
  hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(np.float32)
  hsv[..., 0] = np.floor((hsv[..., 0] + turn) % 180)
  hsv[..., 1:] = np.clip(hsv[..., 1:] + np.array(shifts, np.float32), 0, 255)
  return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2RGB)


def _contrast(
  image: np.ndarray, factors: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
  return _linear(image, rng.uniform(*factors), 0.0) if rng.random() < 0.5 else image


def _linear(values: np.ndarray, factor: float, shift: float) -> np.ndarray:
  """Through a table of all 256 values."""
  _check(values)
  table = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(shift)
  return np.clip(table, 0, 255).astype(np.uint8)[values]


def _turned(image: np.ndarray, shift: int) -> np.ndarray:
  hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
  hsv[..., 0] = (hsv[..., 0].astype(int) + shift) % 180
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def _check(image: np.ndarray) -> None:
  if image.dtype != np.uint8:
    raise TypeError(f"colours of a {image.dtype} picture cannot be changed: put normalize last")
