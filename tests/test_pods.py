"""The table of pods: made to fit by the recipe's own lines, hours by its steps."""

import datetime
import json

import jax
import pytest

from hybrid_vit import topology_plan, tpu_topology
from hybrid_vit.config import Config
from hybrid_vit.run_plan import examine
from hybrid_vit.tools import pods
from hybrid_vit.tpu_topology import Compilation, Cycles

GIB = 2**30
TINY = "moat:runlocal"


@pytest.fixture
def compiler(monkeypatch):
  """A compiler's stand-in: steps that recompute fit and take 3 M cycles."""
  monkeypatch.setattr(pods, "RECIPES", {"A": (TINY, {}), "B": (TINY, {"remat": True})})
  monkeypatch.setattr(pods.tpu_topology, "topology_devices", lambda name: jax.devices()[:4])

  def steps(run, topology, devices):
    assert len(devices) == 4
    fits = Compilation(2.0, True, 9 * GIB, cycles=Cycles(3_000_000, {}, {}, 0))
    refused = Compilation(2.0, False, 20 * GIB)
    found = fits if run.config["remat"] else refused
    chip = tpu_topology.chip_of(topology)
    return [topology_plan.StepPlan(0, "", 8, chip, {}, found, (), 2**20, flops_per_example=1e9)]

  monkeypatch.setattr(pods, "_steps", steps)

  def may_fit(run, topology, mesh, phase, canvas):
    assert (mesh.size, phase, canvas) == (4, 0, 0)
    return run.config["remat"], 9 * GIB

  monkeypatch.setattr(pods.topology_plan, "may_fit", may_fit)


@pytest.mark.parametrize("name", pods.RECIPES)
def test_recipes_are_there(name):
  recipe, lines = pods.RECIPES[name]
  values = pods.configuration(recipe, {**lines, "scan_blocks": True})
  assert values.scan_blocks is True
  assert values.get("curriculum") == lines.get("curriculum")


def test_a_row(compiler):
  row = pods.row_of("A", "v5e:2x2", scan_blocks=False)
  run = examine(Config(pods.configuration(TINY, {})), 4).run
  steps = run.curriculum.total_steps
  assert row["fits"] and row["lines"] == "--config.remat=True"
  scanned = pods.row_of("A", "v5e:2x2", scan_blocks=True)
  assert scanned["lines"] == "--config.scan_blocks=True --config.remat=True"
  assert row["recipe"] == "configs/moat.py:runlocal" and row["steps"] == steps
  assert row["ms_a_step"] == pytest.approx(2.0)
  assert row["hours"] == pytest.approx(steps * 2e-3 / 3600)
  assert row["chip_hours"] == pytest.approx(4 * row["hours"])
  rate = run.curriculum.phases[0].batch_size / 2e-3 / 4
  assert row["images_per_second_a_chip"] == pytest.approx(rate)
  assert row["mfu"] == pytest.approx(1e9 * 8 / 2e-3 / 197e12)
  assert row["sent_mib_a_step"] == 1 and row["peak_gib"] == 9


def test_what_does_not_fit_in_a_hurry_is_not_compiled_at_length(compiler, monkeypatch):
  whole, steps = [], pods._steps
  monkeypatch.setattr(pods, "_steps", lambda run, *a: whole.append(run.config) or steps(run, *a))
  changes = [{"accumulation_steps": 2}, {"remat": True}, {"remat": True, "accumulation_steps": 2}]
  monkeypatch.setattr(pods.topology_plan, "fitting_changes", lambda run, devices: changes)
  assert pods.row_of("A", "v5e:2x2", scan_blocks=False)["lines"] == "--config.remat=True"
  assert [(c["remat"], c.get("accumulation_steps", 1)) for c in whole] == [(False, 1), (True, 1)]


def test_the_command_keeps_earlier_rows(compiler, tmp_path, capsys):
  out = tmp_path / "pods"
  assert pods.main(["B", "--topologies", "v5e:2x2", "--out", str(out)]) == 0
  assert pods.main(["A", "--topologies", "v5e:2x2", "--out", str(out)]) == 0
  assert pods.main(["A", "--topologies", "v4:1x1x2", "--out", str(out)]) == 0
  rows = json.loads((tmp_path / "pods.json").read_text())["rows"]
  assert [(r["system"], r["topology"]) for r in rows] == [
    ("A", "v5e:2x2"), ("A", "v4:1x1x2"), ("B", "v5e:2x2"),
  ]  # fmt: skip
  assert [r["chips"] for r in rows] == [4, 2, 4]
  assert all(datetime.date.fromisoformat(r["date"]) for r in rows)
  stored = json.loads((tmp_path / "pods.json").read_text())
  assert stored["compiled for"] == "v5e:2x2 and v4:1x1x2"
  assert "| A |" in (tmp_path / "pods.md").read_text()
  with pytest.raises(SystemExit):
    pods.main(["C"])
  assert "no system is named 'C'" in capsys.readouterr().err
