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

from hybrid_vit.paths import as_path
from hybrid_vit.plots import displayable, one_line, plain_text, save_figure

_IGNORE = 255
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
  """Draws a photo, its classes over it with a legend, and a truth where there is one, with errors.

  Args:
    photo: `[H, W, 3]`, uint8, or float in [0, 1].
    predicted: whole numbers `[H, W]`, each a class or 255 for none.
    names: of the classes.
    palette: uint8 `[classes, 3]`.
    png: the file to write.
    truth: like `predicted`; pixels of 255 are grey among the errors.

  Raises:
    ValueError: unequal sizes, or a class without a name or colour.
  """
  if len(names) != len(palette):
    raise ValueError(f"{len(names)} names of classes and {len(palette)} colours")
  maps = {"Prediction": predicted} if truth is None else {"Prediction": predicted, "Truth": truth}
  panels = {"Photo": displayable(photo)}
  for title, labels in maps.items():
    _check_size(photo, labels, title)
    _check_labels(labels, len(palette))
    panels[title] = overlay(photo, labels, palette)
  if truth is not None:
    counts = truth != _IGNORE
    wrong = counts & (predicted != truth)
    errors = np.where(wrong[..., None], _WRONG, _RIGHT)
    panels[f"Wrong: {wrong.sum() / max(counts.sum(), 1):.1%}"] = np.where(
      counts[..., None], errors, _NONE
    ).astype(np.uint8)
  found, areas = np.unique(np.concatenate([m.ravel() for m in maps.values()]), return_counts=True)
  order = [int(found[i]) for i in np.argsort(-areas, kind="stable") if found[i] != _IGNORE]
  handles = [
    Patch(color=palette[c] / 255, label=one_line(names[c], _CLASS_LETTERS))
    for c in order[:_LEGEND_CLASSES]
  ]
  if len(order) > _LEGEND_CLASSES:
    handles.append(Patch(alpha=0, label=f"and {len(order) - _LEGEND_CLASSES} more"))
  panel = _PANEL_WIDTH * photo.shape[0] / photo.shape[1]
  size = _PANEL_WIDTH * len(panels) + 1.8, max(panel + 0.4, 0.19 * len(handles) + 0.3)
  with plain_text():
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    for position, (title, image) in enumerate(panels.items()):
      _draw(figure, len(panels), position, title, image)
    figure.legend(handles=handles, loc="outside right center", fontsize=7.5, frameon=False)
    save_figure(figure, png)


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
  none = (labels == _IGNORE)[..., None]
  colors = np.asarray(palette, np.float64)[np.where(none[..., 0], 0, labels)]
  mixed = (1 - _OPACITY) * grey + _OPACITY * np.where(none, _NONE, colors)
  return np.round(mixed).astype(np.uint8)


def plot_depth(
  photo: np.ndarray, predicted: np.ndarray, png: Any, truth: np.ndarray | None = None
) -> None:
  """Draws a photo and its depth with a scale, and where there is a truth, it and the error.

  Args:
    photo: `[H, W, 3]`, uint8, or float in [0, 1].
    predicted: metres, float `[H, W]`.
    png: the file to write.
    truth: metres, float `[H, W]`; 0, "not measured", is grey.

  Raises:
    ValueError: unequal sizes.
  """
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
  height, width = photo.shape[:2]
  columns = len(drawn) + 1
  with plain_text():
    figure = Figure(
      figsize=(_PANEL_WIDTH * columns + 0.5, _PANEL_WIDTH * height / width + 0.85),
      dpi=120,
      layout="constrained",
    )
    axes, shown_image = _draw(figure, columns, 0, "Photo", displayable(photo))
    # A scale that is not seen, so that the photo has the size of the others.
    _scale(figure, axes, shown_image).ax.set_visible(False)
    for position, (title, values, name, vmin, vmax) in enumerate(drawn, 1):
      axes, shown_image = _draw(
        figure, columns, position, title, np.ma.masked_invalid(values), _colors(name), vmin, vmax
      )
      _scale(figure, axes, shown_image)
    save_figure(figure, png)


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
  columns: int,
  position: int,
  title: str,
  image: np.ndarray,
  cmap: Colormap | None = None,
  vmin: float | None = None,
  vmax: float | None = None,
) -> tuple[Any, Any]:
  axes = figure.add_subplot(1, columns, position + 1)
  small = max(image.shape[:2]) < _PANEL_WIDTH * figure.dpi
  shown = axes.imshow(
    image, cmap=cmap, vmin=vmin, vmax=vmax, interpolation="nearest" if small else "antialiased"
  )
  axes.set_xticks([])
  axes.set_yticks([])
  axes.set_title(title, fontsize=9, pad=4)
  return axes, shown


def _check_labels(labels: np.ndarray, classes: int) -> None:
  if classes > _IGNORE:
    raise ValueError(f"{classes} classes; at most {_IGNORE} were expected, {_IGNORE} being none")
  wrong = labels[((labels < 0) | (labels >= classes)) & (labels != _IGNORE)]
  if wrong.size:
    raise ValueError(f"label {wrong[0]} has no colour; 0 to {classes - 1} have, {_IGNORE} is none")


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
