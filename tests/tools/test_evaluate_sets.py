"""One table of several sets and sizes, raw and averaged weights."""

import csv

import jax
import numpy as np
import pytest

from hybrid_vit import main, recipes
from hybrid_vit.checkpoints import export, load_weights
from hybrid_vit.config import Config
from hybrid_vit.evaluate import evaluate
from hybrid_vit.models.registry import create_model
from hybrid_vit.tools import evaluate_sets
from hybrid_vit.weights.stored import load_network
from tests.models.contract import drawn_variables
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


def test_the_sets_serve_a_configuration_too(tmp_path, capsys):
  from hybrid_vit.data.classes import wordnet_numbers
  from tests.tools.test_predict import photo

  names = wordnet_numbers()
  for part, numbers in (("a", (3, 5)), ("c/snow/1", (3, 5, 9))):
    for number in numbers:
      (tmp_path / part / names[number]).mkdir(parents=True)
      photo(tmp_path / part / names[number] / "x.png", 40, 50, seed=number)
  model = create_model("tiny_moat_0", 1000, **recipes.TINY_MOAT)
  drawn = jax.device_get(drawn_variables(model))
  about = {"name": "tiny_moat_0", "arguments": recipes.TINY_MOAT, "num_classes": 1000}
  export(tmp_path / "w", drawn, about)
  fields = local(model__num_classes=None, init_from=str(tmp_path / "w")).resolved()
  sources = {"a": f"imagenet_a:{tmp_path / 'a'}", "c": f"imagenet_c:{tmp_path / 'c/snow/1'}"}
  sets = {name: {"source": source, "batch_size": 8} for name, source in sources.items()}
  fields["evaluation"], fields["checkpoint"] = {"sets": sets}, {}
  found = evaluate(Config(fields))
  assert found["a/examples"] == 2 and found["c/examples"] == 3
  # Of two classes the own one is among the first five, whatever the weights.
  assert found["a/top5"] == 1.0
  rows = evaluate_sets.evaluate_network(load_network(tmp_path / "w"), sources)
  # The registry's entry prepares other pictures than the configuration does; the rule is the same.
  assert [(row["set"], row["examples"]) for row in rows] == [("a", 2.0), ("c", 3.0)]
  assert rows[0]["top5"] == 1.0
