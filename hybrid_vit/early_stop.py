"""Ending a training when its best measure has not improved for a while."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

# Among the sums that a checkpoint keeps; no measure may be called so.
KEY = " early stop"


@dataclasses.dataclass(frozen=True)
class EarlyStop:
  """`config.early_stop`: a training so ended exports its best weights.

  Attributes:
    patience: so many evaluations in a row without a better one end the training.
    min_delta: a value must be better by more than this to count.
  """

  patience: int
  min_delta: float = 0.0

  def __post_init__(self) -> None:
    if self.patience < 1:
      raise ValueError(f"`config.early_stop.patience` is {self.patience}; at least 1 was expected")
    if not self.min_delta >= 0.0:
      raise ValueError(f"`config.early_stop.min_delta` is {self.min_delta}; 0 or more was expected")


class Patience:
  """Counts evaluations without a better value; its memory is two numbers, kept in checkpoints.

  Args:
    settings: see `EarlyStop`.
    higher_is_better: direction of the measure.
    memory: `memory` of an earlier part of the training; None at its start.
  """

  def __init__(
    self, settings: EarlyStop, higher_is_better: bool, memory: Sequence[float] | None = None
  ):
    self._settings, self._sign = settings, 1.0 if higher_is_better else -1.0
    self._waited, best = (int(memory[0]), memory[1:]) if memory else (0, ())
    self._best = self._sign * best[0] if best else -math.inf

  @property
  def memory(self) -> list[float]:
    """[evaluations without a better one, the best value where there was one]."""
    best = [self._sign * self._best] if math.isfinite(self._best) else []
    return [float(self._waited), *best]

  def ends_after(self, value: float) -> bool:
    """Counts an evaluation; whether it is the last one. NaN is never better."""
    gain = self._sign * value - self._best
    if math.isfinite(value) and gain > self._settings.min_delta:
      self._best, self._waited = self._sign * value, 0
    else:
      self._waited += 1
    return self._waited >= self._settings.patience
