"""Predicted maps and depth as files, and drawn over their photos with a legend or a scale."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from hybrid_vit.data.map_reading import IGNORE
from hybrid_vit.paths import as_path
from hybrid_vit.plots import displayable, one_line, plain_text, save_figure

# Where a map has no class, and where depth was not measured.
_NONE = (128, 128, 128)
_WRONG, _RIGHT = (192, 28, 28), (214, 230, 214)
# How much of the class's colour an overlay has.
_OPACITY = 0.6
_LEGEND_CLASSES, _CLASS_LETTERS = 20, 24
_PANEL_WIDTH = 3.4


def save_map(labels: np.ndarray, palette: np.ndarray, png: Any) -> None:
  """Writes a map of classes as a palette PNG: its numbers are the classes, its colours the palette.

  Args:
    labels: whole numbers `[H, W]`, each a class or 255 for none.
    palette: uint8 `[classes, 3]`.
    png: the file to write.

  Raises:
    ValueError: a label without a colour, or more than 255 classes.
  """
  _check_labels(labels, len(palette))
  picture = Image.fromarray(np.asarray(labels, np.uint8))
  colors = np.zeros((256, 3), np.uint8)
  colors[: len(palette)] = palette
  picture.putpalette(colors.reshape(-1).tolist())
  _save(picture, png)


def save_depth(depth: np.ndarray, png: Any, scale: float = 1000.0) -> None:
  """Writes depth as a PNG of 16 bits, as NYU Depth v2 and KITTI have it.

  Args:
    depth: metres, float `[H, W]`; 0 for none.
    png: the file to write.
    scale: units of the file in one metre: 1000 for millimetres, 256 of KITTI.

  Raises:
    ValueError: depth that 16 bits cannot hold, or that is no number.
  """
  units = np.round(np.asarray(depth, np.float64) * scale)
  if not ((units >= 0) & (units <= 65535)).all():
    raise ValueError(
      f"depth from {np.min(depth):g} to {np.max(depth):g} m; 0 to {65535 / scale:g} m fit into 16 "
      f"bits at {scale:g} units a metre"
    )
  _save(Image.fromarray(units.astype(np.uint16)), png)


def plot_segmentation(
  photo: np.ndarray,
  predicted: np.ndarray,
  names: Sequence[str],
  palette: np.ndarray,
  png: Any,
  truth: np.ndarray | None = None,
) -> None:
  """`plot_segmentations` of one photo."""
  truths = None if truth is None else [truth]
  plot_segmentations([photo], [predicted], names, palette, png, truths=truths)


def plot_segmentations(
  photos: Sequence[np.ndarray],
  predicted: Sequence[np.ndarray],
  names: Sequence[str],
  palette: np.ndarray,
  png: Any,
  truths: Sequence[np.ndarray] | None = None,
) -> None:
  """Draws photos, their classes over them, truths where there are some, with errors; one legend.

  Args:
    photos: each `[H, W, 3]`, uint8, or float in [0, 1].
    predicted: whole numbers `[H, W]` of each, a class or 255 for none.
    names: of the classes.
    palette: uint8 `[classes, 3]`.
    png: the file to write.
    truths: like `predicted`; pixels of 255 are grey among the errors.

  Raises:
    ValueError: unequal sizes, or a class without a name or colour.
  """
  if len(names) != len(palette):
    raise ValueError(f"{len(names)} names of classes and {len(palette)} colours")
  rows, areas = [], np.zeros(IGNORE + 1, np.int64)
  for i, photo in enumerate(photos):
    maps = {"Prediction": np.asarray(predicted[i])}
    if truths is not None:
      maps["Truth"] = np.asarray(truths[i])
    panels = {"Photo": displayable(photo)}
    for title, labels in maps.items():
      _check_size(photo, labels, title)
      _check_labels(labels, len(palette))
      panels[title] = overlay(photo, labels, palette)
      areas += np.bincount(labels.ravel(), minlength=IGNORE + 1)
    if "Truth" in maps:
      title, panel = _errors(maps["Prediction"], maps["Truth"])
      panels[title] = panel
    rows.append(panels)
  order = [int(c) for c in np.argsort(-areas, kind="stable") if areas[c] and c != IGNORE]
  handles = [
    Patch(color=palette[c] / 255, label=one_line(names[c], _CLASS_LETTERS))
    for c in order[:_LEGEND_CLASSES]
  ]
  if len(order) > _LEGEND_CLASSES:
    handles.append(Patch(alpha=0, label=f"and {len(order) - _LEGEND_CLASSES} more"))
  columns = len(rows[0])
  heights = [_PANEL_WIDTH * photo.shape[0] / photo.shape[1] + 0.4 for photo in photos]
  size = _PANEL_WIDTH * columns + 1.8, max(sum(heights), 0.19 * len(handles) + 0.3)
  with plain_text():
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
    for row, panels in enumerate(rows):
      for column, (title, image) in enumerate(panels.items()):
        _draw(figure, grid[row, column], title, image)
    figure.legend(handles=handles, loc="outside right center", fontsize=7.5, frameon=False)
    save_figure(figure, png)


def _errors(predicted: np.ndarray, truth: np.ndarray) -> tuple[str, np.ndarray]:
  """Title and picture of where the two differ."""
  counts = truth != IGNORE
  wrong = counts & (predicted != truth)
  colors = np.where(wrong[..., None], _WRONG, _RIGHT)
  picture = np.where(counts[..., None], colors, _NONE).astype(np.uint8)
  return f"Wrong: {wrong.sum() / max(counts.sum(), 1):.1%}", picture


def overlay(photo: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
  """The photo under the colours of its classes, uint8 `[H, W, 3]`; no class leaves it grey.

  Args:
    photo: `[H, W, 3]`, uint8, or float in [0, 1].
    labels: whole numbers `[H, W]`, each a class or 255 for none.
    palette: uint8 `[classes, 3]`.
  """
  shown = displayable(photo)
  below = shown.astype(np.float64) if shown.dtype == np.uint8 else shown * 255.0
  grey = np.broadcast_to(below.mean(-1, keepdims=True), below.shape)
  none = (labels == IGNORE)[..., None]
  colors = np.asarray(palette, np.float64)[np.where(none[..., 0], 0, labels)]
  mixed = (1 - _OPACITY) * grey + _OPACITY * np.where(none, _NONE, colors)
  return np.round(mixed).astype(np.uint8)


def plot_depth(
  photo: np.ndarray, predicted: np.ndarray, png: Any, truth: np.ndarray | None = None
) -> None:
  """`plot_depths` of one photo."""
  plot_depths([photo], [predicted], png, truths=None if truth is None else [truth])


def plot_depths(
  photos: Sequence[np.ndarray],
  predicted: Sequence[np.ndarray],
  png: Any,
  truths: Sequence[np.ndarray] | None = None,
) -> None:
  """Draws photos and their depth with a scale, and where there are truths, these and the errors.

  Args:
    photos: each `[H, W, 3]`, uint8, or float in [0, 1].
    predicted: metres, float `[H, W]` of each.
    png: the file to write.
    truths: metres, float `[H, W]` of each; 0, "not measured", is grey.

  Raises:
    ValueError: unequal sizes.
  """
  heights = [_PANEL_WIDTH * photo.shape[0] / photo.shape[1] + 1.0 for photo in photos]
  columns = 2 if truths is None else 4
  with plain_text():
    figure = Figure(
      figsize=(_PANEL_WIDTH * columns + 0.5, sum(heights)), dpi=120, layout="constrained"
    )
    grid = figure.add_gridspec(len(photos), columns, height_ratios=heights)
    for row, photo in enumerate(photos):
      axes, shown_image = _draw(figure, grid[row, 0], "Photo", displayable(photo))
      # A scale that is not seen, so that the photo has the size of the others.
      _scale(figure, axes, shown_image).ax.set_visible(False)
      panels = _depth_panels(photo, predicted[row], None if truths is None else truths[row])
      for column, (title, values, name, vmin, vmax) in enumerate(panels, 1):
        axes, shown_image = _draw(
          figure,
          grid[row, column],
          title,
          np.ma.masked_invalid(values),
          _colors(name),
          vmin,
          vmax,
        )
        _scale(figure, axes, shown_image)
    save_figure(figure, png)


def _depth_panels(
  photo: np.ndarray, predicted: np.ndarray, truth: np.ndarray | None
) -> list[tuple[str, np.ndarray, str, float, float]]:
  """Title, values, colours and their range of what is drawn beside a photo."""
  shown = {"Prediction": np.asarray(predicted, np.float64)}
  if truth is not None:
    shown["Truth"] = np.where(truth > 0, truth, np.nan)
  for title, values in shown.items():
    _check_size(photo, values, title)
  # One scale for the two, so that colours can be compared.
  finite = np.concatenate([v[np.isfinite(v)] for v in shown.values()])
  low, high = np.percentile(finite, (1, 99)) if finite.size else (0.0, 1.0)
  drawn: list[tuple[str, np.ndarray, str, float, float]] = [
    (title, values, "viridis_r", low, high) for title, values in shown.items()
  ]
  if truth is not None:
    error = np.abs(shown["Prediction"] - shown["Truth"])
    measured = error[np.isfinite(error)]
    rmse = np.sqrt(np.mean(measured**2)) if measured.size else np.nan
    most = np.percentile(measured, 99) if measured.size else 1.0
    drawn.append((f"Error: RMSE {rmse:.3g} m", error, "magma", 0.0, max(most, 1e-6)))
  return drawn


def _scale(figure: Figure, axes: Any, shown: Any) -> Any:
  bar = figure.colorbar(shown, ax=axes, location="bottom", shrink=0.8, pad=0.03)
  bar.ax.tick_params(labelsize=7)
  bar.set_label("m", fontsize=8)
  return bar


def _colors(name: str) -> Colormap:
  red, green, blue = (value / 255 for value in _NONE)
  return matplotlib.colormaps[name].with_extremes(bad=(red, green, blue))


def _draw(
  figure: Figure,
  place: Any,
  title: str,
  image: np.ndarray,
  cmap: Colormap | None = None,
  vmin: float | None = None,
  vmax: float | None = None,
) -> tuple[Any, Any]:
  axes = figure.add_subplot(place)
  small = max(image.shape[:2]) < _PANEL_WIDTH * figure.dpi
  shown = axes.imshow(
    image, cmap=cmap, vmin=vmin, vmax=vmax, interpolation="nearest" if small else "antialiased"
  )
  axes.set_xticks([])
  axes.set_yticks([])
  axes.set_title(title, fontsize=9, pad=4)
  return axes, shown


def _check_labels(labels: np.ndarray, classes: int) -> None:
  if classes > IGNORE:
    raise ValueError(f"{classes} classes; at most {IGNORE} were expected, {IGNORE} being none")
  wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORE)]
  if wrong.size:
    raise ValueError(f"label {wrong[0]} has no colour; 0 to {classes - 1} have, {IGNORE} is none")


def _check_size(photo: np.ndarray, values: np.ndarray, title: str) -> None:
  if photo.shape[:2] != values.shape:
    raise ValueError(
      f"the photo is {photo.shape[0]} x {photo.shape[1]} and the {title.lower()} has shape "
      f"{list(values.shape)}; one size was expected"
    )


def _save(picture: Image.Image, png: Any) -> None:
  path = as_path(png)
  path.parent.mkdir(parents=True, exist_ok=True)
  content = io.BytesIO()
  picture.save(content, "PNG")
  path.write_bytes(content.getvalue())
