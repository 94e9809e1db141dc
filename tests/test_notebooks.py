"""Every notebook's code, run cell by cell in an empty directory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import command

# A figure of the metrics, and what it is at the end: a loss of 4.85 is that of guessing.
FIGURES = {
  "finetune_folder": ("top1", lambda top1: top1 > 0.5),
  "image_text_scenes": ("loss", lambda loss: loss < 4.5),
}
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path, tmp_path, compilation_cache):
  cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
  assert not any(cell["outputs"] for cell in cells), "committed without outputs"
  script = tmp_path / "notebook.py"
  script.write_text("\n\n".join("".join(cell["source"]) for cell in cells))
  found = subprocess.run(
    [sys.executable, str(script)],
    cwd=tmp_path,
    env=command.environment(compilation_cache),
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert found.returncode == 0, found.stdout + found.stderr
  assert "done. In" in found.stdout and "predictions.png (" in found.stdout
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  figure, reached = FIGURES[path.stem]
  found = [json.loads(line).get(figure) for line in lines]
  assert reached([value for value in found if value is not None][-1])
