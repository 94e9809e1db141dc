"""Colours that stand for classes in pictures of maps."""

from __future__ import annotations

import colorsys

import numpy as np

CITYSCAPES_CLASSES = (
  "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign",
  "vegetation", "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle",
  "bicycle",
)  # fmt: skip
# The number of each of these classes among Cityscapes' "ids", of which the others are no class.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_PALETTE = np.array(
  [
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153),
    (153, 153, 153), (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152),
    (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100),
    (0, 80, 100), (0, 0, 230), (119, 11, 32),
  ],
  np.uint8,
)  # fmt: skip

_GOLDEN = (5**0.5 - 1) / 2
_SATURATIONS, _VALUES = (0.75, 0.5, 0.95), (0.95, 0.75, 0.5)


def spread_palette(count: int) -> np.ndarray:
  """Colours for classes that have none of their own, uint8 `[count, 3]`, none of them twice.

  Hues go round in golden steps, so that neighbours differ most and every beginning is spread; the
  saturation and lightness take turns, so that near hues differ, too.
  """
  colors = [
    colorsys.hsv_to_rgb(i * _GOLDEN % 1, _SATURATIONS[i % 3], _VALUES[i // 3 % 3])
    for i in range(count)
  ]
  return np.round(np.array(colors).reshape(-1, 3) * 255).astype(np.uint8)
