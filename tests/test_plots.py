"""Curves and pictures: what they show, and that no name stops them."""

import logging
import math
import warnings

import numpy as np
import pytest
from PIL import Image

from hybrid_vit import plots
from hybrid_vit.plots import plot_curves, plot_predictions
from hybrid_vit.reporting import Reporter

# Names of class folders and of measures that formulas, lines or fonts could stumble over.
NAMES = [
  "$",
  "$x",
  "$x$",
  "$\\frac{1}$",
  "_^{",
  "\\",
  "\\alpha$^",
  "{}",
  "%",
  "#",
  "&",
  "a\nb",
  "\t\r\n",
  "",
  "_hidden",
  "猫と犬",
  "고양이",
  "🐈",
  "\x00\x07",
  "\udcff",
  "עברית",
  "long " * 400,
  "x" * 4000,
]


def no_warnings(draw):
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    draw()


def test_no_name_of_a_class_stops_a_picture_or_changes_its_size(tmp_path, caplog):
  images = np.zeros((len(NAMES), 8, 8, 3), np.uint8)
  plain, odd = tmp_path / "plain.png", tmp_path / "odd.png"
  right, wrong = [0.5] * len(NAMES), NAMES[1:] + NAMES[:1]
  with caplog.at_level(logging.WARNING):
    no_warnings(
      lambda: plot_predictions(images, ["a"] * len(NAMES), ["b"] * len(NAMES), right, plain)
    )
    assert not caplog.records
    no_warnings(lambda: plot_predictions(images, NAMES, wrong, right, odd))
  assert Image.open(odd).size == Image.open(plain).size
  assert len(caplog.records) <= 1  # one word for all letters without a font


def test_a_formula_is_drawn_as_it_is_spelt(tmp_path):
  images = np.zeros((1, 8, 8, 3), np.uint8)
  pictures = []
  for name in ("$x$", "x"):
    plot_predictions(images, [name], [name], [1.0], tmp_path / "p.png")
    pictures.append((tmp_path / "p.png").read_bytes())
  assert pictures[0] != pictures[1]


def test_no_name_of_a_measure_or_set_stops_the_curves(tmp_path):
  reporter = Reporter(tmp_path, 2, sinks=(), progress=False)
  for step in (1, 2):
    values = dict.fromkeys(NAMES, 1.0 / step)
    reporter.scalars(step, values, kind="train")
    for name in NAMES:
      reporter.scalars(step, {"top1": 0.5, "$": 1.0}, kind=f"eval/{name}")
  reporter.close()
  no_warnings(lambda: plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png"))
  assert Image.open(tmp_path / "curves.png").width > 1000


def test_a_set_whose_name_begins_with_an_underscore_is_in_the_legend(tmp_path, monkeypatch, caplog):
  reporter = Reporter(tmp_path, 1, sinks=(), progress=False)
  for kind in ("train", "eval/_mine"):
    reporter.scalars(1, {"loss": 1.0}, kind=kind)
  reporter.close()
  legends, draw = [], plots._draw_panel

  def record(axes, *arguments):
    draw(axes, *arguments)
    legends.append(
      [text.get_text().strip("\N{ZERO WIDTH SPACE}") for text in axes.get_legend().texts]
    )

  monkeypatch.setattr(plots, "_draw_panel", record)
  plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
  assert legends == [["train", "_mine"]] and not caplog.records


def curves_file(workdir, steps=200):
  generator = np.random.default_rng(0)
  reporter = Reporter(workdir, steps, sinks=(), progress=False)
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
  draw = plots._draw_panel

  def record(axes, name, members, series):
    draw(axes, name, members, series)
    drawn.append((name, axes.get_title(), axes.get_xlabel(), len(axes.lines)))

  monkeypatch.setattr(plots, "_draw_panel", record)
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
  (tmp_path / "metrics.jsonl").touch()
  with pytest.raises(ValueError, match="holds no metrics"):
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")


def test_running_mean_passes_over_what_is_not_finite():
  values = np.array([1.0, 1.0, np.nan, 1.0, 1.0, 4.0])
  np.testing.assert_allclose(plots._running_mean(values), [1, 1, 1, 1, 2, 2.5])


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
  assert share(plots._RIGHT, left) > 1e-3 and share(plots._WRONG, left) == 0
  assert share(plots._WRONG, right) > 1e-3 and share(plots._RIGHT, right) == 0
  # Enlarged without blur: the left picture has its two grey levels, side by side.
  row = left[left.shape[0] * 2 // 3]
  assert (row == 255).all(axis=-1).sum() > 30 and (row == 0).all(axis=-1).sum() > 30


def test_normalised_pictures_are_stretched_to_what_can_be_shown():
  image = np.array([[[-2.0, 0.0, 2.0]]])
  np.testing.assert_allclose(plots.displayable(image), [[[0.0, 0.5, 1.0]]])
  inside = np.array([[[0.1, 0.2, 0.3]]], np.float32)
  np.testing.assert_array_equal(plots.displayable(inside), inside)


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
