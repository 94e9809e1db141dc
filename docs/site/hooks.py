"""MkDocs' hooks: the repository's pages and links, which GitHub shows as they are, as a site.

The README is the front page, and CONTRIBUTING and CHANGELOG are pages, without copies of them. A
link that leads out of docs/ leads to one of these, or to a page that shows the file or lists the
directory.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent

# Files of the repository that are pages, by their paths on the site.
PAGES = {
  "README.md": "index.md",
  "CONTRIBUTING.md": "contributing.md",
  "CHANGELOG.md": "changelog.md",
}
_LANGUAGES = {".py": "python", ".sh": "bash", ".sbatch": "bash", ".toml": "toml", ".cfg": "ini"}
# A notebook shows Google's picture of the badge, which stands alone in Colab; the site has its own.
_BADGES = (
  "https://colab.research.google.com/assets/colab-badge.svg",
  "docs/images/open_in_colab.svg",
)
_LINK = re.compile(r"(?<=\]\()([^)\s]+)(?=\))")
_FENCE = re.compile(r"\s*(```|~~~)")
_ITEM = re.compile(r"\s*([*-]|\d+\.) ")


def site_path(path: str) -> str:
  """A path of the repository as one of the site: "docs/data.md" → "data.md"."""
  if path in PAGES:
    return PAGES[path]
  is_directory = (ROOT / path).is_dir()
  if path.startswith("docs/"):
    path = path.removeprefix("docs/")
    return f"{path}/README.md" if is_directory else path
  return f"source/{path}/index.md" if is_directory else f"source/{path}.md"


def site_links(markdown: str, path: str, page: str) -> str:
  """The text of a page with links as the site has them.

  Args:
    markdown: the text, with links relative to `path`.
    path: of the file in the repository.
    page: path of the page on the site.

  Returns:
    The same with links relative to `page`. Addresses, anchors and code stay as they are, and so do
    links to what is not there, which MkDocs names.
  """

  def changed(match: re.Match[str]) -> str:
    target, mark, anchor = match[0].partition("#")
    found = _in_repository(target, path)
    if found is None:
      return match[0]
    return posixpath.relpath(site_path(found), posixpath.dirname(page) or ".") + mark + anchor

  return _outside_code(markdown, lambda line: _LINK.sub(changed, line))


def source_markdown(path: str) -> str:
  """The page of a file as code, of a notebook as its cells, of a directory as a list."""
  head = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
  place = ROOT / path
  if place.is_dir():
    return head + "".join(f"* [{name}]({name}.md)\n" for name in _names(place))
  if place.suffix == ".ipynb":
    own = posixpath.relpath(site_path(_BADGES[1]), posixpath.dirname(site_path(path)))
    text = place.read_text(encoding="utf-8").replace(_BADGES[0], own)
    cells = json.loads(text)["cells"]
    return head + "\n\n".join(_cell(cell["cell_type"], "".join(cell["source"])) for cell in cells)
  return head + _code(place.read_text(encoding="utf-8"), _LANGUAGES.get(place.suffix, "text"))


def on_files(files: Any, config: Any) -> Any:
  """Adds the pages that do not lie in docs/: `PAGES`, and what any page links to."""
  from mkdocs.structure.files import File

  texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in PAGES}
  for path, page in PAGES.items():
    files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
  for file in files.documentation_pages():
    if file.src_uri not in PAGES.values():
      texts[f"docs/{file.src_uri}"] = file.content_string
  linked = {found for path, text in texts.items() for found in _linked(text, path)}
  for path in sorted(linked):
    if path not in PAGES and not path.startswith("docs/"):
      for shown in (path, *(f"{path}/{name}" for name in _names(ROOT / path))):
        if files.get_file_from_path(site_path(shown)) is None:
          files.append(File.generated(config, site_path(shown), content=source_markdown(shown)))
  return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
  """Turns a page's links into those of the site, and says which of the columns it has."""
  uri = page.file.src_uri
  hidden = ["navigation"] if uri == "index.md" else []
  # A table of contents that would be empty takes the place of wide tables.
  page.meta["hide"] = hidden if "\n## " in markdown or ":::" in markdown else [*hidden, "toc"]
  if uri.startswith("source/"):
    return markdown
  paths = {site: path for path, site in PAGES.items()}
  return site_links(markdown, paths.get(uri, f"docs/{uri}"), uri)


def on_config(config: Any) -> Any:
  """Lists within lists by two spaces, as GitHub reads them and the pages are written."""
  from markdown.extensions import Extension

  class TwoSpaces(Extension):
    def extendMarkdown(self, md: Any) -> None:
      md.tab_length = 2

  config.markdown_extensions.append(TwoSpaces())
  return config


def _in_repository(target: str, path: str) -> str | None:
  """The file that a link of the file `path` leads to, or None: an address, an anchor, nothing."""
  if not target or re.match(r"[a-z]+:", target):
    return None
  found = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
  return found if not found.startswith("..") and (ROOT / found).exists() else None


def _linked(markdown: str, path: str) -> Iterator[str]:
  targets: list[str] = []

  def noted(line: str) -> str:
    targets.extend(match[0].partition("#")[0] for match in _LINK.finditer(line))
    return line

  _outside_code(markdown, noted)
  for target in targets:
    found = _in_repository(target, path)
    if found is not None:
      yield found


def _outside_code(markdown: str, change: Callable[[str], str]) -> str:
  lines, fence = [], ""
  for line in markdown.split("\n"):
    match = _FENCE.match(line)
    if match and fence in ("", match[1]):
      fence = "" if fence else match[1]
    elif not fence:
      # Python-Markdown ends a list at code within it, unless an empty line follows.
      if _ITEM.match(line) and lines and _FENCE.match(lines[-1]):
        lines.append("")
      line = change(line)
    lines.append(line)
  return "\n".join(lines)


def _names(directory: Path) -> list[str]:
  """The readable files in a directory; none of what is no directory."""
  if not directory.is_dir():
    return []
  return sorted(p.name for p in directory.iterdir() if p.suffix in (*_LANGUAGES, ".ipynb"))


def _cell(kind: str, text: str) -> str:
  return _code(text, "python") if kind == "code" else text


def _code(text: str, language: str) -> str:
  # Longer than any fence within a docstring.
  return f"`````{language}\n{text.rstrip()}\n`````\n"
