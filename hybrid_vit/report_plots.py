"""Pictures of a report: the confusion matrix and the reliability diagram, as bytes of a PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from hybrid_vit.measuring import Calibration
from hybrid_vit.plots import one_line, plain_text

# With more classes than this their names are too small to read, and are left out.
_NAMED = 60
# With no more than this the numbers are written into the cells.
_WRITTEN = 20


def draw_confusion(confusion: np.ndarray, names: Sequence[str]) -> bytes:
  """Rows are true classes, each as parts of its own pictures; columns predicted ones."""
  classes = len(names)
  share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
  side = float(np.clip(1.6 + 0.34 * classes, 4.5, 16.0))
  with plain_text():
    figure = Figure(figsize=(side + 1.2, side), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if classes <= _NAMED:
      short = [one_line(name, 22) for name in names]
      axes.set_xticks(range(classes), short, rotation=90, fontsize=7)
      axes.set_yticks(range(classes), short, fontsize=7)
    if classes <= _WRITTEN:
      for (row, column), count in np.ndenumerate(confusion):
        if count:
          colour = "white" if share[row, column] > 0.5 else "#222222"
          text = f"{count}"
          axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.7)
    bar.set_label("part of the true class")
    return _png(figure)


def draw_reliability(found: Calibration) -> bytes:
  """Accuracy over confidence, bin by bin, above the numbers of pictures."""
  left, width = found.edges[:-1], np.diff(found.edges)
  with plain_text():
    figure = Figure(figsize=(4.8, 5.0), dpi=110, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    accuracy = np.nan_to_num(found.accuracy)
    style = dict(align="edge", color="#9ecae1", edgecolor="#0b63b0", linewidth=0.8)  # noqa: C408
    top.bar(left, accuracy, width, **style, label="accuracy")
    top.plot(found.confidence, found.accuracy, "o", color="#d2541b", ms=4, label="mean confidence")
    top.plot((0, 1), (0, 1), "--", color="#666666", linewidth=1, label="as it should be")
    top.set_ylabel("accuracy")
    top.set_ylim(0, 1)
    top.legend(fontsize=8, frameon=False, loc="upper left")
    top.set_title(f"ECE {found.ece:.4f} in {len(found.count)} equally wide bins", fontsize=10)
    bottom.bar(left, found.count, width, **style)
    bottom.set_ylabel("pictures")
    bottom.set_xlabel("confidence")
    bottom.set_xlim(0, 1)
    return _png(figure)


def _png(figure: Figure) -> bytes:
  content = io.BytesIO()
  figure.savefig(content, format="png", metadata={"Software": None})
  return content.getvalue()
