import pathlib

import pytest

from hybrid_vit.models.registry import list_models, model_entry
from hybrid_vit.tools import list_weights
from hybrid_vit.weights.official_files import OBTAINABLE, official_files

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "weights.md"


def test_every_file_is_of_a_registered_architecture():
  registered = {name: model_entry(name).module_class.__module__ for name in list_models()}
  there = {module.rsplit(".", 1)[1] for module in registered.values()}
  for file in official_files():
    # A family that is not built yet cannot have its names.
    if file.family in there:
      assert registered.get(file.architecture) == f"hybrid_vit.models.{file.family}", file


def test_the_rows_are_whole_and_different():
  files = official_files()
  assert len({(f.architecture, f.file) for f in files}) == len(files) > 100
  for file in files:
    assert file.address.startswith("https://") and " " not in file.address, file
    assert file.obtainable in OBTAINABLE, file
    assert file.licence and file.source and "|" not in "".join(vars(file).values()), file
  assert len(official_files("tiny_moat_0*")) == 2


def test_the_page_has_the_table_of_today():
  page = PAGE.read_text(encoding="utf-8")
  command = f"python -m hybrid_vit.tools.list_weights --docs={PAGE.name}"
  assert list_weights.with_table(page) == page, f"run {command}"
  assert list_weights.with_table(page.replace("cvt_13", "cvt_14")) != page
  with pytest.raises(ValueError, match="no lines"):
    list_weights.with_table("a page")


def test_the_command(capsys, tmp_path):
  assert list_weights.main(["cvt_13"]) == 0
  said = capsys.readouterr().out
  assert (
    "cvt_13: CvT-13-224x224-IN-1k.pth" in said and "mirror: transformers: microsoft/cvt-13" in said
  )
  assert list_weights.main(["cvt_99"]) == 1
  assert "'cvt_99'" in capsys.readouterr().err
  page = tmp_path / "weights.md"
  page.write_text(PAGE.read_text(encoding="utf-8").replace("| cvt_13 |", "| cvt_99 |"))
  assert list_weights.main([f"--docs={page}"]) == 0
  assert page.read_text(encoding="utf-8") == PAGE.read_text(encoding="utf-8")
