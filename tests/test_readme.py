"""What the README says is so: its code runs, its files are there, its commands' parts exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.slow
def test_the_library_example_runs_and_gives_the_shape_beside_it(capsys):
  (block,) = (b for b in re.findall(r"```python\n(.*?)```", README, re.S) if "create_model" in b)
  space: dict = {}
  exec(compile(block, "README.md", "exec"), space)
  said = ast.literal_eval(re.search(r'\["stage4"\]\.shape  # (\(.*?\))', block)[1])
  assert space["endpoints"]["stage4"].shape == said
  assert space["logits"].shape == (2, 10)
  assert "moat_0" in capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
  targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
  missing = [target for target in targets if not (page.parent / target).exists()]
  assert not missing, missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_modules_and_configurations_that_exist(page):
  text = page.read_text()
  for module in set(re.findall(r"python -m (hybrid_vit[\w.]*)", text)):
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module
  for path in set(re.findall(r"--config=(configs/\w+\.py)", text)):
    assert (ROOT / path).is_file(), path
