"""The site's hooks: links of the repository become those of pages, and nothing else changes."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def hooks():
  spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site/hooks.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.mark.parametrize(
  ("path", "page", "link", "expected"),
  [
    ("README.md", "index.md", "docs/data.md#scenes", "data.md#scenes"),
    ("README.md", "index.md", "configs/moat.py", "source/configs/moat.py.md"),
    ("README.md", "index.md", "configs/", "source/configs/index.md"),
    ("README.md", "index.md", "docs/cards/", "cards/README.md"),
    ("README.md", "index.md", "docs/images/scenes.png", "images/scenes.png"),
    ("docs/howto/gpu.md", "howto/gpu.md", "../../README.md#imagenet", "../index.md#imagenet"),
    ("docs/cards/moat.md", "cards/moat.md", "../networks.md", "../networks.md"),
    ("docs/data.md", "data.md", "#scenes", "#scenes"),
    ("docs/data.md", "data.md", "https://arxiv.org/abs/1", "https://arxiv.org/abs/1"),
    ("docs/data.md", "data.md", "../no_such_file.py", "../no_such_file.py"),
  ],
)
def test_links(hooks, path, page, link, expected):
  assert hooks.site_links(f"See [it]({link}).", path, page) == f"See [it]({expected})."


def test_code_keeps_its_brackets(hooks):
  text = "```python\nfound = table[name](configs/moat.py)\n```\n[a](configs/moat.py)"
  changed = hooks.site_links(text, "README.md", "index.md")
  assert changed.splitlines()[:3] == text.splitlines()[:3]
  assert changed.endswith("[a](source/configs/moat.py.md)")


def test_a_list_goes_on_behind_code_within_it(hooks):
  text = "* one:\n\n  ```python\n  x = 1\n  ```\n* two"
  assert hooks.site_links(text, "README.md", "index.md").endswith("  ```\n\n* two")


def test_a_file_is_shown_whole_and_a_notebook_by_its_cells(hooks):
  text = (ROOT / "configs/quickstart.py").read_text()
  assert text.rstrip() in hooks.source_markdown("configs/quickstart.py")
  notebook = hooks.source_markdown("notebooks/finetune_folder.ipynb")
  assert '"cell_type"' not in notebook
  assert "import hybrid_vit" in notebook or "from hybrid_vit" in notebook


def test_a_notebook_page_loads_no_picture_of_another_host(hooks):
  page = hooks.source_markdown("notebooks/finetune_folder.ipynb")
  assert "![Open in Colab](../../images/open_in_colab.svg)" in page
  assert not re.findall(r"!\[[^]]*\]\(https?:", page)


def test_a_directory_lists_its_files(hooks):
  listed = hooks.source_markdown("configs")
  for file in (ROOT / "configs").glob("*.py"):
    assert f"[{file.name}]({file.name}.md)" in listed


def test_pages_named_in_the_navigation_are_there(hooks):
  # MkDocs says so too, but is not installed where the tests are run.
  names = [
    line.rpartition(" ")[2]
    for line in (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2].splitlines()
    if line.endswith(".md")
  ]
  assert len(names) > 50
  missing = [n for n in names if n not in hooks.PAGES.values() and not (ROOT / "docs" / n).exists()]
  assert not missing
  for page in (ROOT / "docs").glob("*.md"):
    assert page.name in names, page.name
