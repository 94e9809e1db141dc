"""A detector's worst failures on a set: true objects that it missed, its surest false alarms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from hybrid_vit.metrics.coco_ap import Detected, Truth, box_iou

# COCO's loosest threshold.
LEAST_IOU = 0.5


class Failure(NamedTuple):
  """One failure.

  Attributes:
    row: of the true object that was missed, or of the detection that is a false alarm.
    nearest: row of what lies nearest on the other side, of any class; None where nothing overlaps.
    iou: of the two boxes.
  """

  row: int
  nearest: int | None
  iou: float


def missed_objects(truth: Truth, detected: Detected, most: int) -> list[Failure]:
  """True objects with whose box no detection of their class has an IoU of 0.5, the largest first.

  Crowds are none. The nearest detection is given whatever its class.

  Args:
    truth: all objects.
    detected: all detections.
    most: how many at most.
  """
  found = []
  for gt, dt, iou in _pictures(truth, detected):
    same = detected.category[dt][:, None] == truth.category[gt][None]
    seen = ((iou >= LEAST_IOU) & same).any(0)
    for place in np.flatnonzero(~seen & ~np.asarray(truth.crowd, bool)[gt]):
      found.append(_failure(gt[place], dt, iou[:, place]))
  found.sort(key=lambda failure: -float(np.prod(truth.boxes[failure.row][2:])))
  return found[:most]


def false_alarms(truth: Truth, detected: Detected, most: int) -> list[Failure]:
  """Detections that are of no true object, the surest first.

  In each picture and class detections by falling score take the free true object of largest IoU, of
  at least 0.5, as COCO's evaluation does. Those left are false alarms, a second detection of one
  object, too, but not what lies in a crowd of its class.

  Args:
    truth: all objects.
    detected: all detections.
    most: how many at most.
  """
  found = []
  crowd = np.asarray(truth.crowd, bool)
  for gt, dt, iou in _pictures(truth, detected):
    free = np.ones(len(gt), bool)
    for place in np.argsort(-np.asarray(detected.scores)[dt], kind="stable"):
      same = truth.category[gt] == detected.category[dt[place]]
      able = same & (iou[place] >= LEAST_IOU) & (free | crowd[gt])
      if not able.any():
        found.append(_failure(dt[place], gt, iou[place]))
        continue
      pool = able & ~crowd[gt] if (able & ~crowd[gt]).any() else able
      free[np.argmax(np.where(pool, iou[place], -1.0))] = False
  found.sort(key=lambda failure: -float(detected.scores[failure.row]))
  return found[:most]


def _pictures(
  truth: Truth, detected: Detected
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Of each picture the rows of true objects `[g]` and detections `[d]`, and IoU `[d, g]`."""
  crowd = np.asarray(truth.crowd, bool)
  for image in np.unique(truth.images):
    gt, dt = (np.flatnonzero(rows.image == image) for rows in (truth, detected))
    boxes = (np.asarray(rows.boxes, np.float64) for rows in (detected, truth))
    own = [values[rows] for values, rows in zip(boxes, (dt, gt))]
    yield gt, dt, box_iou(own[0], own[1], crowd[gt])


def _failure(row: int, others: np.ndarray, iou: np.ndarray) -> Failure:
  if not iou.size or iou.max() <= 0:
    return Failure(int(row), None, 0.0)
  best = int(np.argmax(iou))
  return Failure(int(row), int(others[best]), float(iou[best]))
