"""The files of a run: exact after a resume, never shortened without a copy, valid JSON."""

import json
import math
import re
import resource

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybrid_vit import line_files, reporting
from hybrid_vit.reporting import Reporter, read_metrics
from hybrid_vit.workdir import explain


def quiet(workdir, **arguments):
  return Reporter(workdir, 100, sinks=(), progress=False, **arguments)


def write_steps(reporter, first, last):
  for step in range(first, last + 1):
    reporter.scalars(step, {"loss": 1 / step, "learning_rate": 0.1}, kind="train")
    if step % 5 == 0:
      reporter.scalars(step, {"top1": step / 100}, kind="eval/validation")
    reporter.timing(step, {"examples_per_second": 100.0})


def test_resumed_file_equals_an_unbroken_one_byte_for_byte(tmp_path):
  reporter = quiet(tmp_path / "unbroken")
  write_steps(reporter, 1, 20)
  reporter.close()

  reporter = quiet(tmp_path / "killed")
  write_steps(reporter, 1, 13)
  reporter.close()
  with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
    file.write('{"step": 14, "kind": "tra')
  reporter = quiet(tmp_path / "killed", start_step=10)
  # What was evaluated at the restored step is evaluated again.
  reporter.scalars(10, {"top1": 0.1}, kind="eval/validation")
  write_steps(reporter, 11, 20)
  reporter.close()

  unbroken = (tmp_path / "unbroken" / "metrics.jsonl").read_bytes()
  assert (tmp_path / "killed" / "metrics.jsonl").read_bytes() == unbroken
  assert len(unbroken.splitlines()) == 24
  # Timings stay apart, and are cut alike.
  timings = read_metrics(tmp_path / "killed" / "timings.jsonl")
  assert [line["step"] for line in timings] == list(range(1, 21))


def test_a_torn_last_line_is_dropped_even_if_it_lies_before_the_restored_step(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 2.0}\n{"step": 2,')
  quiet(tmp_path, start_step=5).close()
  assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1]


@pytest.mark.parametrize("sinks", [(), ("csv",)])
def test_what_is_shortened_is_kept_as_it_was(tmp_path, capsys, sinks):
  names = ["metrics.jsonl", "timings.jsonl", *(["metrics.csv"] if sinks else [])]

  def contents(suffix=""):
    return [(tmp_path / (name + suffix)).read_bytes() for name in names]

  def run(start_step, first, last):
    reporter = Reporter(tmp_path, 100, start_step, progress=False, sinks=sinks)
    write_steps(reporter, first, last)
    reporter.close()
    return contents()

  first = run(0, 1, 14)
  assert run(14, 15, 13) == first  # nothing to cut, no copy
  assert not list(tmp_path.glob("*.1"))
  second = run(9, 10, 12)
  assert contents(".1") == first
  # A new beginning in the same directory.
  run(0, 1, 2)
  assert contents(".1") == first and contents(".2") == second
  assert "goes on from step 9; as it was it is kept as metrics.jsonl.1\n" in (
    capsys.readouterr().out
  )
  assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_damaged_line_is_cut_out_and_kept_in_the_copy(tmp_path):
  text = '{"step": 1, "kind": "train"}\nnonsense\n[3]\n{"step": 2, "kind": "train"}\n'
  (tmp_path / "metrics.jsonl").write_text(text)
  quiet(tmp_path, start_step=2).close()
  assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
  assert (tmp_path / "metrics.jsonl.1").read_text() == text


@pytest.mark.parametrize(("most", "name"), [(24, "metrics.jsonl"), (8, "metrics.jsonl.1")])
def test_a_file_that_cannot_be_written_is_named(tmp_path, most, name):
  """A limit of the system on files: what any user can set, as a full disk cannot be."""
  path, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
  path.write_text('{"step": 1}\n{"step": 2}\n')
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
    with pytest.raises(OSError) as error:
      file = line_files.LineFile(path, (lambda line: b"1" in line) if most == 8 else None)
      file.write("a third line\n")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert explain(error.value).startswith(f"{tmp_path / name}: a file grows")


def test_messages_are_kept_in_a_log_with_the_time(tmp_path):
  for text in ("first", "second"):
    reporter = quiet(tmp_path)
    reporter.message(text)
    reporter.close()
  lines = (tmp_path / "log.txt").read_text().splitlines()
  assert [line[20:] for line in lines] == ["first", "second"]
  assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", line[:19]) for line in lines)


