"""Detected objects drawn over their photos: boxes, masks, names and scores, beside the truth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hybrid_vit.data.lazy_masks import as_lazy
from hybrid_vit.plots import displayable, one_line, plain_text, save_figure

_PANEL_WIDTH, _DPI = 5.2, 120
_OPACITY = 0.5
_NAME_LETTERS, _FONT = 20, 6.5
# Of a letter over the size of the font, and of a line.
_LETTER, _LINE = 0.6, 1.5
_MOST = 60


class Shown(NamedTuple):
  """Objects of one photo.

  Attributes:
    boxes: `[N, 4]`, (x0, y0, x1, y1) in pixels of the photo.
    labels: whole numbers `[N]`, each a class.
    scores: `[N]`; None for true objects.
    masks: `[N, H, W]` of the photo, a mask where it is not 0, also lazy; None for none.
    crowd: bool `[N]`; None for none.
  """

  boxes: np.ndarray
  labels: np.ndarray
  scores: np.ndarray | None = None
  masks: Any = None
  crowd: np.ndarray | None = None


def plot_detections(
  photos: Sequence[np.ndarray],
  predicted: Sequence[Shown],
  names: Sequence[str],
  palette: np.ndarray,
  png: Any,
  truths: Sequence[Shown] | None = None,
  min_score: float = 0.3,
) -> None:
  """Draws photos with what was detected in them, and beside it what there is.

  Of each photo at most 60 objects are drawn, those of the highest scores, or the largest.

  Args:
    photos: each `[H, W, 3]`, uint8, or float in [0, 1].
    predicted: of each.
    names: of the classes.
    palette: uint8 `[classes, 3]`.
    png: the file to write.
    truths: of each.
    min_score: detections below it are not drawn.

  Raises:
    ValueError: no photo, unequal numbers, another size of masks, or a class without name or colour.
  """
  if not len(photos) or len(predicted) != len(photos):
    raise ValueError(
      f"{len(photos)} photos and {len(predicted)} predictions; one each was expected"
    )
  if len(names) != len(palette):
    raise ValueError(f"{len(names)} names of classes and {len(palette)} colours")
  if truths is not None and len(truths) != len(photos):
    raise ValueError(f"{len(photos)} photos and {len(truths)} truths; one each was expected")
  columns = 1 if truths is None else 2
  heights = [_PANEL_WIDTH * photo.shape[0] / photo.shape[1] + 0.35 for photo in photos]
  with plain_text():
    figure = Figure(
      figsize=(_PANEL_WIDTH * columns + 0.1, sum(heights)), dpi=_DPI, layout="constrained"
    )
    grid = figure.add_gridspec(len(photos), columns, height_ratios=heights)
    for row, photo in enumerate(photos):
      panels = {"Prediction": predicted[row]}
      if truths is not None:
        panels["Truth"] = truths[row]
      for column, (title, shown) in enumerate(panels.items()):
        _check(photo, shown, len(names), title)
        axes = figure.add_subplot(grid[row, column])
        drawn = _chosen(shown, min_score)
        said = _said(title, shown, len(drawn), min_score)
        _draw(axes, photo, _rows(shown, drawn), names, palette, said)
    save_figure(figure, png)


def overlay_masks(
  photo: np.ndarray, masks: Any, labels: np.ndarray, palette: np.ndarray
) -> np.ndarray:
  """The photo with masks in their class's colour and an outline each, uint8 `[H, W, 3]`.

  Args:
    photo: `[H, W, 3]`, uint8, or float in [0, 1].
    masks: `[N, H, W]`, also lazy; the larger ones lie below.
    labels: whole numbers `[N]`.
    palette: uint8 `[classes, 3]`.
  """
  shown = displayable(photo)
  out = shown.astype(np.float32) if shown.dtype == np.uint8 else np.float32(255) * shown
  out = out.copy()
  lazy = as_lazy(masks)
  bitmaps = [lazy.part(i, 0, 0, *lazy.shape[1:]) for i in range(len(lazy))]
  for i in sorted(range(len(bitmaps)), key=lambda i: -int(bitmaps[i].sum())):
    inside = bitmaps[i] > 0
    color = np.asarray(palette[labels[i]], np.float32)
    out[inside] += _OPACITY * (color - out[inside])
    edge = inside & (cv2.erode(bitmaps[i], np.ones((3, 3), np.uint8), borderValue=1) == 0)
    out[edge] = color
  return np.round(out).astype(np.uint8)


def _chosen(shown: Shown, min_score: float) -> np.ndarray:
  """The rows that are drawn, those on top last."""
  boxes = np.asarray(shown.boxes, np.float64).reshape(-1, 4)
  areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
  value = areas if shown.scores is None else np.asarray(shown.scores, np.float64)
  rows = np.argsort(-value, kind="stable")[:_MOST]
  if shown.scores is not None:
    rows = rows[value[rows] >= min_score]
  return rows[np.argsort(-areas[rows], kind="stable")]


def _rows(shown: Shown, rows: np.ndarray) -> Shown:
  return Shown(
    np.asarray(shown.boxes, np.float64).reshape(-1, 4)[rows],
    np.asarray(shown.labels)[rows],
    None if shown.scores is None else np.asarray(shown.scores)[rows],
    None if shown.masks is None else as_lazy(shown.masks)[rows],
    None if shown.crowd is None else np.asarray(shown.crowd)[rows],
  )


def _said(title: str, shown: Shown, drawn: int, min_score: float) -> str:
  count = len(shown.labels)
  if shown.scores is None:
    more = "" if drawn == count else f", {drawn} drawn"
    return f"{title}: {count} object{'s' * (count != 1)}{more}"
  above = int((np.asarray(shown.scores) >= min_score).sum())
  more = "" if drawn == above else f", {drawn} drawn"
  return f"{title}: {above} of {count} with a score from {min_score:g}{more}"


def _draw(
  axes: Axes,
  photo: np.ndarray,
  shown: Shown,
  names: Sequence[str],
  palette: np.ndarray,
  title: str,
) -> None:
  image = displayable(photo)
  if shown.masks is not None:
    image = overlay_masks(photo, shown.masks, shown.labels, palette)
  height, width = image.shape[:2]
  small = width < _PANEL_WIDTH * _DPI
  # The edges of the first pixel and of the last are 0 and the side, as those of boxes.
  axes.imshow(
    image, extent=(0, width, height, 0), interpolation="nearest" if small else "antialiased"
  )
  axes.set_xticks([])
  axes.set_yticks([])
  axes.set_title(title, fontsize=9, pad=4)
  # Points of the font in pixels of the photo.
  unit = width / (_PANEL_WIDTH * 72)
  taken: list[tuple[float, float, float, float]] = []
  for i, box in enumerate(shown.boxes):
    color = np.asarray(palette[shown.labels[i]]) / 255
    crowd = shown.crowd is not None and bool(shown.crowd[i])
    axes.add_patch(
      Rectangle(
        (box[0], box[1]), box[2] - box[0], box[3] - box[1], fill=False, edgecolor=color,
        linewidth=1.2, linestyle="--" if crowd else "-",
      )
    )  # fmt: skip
    text = one_line(names[shown.labels[i]], _NAME_LETTERS)
    text += " (crowd)" if crowd else ""
    text += "" if shown.scores is None else f" {shown.scores[i]:.2f}"
    _write(axes, text, box, color, unit, (height, width), taken)
  axes.set_xlim(0, width)
  axes.set_ylim(height, 0)


def _write(
  axes: Axes,
  text: str,
  box: np.ndarray,
  color: np.ndarray,
  unit: float,
  size: tuple[int, int],
  taken: list[tuple[float, float, float, float]],
) -> None:
  """Names a box where there is room: above it, else within, else below."""
  wide, high = len(text) * _LETTER * _FONT * unit, _LINE * _FONT * unit
  place = min(
    _places(box, wide, high, size), key=lambda place: sum(_overlap(place, t) for t in taken)
  )
  taken.append(place)
  dark = color @ (0.299, 0.587, 0.114) < 0.55
  axes.text(
    place[0] + 0.25 * _FONT * unit,
    (place[1] + place[3]) / 2,
    text,
    fontsize=_FONT,
    color="white" if dark else "black",
    verticalalignment="center",
    clip_on=True,
    bbox=dict(facecolor=color, edgecolor="none", pad=0.8, alpha=0.85),  # noqa: C408
  )


def _places(
  box: np.ndarray, wide: float, high: float, size: tuple[int, int]
) -> Iterator[tuple[float, float, float, float]]:
  left = min(max(box[0], 0.0), max(size[1] - wide, 0.0))
  right = min(max(box[2] - wide, 0.0), max(size[1] - wide, 0.0))
  tops = [box[1] - high, box[1], box[3] - high, box[3]]
  tops = [top for top in tops if 0 <= top <= size[0] - high]
  for top in tops or [min(max(box[1], 0.0), max(size[0] - high, 0.0))]:
    for x in (left, right):
      yield x, top, x + wide, top + high


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
  """The area that two boxes have in common."""
  wide = min(one[2], other[2]) - max(one[0], other[0])
  return max(wide, 0.0) * max(min(one[3], other[3]) - max(one[1], other[1]), 0.0)


def _check(photo: np.ndarray, shown: Shown, classes: int, title: str) -> None:
  count = len(shown.labels)
  for name, value in shown._asdict().items():
    if value is not None and len(value) != count:
      raise ValueError(f"{title.lower()}: {len(value)} {name} and {count} labels")
  labels = np.asarray(shown.labels)
  if (wrong := labels[(labels < 0) | (labels >= classes)]).size:
    raise ValueError(f"label {wrong[0]} has no name; 0 to {classes - 1} have")
  if shown.masks is not None and tuple(shown.masks.shape[1:]) != photo.shape[:2]:
    raise ValueError(
      f"the photo is {photo.shape[0]} x {photo.shape[1]} and the masks of the {title.lower()} are "
      f"{' x '.join(map(str, shown.masks.shape[1:]))}; one size was expected"
    )
