"""Colours that stand for classes in pictures of maps."""

from __future__ import annotations

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


def voc_palette(count: int) -> np.ndarray:
  """Pascal VOC's colours, uint8 `[count, 3]`; number 0 is black.

  The bits of the number go in turn to red, green and blue, from the upper bit of each on: any two
  numbers below 256 have different colours, and neighbours very different ones.
  """
  numbers = np.arange(count)
  colours = np.zeros((count, 3), np.int64)
  for place in range(8):
    for channel in range(3):
      colours[:, channel] |= ((numbers >> (3 * place + channel)) & 1) << (7 - place)
  return colours.astype(np.uint8)
