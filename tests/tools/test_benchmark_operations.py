"""The command over all operations at tiny sizes: its files, and that all forms agree."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from hybrid_vit.tools import benchmark_operations
from hybrid_vit.tools.operation_cases import SMALL, all_cases

_CASES = list(all_cases(SMALL))


def test_command_and_its_files(tmp_path, capsys):
  out = tmp_path / "results" / "small"
  arguments = ["--small", "--rounds=1", "--operations", "nms", "roi_align", f"--out={out}"]
  assert benchmark_operations.main(arguments) == 0
  stored = json.loads(out.with_suffix(".json").read_text())
  rows = stored["rows"]
  assert stored["command"].endswith(" ".join(arguments)) and stored["rounds"] == 1
  assert {row["operation"] for row in rows} == {"nms", "roi_align"}
  assert {row["way"] for row in rows if row["operation"] == "roi_align"} == {
    "forward", "with gradient",
  }  # fmt: skip
  assert all(row["ms"] > 0 and row["ratio"] > 0 for row in rows)
  assert [row["ratio"] for row in rows if row["form"] == row["ratio_to"]] == [1.0] * 5
  lines = out.with_suffix(".md").read_text().splitlines()
  assert lines[0].strip() == stored["command"] and stored["date"] in lines[2]
  assert len([line for line in lines if line.startswith("|")]) == 2 + len(rows)
  assert not out.with_suffix(".csv").exists()
  assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_unknown_operations_are_named(capsys):
  with pytest.raises(SystemExit):
    benchmark_operations.main(["--small", "--operations", "sorting"])
  assert "unknown operation 'sorting'" in capsys.readouterr().err


@pytest.mark.parametrize("case", _CASES, ids=lambda case: f"{case.operation}, {case.label}")
def test_forms_of_a_case_are_the_same_operation(case):
  answers = {name: jax.jit(form)(*case.arguments) for name, form in case.forms.items()}
  reference = answers[case.default]
  for name, answer in answers.items():
    for found, expected in zip(jax.tree.leaves(answer), jax.tree.leaves(reference)):
      np.testing.assert_allclose(found, expected, atol=1e-4, err_msg=name)


def test_compiling_for_a_topology(tmp_path, capsys):
  out = tmp_path / "v5e"
  arguments = ["--small", "--topology=v5e:2x2", "--operations", "nms", "--forms", "level by level"]
  if importlib.util.find_spec("libtpu") is None:
    assert benchmark_operations.main(arguments) == 1
    assert "pip install 'jax[tpu]'" in capsys.readouterr().err
    pytest.skip("libtpu is not installed: pip install 'jax[tpu]'")
  assert benchmark_operations.main([*arguments, f"--out={out}"]) == 0
  (row,) = json.loads(out.with_suffix(".json").read_text())["rows"]
  assert row["fits"] and row["mcycles"] > 0 and "sort" in row["not_estimated"]
