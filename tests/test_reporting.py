"""The files of a run: exact after a resume, valid JSON whatever the numbers, pictures readable."""

import json
import math

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hybrid_vit import reporting
from hybrid_vit.reporting import Reporter, plot_curves, plot_predictions, read_metrics


def quiet(workdir, **arguments):
  return Reporter(workdir, 100, tensorboard=False, progress=False, **arguments)


def write_steps(reporter, first, last):
  for step in range(first, last + 1):
    reporter.scalars(step, {"loss": 1 / step, "learning_rate": 0.1}, kind="train")
    if step % 5 == 0:
      reporter.scalars(step, {"top1": step / 100}, kind="eval/validation")
    reporter.timing(step, {"images_per_second": 100.0})


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


def test_a_run_from_the_start_begins_with_empty_files(tmp_path):
  reporter = quiet(tmp_path)
  reporter.scalars(0, {"top1": 0.1}, kind="eval/validation")
  reporter.close()
  quiet(tmp_path).close()
  assert (tmp_path / "metrics.jsonl").read_bytes() == b""


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
  reporter.timing(2, {"images_per_second": 640.0})
  reporter.close()
  reporter.close()
  events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
  for tag, value in (
    ("train/loss", 0.25),
    ("eval/validation/top1", 0.5),
    ("timing/images_per_second", 640.0),
  ):
    (event,) = events.Scalars(tag)
    assert (event.step, event.value) == (2, value)
  assert json.loads((tmp_path / "config.json").read_text())["model"] == {"name": "m"}


def test_plain_lines_come_every_ten_seconds_with_the_time_left(tmp_path, monkeypatch, capsys):
  clock = iter([0.0, 4.0, 11.0, 12.0, 15.0])
  monkeypatch.setattr(reporting.time, "monotonic", lambda: next(clock))
  reporter = Reporter(tmp_path, 100, start_step=50, tensorboard=False)
  for step in (60, 64, 71, 72, 100):
    reporter.progress(step, loss=0.5, images_per_second=1234.0, data_wait_fraction=0.07)
  reporter.message("saved")
  reporter.close()
  assert capsys.readouterr().out.splitlines() == [
    "step 60/100: loss 0.5000, 1,234 images/s, 7% waiting for data",
    # 11 steps in 11 s since the first line: 29 more take 29 s.
    "step 71/100: loss 0.5000, 1,234 images/s, 7% waiting for data, 0:29 left",
    "step 100/100: loss 0.5000, 1,234 images/s, 7% waiting for data",
    "saved",
  ]


