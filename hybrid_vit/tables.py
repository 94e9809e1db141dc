"""Tables of results, for programs (CSV) and for people (Markdown)."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hybrid_vit.paths import as_path

# Shown in percent, as are recalls ("image_to_text_r5").
_PARTS = ("top1", "top5")


def write_table(
  path: Any, rows: Sequence[Mapping[str, Any]], first: Sequence[str] = ()
) -> tuple[Any, Any]:
  """PATH.csv and PATH.md of rows.

  Args:
    path: of both, with the ending of either or with none.
    rows: each a mapping of columns; one that lacks a column leaves it empty.
    first: columns that come first, in this order; those that no row has are left out.
  """
  path = as_path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # A name may have dots, which are no endings.
  base = path.with_suffix("") if path.suffix in (".csv", ".md") else path
  csv_path, md_path = (base.with_name(base.name + ending) for ending in (".csv", ".md"))
  known = dict.fromkeys((*first, *(key for row in rows for key in row)))
  columns = [key for key in known if any(key in row for row in rows)]
  text = io.StringIO(newline="")
  writer = csv.DictWriter(text, columns, restval="")
  writer.writeheader()
  writer.writerows(rows)
  csv_path.write_bytes(text.getvalue().encode())
  shown = ([_shown(key, row.get(key)) for key in columns] for row in rows)
  table = markdown_table(columns, shown, texts=range(len(columns)))
  md_path.write_text(table + "\n", encoding="utf-8")
  return csv_path, md_path


def markdown_table(
  head: Sequence[str], rows: Iterable[Sequence[object]], texts: Sequence[int] = (0,)
) -> str:
  """A table in Markdown.

  Args:
    head: names of the columns.
    rows: the cells of each line below.
    texts: columns of words; the others are numbers, set to the right.
  """
  lines = [head, ["---" if i in texts else "---:" for i in range(len(head))], *rows]
  return "\n".join(_line([str(cell) for cell in line]) for line in lines)


def replace_marked(page: str, source: str, text: str) -> str:
  """A page with the part anew that stands between the comments that name its source.

  Args:
    page: in Markdown, with "<!-- begin: written by SOURCE -->" and "<!-- end -->".
    source: the command, and where that makes several parts, of what.
    text: of the part.

  Raises:
    ValueError: the page has no such part.
  """
  begin, end = f"<!-- begin: written by {source} -->", "<!-- end -->"
  place = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
  if not place.search(page):
    raise ValueError(f"the page has no lines {begin!r} and {end!r}")
  return place.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", page)


def _line(cells: Sequence[str]) -> str:
  # What would end a cell or a line.
  return "| " + " | ".join(" ".join(c.split()).replace("|", "\\|") for c in cells) + " |"


def _shown(column: str, value: Any) -> str:
  name = column.rpartition("/")[2]
  if value is None:
    return ""
  if not isinstance(value, float):
    return str(value)
  if name in _PARTS or re.fullmatch(r"\w+_r\d+", name):
    return f"{value:.2%}"
  return f"{value:,.0f}" if name in ("examples", "captions") else f"{value:.5g}"
