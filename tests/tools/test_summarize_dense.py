"""Backbones with their decoders: what is counted, and the page that holds it."""

import csv
import re
from pathlib import Path

import jax
import pytest

from hybrid_vit import build, detection_counts
from hybrid_vit.config import Config, load_config
from hybrid_vit.dense_systems import dense_systems
from hybrid_vit.detection_systems import detection_systems
from hybrid_vit.tools import summarize_dense
from hybrid_vit.tools.summarize import count_parameters

DOCS = Path(__file__).parent.parent.parent / "docs"
CONFIGS = DOCS.parent / "configs"
COMMAND = "run python -m hybrid_vit.tools.summarize_dense --docs=docs"
DETECTION_COMMAND = f"{COMMAND} --task=detection"


def rows_of_today():
  text = (DOCS / "dense_models.csv").read_text(encoding="utf-8")
  return list(csv.DictReader(text.splitlines()))


def test_published_figures_on_the_page_are_of_today():
  """Names and what was published; counting everything again would take minutes."""
  rows, systems = rows_of_today(), dense_systems()
  page = (DOCS / "dense_models.md").read_text(encoding="utf-8")
  assert [(row["backbone"], row["decoder"]) for row in rows] == [
    (system.backbone, system.decoder) for system in systems
  ], COMMAND
  for row, system in zip(rows, systems):
    for field, value in (
      ("published_parameters", system.parameters),
      ("published_multiply_adds", system.multiply_adds),
      ("published_mean_iou", system.mean_iou),
      ("published_mean_iou_multi_scale", system.mean_iou_multi_scale),
    ):
      assert (float(row[field]) if row[field] else None) == value, (row["backbone"], field, COMMAND)
    assert f"| {row['backbone']} | {row['decoder']} |" in page, COMMAND
    assert f"| {int(row['parameters']):,} |" in page, COMMAND


@pytest.mark.parametrize("name", ["swin_tiny", "convnext_tiny", "tiny_moat_0"])
def test_a_row_is_what_the_tool_counts(name):
  (system,) = [s for s in dense_systems() if s.backbone == name]
  (row,) = [row for row in rows_of_today() if row["backbone"] == name]
  found = summarize_dense.summarize_dense(system)
  (again,) = csv.DictReader(summarize_dense.as_csv([found]).splitlines())
  assert again == row, COMMAND
  if name == "swin_tiny":
    # Backbone 27,520,698, UPerNet 31,497,366, FCN 923,798.
    assert found.parameters == 59_941_862
  if system.parameters:
    assert found.parameters / 1e6 == pytest.approx(system.parameters, abs=1)
  if system.multiply_adds:
    assert found.multiply_adds / 1e9 == pytest.approx(system.multiply_adds, rel=0.01)


# Detectors, counted anew: parameters and multiply-adds.
EXACT = {
  "swin_coco:mask_rcnn_swin_tiny_1x": 47_794_602,
  "swin_coco:retinanet_swin_tiny_1x": 38_458_606,
  "swin_coco:cascade_mask_rcnn_swin_tiny_3x": 27_520_698 + 58_109_106,
  "revcol_coco:revcol_tiny": None,
  "moat_coco:moat_3": None,
  "smt_coco:dino_smt_s_1x": None,
}
# Where the authors' figures are not what their code has; the page says why.
OTHER_PARAMETERS = {
  ":mask_rcnn_focalnet_(tiny_lrf|(small|base)_[sl]rf)_[13]x": "11, 9, 9, 7 (48.6, 70.8, 72.3",
  "focalnet_huge": "746 million are the network with its classifier",
  "_smt_s_": "a smaller network than the released `smt_s`",
}


def detectors_of_today():
  text = (DOCS / "detection_models.csv").read_text(encoding="utf-8")
  return {row["recipe"]: row for row in csv.DictReader(text.splitlines())}


