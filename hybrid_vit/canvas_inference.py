"""A picture of any size on a canvas of few sizes, as detectors and mask classifiers see it.

mmdetection's and detectron2's protocol: a picture is resized to fit a scale and padded at the right
and below to a multiple of 32, or to the smallest of some canvases, so that few shapes are compiled.

Deviation: pictures are resized by Pillow's antialiased filters, as everywhere here, and padded with
the mean colour before normalising, where mmdetection puts 0 behind it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from hybrid_vit.data import arguments as check
from hybrid_vit.data.resizing import FILTERS, resize_image

Size = tuple[int, int]  # (height, width)


@dataclasses.dataclass(frozen=True)
class CanvasSettings:
  """How a picture is seen.

  Attributes:
    scale: (long, short): a picture is resized, its aspect kept, as large as fits; None to leave it.
    size_divisor: sides are padded to a multiple of it.
    canvases: (height, width) of each; a picture is padded to the smallest in which it fits,
      instead; one that fits in none is padded to the multiple.
    interpolation: of the picture.

  Raises:
    ValueError: a value that cannot be; the message names it.
  """

  scale: tuple[int, int] | None = (1333, 800)
  size_divisor: int = 32
  canvases: tuple[tuple[int, int], ...] = ()
  interpolation: str = "bilinear"

  def __post_init__(self) -> None:
    check.choice("inference.interpolation", self.interpolation, FILTERS)
    check.whole("inference.size_divisor", self.size_divisor)
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

  def place(self, image: np.ndarray, fill: np.ndarray) -> tuple[np.ndarray, Size]:
    """uint8 `[H, W, 3]` → (its canvas, uint8 `[1, h, w, 3]`, and the picture's size on it).

    `fill` is the colour of the padding.
    """
    seen = self.input_size((image.shape[0], image.shape[1]))
    canvas = np.empty((1, *self.canvas(seen), 3), np.uint8)
    canvas[...] = fill
    canvas[0, : seen[0], : seen[1]] = resize_image(image, seen, self.interpolation)
    return canvas, seen
