"""What of the data could not be decoded: counted, named once, and at some point too much."""

from __future__ import annotations

import logging
import threading

from hybrid_vit.data.errors import CorruptDataError
from hybrid_vit.data.sources import Source


class Corrupt:
  """The corrupt examples that this process has met, each named once.

  Args:
    source: says their names.
    max_fraction: so much of the part may be corrupt.
    part: how many examples this process reads, of an epoch in training.
  """

  def __init__(self, source: Source, max_fraction: float, part: float):
    if not 0 <= max_fraction <= 1:
      raise ValueError(
        f"max_corrupt_fraction is {max_fraction:g}; a number from 0 to 1 was expected"
      )
    self._source, self._max_fraction, self._part = source, max_fraction, part
    self._names: dict[int, str] = {}
    self._of_epoch: dict[int, set[int]] = {}
    self._lock = threading.Lock()

  @property
  def count(self) -> int:
    """How many different ones."""
    return len(self._names)

  @property
  def names(self) -> list[str]:
    """Their names, in the order in which they were met."""
    return list(self._names.values())

  def add(self, index: int, error: Exception, epoch: int = 0) -> None:
    """Notes one.

    Raises:
      CorruptDataError: that is too many of this epoch's part.
    """
    with self._lock:
      met = self._of_epoch.setdefault(epoch, set())
      met.add(index)
      # Batches ahead may have begun the next epoch.
      for past in [e for e in self._of_epoch if e < epoch - 1]:
        del self._of_epoch[past]
      new = index not in self._names
      if new:
        self._names[index] = self._source.describe(index)
      name, count = self._names[index], len(met)
      among = ", ".join([self._names[i] for i in sorted(met)][:5])
    if new:
      logging.warning("skipped an example that is corrupt: %s (%s)", name, error)
    if count > self._max_fraction * self._part:
      raise CorruptDataError(
        f"{count} of the {self._part:.0f} examples that this process reads are corrupt, more than "
        f"max_corrupt_fraction = {self._max_fraction:g} allows; among them: {among}. The last one: "
        f"{error}"
      ) from error
