"""Backbones with their decoders: what is counted, and the page that holds it."""

import csv
from pathlib import Path

import pytest

from hybrid_vit.dense_systems import dense_systems
from hybrid_vit.tools import summarize_dense

DOCS = Path(__file__).parent.parent.parent / "docs"
COMMAND = "run python -m hybrid_vit.tools.summarize_dense --docs=docs"


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
