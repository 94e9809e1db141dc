"""Curves of a metrics.jsonl and pictures with their predictions, as PNG files.

Names (of classes, measures, sets) are drawn letter by letter: none of them is a formula.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hybrid_vit.paths import as_path
from hybrid_vit.reporting import RESERVED, read_metrics

_ACCURACY_KEYS = ("top1", "top5", "accuracy")
_COLOURS = ("#0b63b0", "#d2541b", "#3a8f3e", "#7d4fa8", "#946317", "#b8317b")
_RIGHT, _WRONG = "#1d7a2b", "#c01c1c"

# Curves with more points than this are drawn pale, with their running mean on top.
_SMOOTHED_FROM = 60
_MAX_PICTURES_IN_A_ROW = 8
_SHEET_COLUMNS = 4

# Letters of a class's name under its picture, and of a measure's or a set's beside its curve.
_CLASS_LETTERS, _CURVE_LETTERS = 18, 40

# Fonts with Chinese, Japanese and Korean letters, which matplotlib's own has not; looked into after
# that where they are installed.
_MORE_FONTS = (
  "Noto Sans CJK SC",
  "Noto Sans CJK JP",
  "Noto Sans CJK KR",
  "Source Han Sans SC",
  "WenQuanYi Micro Hei",
  "WenQuanYi Zen Hei",
  "Microsoft YaHei",
  "PingFang SC",
  "Hiragino Sans",
  "Malgun Gothic",
  "Arial Unicode MS",
)


def plot_curves(metrics_jsonl: Any, png: Any) -> None:
  """Draws loss, accuracy, learning rate and every other figure of a metrics.jsonl over the steps.

  Training is a line (with its running mean where there are many points), evaluation is marked
  point by point.

  Raises:
    ValueError: the file has no line yet.
  """
  series = _series(read_metrics(metrics_jsonl))
  if not series:
    raise ValueError(f"{metrics_jsonl} holds no metrics to draw")
  panels: dict[str, list[tuple[str, str]]] = {}
  for kind, key in series:
    # How many pictures were evaluated is the same each time.
    if key != "examples":
      panels.setdefault(_panel(key), []).append((kind, key))
  # Loss, accuracy and learning rate first, whatever the order in the file.
  order = ("Loss", "Accuracy", "Learning rate")
  names = sorted(panels, key=lambda name: (order.index(name) if name in order else len(order),))

  columns = 2 if len(names) == 4 else min(3, len(names))
  rows = math.ceil(len(names) / columns)
  with plain_text():
    figure = Figure(figsize=(4.6 * columns, 3.5 * rows), dpi=120, layout="constrained")
    for position, name in enumerate(names):
      axes = figure.add_subplot(rows, columns, position + 1)
      _draw_panel(axes, name, panels[name], series)
    save_figure(figure, png)


def plot_predictions(
  images: np.ndarray,
  true_names: Sequence[str],
  predicted_names: Sequence[str],
  probabilities: Sequence[float],
  png: Any,
) -> None:
  """Draws a grid of pictures under their predictions, green where right and red where wrong.

  Args:
    images: `[N, H, W, 3]`, uint8, or float in [0, 1]; floats beyond it (normalised pictures) are
      stretched to it picture by picture.
    true_names: N class names.
    predicted_names: N class names.
    probabilities: N probabilities of the predicted class.
    png: the file to write.

  Raises:
    ValueError: no picture, another shape, or unequal numbers.
  """
  images = np.asarray(images)
  if images.ndim != 4 or images.shape[-1] != 3 or not len(images):
    raise ValueError(f"images have shape {images.shape}; [N, H, W, 3] with N > 0 was expected")
  lengths = (len(true_names), len(predicted_names), len(probabilities))
  if set(lengths) != {len(images)}:
    raise ValueError(
      f"{len(images)} images, but {lengths[0]} true names, {lengths[1]} predicted names and "
      f"{lengths[2]} probabilities"
    )
  columns = min(_MAX_PICTURES_IN_A_ROW, len(images))
  rows = math.ceil(len(images) / columns)
  height, width = images.shape[1:3]
  cell_width = 1.5
  cell_height = cell_width * min(max(height / width, 0.5), 2.0) + 0.35
  right = sum(true == predicted for true, predicted in zip(true_names, predicted_names))
  with plain_text():
    figure = Figure(
      figsize=(max(cell_width * columns, 3.0), cell_height * rows + 0.35),
      dpi=120,
      layout="constrained",
    )
    for position, image in enumerate(images):
      axes = figure.add_subplot(rows, columns, position + 1)
      # Enlarged pixels stay pixels; large pictures are averaged down.
      small = max(height, width) < cell_width * figure.dpi
      axes.imshow(displayable(image), interpolation="nearest" if small else "antialiased")
      axes.set_xticks([])
      axes.set_yticks([])
      true, predicted = true_names[position], predicted_names[position]
      colour = _RIGHT if true == predicted else _WRONG
      title = f"{one_line(predicted, _CLASS_LETTERS)} ({float(probabilities[position]):.0%})"
      # Two lines in every title, so that all pictures have one size.
      second = f"is {one_line(true, _CLASS_LETTERS)}"
      title = f"\n{title}" if true == predicted else f"{title}\n{second}"
      axes.set_title(title, color=colour, fontsize=8, pad=3)
      for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(1.0 if true == predicted else 2.5)
    figure.suptitle(f"Predictions: {right} of {len(images)} right", fontsize=10)
    save_figure(figure, png)


def plot_rows(rows: Mapping[str, np.ndarray], png: Any) -> None:
  """Draws rows of pictures below one another, e.g. originals and what was made of them.

  Args:
    rows: title → `[N, H, W, 3]`, uint8, or float in [0, 1]; as many pictures in each.
    png: the file to write.

  Raises:
    ValueError: no picture, or unequal numbers.
  """
  counts = {len(images) for images in rows.values()}
  if len(counts) != 1 or counts == {0}:
    raise ValueError(f"rows of {sorted(counts)} pictures; as many in each were expected")
  (columns,) = counts
  with plain_text():
    figure = Figure(figsize=(1.5 * columns, 1.55 * len(rows)), dpi=120, layout="constrained")
    for row, (title, images) in enumerate(rows.items()):
      for column, image in enumerate(images):
        axes = figure.add_subplot(len(rows), columns, row * columns + column + 1)
        small = max(image.shape[:2]) < 1.5 * figure.dpi
        axes.imshow(displayable(image), interpolation="nearest" if small else "antialiased")
        axes.set_xticks([])
        axes.set_yticks([])
        if not column:
          axes.set_ylabel(one_line(title, _CURVE_LETTERS), fontsize=8)
    save_figure(figure, png)


def plot_bars(
  panels: Mapping[str, Mapping[str, Mapping[str, float]]], png: Any, heading: str
) -> None:
  """Bars side by side.

  Args:
    panels: by title: groups by label, of which long lines are broken, and of each its bars by
      name. Names have the same colour everywhere.
    png: file to write.
    heading: over all.
  """
  names = list(dict.fromkeys(n for p in panels.values() for bars in p.values() for n in bars))
  colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
  labels = {
    label: "\n".join(textwrap.fill(printable(line), 44) for line in label.splitlines())
    for groups in panels.values()
    for label in groups
  }
  # In bars: a label of many lines is higher than its own.
  room = {
    title: [
      max(len(bars), 0.55 * (labels[label].count("\n") + 1)) for label, bars in groups.items()
    ]
    for title, groups in panels.items()
  }
  counts = [sum(heights) + len(heights) for heights in room.values()]
  height = 0.28 * sum(counts) + 1.0 * len(panels) + 0.6
  with plain_text():
    figure = Figure(figsize=(9, height), layout="constrained")
    figure.suptitle(heading)
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=counts)[:, 0]
    for axis, (title, groups) in zip(axes, panels.items()):
      begin, ticks = 0.0, []
      for bars, high in zip(groups.values(), room[title]):
        ticks.append(begin + (high - 1) / 2)
        for i, (name, value) in enumerate(bars.items()):
          place = begin + (high - len(bars)) / 2 + i
          axis.barh(place, value, height=0.9, color=colours[name])
          axis.annotate(
            f"{value:,.3g}" if value < 1000 else f"{value:,.0f}", (value, place),
            (3, 0), textcoords="offset points", va="center", fontsize=8,
          )  # fmt: skip
        begin += high + 1.0
      axis.set_yticks(ticks, [labels[label] for label in groups], fontsize=8)
      axis.set_ylim(begin - 1.0, -1.0)
      axis.margins(x=0.12)
      axis.set_title(title, fontsize=10)
    handles = [Patch(color=colours[name], label=printable(name)) for name in names]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, png)


def plot_sheet(images: Sequence[np.ndarray], titles: Sequence[str], heading: str, png: Any) -> None:
  """Draws pictures, each below its title, on one sheet.

  Args:
    images: N of `[H, W, 3]`, uint8.
    titles: N texts.
    heading: of the sheet.
    png: the file to write.

  Raises:
    ValueError: no picture, or unequal numbers.
  """
  if not len(images) or len(images) != len(titles):
    raise ValueError(f"{len(images)} pictures and {len(titles)} titles; as many were expected")
  columns = min(_SHEET_COLUMNS, len(images))
  rows = math.ceil(len(images) / columns)
  with plain_text():
    size = (max(2.0 * columns, 4.0), 2.25 * rows + 0.4)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid:
      axes.axis("off")
    for axes, image, title in zip(grid, images, titles):
      axes.imshow(image)
      axes.set_title(one_line(title, 28), fontsize=8)
    figure.suptitle(one_line(heading, 80), fontsize=11)
    save_figure(figure, png)


def _series(
  lines: Iterable[Mapping[str, Any]],
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
  """(kind, key) → steps and values, in the order in which they first appear."""
  points: dict[tuple[str, str], list[tuple[int, float]]] = {}
  for line in lines:
    for key, value in line.items():
      if key not in RESERVED:
        points.setdefault((line["kind"], key), []).append((line["step"], float(value)))
  return {
    name: (np.array([s for s, _ in pairs]), np.array([v for _, v in pairs]))
    for name, pairs in points.items()
  }


def _panel(key: str) -> str:
  if key in _ACCURACY_KEYS:
    return "Accuracy"
  return one_line(key.replace("_", " ").capitalize(), _CURVE_LETTERS)


def _draw_panel(
  axes: Axes,
  name: str,
  members: Sequence[tuple[str, str]],
  series: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]],
) -> None:
  several_keys = len({key for _, key in members}) > 1
  kinds = list(dict.fromkeys(kind for kind, _ in members))
  title = name
  for kind, key in members:
    steps, values = series[kind, key]
    # The train curve has the same colour in each panel.
    colour = _COLOURS[0] if kind == "train" else _COLOURS[1 + kinds.index(kind) % 5]
    style = "--" if key == "top5" else "-"
    of = one_line(kind.removeprefix("eval/"), _CURVE_LETTERS)
    # A label that begins with "_" would be left out of the legend.
    label = ("\N{ZERO WIDTH SPACE}" if of.startswith("_") else "") + of
    label += f" {_key_label(key)}" if several_keys else ""
    if kind != "train":
      axes.plot(
        steps, values, style, color=colour, marker="o", markersize=4, linewidth=1.2, label=label
      )
      if key == "top1" and title == name:
        title = f"Accuracy ({of} top-1 {values[-1]:.2%} at the end)"
    elif len(values) >= _SMOOTHED_FROM and name != "Learning rate":
      axes.plot(steps, values, style, color=colour, alpha=0.25, linewidth=0.8)
      axes.plot(
        steps, _running_mean(values), style, color=colour, linewidth=1.6, label=f"{label} (mean)"
      )
    else:
      axes.plot(steps, values, style, color=colour, linewidth=1.4, label=label)
  axes.set_title(title, fontsize=10)
  axes.set_xlabel("step")
  axes.set_ylabel(name.lower())
  axes.grid(True, color="#dddddd", linewidth=0.6)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  if name == "Accuracy":
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
  elif name == "Learning rate":
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
  if len(members) > 1:
    axes.legend(fontsize=8, frameon=False)


def _key_label(key: str) -> str:
  return {"top1": "top-1", "top5": "top-5"}.get(key, key)


def _running_mean(values: np.ndarray) -> np.ndarray:
  """Centred mean over about a thirtieth of the points; non-finite ones are left out."""
  window = max(len(values) // 30, 3) | 1
  finite = np.isfinite(values)
  kernel = np.ones(window)
  total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
  count = np.convolve(finite.astype(float), kernel, mode="same")
  return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def displayable(image: np.ndarray) -> np.ndarray:
  """uint8 as it is; floats beyond [0, 1] stretched to it."""
  if image.dtype == np.uint8:
    return image
  image = np.asarray(image, np.float32)
  low, high = float(image.min()), float(image.max())
  if low < 0.0 or high > 1.0:
    image = (image - low) / max(high - low, 1e-6)
  return image


def printable(text: object) -> str:
  """On one line, and without what no terminal or font shows: parts of letters, control codes."""
  line = " ".join(str(text).split())
  return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def one_line(name: str, letters: int) -> str:
  """A name on one line, in so many letters at most, all of which can be drawn."""
  line = printable(name)
  return line if len(line) <= letters else line[: letters - 1].rstrip() + "…"


@contextlib.contextmanager
def plain_text() -> Iterator[None]:
  """Within it text is drawn as it stands, without formulas, and with whatever fonts have it."""
  installed = {font.name for font in font_manager.fontManager.ttflist}
  fonts = ["DejaVu Sans", *(name for name in _MORE_FONTS if name in installed)]
  settings: Any = {"text.parse_math": False, "text.usetex": False, "font.family": fonts}
  with matplotlib.rc_context(settings), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    yield
  lost = [w for w in caught if "missing from" in str(w.message)]
  for warning in caught:
    if warning not in lost:
      warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
  if lost:
    logging.warning(
      "some names have letters of which no font is installed here: they are drawn as boxes "
      "(install e.g. Noto Sans CJK)"
    )


def save_figure(figure: Figure, png: Any) -> None:
  path = as_path(png)
  path.parent.mkdir(parents=True, exist_ok=True)
  content = io.BytesIO()
  # Without matplotlib's version in it, the file depends on what it shows only.
  figure.savefig(content, format="png", metadata={"Software": None})
  path.write_bytes(content.getvalue())
