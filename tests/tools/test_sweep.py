"""`sweep()` beside `get_config`, and its runner: resumed, told apart, a table of results."""

import csv

import pytest

from hybrid_vit.config import ConfigError, load_sweep
from hybrid_vit.tools import sweep

FILE = """
from ml_collections import ConfigDict

def get_config(argument=None):
  return ConfigDict(dict(seed=0, model=dict(name=argument or "a"), rates=(1.0, 2.0)))

def sweep():
  return [
    {"seed": 1},
    {"seed": 2, "model.name": "b", "rates": (0.5,), "optimizer.name": "sgd"},
    ConfigDict(dict(seed=7)),
  ]
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "swept.py"
  path.write_text(FILE)
  return path


def test_fields_are_set_in_what_get_config_returns(file, tmp_path):
  found = load_sweep(file, "c")
  assert [fields for fields, _ in found][2] == {} and found[2][1].to_dict() == {"seed": 7}
  assert found[0][1].to_dict() == {"seed": 1, "model": {"name": "c"}, "rates": (1.0, 2.0)}
  assert found[1][1].to_dict() == {
    "seed": 2, "model": {"name": "b"}, "rates": (0.5,), "optimizer": {"name": "sgd"}
  }  # fmt: skip
  file.write_text(
    FILE.replace("sweep()", "sweep(argument)").replace("[", "[{'seed': argument},", 1)
  )
  assert load_sweep(file, "5")[0][1].seed == 5
  file.write_text(FILE.replace("def sweep", "def swept"))
  with pytest.raises(ConfigError, match=r"has no `sweep\(\)`"):
    load_sweep(file)
  file.write_text(FILE.replace('{"seed": 1}', "3"))
  with pytest.raises(ConfigError, match="entry 0 is 3; a dict of fields"):
    load_sweep(file)


def test_what_is_finished_is_passed_over(file, tmp_path):
  begun, broken = [], {2}

  def train(config, place):
    begun.append(place.name)
    if config.seed in broken:
      raise ValueError("a batch is\ntoo large")
    return {"validation/top1": config.seed / 10, "validation/loss": 1.0}

  def run():
    return sweep.run_sweep(load_sweep(file), tmp_path / "runs", train, lambda text: None)

  rows = run()
  assert begun == ["000", "001", "002"]
  assert [row["status"] for row in rows] == ["finished", "failed: a batch is too large", "finished"]
  broken.clear()
  assert [row["validation/top1"] for row in run()] == [0.1, 0.2, 0.7]
  assert begun[3:] == ["001"]
  table = list(csv.DictReader((tmp_path / "runs" / "table.csv").open()))
  assert [row["run"] for row in table] == ["000", "001", "002"]
  assert table[1]["model.name"] == "b" and table[1]["validation/top1"] == "0.2"
  lines = (tmp_path / "runs" / "table.md").read_text().splitlines()
  assert lines[0].startswith("| run | status | seed |") and "| 20.00% |" in lines[3]
  file.write_text(FILE.replace('"seed": 1', '"seed": 9'))
  with pytest.raises(ConfigError, match=r"000 is a finished run of another.*config.seed: 1, now 9"):
    run()
  assert len(begun) == 4
  with pytest.raises(ConfigError, match="there is nothing to run"):
    sweep.run_sweep([], tmp_path, train)


def test_the_command_trains(tmp_path, capsys):
  path = tmp_path / "digits.py"
  path.write_text(
    "from hybrid_vit.config import load_config\n"
    "def get_config():\n"
    "  config = load_config('finetune', 'runlocal')\n"
    "  config.total_epochs, config.sinks = 2, ()\n"
    "  config.data.batch_size = 512\n"
    "  return config\n"
    "def sweep():\n"
    "  return [{'optimizer.learning_rate': 1e-3}, {'optimizer.learning_rate': 'x'}]\n"
  )
  assert sweep.main([f"--config={path}", f"--workdir={tmp_path / 'w'}"]) == 1
  assert "learning_rate` is 'x'; a number" in capsys.readouterr().err
  path.write_text(path.read_text().replace("'x'", "-1.0"))
  assert sweep.main([f"--config={path}", f"--workdir={tmp_path / 'w'}"]) == 1
  out = capsys.readouterr().out
  assert "| 000 | finished | 0.001 |" in out and "learning_rate` is -1.0; at least 0.0" in out
