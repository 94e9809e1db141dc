"""Where figures go besides metrics.jsonl: TensorBoard, a CSV, Weights & Biases, MLflow.

Each is a small class of one shape; the libraries of the last two are imported when they are asked
for and belong to no extra of the package.
"""

from __future__ import annotations

import csv
import importlib
import io
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from etils import epath

from hybrid_vit.line_files import LineFile
from hybrid_vit.workdir import explain

SINKS = ("tensorboard", "csv", "wandb", "mlflow")


class Sink(Protocol):
  """Takes figures of steps."""

  def scalars(self, step: int, values: Mapping[str, float], kind: str) -> None:
    """Figures of one step; `kind` is "train", "eval/<set>" or "timing"."""
    ...

  def text(self, name: str, text: str, step: int) -> None:
    """A page of text, such as the configuration."""
    ...

  def close(self) -> None:
    """Writes what is left."""
    ...


def create_sink(
  name: str, workdir: epath.Path, start_step: int, run_config: Mapping[str, Any]
) -> Sink:
  """Opens a sink.

  Args:
    name: one of `SINKS`.
    workdir: of the run, whose name the services show.
    start_step: from which a resumed run goes on.
    run_config: its configuration.

  Raises:
    ValueError: an unknown name, or a library that is not installed.
  """
  makers: dict[str, Callable[..., Sink]] = {
    "tensorboard": TensorBoard,
    "csv": Csv,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
  }
  if name not in makers:
    raise ValueError(f"`config.sinks` names {name!r}; there are: {', '.join(SINKS)}")
  return makers[name](workdir, start_step, run_config)


def stays(step: int, kind: str, start_step: int) -> bool:
  """Whether a run that goes on from `start_step` will not write this figure again.

  What was evaluated at that step is evaluated again.
  """
  return step <= (start_step - 1 if kind.startswith("eval/") else start_step) and start_step > 0


class TensorBoard:
  """Event files in `workdir`/tensorboard, written by the thread that trains.

  `tensorboardX.SummaryWriter` has a thread of its own, which ends where the disk is full, and the
  training then waits for it for ever; so only its format is taken. Where nothing can be written,
  that is said once, and figures go on in the other files.
  """

  _FLUSH_SECONDS = 120.0

  def __init__(self, workdir: epath.Path, start_step: int, run_config: Mapping[str, Any]):
    del run_config
    from tensorboardX import event_file_writer, record_writer, summary
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    self._place, self._summary, self._event = workdir / "tensorboard", summary, Event
    self._flushed = time.monotonic()
    record_writer.directory_check(os.fspath(self._place))
    self._writer: Any = event_file_writer.EventsWriter(os.fspath(self._place / "events"))
    # Tells TensorBoard to forget what an earlier run wrote beyond the restored step.
    first = start_step + 1 if start_step else 0
    self._write(Event(step=first, session_log=SessionLog(status=SessionLog.START)))
    self._flush()

  def scalars(self, step: int, values: Mapping[str, float], kind: str) -> None:
    """See `Sink`."""
    for key, value in values.items():
      self._add(self._summary.scalar(f"{kind}/{key}", value), step)
    if time.monotonic() - self._flushed >= self._FLUSH_SECONDS:
      self._flush()

  def text(self, name: str, text: str, step: int) -> None:
    """See `Sink`."""
    self._add(self._summary.text(name, f"```json\n{text}\n```"), step)

  def close(self) -> None:
    """See `Sink`."""
    self._guarded(lambda: self._writer.close())
    self._writer = None

  def _add(self, summary: Any, step: int) -> None:
    self._write(self._event(wall_time=time.time(), step=step, summary=summary))

  def _write(self, event: Any) -> None:
    self._guarded(lambda: self._writer.write_event(event))

  def _flush(self) -> None:
    self._flushed = time.monotonic()
    self._guarded(lambda: self._writer.flush())

  def _guarded(self, write: Callable[[], Any]) -> None:
    if self._writer is None:
      return
    try:
      write()
    except OSError as error:
      self._writer = None
      logging.warning(
        "%s: figures go on in metrics.jsonl alone: %s", self._place, explain(error) or error
      )


class Csv:
  """`workdir`/metrics.csv: a row for each figure, "step,kind,name,value"."""

  def __init__(self, workdir: epath.Path, start_step: int, run_config: Mapping[str, Any]):
    del run_config

    def keep(line: bytes) -> bool:
      row = next(csv.reader([line.decode(errors="replace")]))
      is_row = len(row) == 4 and row[0].isdecimal()
      return is_row and stays(int(row[0]), row[1], start_step)

    self._file = LineFile(workdir / "metrics.csv", keep, header="step,kind,name,value")

  def scalars(self, step: int, values: Mapping[str, float], kind: str) -> None:
    """See `Sink`."""
    rows = io.StringIO()
    csv.writer(rows, lineterminator="\n").writerows(
      # A name on one line, so that a line is a row.
      (step, kind, " ".join(key.split()), repr(value))
      for key, value in values.items()
    )
    self._file.write(rows.getvalue())

  def text(self, name: str, text: str, step: int) -> None:
    """Nothing: a table has no pages."""

  def close(self) -> None:
    """See `Sink`."""
    self._file.close()


class WeightsAndBiases:
  """A run of Weights & Biases, called as the work directory is; its own settings are wandb's.

  Its identity is in `workdir`/wandb_id.txt, so that a resumed run goes on with it.
  """

  def __init__(self, workdir: epath.Path, start_step: int, run_config: Mapping[str, Any]):
    wandb = _library("wandb")
    kept = workdir / "wandb_id.txt"
    known = _known(kept, start_step)
    self._run = wandb.init(name=workdir.name, id=known, resume="allow", config=dict(run_config))
    kept.write_text(f"{self._run.id}\n")

  def scalars(self, step: int, values: Mapping[str, float], kind: str) -> None:
    """See `Sink`."""
    self._run.log({f"{kind}/{key}": value for key, value in values.items()}, step=step)

  def text(self, name: str, text: str, step: int) -> None:
    """Nothing: the configuration is the run's own."""

  def close(self) -> None:
    """See `Sink`."""
    self._run.finish()


class MLflow:
  """A run of MLflow, called as the work directory is; the server is MLFLOW_TRACKING_URI's.

  Its identity is in `workdir`/mlflow_id.txt, so that a resumed run goes on with it.
  """

  def __init__(self, workdir: epath.Path, start_step: int, run_config: Mapping[str, Any]):
    del run_config
    self._mlflow = _library("mlflow")
    kept = workdir / "mlflow_id.txt"
    known = _known(kept, start_step)
    run = self._mlflow.start_run(run_id=known, run_name=workdir.name)
    kept.write_text(f"{run.info.run_id}\n")

  def scalars(self, step: int, values: Mapping[str, float], kind: str) -> None:
    """See `Sink`."""
    self._mlflow.log_metrics({f"{kind}/{key}": value for key, value in values.items()}, step=step)

  def text(self, name: str, text: str, step: int) -> None:
    """See `Sink`."""
    self._mlflow.log_text(text, f"{name}.json")

  def close(self) -> None:
    """See `Sink`."""
    self._mlflow.end_run()


def _known(kept: epath.Path, start_step: int) -> str | None:
  """The identity to go on with; one that begins anew gets a new one."""
  return kept.read_text().strip() if start_step and kept.exists() else None


def _library(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise ValueError(
      f"`config.sinks` names {name!r}, which is not installed: pip install {name}"
    ) from error
