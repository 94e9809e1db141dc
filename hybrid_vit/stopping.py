"""Being told to stop: by a signal, at any moment, evaluation included."""

from __future__ import annotations

import contextlib
import signal
from typing import Any

import jax


class Preempted(SystemExit):
  """Told to stop; the state is saved. Carries the shell's code for the signal."""


class Interrupted(Exception):
  """Raised between two batches of an evaluation when the run has been told to stop."""


class StopSignal:
  """Notes SIGTERM and the first Ctrl-C; a second Ctrl-C interrupts at once.

  Attributes:
    number: the signal's, None until one came.
  """

  def __init__(self) -> None:
    self.number: int | None = None
    self._previous: dict[int, Any] = {}

  @property
  def told(self) -> bool:
    """Whether a signal came."""
    return self.number is not None

  def raise_if_told(self) -> None:
    """Ends an evaluation.

    Raises:
      Interrupted: a signal came.
    """
    if self.told:
      raise Interrupted

  def __enter__(self) -> StopSignal:
    # Several processes must stop at one step: JAX's own handler of SIGTERM sees to that, and Ctrl-C
    # just interrupts.
    if jax.process_count() > 1:
      return self
    # Signals can be caught in the main thread only.
    with contextlib.suppress(ValueError):
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._note)
    return self

  def _note(self, number: int, _: Any) -> None:
    if self.number is not None:
      raise KeyboardInterrupt
    self.number = number

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
