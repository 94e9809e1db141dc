"""Panoptic quality (arXiv:1801.00868) by the rules of panopticapi.

A predicted segment is a true one of its class if their IoU is above one half, its pixels where
nothing is annotated left out of the union. Sums of the overlaps, true and false positives and false
negatives of each class add up over pictures, batches and hosts.

Deviations: the area of a true segment is that of its pixels, where panopticapi takes the number in
the annotation file; a map with a segment that the list does not name is refused for the truth, too;
no class to average over gives no number instead of an error.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# Columns of the sums.
SUMS = ("iou", "true_positives", "false_positives", "false_negatives")
_VOID = 0


class Segments(NamedTuple):
  """What a map of ids means.

  Attributes:
    ids: int `[S]`, above 0, which is no segment.
    classes: int `[S]`, 0 to the number of classes - 1.
    crowd: bool `[S]`, groups that nothing is matched with; None for none.
  """

  ids: np.ndarray
  classes: np.ndarray
  crowd: np.ndarray | None = None


def panoptic_sums(
  predicted: np.ndarray,
  predicted_segments: Segments,
  truth: np.ndarray,
  truth_segments: Segments,
  classes: int,
) -> np.ndarray:
  """One picture's sums.

  Args:
    predicted: int `[H, W]`, the segment of each pixel; 0 for none.
    predicted_segments: its list; every segment has a pixel.
    truth: int `[H, W]`.
    truth_segments: its list.
    classes: how many there are.

  Returns:
    float64 `[classes, 4]`, the columns being `SUMS`.

  Raises:
    ValueError: two sizes; an id in a map that its list does not name; a predicted segment without
      pixels; a class that there is not.
  """
  if predicted.shape != truth.shape:
    raise ValueError(
      f"the predicted map is {list(predicted.shape)} and the truth {list(truth.shape)}: resize the "
      "prediction to the truth's size"
    )
  for name, segments in (("predicted", predicted_segments), ("true", truth_segments)):
    wrong = [c for c in segments.classes if not 0 <= c < classes]
    if wrong:
      raise ValueError(f"a {name} segment is of class {wrong[0]}; 0 to {classes - 1} were expected")
  across = _places(predicted, predicted_segments, "predicted")
  down = _places(truth, truth_segments, "true")
  true_count, count = len(truth_segments.ids), len(predicted_segments.ids)
  shared = np.bincount(
    (down * (count + 1) + across).ravel(), minlength=(true_count + 1) * (count + 1)
  ).reshape(true_count + 1, count + 1)
  area, true_area = shared.sum(0)[1:], shared.sum(1)[1:]
  if (area == 0).any():
    raise ValueError(
      f"predicted segment {predicted_segments.ids[int(np.argmin(area))]} has no pixel in its map"
    )
  void, both = shared[0, 1:], shared[1:, 1:]
  crowd = np.zeros(true_count, bool)
  if truth_segments.crowd is not None:
    crowd = np.asarray(truth_segments.crowd).astype(bool)
  of, true_of = np.asarray(predicted_segments.classes, int), np.asarray(truth_segments.classes, int)

  union = area + true_area[:, None] - both - void
  # One without a pixel, or all of it unannotated, overlaps nothing.
  iou = both / np.maximum(union, 1)
  matched = (iou > 0.5) & (of == true_of[:, None]) & ~crowd[:, None]
  missed = ~matched.any(1) & ~crowd

  excused = void.copy()
  for label in np.unique(true_of[crowd]):
    # Only the last crowd of a class, as in panopticapi.
    last = np.flatnonzero(crowd & (true_of == label))[-1]
    excused += np.where(of == label, both[last], 0)
  false = ~matched.any(0) & ~(excused / area > 0.5)

  pairs = np.nonzero(matched)
  tally = lambda labels, weights=None: np.bincount(labels, weights, minlength=classes)  # noqa: E731
  hit = of[pairs[1]]
  columns = (tally(hit, iou[pairs]), tally(hit), tally(of[false]), tally(true_of[missed]))
  return np.stack(columns, axis=1).astype(np.float64)


def class_qualities(sums: np.ndarray) -> np.ndarray:
  """Of summed sums `[C, 4]`: PQ, SQ and RQ of each class, `[C, 3]`; NaN where nothing was."""
  iou, tp, fp, fn = sums.T
  weight = tp + 0.5 * fp + 0.5 * fn
  there = weight > 0
  divide = lambda a, b, where: np.divide(a, b, out=np.zeros(len(a)), where=where)  # noqa: E731
  found = np.stack(
    [divide(iou, weight, there), divide(iou, tp, tp > 0), divide(tp, weight, there)], axis=1
  )
  return np.where(there[:, None], found, np.nan)


def panoptic_metrics(sums: np.ndarray, things: np.ndarray) -> dict[str, float]:
  """Means over the classes that were there.

  Args:
    sums: `[C, 4]`, of all pictures.
    things: bool `[C]`, which classes are countable things.

  Returns:
    "pq", "sq", "rq", and each with "_things" and "_stuff"; NaN where no class was there.
  """
  found = class_qualities(sums)
  things = np.asarray(things).astype(bool)
  metrics = {}
  for suffix, chosen in (("", things | ~things), ("_things", things), ("_stuff", ~things)):
    rows = found[chosen & ~np.isnan(found[:, 0])]
    for i, name in enumerate(("pq", "sq", "rq")):
      metrics[name + suffix] = float(rows[:, i].mean()) if len(rows) else float("nan")
  return metrics


def _places(ids: np.ndarray, segments: Segments, name: str) -> np.ndarray:
  """Each pixel's place in the list, from 1; 0 for no segment."""
  known = np.asarray(segments.ids, np.int64)
  if (known <= _VOID).any() or len(np.unique(known)) != len(known):
    raise ValueError(f"the {name} segments' ids must be different and above {_VOID}; got {known}")
  order = np.argsort(known)
  keys = np.concatenate([[_VOID], known[order]])
  values = np.concatenate([[0], order + 1])
  found = np.minimum(np.searchsorted(keys, ids), len(keys) - 1)
  strange = np.asarray(ids)[keys[found] != ids]
  if strange.size:
    raise ValueError(f"the {name} map has segment {strange[0]}, which its list does not name")
  return values[found]
