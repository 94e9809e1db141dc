"""What a run says: metrics.jsonl, timings.jsonl, other sinks, a log and a progress bar.

`metrics.jsonl` holds no clock and no machine-dependent figure, so that a run that was killed and
resumed leaves the same bytes as one that was not; everything timed goes to `timings.jsonl`.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from hybrid_vit.line_files import LineFile, whole_lines
from hybrid_vit.paths import as_path
from hybrid_vit.sinks import Sink, create_sink, stays
from hybrid_vit.workdir import naming

# Seconds between the plain lines that stand in for the bar where output is no terminal.
_PLAIN_LINE_SECONDS = 10.0

RESERVED = ("step", "kind")


class Reporter:
  """The one writer of a run's figures; only process 0 makes one.

  Files in `workdir`: `metrics.jsonl`, `timings.jsonl`, `log.txt`, `config.json` and the sinks'.

  Args:
    workdir: directory of the run; made where missing.
    total_steps: the step at which training ends.
    start_step: the step a restored run continues from. Lines of later steps are dropped from both
      files, as are this step's evaluations, which come again, and a last line that a kill left half
      written; 0 starts both files anew. What loses lines is kept as `metrics.jsonl.1`, `.2` ….
    progress: whether to show a bar (on a terminal) or a line every ten seconds (elsewhere).
    run_config: the configuration, written to `config.json` and to the sinks.
    sinks: where figures go besides, see `hybrid_vit.sinks`.
  """

  def __init__(
    self,
    workdir: Any,
    total_steps: int,
    start_step: int = 0,
    *,
    progress: bool = True,
    run_config: dict[str, Any] | None = None,
    sinks: Sequence[str] = ("tensorboard",),
  ):
    self._workdir = as_path(workdir)
    self._workdir.mkdir(parents=True, exist_ok=True)
    self._total_steps = total_steps
    self._metrics = _open_lines(self._workdir / "metrics.jsonl", start_step)
    self._timings = _open_lines(self._workdir / "timings.jsonl", start_step)
    self._sinks: list[Sink] = [
      create_sink(name, self._workdir, start_step, run_config or {}) for name in sinks
    ]
    self._log = LineFile(self._workdir / "log.txt")
    if run_config is not None:
      text = json.dumps(run_config, indent=2, default=str)
      with naming(self._workdir / "config.json"):
        (self._workdir / "config.json").write_text(text + "\n")
      for sink in self._sinks:
        sink.text("config", text, start_step)
    self._show = progress
    self._bar: tqdm | None = None
    if progress and sys.stderr.isatty():
      self._bar = tqdm(
        total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, file=sys.stderr
      )
    # (step, clock) of the first call of `progress`: compilation lies before it, so that the
    # remaining time is judged from steps alone.
    self._first_shown: tuple[int, float] | None = None
    self._last_shown = -math.inf
    if self._metrics.copy is not None:
      self.message(
        f"metrics.jsonl goes on from step {start_step}; as it was it is kept as "
        f"{self._metrics.copy}"
      )

  def scalars(self, step: int, values: Mapping[str, float], *, kind: str) -> None:
    """Writes one line of metrics.jsonl and TensorBoard's "<kind>/<key>".

    Args:
      step: steps done so far.
      values: plain or 0-d array numbers. NaN and infinities are written as "nan", "inf", "-inf".
      kind: "train", or "eval/<name>".

    Raises:
      ValueError: a value is named "step" or "kind".
    """
    numbers = _numbers(values)
    _write_line(self._metrics, {"step": int(step), "kind": kind, **numbers})
    self._add_to_sinks(step, numbers, kind)

  def timing(self, step: int, values: Mapping[str, float]) -> None:
    """Writes wall-clock figures (images/s, waiting, compilation) to timings.jsonl."""
    numbers = _numbers(values)
    _write_line(self._timings, {"step": int(step), "unix_time": round(time.time(), 3), **numbers})
    self._add_to_sinks(step, numbers, "timing")

  def progress(
    self,
    step: int,
    *,
    loss: float | None,
    rate: str,
    phase: str | None = None,
  ) -> None:
    """Shows where the run is.

    Args:
      step: steps done so far.
      loss: the latest known loss, or None.
      rate: how fast it goes, in words.
      phase: which phase it is in, in words; None where there is one only.
    """
    if not self._show:
      return
    parts = [rate] if phase is None else [phase, rate]
    if loss is not None:
      parts.insert(0, f"loss {loss:.4f}")
    if self._bar is not None:
      self._bar.set_postfix_str(", ".join(parts), refresh=False)
      self._bar.update(step - self._bar.n)
      return
    now = time.monotonic()
    if self._first_shown is None:
      self._first_shown = (step, now)
    if now - self._last_shown < _PLAIN_LINE_SECONDS and step < self._total_steps:
      return
    self._last_shown = now
    first_step, first_time = self._first_shown
    if first_step < step < self._total_steps:
      seconds = (now - first_time) / (step - first_step) * (self._total_steps - step)
      parts.append(f"{_duration(seconds)} left")
    print(f"step {step}/{self._total_steps}: {', '.join(parts)}", flush=True)

  def message(self, text: str) -> None:
    """Prints a line without breaking the bar, and keeps it in log.txt with the time."""
    self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
    if self._bar is not None:
      self._bar.write(text, file=sys.stdout)
    else:
      print(text, flush=True)

  def close(self) -> None:
    """Ends the bar and closes the files; calling it again does nothing."""
    if self._bar is not None:
      self._bar.close()
      self._bar = None
    for sink in self._sinks:
      sink.close()
    self._sinks = []
    self._log.close()
    self._metrics.close()
    self._timings.close()

  def _add_to_sinks(self, step: int, numbers: Mapping[str, float], kind: str) -> None:
    for sink in self._sinks:
      sink.scalars(int(step), numbers, kind)


class SilentReporter:
  """The reporter of processes other than the first."""

  def _nothing(self, *args: Any, **kwargs: Any) -> None:
    del args, kwargs

  scalars = timing = progress = message = close = _nothing


def figures(values: Mapping[str, float]) -> str:
  """Measures in words: accuracies in percent, the number of examples at the end."""
  text = ", ".join(
    f"{key} {value:.2%}" if key.startswith("top") else f"{key} {value:.4f}"
    for key, value in values.items()
    if key != "examples"
  )
  return f"{text} ({values['examples']:.0f} examples)" if "examples" in values else text


def read_metrics(path: Any) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl (or timings.jsonl); "nan", "inf" and "-inf" become floats.

  A last line that a kill left half written is left out.

  Raises:
    ValueError: another line that is damaged; the message says which.
  """
  lines = whole_lines(as_path(path).read_bytes())
  return [_parsed(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _parsed(raw: bytes, name: str) -> dict[str, Any]:
  try:
    line = json.loads(raw)
    int(line["step"])
    return {
      key: float(value) if isinstance(value, str) and key not in RESERVED else value
      for key, value in line.items()
    }
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f"{name} is damaged: {str(raw[:60])[2:-1]}… ({error})") from error


def _numbers(values: Mapping[str, float]) -> dict[str, float]:
  for name in RESERVED:
    if name in values:
      raise ValueError(f"{name!r} is the name of a field of every line; rename the value")
  return {key: float(value) for key, value in values.items()}


def _write_line(file: LineFile, line: Mapping[str, Any]) -> None:
  # JSON has no NaN: as text it survives any reader, and float() reads it back.
  whole = {
    key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
    for key, value in line.items()
  }
  file.write(json.dumps(whole, allow_nan=False) + "\n")


def _open_lines(path: Any, start_step: int) -> LineFile:
  """A file of lines without what a resumed run will write again."""

  def keep(line: bytes) -> bool:
    try:
      fields = json.loads(line)
      return stays(int(fields["step"]), str(fields.get("kind")), start_step)
    except (ValueError, TypeError, KeyError):  # not a line of ours, or damaged
      return False

  return LineFile(path, keep)


def _duration(seconds: float) -> str:
  """ "1:02:03", or "2:03" below an hour."""
  minutes, second = divmod(round(seconds), 60)
  hour, minute = divmod(minutes, 60)
  return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
