"""Panoptic segments: one map of their numbers, and what is known of each number.

An example has "segments", int32 `[H, W]`, a map whose pixels hold a row of "segment_labels", int32
`[S]` (the class of each), and of "segment_crowd", bool `[S]`. 255 is no segment, as in other maps;
the row 255, which there is where a picture has more, stands for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hybrid_vit.data.map_reading import IGNORE

MAP, LABELS, CROWD = "segments", "segment_labels", "segment_crowd"
# Numbers below `IGNORE` can be told from it.
MOST = IGNORE


def panoptic_fields(rows: np.ndarray, labels: np.ndarray, crowd: np.ndarray) -> dict[str, Any]:
  """The three keys of an example.

  Args:
    rows: int `[H, W]`, of each pixel the segment's row in `labels`, -1 for none.
    labels: int `[S]`, `IGNORE` for one whose class is not known.
    crowd: bool `[S]`.
  """
  if len(labels) > IGNORE:
    labels, crowd = np.insert(labels, IGNORE, IGNORE), np.insert(crowd, IGNORE, True)
    rows = rows + (rows >= IGNORE)
  return {
    MAP: np.where(rows < 0, IGNORE, rows).astype(np.int32),
    LABELS: np.asarray(labels, np.int32),
    CROWD: np.asarray(crowd, bool),
  }


def known_segments(example: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  """Of an example's segments the numbers whose class is known, and how many pixels each number has.

  Returns:
    (int `[N]`, rising; int `[S]`).

  Raises:
    ValueError: a pixel of a segment of which nothing is known.
  """
  labels = np.asarray(example[LABELS])
  values = np.asarray(example[MAP])
  counts = np.bincount(values[values != IGNORE].reshape(-1), minlength=len(labels))
  if len(counts) > len(labels):
    raise ValueError(
      f"a pixel is of segment {len(counts) - 1}, and {len(labels)} segments have a class"
    )
  if len(counts) > IGNORE:
    counts[IGNORE] = 0
  return np.flatnonzero(labels != IGNORE), counts


def chosen_segments(example: Mapping[str, Any], rows: np.ndarray) -> dict[str, Any]:
  """The example with the segments of `rows` alone, numbered in this order."""
  labels = np.asarray(example[LABELS])
  table = np.full(max(len(labels), IGNORE) + 1, -1, np.int32)
  table[rows] = np.arange(len(rows))
  crowd = np.asarray(example.get(CROWD, np.zeros(len(labels))), bool)
  made = panoptic_fields(table[np.asarray(example[MAP])], labels[rows], crowd[rows])
  return {**example, **made}


def numbered_segments(example: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The segments of an example that have a class and a pixel, numbered from 1; crowds are some.

  Returns:
    (int32 `[H, W]` of these numbers, 0 for none; int32 `[N]`, the class of each; bool `[N]`, which
    are crowds).

  Raises:
    ValueError: a pixel of a segment of which nothing is known.
  """
  rows, areas = known_segments(example)
  rows = rows[areas[rows] > 0]
  labels = np.asarray(example[LABELS])
  table = np.zeros(max(len(labels), IGNORE) + 1, np.int32)
  table[rows] = np.arange(1, len(rows) + 1)
  crowd = np.asarray(example.get(CROWD, np.zeros(len(labels))), bool)
  return table[np.asarray(example[MAP])], labels[rows].astype(np.int32), crowd[rows]