def test_a_terminal_gets_a_bar_and_messages_beside_it(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
  reporter = Reporter(tmp_path, 100, start_step=40, tensorboard=False)
  reporter.progress(70, loss=None, images_per_second=10.0, data_wait_fraction=0.0)
  reporter.message("evaluated")
  reporter.close()
  captured = capsys.readouterr()
  assert captured.out == "evaluated\n"
  assert "70/100" in captured.err and "10 images/s" in captured.err


def test_no_progress_is_shown_when_not_asked_for(tmp_path, capsys):
  reporter = quiet(tmp_path)
  reporter.progress(100, loss=0.5, images_per_second=1.0, data_wait_fraction=0.0)
  reporter.close()
  captured = capsys.readouterr()
  assert captured.out == "" and captured.err == ""


def test_durations_are_written_as_a_clock():
  assert reporting._duration(59.6) == "1:00"
  assert reporting._duration(3725) == "1:02:05"


def curves_file(workdir, steps=200):
  generator = np.random.default_rng(0)
  reporter = quiet(workdir)
  for step in range(1, steps + 1):
    loss = 2.3 * math.exp(-step / 50) + 0.5 + 0.1 * generator.normal()
    reporter.scalars(
      step,
      {
        "loss": math.nan if step == 100 else loss,
        "top1": 1 - math.exp(-step / 40),
        "learning_rate": 1e-3 * math.cos(step / steps * math.pi / 2) ** 2,
        "gradient_norm": 1 + generator.random(),
      },
      kind="train",
    )
    if step % 40 == 0:
      top1 = 1 - math.exp(-step / 30)
      reporter.scalars(
        step, {"loss": 0.6 + 1 / step, "top1": top1, "top5": 1.0}, kind="eval/validation"
      )
      reporter.scalars(step, {"loss": 0.7, "top1": top1 * 0.9}, kind="eval/ema")
  reporter.close()
  return workdir / "metrics.jsonl"


def test_curves_are_drawn_panel_by_panel(tmp_path, monkeypatch):
  drawn = []
  draw = reporting._draw_panel

  def record(axes, name, members, series):
    draw(axes, name, members, series)
    drawn.append((name, axes.get_title(), axes.get_xlabel(), len(axes.lines)))

  monkeypatch.setattr(reporting, "_draw_panel", record)
  png = tmp_path / "deep" / "curves.png"
  plot_curves(curves_file(tmp_path), png)
  last = 1 - math.exp(-200 / 30)
  assert drawn == [
    # Train twice (pale and its mean), and two evaluations.
    ("Loss", "Loss", "step", 4),
    ("Accuracy", f"Accuracy (validation top-1 {last:.2%} at the end)", "step", 5),
    ("Learning rate", "Learning rate", "step", 1),
    ("Gradient norm", "Gradient norm", "step", 2),
  ]
  picture = np.asarray(Image.open(png).convert("RGB"))
  assert picture.shape[0] > 800 and picture.shape[1] > 1000
  assert picture.std() > 5


def test_curves_of_an_empty_file_are_refused(tmp_path):
  quiet(tmp_path).close()
  with pytest.raises(ValueError, match="holds no metrics"):
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


def test_running_mean_passes_over_what_is_not_finite():
  values = np.array([1.0, 1.0, np.nan, 1.0, 1.0, 4.0])
  np.testing.assert_allclose(reporting._running_mean(values), [1, 1, 1, 1, 2, 2.5])


def test_predictions_show_each_picture_in_the_colour_of_its_verdict(tmp_path):
  images = np.zeros((2, 4, 4, 3), np.uint8)
  images[0, :, :2] = 255
  png = tmp_path / "predictions.png"
  plot_predictions(images, ["cat", "cat"], ["cat", "dog"], [0.9, 0.6], png)
  picture = np.asarray(Image.open(png).convert("RGB")).astype(int)

  def share(colour, half):
    colour = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.mean(np.abs(half - colour).max(axis=-1) < 24)

  left, right = np.split(picture[:, : picture.shape[1] // 2 * 2], 2, axis=1)
  assert share(reporting._RIGHT, left) > 1e-3 and share(reporting._WRONG, left) == 0
  assert share(reporting._WRONG, right) > 1e-3 and share(reporting._RIGHT, right) == 0
  # Enlarged without blur: the left picture has its two grey levels, side by side.
  row = left[left.shape[0] * 2 // 3]
  assert (row == 255).all(axis=-1).sum() > 30 and (row == 0).all(axis=-1).sum() > 30


def test_normalised_pictures_are_stretched_to_what_can_be_shown():
  image = np.array([[[-2.0, 0.0, 2.0]]])
  np.testing.assert_allclose(reporting._displayable(image), [[[0.0, 0.5, 1.0]]])
  inside = np.array([[[0.1, 0.2, 0.3]]], np.float32)
  np.testing.assert_array_equal(reporting._displayable(inside), inside)


def test_pictures_and_names_that_do_not_fit_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"\[N, H, W, 3\]"):
    plot_predictions(np.zeros((2, 4, 4)), ["a"] * 2, ["a"] * 2, [1.0] * 2, tmp_path / "p.png")
  with pytest.raises(ValueError, match="2 images, but 1 true names"):
    plot_predictions(np.zeros((2, 4, 4, 3)), ["a"], ["a"] * 2, [1.0] * 2, tmp_path / "p.png")


def test_pictures_depend_on_their_content_only(tmp_path):
  metrics = curves_file(tmp_path)
  plot_curves(metrics, tmp_path / "a.png")
  plot_curves(metrics, tmp_path / "b.png")
  assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
