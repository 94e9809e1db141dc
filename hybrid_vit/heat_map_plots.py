"""Heat maps drawn over the photo as the network saw it, and a sheet of all methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np

from hybrid_vit.heat_maps import HeatMap
from hybrid_vit.plots import plot_sheet
from hybrid_vit.saliency import resize_map

_COLOURS = "turbo"
_OPACITY = 0.55
# Pictures below this side are drawn by whole pixels, so many times as large.
_LEAST_SIDE = 224


def overlay_heat(image: np.ndarray, heat: HeatMap) -> np.ndarray:
  """The photo under the colours of a map, blue for its least value and red for its largest.

  Grad-CAM's colours begin at 0, those of the others at the map's least value; components of
  features are colours already and cover the photo.

  Args:
    image: uint8 `[S, S, 3]`.
    heat: resized to it, see `saliency.resize_map`.

  Returns:
    uint8 `[H, W, 3]`, a whole multiple of the photo's size: at least 224 pixels a side.
  """
  photo = enlarged(image)
  values = resize_map(heat.values, (photo.shape[0], photo.shape[1]))
  if values.ndim == 3:
    return np.round(255 * np.clip(values, 0, 1)).astype(np.uint8)
  low = 0.0 if heat.method == "grad_cam" else float(values.min())
  spread = float(values.max()) - low
  # A map without differences has none to show.
  shares = (values - low) / spread if spread > 0 else np.zeros_like(values)
  colours = 255 * matplotlib.colormaps[_COLOURS](shares)[..., :3]
  grey = photo.mean(-1, keepdims=True)
  return np.round(grey + _OPACITY * (colours - grey)).astype(np.uint8)


def enlarged(image: np.ndarray) -> np.ndarray:
  """A photo `[H, W, 3]` by whole pixels, until its shorter side has at least 224."""
  factor = max(1, math.ceil(_LEAST_SIDE / min(image.shape[:2])))
  return image.repeat(factor, axis=0).repeat(factor, axis=1)


def plot_heat_maps(image: np.ndarray, heats: Sequence[HeatMap], heading: str, png: Any) -> None:
  """Draws a photo beside its maps.

  Args:
    image: uint8 `[S, S, 3]`, as the network saw it.
    heats: of that photo.
    heading: of the sheet.
    png: the file to write.
  """
  pictures = [enlarged(image), *(overlay_heat(image, heat) for heat in heats)]
  plot_sheet(pictures, ["Photo", *(heat.title for heat in heats)], heading, png)
