"""One HTML file that holds everything of a report: no script, nothing from elsewhere.

Every name (of classes, files, weights) is escaped; pictures are embedded.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
from collections.abc import Mapping, Sequence

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
  head = "".join(f"<tr><td>{text(k)}</td><td>{text(v)}</td></tr>" for k, v in facts.items())
  said = "".join(f"<p>{text(note)}</p>" for note in notes)
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
  shown = "".join(map(_figure, mistakes)) or "<p>None.</p>"
  return (
    f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>'
    f"<style>{_STYLE}</style></head><body><h1>{text(title)}</h1><table>{head}</table>{said}"
    f'<h2>Worst mistakes</h2><div class="mistakes">{shown}</div>'
    f'<h2>Confusion</h2><img class="wide" alt="confusion matrix" src="{_embedded(confusion_png)}">'
    "<h2>Most often confused</h2><table><tr><th>true</th><th>predicted</th><th>pictures</th></tr>"
    f"{pairs}</table>"
    f'<h2>Calibration</h2><img class="wide" alt="reliability" src="{_embedded(reliability_png)}">'
    '<h2>Classes</h2><div class="scroll"><table><tr><th>class</th><th>pictures</th>'
    f"<th>precision</th><th>recall</th><th>F1</th></tr>{classes}</table></div></body></html>\n"
  )


def _figure(mistake: Mistake) -> str:
  content = io.BytesIO()
  Image.fromarray(mistake.image).save(content, format="PNG")
  text = html.escape
  return (
    f'<figure><img alt="" src="{_embedded(content.getvalue())}"><figcaption>'
    f'<span class="wrong">{text(mistake.predicted)} ({mistake.confidence:.1%})</span><br>is '
    f"{text(mistake.true)} ({mistake.own:.1%})<br>"
    f'<span class="file">{text(mistake.name)}</span></figcaption></figure>'
  )


def _embedded(png: bytes) -> str:
  return "data:image/png;base64," + base64.b64encode(png).decode()


def _percent(value: float) -> str:
  return "-" if np.isnan(value) else f"{value:.1%}"
