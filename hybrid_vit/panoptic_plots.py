"""Segments of things and stuff drawn over their photos, each named, beside the truth."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hybrid_vit.detection_plots import overlay_masks
from hybrid_vit.plots import displayable, one_line, plain_text, save_figure

_PANEL_WIDTH, _DPI = 4.2, 120
_NAME_LETTERS, _FONT = 20, 6.5
# Segments below this part of the photo have no name.
_NAMED = 2e-3


class DrawnPicture(Protocol):
  """A map of ids `[H, W]`, 0 for none, and its segments: `mask2former_inference.Segment`."""

  @property
  def map(self) -> np.ndarray: ...

  @property
  def segments(self) -> Sequence[Any]: ...


class _Panel(NamedTuple):
  title: str
  picture: DrawnPicture | None


def plot_panoptic(
  photos: Sequence[np.ndarray],
  predicted: Sequence[DrawnPicture],
  names: Sequence[str],
  palette: np.ndarray,
  png: Any,
  truths: Sequence[DrawnPicture] | None = None,
) -> None:
  """Draws photos, the segments found in them, and where there are some the true ones.

  Segments have the colour of their class, things of one class different shades of it.

  Args:
    photos: each `[H, W, 3]`, uint8, or float in [0, 1].
    predicted: of each.
    names: of the classes.
    palette: uint8 `[classes, 3]`.
    png: the file to write.
    truths: of each.

  Raises:
    ValueError: no photo, unequal numbers or sizes, or a class without name or colour.
  """
  if not len(photos) or len(predicted) != len(photos):
    raise ValueError(
      f"{len(photos)} photos and {len(predicted)} predictions; one each was expected"
    )
  if truths is not None and len(truths) != len(photos):
    raise ValueError(f"{len(photos)} photos and {len(truths)} truths; one each was expected")
  if len(names) != len(palette):
    raise ValueError(f"{len(names)} names of classes and {len(palette)} colours")
  columns = 2 if truths is None else 3
  heights = [_PANEL_WIDTH * photo.shape[0] / photo.shape[1] + 0.3 for photo in photos]
  with plain_text():
    figure = Figure(
      figsize=(_PANEL_WIDTH * columns + 0.1, sum(heights)), dpi=_DPI, layout="constrained"
    )
    grid = figure.add_gridspec(len(photos), columns, height_ratios=heights)
    for row, photo in enumerate(photos):
      panels = [_Panel("Photo", None), _Panel("Prediction", predicted[row])]
      if truths is not None:
        panels.append(_Panel("Truth", truths[row]))
      for column, panel in enumerate(panels):
        axes = figure.add_subplot(grid[row, column])
        _draw(axes, photo, panel, names, palette)
    save_figure(figure, png)


def overlay_segments(photo: np.ndarray, picture: DrawnPicture, palette: np.ndarray) -> np.ndarray:
  """The photo under its segments in colours, uint8 `[H, W, 3]`; without a segment as it is.

  Args:
    photo: `[H, W, 3]`, uint8, or float in [0, 1].
    picture: its segments.
    palette: uint8 `[classes, 3]`.
  """
  masks = np.array([picture.map == s.id for s in picture.segments], np.uint8)
  masks = masks.reshape(-1, *photo.shape[:2])
  colors = segment_shades(picture.segments, palette)
  return overlay_masks(photo, masks, np.arange(len(masks)), colors)


def segment_shades(segments: Collection[Any], palette: np.ndarray) -> np.ndarray:
  """A colour of each segment: its class's, of further things lighter or darker ones."""
  colors, seen = [], dict[int, int]()
  for segment in segments:
    turn = seen[segment.category] = seen.get(segment.category, -1) + 1
    color = np.asarray(palette[segment.category], np.float64)
    if turn and segment.is_thing:
      toward = 255.0 if turn % 2 else 0.0
      color = color + (toward - color) * min(0.2 + 0.1 * turn, 0.6)
    colors.append(color)
  return np.round(np.array(colors).reshape(-1, 3)).astype(np.uint8)


def _draw(
  axes: Axes, photo: np.ndarray, panel: _Panel, names: Sequence[str], palette: np.ndarray
) -> None:
  image, title, picture = displayable(photo), panel.title, panel.picture
  if picture is not None:
    if picture.map.shape != photo.shape[:2]:
      raise ValueError(
        f"the photo is {photo.shape[0]} x {photo.shape[1]} and the map of the {title.lower()} "
        f"{picture.map.shape[0]} x {picture.map.shape[1]}; one size was expected"
      )
    for segment in picture.segments:
      if not 0 <= segment.category < len(names):
        raise ValueError(f"class {segment.category} has no name; 0 to {len(names) - 1} have")
    image = overlay_segments(photo, picture, palette)
    count = len(picture.segments)
    title = f"{title}: {count} segment{'s' * (count != 1)}"
  small = max(image.shape[:2]) < _PANEL_WIDTH * _DPI
  axes.imshow(image, interpolation="nearest" if small else "antialiased")
  axes.set_xticks([])
  axes.set_yticks([])
  axes.set_title(title, fontsize=9, pad=4)
  for segment in picture.segments if picture is not None else ():
    inside = picture.map == segment.id  # type: ignore[union-attr]
    if inside.mean() < _NAMED:
      continue
    x, y = _innermost(inside)
    axes.text(
      x,
      y,
      one_line(names[segment.category], _NAME_LETTERS),
      fontsize=_FONT,
      color="white",
      horizontalalignment="center",
      verticalalignment="center",
      clip_on=True,
      bbox=dict(facecolor="black", edgecolor="none", pad=0.8, alpha=0.6),  # noqa: C408
    )


def _innermost(inside: np.ndarray) -> tuple[int, int]:
  """(x, y) of the pixel that is farthest from the border of a mask."""
  padded = np.pad(inside.astype(np.uint8), 1)
  distance = cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1]
  y, x = np.unravel_index(int(np.argmax(distance)), distance.shape)
  return int(x), int(y)