def test_an_object_store_gets_whole_files_now_and_then_and_at_the_end(tmp_path, monkeypatch):
  monkeypatch.setattr(line_files, "is_remote", lambda path: True)
  monkeypatch.setattr(line_files, "_UPLOAD_SECONDS", math.inf)
  reporter = quiet(tmp_path)
  write_steps(reporter, 1, 7)
  assert (tmp_path / "metrics.jsonl").read_bytes() == b""
  monkeypatch.setattr(line_files, "_UPLOAD_SECONDS", 0.0)
  write_steps(reporter, 8, 8)
  assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 8

  def fail(*args):
    raise OSError("not now")

  with monkeypatch.context() as patch:
    patch.setattr(type(line_files.epath.Path()), "write_text", fail)
    write_steps(reporter, 9, 9)
  write_steps(reporter, 10, 10)
  reporter.close()
  reporter.close()
  quiet(tmp_path, start_step=10).close()
  train = [line for line in read_metrics(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
  assert [line["step"] for line in train] == list(range(1, 11))


def test_lines_are_on_disk_at_once_and_hold_plain_numbers(tmp_path):
  reporter = quiet(tmp_path)
  reporter.scalars(np.int64(3), {"loss": np.float32(0.5), "top1": np.array(1)}, kind="train")
  line = (tmp_path / "metrics.jsonl").read_text()
  assert line == '{"step": 3, "kind": "train", "loss": 0.5, "top1": 1.0}\n'
  reporter.close()


def test_numbers_that_are_not_finite_stay_valid_json_and_come_back(tmp_path):
  reporter = Reporter(tmp_path, 10, progress=False)
  reporter.scalars(1, {"a": math.nan, "b": math.inf, "c": -math.inf}, kind="train")
  reporter.close()

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
  assert line == {"step": 1, "kind": "train", "a": "nan", "b": "inf", "c": "-inf"}
  (back,) = read_metrics(tmp_path / "metrics.jsonl")
  assert math.isnan(back["a"]) and back["b"] == math.inf and back["c"] == -math.inf


@pytest.mark.parametrize("name", ["step", "kind"])
def test_names_of_the_lines_own_fields_are_refused(tmp_path, name):
  reporter = quiet(tmp_path)
  with pytest.raises(ValueError, match=f"'{name}' is the name of a field"):
    reporter.scalars(1, {name: 1.0}, kind="train")
  reporter.close()


def test_tensorboard_reads_what_was_written(tmp_path):
  reporter = Reporter(tmp_path, 10, progress=False, run_config={"lr": 0.1, "model": {"name": "m"}})
  reporter.scalars(2, {"loss": 0.25}, kind="train")
  reporter.scalars(2, {"top1": 0.5}, kind="eval/validation")
  reporter.timing(2, {"examples_per_second": 640.0})
  reporter.close()
  reporter.close()
  events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
  for tag, value in (
    ("train/loss", 0.25),
    ("eval/validation/top1", 0.5),
    ("timing/examples_per_second", 640.0),
  ):
    (event,) = events.Scalars(tag)
    assert (event.step, event.value) == (2, value)
  assert json.loads((tmp_path / "config.json").read_text())["model"] == {"name": "m"}


def test_plain_lines_come_every_ten_seconds_with_the_time_left(tmp_path, monkeypatch, capsys):
  clock = iter([0.0, 4.0, 11.0, 12.0, 15.0])
  monkeypatch.setattr("hybrid_vit.reporting.time.monotonic", lambda: next(clock))
  reporter = Reporter(tmp_path, 100, start_step=50, sinks=())
  for step in (60, 64, 71, 72, 100):
    reporter.progress(step, loss=0.5, rate="1,234 examples/s, 7% waiting for data")
  reporter.message("saved")
  reporter.close()
  assert capsys.readouterr().out.splitlines() == [
    "step 60/100: loss 0.5000, 1,234 examples/s, 7% waiting for data",
    # 11 steps in 11 s since the first line: 29 more take 29 s.
    "step 71/100: loss 0.5000, 1,234 examples/s, 7% waiting for data, 0:29 left",
    "step 100/100: loss 0.5000, 1,234 examples/s, 7% waiting for data",
    "saved",
  ]


def test_a_terminal_gets_a_bar_and_messages_beside_it(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
  reporter = Reporter(tmp_path, 100, start_step=40, sinks=())
  reporter.progress(70, loss=None, rate="10 examples/s", phase="phase 2/3")
  reporter.message("evaluated")
  reporter.close()
  captured = capsys.readouterr()
  assert captured.out == "evaluated\n"
  assert "70/100" in captured.err and "phase 2/3, 10 examples/s" in captured.err


def test_no_progress_is_shown_when_not_asked_for(tmp_path, capsys):
  reporter = quiet(tmp_path)
  reporter.progress(100, loss=0.5, rate="1 examples/s")
  reporter.close()
  captured = capsys.readouterr()
  assert captured.out == "" and captured.err == ""


def test_durations_are_written_as_a_clock():
  assert reporting._duration(59.6) == "1:00"
  assert reporting._duration(3725) == "1:02:05"


@pytest.mark.parametrize("damaged", [b'{"step": 3, "ki', b'{"kind": "train"}', b"[1]", b"\xff"])
def test_a_damaged_line_that_is_read_is_named(tmp_path, damaged):
  path = tmp_path / "metrics.jsonl"
  path.write_bytes(b'{"step": 1, "loss": "nan"}\n' + damaged + b'\n{"step": 4}\n')
  with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is damaged"):
    read_metrics(path)
