"""Where figures go besides metrics.jsonl: TensorBoard, a CSV, Weights & Biases, MLflow.

Each is a small class of one shape; the libraries of the last two are imported when they are asked
for and belong to no extra of the package.
"""

from __future__ import annotations

import csv
import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from etils import epath

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


class TensorBoard:
  """Event files in `workdir`/tensorboard."""

  def __init__(self, workdir: epath.Path, start_step: int, run_config: Mapping[str, Any]):
    del run_config
    import tensorboardX

    self._writer = tensorboardX.SummaryWriter(
      os.fspath(workdir / "tensorboard"),
      # Tells TensorBoard to forget what an interrupted run wrote beyond the restored step.
      purge_step=start_step + 1 if start_step else None,
    )

  def scalars(self, step: int, values: Mapping[str, float], kind: str) -> None:
    """See `Sink`."""
    for key, value in values.items():
      self._writer.add_scalar(f"{kind}/{key}", value, step)

  def text(self, name: str, text: str, step: int) -> None:
    """See `Sink`."""
    self._writer.add_text(name, f"```json\n{text}\n```", step)

  def close(self) -> None:
    """See `Sink`."""
    self._writer.close()


class Csv:
  """`workdir`/metrics.csv: a row for each figure, "step,kind,name,value"."""

  def __init__(self, workdir: epath.Path, start_step: int, run_config: Mapping[str, Any]):
    del run_config
    path, rows = workdir / "metrics.csv", []
    if start_step and path.exists():
      with path.open("r") as file:
        rows = [
          row for row in list(csv.reader(file))[1:] if len(row) == 4 and _stays(row, start_step)
        ]
    self._file = path.open("w")
    self._writer = csv.writer(self._file, lineterminator="\n")
    self._writer.writerow(("step", "kind", "name", "value"))
    self._writer.writerows(rows)

  def scalars(self, step: int, values: Mapping[str, float], kind: str) -> None:
    """See `Sink`."""
    self._writer.writerows((step, kind, key, repr(value)) for key, value in values.items())
    self._file.flush()

  def text(self, name: str, text: str, step: int) -> None:
    """Nothing: a table has no pages."""

  def close(self) -> None:
    """See `Sink`."""
    self._file.close()


def _stays(row: list[str], start_step: int) -> bool:
  """Whether a resumed run will not write this row again."""
  last = start_step - 1 if row[1].startswith("eval/") else start_step
  return row[0].isdecimal() and int(row[0]) <= last


class WeightsAndBiases:
  """A run of Weights & Biases, called as the work directory is; its own settings are wandb's."""

  def __init__(self, workdir: epath.Path, start_step: int, run_config: Mapping[str, Any]):
    del start_step
    wandb = _library("wandb")
    # The same identity when the run goes on.
    self._run = wandb.init(
      name=workdir.name, id=workdir.name, resume="allow", config=dict(run_config)
    )

  def scalars(self, step: int, values: Mapping[str, float], kind: str) -> None:
    """See `Sink`."""
    self._run.log({f"{kind}/{key}": value for key, value in values.items()}, step=step)

  def text(self, name: str, text: str, step: int) -> None:
    """Nothing: the configuration is the run's own."""

  def close(self) -> None:
    """See `Sink`."""
    self._run.finish()


class MLflow:
  """A run of MLflow, called as the work directory is; the server is MLFLOW_TRACKING_URI's."""

  def __init__(self, workdir: epath.Path, start_step: int, run_config: Mapping[str, Any]):
    del start_step, run_config
    self._mlflow = _library("mlflow")
    self._mlflow.start_run(run_name=workdir.name)

  def scalars(self, step: int, values: Mapping[str, float], kind: str) -> None:
    """See `Sink`."""
    self._mlflow.log_metrics({f"{kind}/{key}": value for key, value in values.items()}, step=step)

  def text(self, name: str, text: str, step: int) -> None:
    """See `Sink`."""
    self._mlflow.log_text(text, f"{name}.json")

  def close(self) -> None:
    """See `Sink`."""
    self._mlflow.end_run()


def _library(name: str) -> Any:
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise ValueError(
      f"`config.sinks` names {name!r}, which is not installed: pip install {name}"
    ) from error
