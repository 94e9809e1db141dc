"""Every notebook's code, run cell by cell in an empty directory, and what all of them share."""

import ast
import configparser
import importlib.metadata
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests import command

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
shared = runpy.run_path(str(ROOT / ".ci" / "notebooks.py"))

# Lines that the notebooks print, and what their figures are where all went well.
FIGURES = {
  "efficienttrain": (
    (r"plain: .* top-1 (\S+)", lambda top1: top1 > 0.8),
    (r"efficienttrain\+\+: .* top-1 (\S+)", lambda top1: top1 > 0.8),
    (r"over that of the plain training: (\S+)", lambda ratio: 0.5 < ratio < 0.85),
  ),
  "finetune_folder": ((r"top-1 of the held-out part: (\S+)", lambda top1: top1 > 0.5),),
  "image_text_scenes": (
    # That of guessing is 4.85.
    (r"loss of the last steps: (\S+)", lambda loss: loss < 4.5),
    (r"own place among those nearest to it: (\d)", lambda place: place == 1),
  ),
  "networks_and_features": ((r"right: (\d) of 6", lambda right: right >= 5),),
  "reversible_memory": (
    (r"gradients of 4 columns: (\S+) away", lambda away: away < 1e-3),
    (r"trainings apart by at most (\S+)", lambda apart: apart < 0.05),
    (r"memory of 8 columns over that of 2, plain: (\S+)", lambda factor: factor > 2.5),
    (r"over that of 2, reversible: (\S+)", lambda factor: factor < 1.5),
  ),
  "segment_and_detect": (
    # So few steps find nothing yet, but learn; docs/results/detection has what all of them find.
    (r"segmenter: .*, (\S+) of it", lambda part: part < 0.8),
    (r"detector: .*, (\S+) of it", lambda part: part < 0.95),
    (r"mean IoU of held-out maps: (\S+)", lambda iou: iou > 0.05),
  ),
  "train_on_a_tpu": (
    (r"restored step (\d+)", lambda step: step > 0),
    (r"devices that hold parameters: (\d+) of 4", lambda devices: devices == 4),
    (r"the dry run ended with (\d+)", lambda status: status == 0),
    (r"arrays that are split: (\d+)", lambda arrays: arrays > 5),
    (r"top-1 of the held-out part: (\S+)", lambda top1: top1 > 0.5),
  ),
}
ACCELERATORS = {
  "efficienttrain": "GPU",
  "finetune_folder": "GPU",
  "image_text_scenes": "GPU",
  "segment_and_detect": "GPU",
  "train_on_a_tpu": "TPU",
}
# Settings that a test has smaller, where a useful network takes minutes.
SHORTER = {
  "efficienttrain": {"EPOCHS": 4},
  "segment_and_detect": {
    "SEGMENTER_STEPS": 24,
    "SEGMENTER_BATCH": 8,
    "DETECTOR_STEPS": 24,
    "DETECTOR_BATCH": 4,
    "HELD_OUT": 8,
  },
}
# Whose many steps cost more without XLA's optimisation (tests/compiling.py) than it does.
OPTIMISED = ("image_text_scenes",)
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def sources(path, kind):
  cells = json.loads(path.read_text())["cells"]
  return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


