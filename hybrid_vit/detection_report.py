"""What a detector did on a set, as files: COCO's results, a table of the classes, its failures.

detections_<set>.json   every detection, in COCO's format of results
classes_<set>.csv, .md  objects, AP and AP50 of each class
failures_<set>.html     one page: figures, the worst misses and false alarms, the classes
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from hybrid_vit.coco_results import write_results
from hybrid_vit.metrics.coco_ap import CocoResult, Detected, Truth, category_ap
from hybrid_vit.metrics.detection_failures import Failure, false_alarms, missed_objects
from hybrid_vit.paths import as_path
from hybrid_vit.plots import displayable, one_line
from hybrid_vit.report_page import Shown, document, figures_of, table_of
from hybrid_vit.tables import write_table

# Failures of each kind on a page.
_MOST = 24
_LETTERS = 80
# Of a crop's sides, what is beside the object; of the shown crop's longer side, pixels.
_AROUND, _SIDE = 0.75, 360
# Other detections drawn beside.
_DRAWN_SCORE = 0.3
_TRUE, _FOUND = (35, 160, 70), (210, 35, 35)


def write_report(
  directory: Any,
  name: str,
  *,
  results: Sequence[dict[str, Any]],
  measures: Mapping[str, CocoResult],
  truth: Truth,
  detected: Detected,
  names: Sequence[str],
  figures: Mapping[str, float],
  picture: Callable[[int], tuple[np.ndarray, str]],
) -> list[str]:
  """Writes everything; see the head of this file.

  Args:
    directory: where to; it is made.
    name: of the set.
    results: rows of COCO's results.
    measures: "box" and perhaps "mask" → what `evaluate_coco` gave, categories being the classes.
    truth: true objects.
    detected: detections.
    names: of the classes.
    figures: of the whole set, "examples" among them; -1 for what has no objects.
    picture: `(its number in truth.images) → (uint8 [H, W, 3], its name)`.

  Returns:
    The names of the files.

  Raises:
    OSError: they cannot be written.
  """
  place = as_path(directory)
  place.mkdir(parents=True, exist_ok=True)
  write_results(results, place / f"detections_{name}.json")
  rows = class_rows(truth, measures, names)
  tables = write_table(place / f"classes_{name}", rows, ("class", "objects"))
  missed = missed_objects(truth, detected, _MOST)
  alarms = false_alarms(truth, detected, _MOST)
  facts = {key: f"{value:.4f}" if value >= 0 else "-" for key, value in figures.items()}
  page = document(
    f"Failures on {name}",
    {**facts, "examples": f"{figures['examples']:,.0f}"},
    [
      "Green boxes are what there is, red ones what was found; thick is what the picture is "
      f"about. Other detections are drawn from a score of {_DRAWN_SCORE:g}.",
    ],
    [
      (
        "Missed: the largest objects without a detection of their class over an IoU of 0.5",
        figures_of([_missed(f, truth, detected, names, picture) for f in missed]),
      ),
      (
        "False alarms: the surest detections of what is not there",
        figures_of([_alarm(f, truth, detected, names, picture) for f in alarms]),
      ),
      ("Classes", table_of(list(rows[0]) if rows else [], [list(row.values()) for row in rows])),
    ],
  )
  (place / f"failures_{name}.html").write_text(page, encoding="utf-8")
  return [f"detections_{name}.json", *(path.name for path in tables), f"failures_{name}.html"]


def class_rows(
  truth: Truth, measures: Mapping[str, CocoResult], names: Sequence[str]
) -> list[dict[str, Any]]:
  """A row for each class: "class", "objects" without crowds, "box_ap", "box_ap50" and so on.

  A figure of a class without objects is None.
  """
  counts = np.bincount(
    np.asarray(truth.category)[~np.asarray(truth.crowd, bool)], minlength=len(names)
  )
  rows: list[dict[str, Any]] = [
    {"class": name, "objects": int(count)} for name, count in zip(names, counts)
  ]
  for kind, result in measures.items():
    for measure, threshold in (("ap", None), ("ap50", 0)):
      for row, value in zip(rows, category_ap(result, threshold)):
        row[f"{kind}_{measure}"] = float(value) if value >= 0 else None
  return rows


def _missed(
  failure: Failure, truth: Truth, detected: Detected, names: Sequence[str], picture: Any
) -> Shown:
  row, near = failure.row, failure.nearest
  image, file = picture(int(truth.image[row]))
  width, height = truth.boxes[row][2:]
  said = "nothing was found there"
  if near is not None:
    found = names[int(detected.category[near])]
    said = f"nearest: {found} {detected.scores[near]:.2f} (IoU {failure.iou:.2f})"
  crop = _crop(image, truth, detected, int(truth.image[row]), truth.boxes[row], _TRUE, near)
  title = f"{names[int(truth.category[row])]}, {width:.0f} x {height:.0f} pixels"
  return Shown(crop, one_line(title, _LETTERS), said, _end(file))


def _alarm(
  failure: Failure, truth: Truth, detected: Detected, names: Sequence[str], picture: Any
) -> Shown:
  row, near = failure.row, failure.nearest
  image, file = picture(int(detected.image[row]))
  said = "nothing is there"
  if near is not None:
    own = truth.category[near] == detected.category[row]
    kind = "found already, or badly placed: " if own else "is "
    said = f"{kind}{names[int(truth.category[near])]} (IoU {failure.iou:.2f})"
  crop = _crop(image, truth, detected, int(detected.image[row]), detected.boxes[row], _FOUND, None)
  title = f"{names[int(detected.category[row])]} {detected.scores[row]:.2f}"
  return Shown(crop, one_line(title, _LETTERS), said, _end(file))


def _end(file: str) -> str:
  return one_line(file if len(file) <= _LETTERS else "…" + file[1 - _LETTERS :], _LETTERS)


def _crop(
  image: np.ndarray,
  truth: Truth,
  detected: Detected,
  number: int,
  box: np.ndarray,
  color: tuple[int, int, int],
  also: int | None,
) -> np.ndarray:
  """The part of a picture around a box (x, y, width, height), with all boxes, uint8 `[h, w, 3]`."""
  shown = displayable(image)
  if shown.dtype != np.uint8:
    shown = np.round(255 * shown).astype(np.uint8)
  limits = shown.shape[1], shown.shape[0]
  x, y, w, h = np.asarray(box, np.float64)
  around = _AROUND * max(w, h, 16.0)
  left, top = max(int(x - around), 0), max(int(y - around), 0)
  right, bottom = min(int(x + w + around) + 1, limits[0]), min(int(y + h + around) + 1, limits[1])
  part = shown[top:bottom, left:right]
  scale = _SIDE / max(part.shape[:2])
  size = (max(round(part.shape[1] * scale), 1), max(round(part.shape[0] * scale), 1))
  method = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
  canvas = np.ascontiguousarray(cv2.resize(part, size, interpolation=method))

  def draw(one: np.ndarray, color: tuple[int, int, int], thick: int) -> None:
    x0, y0, width, height = (np.asarray(one, np.float64) - (left, top, 0, 0)) * scale
    a, b, c, d = (round(value) for value in (x0, y0, x0 + width, y0 + height))
    cv2.rectangle(canvas, (a, b), (c, d), color, thick, cv2.LINE_AA)

  for one in np.asarray(truth.boxes)[truth.image == number]:
    draw(one, _TRUE, 1)
  sure = (detected.image == number) & (np.asarray(detected.scores) >= _DRAWN_SCORE)
  for one in np.asarray(detected.boxes)[sure]:
    draw(one, _FOUND, 1)
  if also is not None:
    draw(detected.boxes[also], _FOUND, 1)
  draw(box, color, 3)
  return canvas
