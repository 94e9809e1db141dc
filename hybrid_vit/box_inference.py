"""From a picture of any size to its objects, in the picture's own pixels.

The protocol is mmdetection's: a picture is resized to fit a scale, normalised, and padded at the
right and below to a multiple of 32, or to the smallest of some canvases, so that few shapes are
compiled. Boxes come back divided by the factor of each axis; masks are pasted at the picture's
size.

Deviation: pictures are resized by Pillow's antialiased filters, as everywhere here, and padded with
the mean colour before normalising, where mmdetection puts 0 behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from hybrid_vit.data import arguments as check
from hybrid_vit.data.mask_encoding import Rle, encode_mask
from hybrid_vit.data.resizing import FILTERS, resize_image
from hybrid_vit.metrics.paste_masks import paste_masks

Size = tuple[int, int]  # (height, width)


@dataclasses.dataclass(frozen=True)
class BoxInferenceSettings:
  """How a picture is seen.

  Attributes:
    scale: (long, short): a picture is resized, its aspect kept, as large as fits; None to leave it.
    size_divisor: sides are padded to a multiple of it.
    canvases: (height, width) of each; a picture is padded to the smallest in which it fits,
      instead; one that fits in none is padded to the multiple.
    interpolation: of the picture.
    mask_threshold: of the pasted probabilities.

  Raises:
    ValueError: a value that cannot be; the message names it.
  """

  scale: tuple[int, int] | None = (1333, 800)
  size_divisor: int = 32
  canvases: tuple[tuple[int, int], ...] = ()
  interpolation: str = "bilinear"
  mask_threshold: float = 0.5

  def __post_init__(self) -> None:
    check.choice("inference.interpolation", self.interpolation, FILTERS)
    check.whole("inference.size_divisor", self.size_divisor)
    check.number("inference.mask_threshold", self.mask_threshold, 0, 1)
    for name, sides in (("scale", self.scale), *(("canvases", c) for c in self.canvases)):
      if sides is not None:
        check.sides(f"inference.{name}", sides)

  def input_size(self, size: Size) -> Size:
    """(height, width) to which a picture of `size` is resized."""
    if self.scale is None:
      return size
    factor = min(max(self.scale) / max(size), min(self.scale) / min(size))
    return max(int(size[0] * factor + 0.5), 1), max(int(size[1] * factor + 0.5), 1)

  def canvas(self, size: Size) -> Size:
    """(height, width) to which a resized picture of `size` is padded."""
    fitting = [c for c in self.canvases if c[0] >= size[0] and c[1] >= size[1]]
    if fitting:
      height, width = min(fitting, key=lambda c: c[0] * c[1])
      return height, width
    multiple = self.size_divisor
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Objects:
  """What was found in one picture, the surest first.

  Attributes:
    boxes: float32 `[N, 4]`, (x0, y0, x1, y1) in the picture's pixels.
    scores: float32 `[N]`.
    labels: int32 `[N]`.
    masks: of the picture's size; None where the detector has none.
  """

  boxes: np.ndarray
  scores: np.ndarray
  labels: np.ndarray
  masks: tuple[Rle, ...] | None


class BoxInference:
  """Objects of pictures by one detector; compiled programs are kept."""

  def __init__(
    self,
    detect: Callable[[Any, jax.Array, jax.Array], Mapping[str, jax.Array]],
    settings: BoxInferenceSettings,
    fill: tuple[int, int, int],
  ):
    """
    Args:
      detect: pure, `(variables, images uint8 [B, H, W, 3], sizes float32 [B, 2]) → {"boxes" [B, D,
        4], "scores", "labels", "valid" [B, D], and "masks" [B, D, m, m] probabilities}`.
      settings: how.
      fill: colour of the padding.
    """
    self.settings = settings
    self._detect = jax.jit(detect)
    self._fill = np.array(fill, np.uint8)

  def objects(self, variables: Any, image: np.ndarray) -> Objects:
    """uint8 `[H, W, 3]` → its objects."""
    size = image.shape[0], image.shape[1]
    seen = self.settings.input_size(size)
    canvas = np.empty((1, *self.settings.canvas(seen), 3), np.uint8)
    canvas[...] = self._fill
    canvas[0, : seen[0], : seen[1]] = resize_image(image, seen, self.settings.interpolation)
    found = jax.device_get(self._detect(variables, canvas, np.array([seen], np.float32)))
    kept = found["valid"][0].astype(bool)
    scores = found["scores"][0][kept]
    order = np.argsort(-scores, kind="stable")
    factors = np.array([size[1] / seen[1], size[0] / seen[0]] * 2, np.float32)
    boxes = (found["boxes"][0][kept] * factors)[order]
    boxes = np.clip(boxes, 0, np.array([size[1], size[0]] * 2, np.float32))
    masks = None
    if "masks" in found:
      pasted = paste_masks(
        found["masks"][0][kept][order], boxes, size, threshold=self.settings.mask_threshold
      )
      masks = tuple(encode_mask(mask) for mask in pasted)
    return Objects(boxes, scores[order], found["labels"][0][kept][order].astype(np.int32), masks)
