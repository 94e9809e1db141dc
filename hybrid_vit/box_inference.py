"""From a picture of any size to its objects, in the picture's own pixels.

The protocol is mmdetection's, see `canvas_inference`. Boxes come back divided by the factor of each
axis; masks are pasted at the picture's size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from hybrid_vit.canvas_inference import CanvasSettings
from hybrid_vit.data import arguments as check
from hybrid_vit.data.mask_encoding import Rle, encode_mask
from hybrid_vit.metrics.paste_masks import paste_masks


@dataclasses.dataclass(frozen=True)
class BoxInferenceSettings(CanvasSettings):
  """How a picture is seen, and what its masks are.

  Attributes:
    mask_threshold: of the pasted probabilities.

  Raises:
    ValueError: a value that cannot be; the message names it.
  """

  mask_threshold: float = 0.5

  def __post_init__(self) -> None:
    super().__post_init__()
    check.number("inference.mask_threshold", self.mask_threshold, 0, 1)


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
    canvas, seen = self.settings.place(image, self._fill)
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
