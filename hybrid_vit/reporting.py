"""What a run says: metrics.jsonl, timings.jsonl, TensorBoard, a progress bar, curves and pictures.

`metrics.jsonl` holds no clock and no machine-dependent figure, so that a run that was killed and
resumed leaves the same bytes as one that was not; everything timed goes to `timings.jsonl`.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from tqdm import tqdm

from hybrid_vit.sinks import Sink, create_sink

# Seconds between the plain lines that stand in for the bar where output is no terminal.
_PLAIN_LINE_SECONDS = 10.0

_RESERVED = ("step", "kind")
_ACCURACY_KEYS = ("top1", "top5", "accuracy")
_COLOURS = ("#0b63b0", "#d2541b", "#3a8f3e", "#7d4fa8", "#946317", "#b8317b")
_RIGHT, _WRONG = "#1d7a2b", "#c01c1c"

# Curves with more points than this are drawn pale, with their running mean on top.
_SMOOTHED_FROM = 60
_MAX_PICTURES_IN_A_ROW = 8


class Reporter:
  """The one writer of a run's figures; only process 0 makes one.

  Files in `workdir`: `metrics.jsonl`, `timings.jsonl`, `tensorboard/`, `config.json`.

  Args:
    workdir: directory of the run; made where missing.
    total_steps: the step at which training ends.
    start_step: the step a restored run continues from. Lines of later steps are dropped from both
      files, as are this step's evaluations, which come again, and a last line that a kill left half
      written; 0 starts both files anew.
    progress: whether to show a bar (on a terminal) or a line every ten seconds (elsewhere).
    run_config: the configuration, written to `config.json` and to the sinks.
    sinks: where figures go besides, see `hybrid_vit.sinks`.
  """

  def __init__(
    self,
    workdir: str | Path,
    total_steps: int,
    start_step: int = 0,
    *,
    progress: bool = True,
    run_config: dict[str, Any] | None = None,
    sinks: Sequence[str] = ("tensorboard",),
  ):
    self._workdir = Path(workdir)
    self._workdir.mkdir(parents=True, exist_ok=True)
    self._total_steps = total_steps
    self._metrics = _open_lines(self._workdir / "metrics.jsonl", start_step)
    self._timings = _open_lines(self._workdir / "timings.jsonl", start_step)
    self._sinks: list[Sink] = [
      create_sink(name, epath.Path(self._workdir), start_step, run_config or {}) for name in sinks
    ]
    self._log = (self._workdir / "log.txt").open("a", encoding="utf-8")
    if run_config is not None:
      text = json.dumps(run_config, indent=2, default=str)
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
    self._log.flush()
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


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
  """The lines of a metrics.jsonl (or timings.jsonl); "nan", "inf" and "-inf" become floats.

  A last line that a kill left half written is left out.
  """
  lines = []
  for raw in _whole_lines(Path(path).read_bytes()):
    line = json.loads(raw)
    lines.append(
      {
        key: float(value) if isinstance(value, str) and key not in _RESERVED else value
        for key, value in line.items()
      }
    )
  return lines


def plot_curves(metrics_jsonl: str | Path, png: str | Path) -> None:
  """Draws loss, accuracy, learning rate and every other figure of a metrics.jsonl over the steps.

  Training is a line (with its running mean where there are many points), evaluation is marked
  point by point.

  Raises:
    ValueError: the file has no line yet.
  """
  series = _series(read_metrics(metrics_jsonl))
  if not series:
    raise ValueError(f"{metrics_jsonl} holds no metrics to draw")
  panels: dict[str, list[tuple[str, str]]] = {}
  for kind, key in series:
    # How many pictures were evaluated is the same each time.
    if key != "examples":
      panels.setdefault(_panel(key), []).append((kind, key))
  # Loss, accuracy and learning rate first, whatever the order in the file.
  order = ("Loss", "Accuracy", "Learning rate")
  names = sorted(panels, key=lambda name: (order.index(name) if name in order else len(order),))

  columns = 2 if len(names) == 4 else min(3, len(names))
  rows = math.ceil(len(names) / columns)
  figure = Figure(figsize=(4.6 * columns, 3.5 * rows), dpi=120, layout="constrained")
  for position, name in enumerate(names):
    axes = figure.add_subplot(rows, columns, position + 1)
    _draw_panel(axes, name, panels[name], series)
  _save(figure, png)


def plot_predictions(
  images: np.ndarray,
  true_names: Sequence[str],
  predicted_names: Sequence[str],
  probabilities: Sequence[float],
  png: str | Path,
) -> None:
  """Draws a grid of pictures under their predictions, green where right and red where wrong.

  Args:
    images: `[N, H, W, 3]`, uint8, or float in [0, 1]; floats beyond it (normalised pictures) are
      stretched to it picture by picture.
    true_names: N class names.
    predicted_names: N class names.
    probabilities: N probabilities of the predicted class.
    png: the file to write.

  Raises:
    ValueError: no picture, another shape, or unequal numbers.
  """
  images = np.asarray(images)
  if images.ndim != 4 or images.shape[-1] != 3 or not len(images):
    raise ValueError(f"images have shape {images.shape}; [N, H, W, 3] with N > 0 was expected")
  lengths = (len(true_names), len(predicted_names), len(probabilities))
  if set(lengths) != {len(images)}:
    raise ValueError(
      f"{len(images)} images, but {lengths[0]} true names, {lengths[1]} predicted names and "
      f"{lengths[2]} probabilities"
    )
  columns = min(_MAX_PICTURES_IN_A_ROW, len(images))
  rows = math.ceil(len(images) / columns)
  height, width = images.shape[1:3]
  cell_width = 1.5
  cell_height = cell_width * min(max(height / width, 0.5), 2.0) + 0.35
  figure = Figure(
    figsize=(max(cell_width * columns, 3.0), cell_height * rows + 0.35),
    dpi=120,
    layout="constrained",
  )
  right = 0
  for position, image in enumerate(images):
    axes = figure.add_subplot(rows, columns, position + 1)
    # Enlarged pixels stay pixels; large pictures are averaged down.
    small = max(height, width) < cell_width * figure.dpi
    axes.imshow(_displayable(image), interpolation="nearest" if small else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    true, predicted = true_names[position], predicted_names[position]
    is_right = true == predicted
    right += is_right
    colour = _RIGHT if is_right else _WRONG
    title = f"{_short(predicted)} ({float(probabilities[position]):.0%})"
    # Two lines in every title, so that all pictures have one size.
    title = f"\n{title}" if is_right else f"{title}\nis {_short(true)}"
    axes.set_title(title, color=colour, fontsize=8, pad=3)
    for spine in axes.spines.values():
      spine.set_color(colour)
      spine.set_linewidth(1.0 if is_right else 2.5)
  figure.suptitle(f"Predictions: {right} of {len(images)} right", fontsize=10)
  _save(figure, png)


def _numbers(values: Mapping[str, float]) -> dict[str, float]:
  for name in _RESERVED:
    if name in values:
      raise ValueError(f"{name!r} is the name of a field of every line; rename the value")
  return {key: float(value) for key, value in values.items()}


def _write_line(file: TextIO, line: Mapping[str, Any]) -> None:
  # JSON has no NaN: as text it survives any reader, and float() reads it back.
  whole = {
    key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
    for key, value in line.items()
  }
  file.write(json.dumps(whole, allow_nan=False) + "\n")
  file.flush()


def _whole_lines(content: bytes) -> Iterable[bytes]:
  """Lines that end in a newline: a killed process can leave a part of one at the end."""
  return [line for line in content.split(b"\n")[:-1] if line]


def _open_lines(path: Path, start_step: int) -> TextIO:
  """Opens a file of lines for appending, without what a resumed run will write again."""
  kept: list[bytes] = []
  if start_step and path.exists():
    for line in _whole_lines(path.read_bytes()):
      fields = json.loads(line)
      # What was evaluated at the restored step is evaluated again.
      last = start_step - 1 if str(fields.get("kind")).startswith("eval/") else start_step
      if fields["step"] <= last:
        kept.append(line)
  # Beside the file first: a kill in here must not lose the history.
  fresh = path.with_name(path.name + ".new")
  fresh.write_bytes(b"".join(line + b"\n" for line in kept))
  os.replace(fresh, path)
  return path.open("a", encoding="utf-8")


def _duration(seconds: float) -> str:
  """ "1:02:03", or "2:03" below an hour."""
  minutes, second = divmod(round(seconds), 60)
  hour, minute = divmod(minutes, 60)
  return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _series(
  lines: Iterable[Mapping[str, Any]],
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
  """(kind, key) → steps and values, in the order in which they first appear."""
  points: dict[tuple[str, str], list[tuple[int, float]]] = {}
  for line in lines:
    for key, value in line.items():
      if key not in _RESERVED:
        points.setdefault((line["kind"], key), []).append((line["step"], float(value)))
  return {
    name: (np.array([s for s, _ in pairs]), np.array([v for _, v in pairs]))
    for name, pairs in points.items()
  }


def _panel(key: str) -> str:
  if key in _ACCURACY_KEYS:
    return "Accuracy"
  return key.replace("_", " ").capitalize()


def _draw_panel(
  axes: Axes,
  name: str,
  members: Sequence[tuple[str, str]],
  series: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]],
) -> None:
  several_keys = len({key for _, key in members}) > 1
  kinds = list(dict.fromkeys(kind for kind, _ in members))
  title = name
  for kind, key in members:
    steps, values = series[kind, key]
    # The train curve has the same colour in each panel.
    colour = _COLOURS[0] if kind == "train" else _COLOURS[1 + kinds.index(kind) % 5]
    style = "--" if key == "top5" else "-"
    label = kind.removeprefix("eval/") + (f" {_key_label(key)}" if several_keys else "")
    if kind != "train":
      axes.plot(
        steps, values, style, color=colour, marker="o", markersize=4, linewidth=1.2, label=label
      )
      if key == "top1" and title == name:
        title = f"Accuracy ({kind.removeprefix('eval/')} top-1 {values[-1]:.2%} at the end)"
    elif len(values) >= _SMOOTHED_FROM and name != "Learning rate":
      axes.plot(steps, values, style, color=colour, alpha=0.25, linewidth=0.8)
      axes.plot(
        steps, _running_mean(values), style, color=colour, linewidth=1.6, label=f"{label} (mean)"
      )
    else:
      axes.plot(steps, values, style, color=colour, linewidth=1.4, label=label)
  axes.set_title(title, fontsize=10)
  axes.set_xlabel("step")
  axes.set_ylabel(name.lower())
  axes.grid(True, color="#dddddd", linewidth=0.6)
  axes.set_axisbelow(True)
  for side in ("top", "right"):
    axes.spines[side].set_visible(False)
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  if name == "Accuracy":
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1.0))
  elif name == "Learning rate":
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
  if len(members) > 1:
    axes.legend(fontsize=8, frameon=False)


def _key_label(key: str) -> str:
  return {"top1": "top-1", "top5": "top-5"}.get(key, key)


def _running_mean(values: np.ndarray) -> np.ndarray:
  """Centred mean over about a thirtieth of the points; non-finite ones are left out."""
  window = max(len(values) // 30, 3) | 1
  finite = np.isfinite(values)
  kernel = np.ones(window)
  total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
  count = np.convolve(finite.astype(float), kernel, mode="same")
  return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _displayable(image: np.ndarray) -> np.ndarray:
  if image.dtype == np.uint8:
    return image
  image = np.asarray(image, np.float32)
  low, high = float(image.min()), float(image.max())
  if low < 0.0 or high > 1.0:
    image = (image - low) / max(high - low, 1e-6)
  return image


def _short(name: str) -> str:
  return name if len(name) <= 18 else name[:17].rstrip() + "…"


def _save(figure: Figure, png: str | Path) -> None:
  Path(png).parent.mkdir(parents=True, exist_ok=True)
  # Without matplotlib's version in it, the file depends on what it shows only.
  figure.savefig(png, format="png", metadata={"Software": None})