def test_every_recipe_of_coco_with_published_figures_has_its_row():
  rows, systems = detectors_of_today(), detection_systems()
  assert list(rows) == [system.recipe for system in systems], DETECTION_COMMAND
  page = (DOCS / "detection_models.md").read_text(encoding="utf-8")
  for system in systems:
    row = rows[system.recipe]
    for field, value in (
      ("published_parameters", system.parameters),
      ("published_multiply_adds", system.multiply_adds),
      ("published_box_ap", system.box_ap),
      ("published_mask_ap", system.mask_ap),
      ("source", system.source),
    ):
      assert row[field] == ("" if value is None else str(value)), (system.recipe, field)
    assert f"| {system.recipe} |" in page and f"| {int(row['parameters']):,} |" in page


@pytest.mark.parametrize("recipe", EXACT)
def test_a_detector_is_what_the_tool_counts(recipe):
  (system,) = [s for s in detection_systems() if s.recipe == recipe]
  found = detection_counts.summarize_detection(system)
  (again,) = csv.DictReader(summarize_dense.as_csv([found]).splitlines())
  assert again == detectors_of_today()[recipe], DETECTION_COMMAND
  assert EXACT[recipe] in (None, found.parameters)


@pytest.mark.parametrize("system", detection_systems(), ids=lambda system: system.recipe)
def test_a_detectors_parameters_are_the_published_ones(system):
  """To the published rounding; or where they differ, as the page says."""
  row = detectors_of_today()[system.recipe]
  if not system.parameters:
    return
  places = len(system.parameters.partition(".")[2])
  found = int(row["parameters"]) / 1e6
  # Some round, some cut.
  shown = {f"{found:.{places}f}", f"{int(found * 10**places) / 10**places:.{places}f}"}
  differs = next((p for p in OTHER_PARAMETERS if re.search(p, system.recipe)), None)
  assert (system.parameters in shown) == (differs is None), (system.recipe, found)
  if differs is not None:
    page = (DOCS / "detection_models.md").read_text(encoding="utf-8")
    assert OTHER_PARAMETERS[differs] in page


def test_focalnets_published_millions_are_those_of_other_kernels():
  config = load_config(CONFIGS / "focalnet_coco.py", "mask_rcnn_focalnet_small_srf_1x")
  config.model.arguments.focal_windows = (11, 9, 9, 7)
  (task,), _ = build.build_tasks(
    Config(config), build.DataFacts(), build.preprocessing_of(Config(config)), None
  )
  images = jax.ShapeDtypeStruct((1, 256, 256, 3), "float32")
  shapes = jax.eval_shape(lambda x: task.model.init(jax.random.key(0), x, train=False), images)
  assert round(count_parameters(shapes["params"]) / 1e6, 1) == 70.8


def test_the_command_writes_the_docs_and_names_what_it_does_not_know(tmp_path, monkeypatch, capsys):
  assert summarize_dense.main(["swim_*"]) == 1
  assert "no system has a backbone swim_*: focalnet_tiny_srf" in capsys.readouterr().err
  only = [s for s in dense_systems() if s.backbone == "tiny_moat_0"]
  monkeypatch.setattr(summarize_dense, "dense_systems", lambda: only)
  assert summarize_dense.main([f"--docs={tmp_path / 'docs'}"]) == 0
  assert summarize_dense.main(["tiny_*"]) == 0
  table = capsys.readouterr().out.strip()
  page = (tmp_path / "docs" / "dense_models.md").read_text()
  assert table in page and page.startswith("# Backbones with decoders")
  (row,) = csv.DictReader((tmp_path / "docs" / "dense_models.csv").read_text().splitlines())
  assert row in rows_of_today()
  few = [s for s in detection_systems() if s.recipe == "swin_coco:retinanet_swin_tiny_1x"]
  monkeypatch.setattr(summarize_dense, "detection_systems", lambda: few)
  assert summarize_dense.main(["--task=detection", f"--docs={tmp_path / 'docs'}"]) == 0
  page = (tmp_path / "docs" / "detection_models.md").read_text()
  assert page.startswith("# Detectors") and "| 38,458,606 |" in page
  assert summarize_dense.main(["--task=detection", "*resnet*"]) == 1
  assert "no system has a recipe *resnet*: swin_coco:retinanet" in capsys.readouterr().err
