"""One table of several sets and sizes, raw and averaged weights."""

import csv

import jax
import numpy as np
import pytest

from hybrid_vit import main
from hybrid_vit.checkpoints import load_weights
from hybrid_vit.config import Config
from hybrid_vit.tools import evaluate_sets
from tests.test_build import local


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A work directory of digits with averaged weights."""
  workdir = tmp_path_factory.mktemp("sets") / "run"
  config = local(total_epochs=1, ema_decay=0.5, sinks=(), data__batch_size=256)
  config = Config(config.resolved() | {"total_epochs": 2})
  main.train(config, workdir)
  return workdir


def test_raw_and_averaged_weights_of_a_state(run):
  averaged, about = load_weights(run / "checkpoints")
  raw, about_raw = load_weights(run, raw=True)
  assert "averaged" in about["weights"] and "averaged" not in about_raw["weights"]
  kernels = [w["params"]["head"]["kernel"] for w in (averaged, raw)]
  assert not np.array_equal(*kernels)
  jax.tree.map(np.testing.assert_array_equal, averaged, load_weights(run)[0])


def test_a_row_for_each(run, tmp_path, capsys):
  arguments = [f"--weights={run}", "--sizes=32,40", "--set=digits", "--set=again=digits"]
  assert evaluate_sets.main([*arguments, f"--table={tmp_path / 'out' / 'v1.0'}"]) == 0
  assert "digits at 40: top-1" in capsys.readouterr().out
  rows = list(csv.DictReader((tmp_path / "out" / "v1.0.csv").open()))
  assert [(row["weights"], row["size"], row["set"]) for row in rows] == [
    (weights, size, name)
    for weights in ("averaged", "raw")
    for size in ("32", "40")
    for name in ("digits", "again")
  ]
  assert all(row["examples"] == "360.0" for row in rows)
  # At the weights' own size the figures are those of the training's last evaluation.
  _, metadata = load_weights(run)
  assert float(rows[0]["top1"]) == metadata["results"]["validation/top1"]
  lines = (tmp_path / "out" / "v1.0.md").read_text().splitlines()
  assert lines[0].startswith("| weights | size | set | examples | top1 | top5 |")
  assert len(lines) == 2 + len(rows) and "%" in lines[2]


def test_bad_input_is_one_paragraph(run, capsys):
  for arguments, message in (
    ([], "nothing to evaluate on"),
    (["--set=digits", "--set=digits"], "two sets are called 'digits'"),
    (["--set=imagenet_a:/not/there"], "was looked for"),
    (["--set=digits", "--batch_size=0"], "must be at least 1"),
    (["--imagenet_c=/not/there"], "ImageNet-C was looked for"),
  ):
    assert evaluate_sets.main([f"--weights={run}", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ")


def test_names_of_sets():
  given = ["imagenet_real:/val?labels=/real.json", "a=folder:/x", "folder:/y"]
  assert evaluate_sets._sets(given, None) == {
    "imagenet_real": "imagenet_real:/val?labels=/real.json",
    "a": "folder:/x",
    "folder:/y": "folder:/y",
  }
