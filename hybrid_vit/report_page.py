"""One HTML file that holds everything of a report: no script, nothing from elsewhere.

Every name (of classes, files, weights) is escaped; pictures are embedded.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; } td, th { padding: .2em .7em; text-align: right;
        border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; overflow-wrap: anywhere; }
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr));
            gap: 1.1em; }
figure { margin: 0; } figure img { width: 100%; image-rendering: auto; }
figcaption { font-size: .85em; overflow-wrap: anywhere; } .file { color: #666; }
.wrong { color: #c01c1c; } .wide { max-width: 100%; } .scroll { overflow: auto; max-height: 40em; }
"""


@dataclasses.dataclass(frozen=True)
class Shown:
  """A picture with what is said of it.

  Attributes:
    image: uint8 `[H, W, 3]`.
    title: in red.
    text: below it.
    name: of its file.
  """

  image: np.ndarray
  title: str
  text: str
  name: str


@dataclasses.dataclass(frozen=True)
class Mistake:
  """A picture that was taken for something else.

  Attributes:
    image: as the network saw it, uint8 `[H, W, 3]`.
    name: of its file.
    true: name of its class.
    predicted: name of the class it was taken for.
    confidence: probability of that.
    own: probability of its own class.
  """

  image: np.ndarray
  name: str
  true: str
  predicted: str
  confidence: float
  own: float


def page(
  title: str,
  facts: Mapping[str, str],
  *,
  confusion_png: bytes,
  reliability_png: bytes,
  class_rows: Sequence[tuple[str, int, float, float, float]],
  confused: Sequence[tuple[str, str, int]],
  mistakes: Sequence[Mistake],
  notes: Sequence[str] = (),
) -> str:
  """The whole page.

  Args:
    title: of it.
    facts: name → value, the table at its head.
    confusion_png: see `report_plots`.
    reliability_png: see there.
    class_rows: (name, pictures, precision, recall, F1) of each class.
    confused: (true, predicted, pictures), the commonest first.
    mistakes: the worst first.
    notes: sentences below the head.
  """
  text = html.escape
  classes = "".join(
    f"<tr><td>{text(name)}</td><td>{count}</td>"
    + "".join(f"<td>{_percent(value)}</td>" for value in figures)
    + "</tr>"
    for name, count, *figures in class_rows
  )
  pairs = "".join(
    f"<tr><td>{text(true)}</td><td>{text(predicted)}</td><td>{count}</td></tr>"
    for true, predicted, count in confused
  )
  shown = [
    Shown(
      mistake.image,
      f"{mistake.predicted} ({mistake.confidence:.1%})",
      f"is {mistake.true} ({mistake.own:.1%})",
      mistake.name,
    )
    for mistake in mistakes
  ]
  return document(
    title,
    facts,
    notes,
    [
      ("Worst mistakes", figures_of(shown)),
      (
        "Confusion",
        f'<img class="wide" alt="confusion matrix" src="{_embedded(confusion_png)}">',
      ),
      (
        "Most often confused",
        f"<table><tr><th>true</th><th>predicted</th><th>pictures</th></tr>{pairs}</table>",
      ),
      (
        "Calibration",
        f'<img class="wide" alt="reliability" src="{_embedded(reliability_png)}">',
      ),
      (
        "Classes",
        '<div class="scroll"><table><tr><th>class</th><th>pictures</th>'
        f"<th>precision</th><th>recall</th><th>F1</th></tr>{classes}</table></div>",
      ),
    ],
  )


def document(
  title: str,
  facts: Mapping[str, str],
  notes: Sequence[str],
  sections: Sequence[tuple[str, str]],
) -> str:
  """A page of sections.

  Args:
    title: of it.
    facts: name → value, the table at its head.
    notes: sentences below the head.
    sections: (title, HTML).
  """
  text = html.escape
  head = "".join(f"<tr><td>{text(k)}</td><td>{text(v)}</td></tr>" for k, v in facts.items())
  said = "".join(f"<p>{text(note)}</p>" for note in notes)
  body = "".join(f"<h2>{text(name)}</h2>{content}" for name, content in sections)
  return (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
    f"<style>{_STYLE}</style></head><body><h1>{text(title)}</h1><table>{head}</table>{said}"
    f"{body}</body></html>\n"
  )


def figures_of(shown: Sequence[Shown]) -> str:
  """HTML of pictures side by side, or "None."."""
  return f'<div class="mistakes">{"".join(map(_figure, shown)) or "<p>None.</p>"}</div>'


def table_of(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """HTML of a table: names, whole numbers, and parts in percent, "-" for None."""

  def cell(value: Any) -> str:
    if value is None:
      return "-"
    return f"{value:.1%}" if isinstance(value, float) else html.escape(str(value))

  lines = "".join(
    "<tr>" + "".join(f"<td>{cell(value)}</td>" for value in row) + "</tr>" for row in rows
  )
  head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
  return f'<div class="scroll"><table><tr>{head}</tr>{lines}</table></div>'


def _figure(shown: Shown) -> str:
  content = io.BytesIO()
  Image.fromarray(shown.image).save(content, format="PNG")
  text = html.escape
  return (
    f'<figure><img alt="" src="{_embedded(content.getvalue())}"><figcaption>'
    f'<span class="wrong">{text(shown.title)}</span><br>{text(shown.text)}<br>'
    f'<span class="file">{text(shown.name)}</span></figcaption></figure>'
  )


def _embedded(png: bytes) -> str:
  return "data:image/png;base64," + base64.b64encode(png).decode()


def _percent(value: float) -> str:
  return "-" if np.isnan(value) else f"{value:.1%}"