@pytest.mark.slow
@each
def test_the_notebook_runs(path, tmp_path, compilation_cache):
  flags = {"XLA_FLAGS": ""} if path.stem in OPTIMISED else {}
  script = tmp_path / "notebook.py"
  text = "\n\n".join(sources(path, "code"))
  for name, value in SHORTER.get(path.stem, {}).items():
    text, changes = re.subn(rf"^{name} = \d+", f"{name} = {value}", text, flags=re.M)
    assert changes == 1, name
  script.write_text(text)
  found = subprocess.run(
    [sys.executable, str(script)],
    cwd=tmp_path,
    env=command.environment(compilation_cache, **flags),
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert found.returncode == 0, found.stdout + found.stderr
  for pattern, reached in FIGURES[path.stem]:
    figure = re.search(pattern, found.stdout)
    assert figure, f"{pattern!r} is not in\n{found.stdout}"
    assert reached(float(figure[1])), figure[0]


@each
def test_it_is_committed_as_the_shared_parts_are_written(path):
  notebook = json.loads(path.read_text())
  url, install = shared["address"](), shared["install_cell"]()
  assert shared["written"](notebook, path.stem, url, install) == notebook, (
    "run `python .ci/notebooks.py`"
  )
  for cell in notebook["cells"]:
    assert cell["cell_type"] == "markdown" or not (cell["outputs"] or cell["execution_count"])


@each
def test_it_begins_with_what_it_does_a_badge_and_settings(path):
  first = " ".join(sources(path, "markdown")[0].split())
  assert first.startswith("# ") and re.search(r"It takes about [^.]*on two CPU cores", first)
  assert f"/blob/main/notebooks/{path.name})" in first
  install, settings, *rest = sources(path, "code")
  assert settings.startswith("# Settings.") and rest
  # Nothing but settings: names in capitals, and plain values or other settings.
  for line in ast.parse(settings).body:
    assert isinstance(line, ast.Assign) and line.targets[0].id.isupper()
  version = configparser.ConfigParser()
  version.read(ROOT / "setup.cfg")
  assert f'VERSION = "{version["metadata"]["version"]}"\n' in install


@each
def test_it_asks_colab_for_the_machine_that_the_page_names(path):
  metadata = json.loads(path.read_text())["metadata"]
  asked = metadata.get("accelerator")
  assert asked == ACCELERATORS.get(path.stem)
  (row,) = (r for r in (ROOT / "docs/notebooks.md").read_text().splitlines() if path.name in r)
  assert f"| {asked or 'CPU'} |" in row
  assert bool(metadata["colab"].get("gpuType")) == bool(asked)


@each
def test_pages_list_it_with_a_badge(path):
  link = shared["badge_link"](path.stem, shared["address"]())
  for page in shared["PAGES"]:
    text = (ROOT / page).read_text()
    assert f"notebooks/{path.name}):" in text or f"notebooks/{path.name}) |" in text, page
    assert f"({link})" in text, f"{page}: run `python .ci/notebooks.py`"


@pytest.mark.parametrize("device", ["", "vfio/0", "nvidia0"])
@pytest.mark.parametrize("in_checkout", [True, False])
def test_it_installs_what_is_missing(in_checkout, device, tmp_path, monkeypatch):
  calls, exists = [], Path.exists
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(subprocess, "run", lambda call, check: calls.append(call))
  monkeypatch.setattr(sys, "path", list(sys.path))
  monkeypatch.setattr(Path, "glob", lambda self, p: [p] if device.startswith(p[:4]) else [])
  monkeypatch.setattr(
    Path, "exists", lambda self: (bool(device) and device in str(self)) or exists(self)
  )
  notebooks = tmp_path / "notebooks"
  notebooks.mkdir()
  if in_checkout:
    (tmp_path / "hybrid_vit").mkdir()
    (tmp_path / "hybrid_vit" / "__init__.py").touch()
  monkeypatch.chdir(notebooks)
  exec(shared["install_cell"](), {})
  extras = {"": "hub", "vfio/0": "hub,tpu", "nvidia0": "hub,cuda"}[device]
  (call,) = calls
  assert call[:5] == [sys.executable, "-m", "pip", "install", "--quiet"]
  if in_checkout:
    assert call[5:] == ["--editable", f"{tmp_path.resolve()}[{extras}]"]
    assert sys.path[0] == str(tmp_path.resolve())
  else:
    version = importlib.metadata.version("hybrid_vit")
    assert call[5:] == [f"hybrid_vit[{extras}]=={version}"]


def test_a_package_that_was_replaced_under_python_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  monkeypatch.setattr(subprocess, "run", lambda call, check: None)
  monkeypatch.setattr(sys, "path", list(sys.path))
  monkeypatch.setattr(sys.modules["numpy"], "__version__", "1.26.4")
  with pytest.raises(SystemExit, match="numpy was replaced after it was loaded"):
    exec(shared["install_cell"](), {})


def test_badges_follow_the_address_of_the_repository(tmp_path):
  setup = tmp_path / "setup.cfg"
  setup.write_text("[metadata]\nversion = 9.9\nurl = https://github.com/some/where/\n")
  url = shared["address"](setup)
  link = shared["badge_link"]("x", url)
  assert link == "https://colab.research.google.com/github/some/where/blob/main/notebooks/x.ipynb"
  stands_in = shared["badge_link"]("x", shared["STANDS_IN"])
  assert shared["with_links"](f"[a]({stands_in}) b", url) == f"[a]({link}) b"
  assert 'VERSION = "9.9"' in shared["install_cell"](setup)
  setup.write_text("[metadata]\nurl = https://example.com/a\n")
  with pytest.raises(ValueError, match=r"https://example\.com/a"):
    shared["address"](setup)
