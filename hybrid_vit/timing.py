"""Time in a run: rates since the last line of the log, the wait for data, traces of some steps."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath


class Clock:
  """Examples and waiting in a window; evaluation and compilation do not count.

  Attributes:
    examples: in the window, of all processes together.
    loss: the last one known, for people.
    utilisation_of_rate: part of the devices' peak for one example a second; None: not known.
  """

  def __init__(self) -> None:
    self.loss: float | None = None
    self.utilisation_of_rate: float | None = None
    self._shown: tuple[float, float] = (0.0, 0.0)
    self.restart()

  def restart(self) -> None:
    """Begins a new window after a break that was no training."""
    self.examples = 0
    self._begin, self._waited = time.monotonic(), 0.0

  def window(self) -> None:
    """Begins a new window after a line of the log; until it has a step, the old one is shown."""
    self._shown = self._rates()
    self.restart()

  def waiting(self, get: Callable[[], Any]) -> Any:
    """Calls `get`; its time counts as waiting for data."""
    begin = time.monotonic()
    result = get()
    self._waited += time.monotonic() - begin
    return result

  def figures(self) -> dict[str, float]:
    """For timings.jsonl: examples a second, part of the time spent waiting, utilisation (MFU)."""
    rate, wait = self._rates() if self.examples else self._shown
    found = {"examples_per_second": rate, "data_wait_fraction": wait}
    if self.utilisation_of_rate is not None:
      found["model_flops_utilisation"] = rate * self.utilisation_of_rate
    return found

  def text(self) -> str:
    """The same for people."""
    found = self.figures()
    parts = [
      f"{found['examples_per_second']:,.0f} examples/s",
      f"{found['data_wait_fraction']:.0%} waiting for data",
    ]
    if "model_flops_utilisation" in found:
      parts.append(f"MFU {found['model_flops_utilisation']:.1%}")
    return ", ".join(parts)

  def _rates(self) -> tuple[float, float]:
    seconds = max(time.monotonic() - self._begin, 1e-9)
    return self.examples / seconds, min(self._waited / seconds, 1.0)


class Profile:
  """A trace of the steps first … last, for TensorBoard, XProf or Perfetto.

  Args:
    workdir: the trace goes to its directory `profile`.
    steps: (first, last), counted as the log counts; None for no trace.
  """

  def __init__(self, workdir: epath.Path, steps: tuple[int, int] | None):
    self._directory, self._steps = os.fspath(workdir / "profile"), steps
    self._running = False

  def at(self, step: int) -> None:
    """Called before step `step` is run."""
    if self._steps is None:
      return
    first, last = self._steps
    if not self._running and first <= step <= last:
      jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
      self._running = True
    elif step > last:
      self._stop()

  def _stop(self) -> None:
    if self._running:
      jax.profiler.stop_trace()
      self._running = False

  def __enter__(self) -> Profile:
    return self

  def __exit__(self, *_: object) -> None:
    self._stop()


def parse_steps(text: str) -> tuple[int, int]:
  """ "10:20" → (10, 20), both included.

  Raises:
    ValueError: it is no such pair.
  """
  first, colon, last = text.partition(":")
  if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
    raise ValueError(f"--profile={text}: FIRST:LAST was expected, two steps, e.g. 10:20")
  return int(first), int(last)
