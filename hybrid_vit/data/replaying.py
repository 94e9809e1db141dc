"""Loaded examples that are shown several times, for hosts that decode too slowly; bit for bit.

EfficientTrain++ (arXiv:2405.08768): of a batch of B rows B / k are loaded, the others are drawn
from what was loaded in the last steps. Augmentation on the host is not redone; mixing, in the step,
is.

Differences from the authors' buffer, so that a batch stays a function of the step alone: a group of
k neighbouring rows replays what stood first in the same group before, not anything of the buffer
(so the number of processes changes nothing); and where a kept row is missing, as after a resume, it
is loaded again. Rows are float16 in theirs, and as they come in ours.
"""

from __future__ import annotations

import collections
import threading
from typing import Any

import numpy as np


def replayed_step(seed: int, position: int, place: int, step: int, window: int, times: int) -> int:
  """The step whose load a row shows: its own for the first of a group, else one of the last.

  Args:
    seed: of the training.
    position: of the row among all rows of the training, from which it draws.
    place: of the row in its group, from 0 to `times` - 1.
    step: of the row, from the start of the phase.
    window: how many steps back may be drawn.
    times: rows of a group.
  """
  if place == 0 or times == 1 or step == 0:
    return step
  first = max(0, step - window)
  return int(np.random.default_rng((seed, 2, position)).integers(first, step))


class KeptRows:
  """The rows loaded last, by their position in the data; several threads may use it.

  Args:
    most: how many; the oldest are given up.
  """

  def __init__(self, most: int):
    self._most = most
    self._rows: collections.OrderedDict[int, Any] = collections.OrderedDict()
    self._lock = threading.Lock()

  def get(self, position: int) -> Any:
    """The row of a position; None where it is not kept."""
    with self._lock:
      return self._rows.get(position)

  def put(self, position: int, row: Any) -> None:
    """Keeps a row."""
    with self._lock:
      self._rows[position] = row
      while len(self._rows) > self._most:
        self._rows.popitem(last=False)
