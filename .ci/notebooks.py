"""What all notebooks share, written into them: how they install, and a badge that opens Colab.

    python .ci/notebooks.py            writes what differs, and names it
    python .ci/notebooks.py --check    changes nothing; 1 where anything differs

The version is setup.cfg's, and so is the repository's address: `url = https://github.com/OWNER/REPO`
below [metadata]. Until it is there, badges lead to a name that stands in for it.
"""

from __future__ import annotations

import argparse
import configparser
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STANDS_IN = "https://github.com/OWNER/hybrid_vit"
COLAB = "https://colab.research.google.com"
# Of pages, whose badges have a picture of their own beside them.
PAGES = ("README.md", "docs/notebooks.md")
_LINK = re.compile(rf"{re.escape(COLAB)}/github/[^\s)]*/notebooks/(\w+)\.ipynb")

_INSTALL = """\
# Where hybrid_vit is missing: the checkout in which this notebook lies, else the released version.
import importlib
import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

VERSION = "{version}"
if util.find_spec("hybrid_vit") is None:
  is_tpu = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev").glob("vfio/[0-9]*"))
  extras = "hub,tpu" if is_tpu else "hub,cuda" if Path("/dev/nvidia0").exists() else "hub"
  checkout = Path.cwd().resolve().parent
  package = [f"hybrid_vit[{{extras}}]=={{VERSION}}"]
  if (checkout / "hybrid_vit" / "__init__.py").is_file():
    package = ["--editable", f"{{checkout}}[{{extras}}]"]
    # What is installed so is found by processes that begin later; this one has begun.
    sys.path.insert(0, str(checkout))
  subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *package], check=True)
  importlib.invalidate_caches()
  for name, project in (("jax", "jax"), ("numpy", "numpy"), ("PIL", "pillow")):
    loaded = sys.modules.get(name)
    if loaded and loaded.__version__ != metadata.version(project):
      raise SystemExit(f"{{project}} was replaced after it was loaded: restart, then run all")"""


def address(setup: Path = ROOT / "setup.cfg") -> str:
  """Where the repository lies, or what stands in for it.

  Raises:
    ValueError: an address that Colab has no link for.
  """
  url = _metadata(setup).get("url", STANDS_IN).removesuffix("/")
  if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", url):
    raise ValueError(f"setup.cfg: url is {url!r}; https://github.com/OWNER/REPO was expected")
  return url


def badge_link(name: str, url: str) -> str:
  """What opens a notebook in Colab."""
  repository = url.removeprefix("https://github.com/")
  return f"{COLAB}/github/{repository}/blob/main/notebooks/{name}.ipynb"


def install_cell(setup: Path = ROOT / "setup.cfg") -> str:
  """The first code cell."""
  return _INSTALL.format(version=_metadata(setup)["version"])


def with_links(text: str, url: str) -> str:
  """A text whose links to notebooks in Colab lead to the repository."""
  return _LINK.sub(lambda match: badge_link(match[1], url), text)


def written(notebook: dict[str, Any], name: str, url: str, install: str) -> dict[str, Any]:
  """A notebook with its badge, its first code cell, numbered cells and no outputs."""
  cells = [dict(cell) for cell in notebook["cells"]]
  badge = f"[![Open in Colab]({COLAB}/assets/colab-badge.svg)]({badge_link(name, url)})"
  lines = [line for line in _text(cells[0]).split("\n") if not line.startswith("[![")]
  cells[0]["source"] = _lines("\n".join(lines).rstrip() + f"\n\n{badge}")
  first = next(cell for cell in cells if cell["cell_type"] == "code")
  first["source"] = _lines(install)
  for number, cell in enumerate(cells):
    cell |= {"id": f"cell-{number}", "metadata": {}}
    if cell["cell_type"] == "code":
      cell |= {"execution_count": None, "outputs": []}
  return {**notebook, "cells": cells}


def main() -> int:
  """The command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--check", action="store_true", help="change nothing")
  check, url, install = parser.parse_args().check, address(), install_cell()
  texts = {}
  for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
    made = written(json.loads(path.read_text(encoding="utf-8")), path.stem, url, install)
    texts[path] = json.dumps(made, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
  texts |= {ROOT / p: with_links((ROOT / p).read_text(encoding="utf-8"), url) for p in PAGES}
  differing = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
  for path in differing:
    print(f"{'differs' if check else 'written'}: {path.relative_to(ROOT)}")
    if not check:
      path.write_text(texts[path], encoding="utf-8")
  return int(check and bool(differing))


def _metadata(setup: Path) -> configparser.SectionProxy:
  parser = configparser.ConfigParser()
  parser.read(setup)
  return parser["metadata"]


def _text(cell: dict[str, Any]) -> str:
  return "".join(cell["source"])


def _lines(text: str) -> list[str]:
  return text.splitlines(keepends=True)


if __name__ == "__main__":
  sys.exit(main())
