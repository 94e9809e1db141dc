"""Where figures go besides metrics.jsonl; the services are stood in for by modules of ours."""

import csv
import errno
import sys
import types

import pytest

from hybrid_vit import sinks
from hybrid_vit.paths import as_path
from hybrid_vit.reporting import Reporter
from hybrid_vit.sinks import SINKS, create_sink

CONFIG = {"seed": 3}


def reporter(workdir, start_step=0, sinks=()):
  return Reporter(workdir, 9, start_step, progress=False, run_config=CONFIG, sinks=sinks)


def rows(workdir):
  with (workdir / "metrics.csv").open(newline="") as file:
    return list(csv.DictReader(file))


def test_a_table_takes_names_that_come_later(tmp_path):
  one = reporter(tmp_path, sinks=["csv"])
  one.scalars(1, {"loss": 0.1}, kind="train")
  one.scalars(1, {"loss": 0.5, "top1": float("nan")}, kind="eval/test")
  one.scalars(2, {'a,"b"\nc': 2.0, "loss": 1e-30}, kind="train")
  one.close()
  two = reporter(tmp_path, 2, sinks=["csv"])
  two.scalars(3, {"new": 1.0}, kind="train")
  two.close()
  found = rows(tmp_path)
  assert [(r["step"], r["kind"], r["name"], r["value"]) for r in found] == [
    ("1", "train", "loss", "0.1"),
    ("1", "eval/test", "loss", "0.5"),
    ("1", "eval/test", "top1", "nan"),
    ("2", "train", 'a,"b" c', "2.0"),
    ("2", "train", "loss", "1e-30"),
    ("3", "train", "new", "1.0"),
  ]
  assert not (tmp_path / "metrics.csv.1").exists()


def test_a_resumed_table_has_each_figure_once(tmp_path):
  one = reporter(tmp_path, sinks=["csv"])
  for step in (1, 2, 3):
    one.scalars(step, {"loss": 1.0}, kind="train")
    one.scalars(step, {"top1": 1.0}, kind="eval/test")
  one.close()
  with (tmp_path / "metrics.csv").open("a") as file:
    file.write("4,train,lo")
  two = reporter(tmp_path, 2, sinks=["csv"])
  two.scalars(2, {"top1": 1.0}, kind="eval/test")
  two.close()
  assert [(r["step"], r["kind"]) for r in rows(tmp_path)] == [
    (step, kind) for step in "12" for kind in ("train", "eval/test")
  ]
  assert (tmp_path / "metrics.csv.1").read_text().endswith("3,eval/test,top1,1.0\n4,train,lo")


def test_an_unknown_sink_is_told_in_one_sentence(tmp_path):
  with pytest.raises(ValueError) as error:
    create_sink("wandbb", as_path(tmp_path), 0, {})
  assert str(error.value) == (
    "`config.sinks` names 'wandbb'; there are: tensorboard, csv, wandb, mlflow"
  )


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_library_that_is_not_there_is_named_with_its_remedy(tmp_path, monkeypatch, name):
  monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(ValueError) as error:
    create_sink(name, as_path(tmp_path), 0, {})
  assert str(error.value) == (
    f"`config.sinks` names {name!r}, which is not installed: pip install {name}"
  )


class Recorder:
  """A service that knows runs by their identity, and what was sent to it."""

  def __init__(self):
    self.calls, self.runs = [], 0

  def begin(self, known, name):
    if known is None:
      self.runs += 1
      known = f"id{self.runs}"
    self.calls.append(("begin", known, name))
    return known


@pytest.fixture
def wandb(monkeypatch):
  """Weights & Biases as far as it is used."""
  service = Recorder()

  def init(name, id, resume, config):
    assert resume == "allow" and config == CONFIG
    return types.SimpleNamespace(
      id=service.begin(id, name),
      log=lambda values, step: service.calls.append(("log", values, step)),
      finish=lambda: service.calls.append(("end",)),
    )

  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  return service


@pytest.fixture
def mlflow(monkeypatch):
  """MLflow as far as it is used."""
  service = Recorder()

  def start_run(run_id, run_name):
    identity = service.begin(run_id, run_name)
    return types.SimpleNamespace(info=types.SimpleNamespace(run_id=identity))

  module = types.SimpleNamespace(
    start_run=start_run,
    log_metrics=lambda values, step: service.calls.append(("log", values, step)),
    log_text=lambda text, name: service.calls.append(("text", name)),
    end_run=lambda: service.calls.append(("end",)),
  )
  monkeypatch.setitem(sys.modules, "mlflow", module)
  return service


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_service_gets_every_figure_and_goes_on_with_its_run(tmp_path, request, name):
  service = request.getfixturevalue(name)
  workdir = tmp_path / "my_run"
  for start_step in (0, 5, 0):
    one = reporter(workdir, start_step, sinks=[name])
    one.scalars(6, {"loss": 0.5}, kind="train")
    one.timing(6, {"examples_per_second": 2.0})
    one.close()
    one.close()
  calls = [call for call in service.calls if call[0] != "text"]
  log = [("log", {"train/loss": 0.5}, 6), ("log", {"timing/examples_per_second": 2.0}, 6), ("end",)]
  # Gone on with where the run goes on, new where it begins anew.
  assert calls == [
    ("begin", "id1", "my_run"), *log,
    ("begin", "id1", "my_run"), *log,
    ("begin", "id2", "my_run"), *log,
  ]  # fmt: skip
  assert name == "wandb" or ("text", "config.json") in service.calls


def test_any_sink_of_the_interface_is_served(tmp_path, monkeypatch):
  seen = []

  class Own:
    def scalars(self, step, values, kind):
      seen.append((step, dict(values), kind))

    def text(self, name, text, step):
      seen.append((name, step))

    def close(self):
      seen.append("closed")

  monkeypatch.setattr(sinks, "TensorBoard", lambda *arguments: Own())
  one = reporter(tmp_path, 4, sinks=["tensorboard"])
  one.scalars(5, {"loss": 0.5}, kind="train")
  one.timing(5, {"rate": 2})
  one.close()
  assert seen == [
    ("config", 4),
    (5, {"loss": 0.5}, "train"),
    (5, {"rate": 2.0}, "timing"),
    "closed",
  ]
  assert SINKS == ("tensorboard", "csv", "wandb", "mlflow")


def test_a_board_that_cannot_be_written_stops_no_training(tmp_path, monkeypatch, caplog):
  """A disk that is full for a while: many more figures than a queue would hold."""
  board = sinks.TensorBoard(tmp_path, 0, {})

  def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr(board._writer, "flush", full)
  monkeypatch.setattr(board, "_FLUSH_SECONDS", 0.0)
  for step in range(100):
    board.scalars(step, {"loss": 1.0}, "train")
  board.close()
  assert caplog.text.count("figures go on in metrics.jsonl alone: the disk is full") == 1
