"""The order of the examples of each epoch, drawn from the seed and the epoch alone."""

from __future__ import annotations

import math
import threading

import numpy as np


class Order:
  """The order of each epoch, drawn once, whichever thread asks first.

  Args:
    members: the examples of which it is one.
    seed: of the draws.
    repeats: each drawn example comes so many times in a row, of so many times fewer.
    group: beside the epoch, what tells orders of one seed apart.
  """

  _KEPT = 4  # a small source goes through several within one batch

  def __init__(
    self, members: np.ndarray, seed: tuple[int, ...], repeats: int, group: tuple[int, ...] = ()
  ):
    self._members, self._seed, self._repeats, self._group = members, seed, repeats, group
    self._drawn: dict[int, np.ndarray] = {}
    self._lock = threading.Lock()

  def __call__(self, epoch: int) -> np.ndarray:
    """int32, as long as `members`."""
    found = self._drawn.get(epoch)
    if found is not None:
      return found
    with self._lock:
      if epoch not in self._drawn:
        while len(self._drawn) >= self._KEPT:
          del self._drawn[next(iter(self._drawn))]
        self._drawn[epoch] = self._draw(epoch)
      return self._drawn[epoch]

  def _draw(self, epoch: int) -> np.ndarray:
    length = len(self._members)
    rng = np.random.default_rng((*self._seed, epoch, *self._group))
    drawn = self._members[rng.permutation(length)]
    drawn = drawn[: math.ceil(length / self._repeats)].astype(np.int32)
    return drawn if self._repeats == 1 else np.repeat(drawn, self._repeats)[:length]


def members_of(groups: np.ndarray | None, length: int) -> list[np.ndarray]:
  """The examples of each group, in their order; of all `length` of them where there are no groups.

  Raises:
    ValueError: a group without examples, or not one for every example.
  """
  if groups is None:
    return [np.arange(length)]
  members = [np.flatnonzero(groups == group) for group in range(int(groups.max()) + 1)]
  if len(groups) != length or not all(map(len, members)):
    raise ValueError(
      f"groups of {[len(own) for own in members]} examples, {length} in all: some in each of them, "
      "and one group for every example, were expected"
    )
  return members
