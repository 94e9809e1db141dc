"""The tables of a page about speed, from the results beside it.

    python -m hybrid_vit.tools.benchmark page docs/results/speed

Writes DIRECTORY/README.md anew between the comments that name this command and a table; what each
is made of are the files that `tools.benchmark networks` and `tools.benchmark data` left there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_vit.tables import markdown_table, replace_marked

Row = Mapping[str, Any]
# By what stands at the beginning of a line, then by column.
_Cells = dict[tuple[str, ...], dict[str, str]]
_OURS = "hybrid_vit"
# A kind of layer with less of the cycles than this is not named.
_NAMED_SHARE = 9.5
# Pictures of a step and their side that go without saying.
_USUAL = (64, 224)


def of_shares(rows: Sequence[Row]) -> str:
  """A line for each network compiled for a TPU, the fastest first, with where its cycles go."""

  def line(row: Row) -> list[object]:
    kinds = [(float(row[name]), name[:-2]) for name in row if name.endswith("_%")]
    shares = [
      f"{kind} {share:.0f} %"
      for share, kind in sorted(kinds, key=lambda kind: -kind[0])
      if share >= _NAMED_SHARE
    ]
    unusual = (row["batch"], row["size"]) != _USUAL
    return [
      row["network"] + (f", {row['batch']} x {row['size']}" if unusual else ""),
      f"{row['images_per_second']:,.0f}",
      _percent(row["mfu"]),
      f"{row['memory_mib'] / 1024:.1f} GiB",
      f"{row['traffic_mb_per_image']:,.0f} MB",
      ", ".join(shares),
    ]

  head = [
    "network", "pictures a second", "MFU", "memory", "traffic a picture",
    "largest shares of the cycles",
  ]  # fmt: skip
  return markdown_table(
    head,
    [line(row) for row in sorted(rows, key=lambda row: -row["images_per_second"])],
    texts=(0, 5),
  )


def of_chips(results: Mapping[str, Sequence[Row]]) -> str:
  """A line for each network that was compiled for more than one chip.

  Args:
    results: of each chip.
  """
  cells: _Cells = {}
  for chip, rows in results.items():
    for row in rows:
      cell = f"{row['images_per_second']:,.0f} ({_percent(row['mfu'])})"
      cells.setdefault((row["network"],), {})[chip] = cell
  several = {name: of for name, of in cells.items() if len(of) > 1}
  return _side_by_side(["network"], list(results), several)


def of_levels(rows: Sequence[Row]) -> str:
  """A line for each network compiled at several levels of XLA's optimisation, a column for each.

  A cell is of how long compiling took, of the step and of its memory.
  """
  cells: _Cells = {}
  for row in rows:
    level = row["form"].rpartition(", ")[0].removeprefix(_OURS).removeprefix(", ") or "whole"
    cells.setdefault((row["network"],), {})[level] = (
      f"{row['compile_seconds']:,.0f} s; {row['ms']:,.0f} ms; {row['memory_mib'] / 1024:.1f} GiB"
    )
  return _side_by_side(["network"], _columns(cells), cells)


def of_comparison(rows: Sequence[Row]) -> str:
  """A line for each network timed beside another library's: times the speed of its fastest form."""
  cells: _Cells = {}
  for row in rows:
    if row["form"] == _OURS and "speed_ratio" in row:
      beside = row["ratio_to"].rpartition(", ")[0]
      name = row["network"] + ("" if beside == "timm" else f" (beside {beside}, a stand-in)")
      cells.setdefault((name,), {})[row["mode"]] = f"{row['speed_ratio']:.2f}"
  return _side_by_side(["network"], _columns(cells), cells)


def of_data(rows: Sequence[Row]) -> str:
  """A line for each transform and decoder, a column for each source."""
  cells: _Cells = {}
  for row in rows:
    if row["form"].startswith("timm"):
      continue
    transform = ", ".join(f"`{name}`" for name in row["transform"].split("|") if name != "decode")
    source = "ArrayRecord" if row["source"] == "tfds" else row["source"]
    ratios = f"{row['per_core_ratio']:.2f} ({row['speed_ratio']:.2f})"
    cells.setdefault((transform, row["form"]), {})[source] = ratios
  return _side_by_side(["transform", "decoder"], _columns(cells), dict(sorted(cells.items())))


def _columns(cells: _Cells) -> list[str]:
  """Those that any line has, in the order of the rows that they come from."""
  return list(dict.fromkeys(column for of in cells.values() for column in of))


def _side_by_side(heads: Sequence[str], columns: Sequence[str], cells: _Cells) -> str:
  """A line for each key, whose parts stand below `heads`; empty where it has no such column."""
  lines = [[*key, *(of.get(column, "") for column in columns)] for key, of in cells.items()]
  return markdown_table([*heads, *columns], lines, texts=range(len(heads)))


def _percent(part: float) -> str:
  return f"{100 * part:.1f} %"


# What each comment names: the files it is made of, and how.
_TABLES: Mapping[str, tuple[Sequence[str], Callable[[Mapping[str, Any]], str]]] = {
  "shares of v5e.json": (["v5e"], lambda results: of_shares(results["v5e"])),
  "chips": (["v4", "v5e", "v6e"], of_chips),
  "v5e_levels.json": (["v5e_levels"], lambda results: of_levels(results["v5e_levels"])),
  "cpu.json": (["cpu"], lambda results: of_comparison(results["cpu"])),
  "data.json": (["data"], lambda results: of_data(results["data"])),
}


def written(page: str, directory: Path) -> str:
  """The page with every table anew.

  Args:
    page: its text.
    directory: of the results.

  Raises:
    OSError: a result cannot be read.
    ValueError: the page has no place for one of the tables.
  """
  for name, (files, make) in _TABLES.items():
    results = {
      file: json.loads((directory / f"{file}.json").read_text("utf-8"))["rows"] for file in files
    }
    page = replace_marked(page, f"python -m hybrid_vit.tools.benchmark page, {name}", make(results))
  return page


def write_page(directory: Path) -> None:
  """Writes the tables of DIRECTORY/README.md anew; raises what `written` does."""
  page = directory / "README.md"
  page.write_text(written(page.read_text("utf-8"), directory), "utf-8")
