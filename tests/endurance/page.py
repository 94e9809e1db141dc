"""Writes the tables of docs/results/reliability.md from what the scripts beside this one left.

python -m tests.endurance.page
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hybrid_vit.tables import markdown_table, replace_marked
from tests.endurance.fuzz import FAULTS
from tests.endurance.writers import FAULTS as WRITERS_FAULTS

PAGE = Path(__file__).parents[2] / "docs" / "results" / "reliability.md"
OUTCOMES = ("same", "told", "refused", "unnoticed", *FAULTS)

Row = Mapping[str, str]


def of_kills(rows: Sequence[Row]) -> str:
  """A line for each kind of moment."""

  def line(name: str, some: Sequence[Row]) -> list[object]:
    total = {key: sum(int(row[key]) for row in some) for key in (
      "torn_states", "torn_export", "torn_lines", "lost_states", "steps_again")}  # fmt: skip
    return [
      name,
      len(some),
      total["torn_states"] + total["torn_export"],
      total["torn_lines"],
      total["lost_states"],
      f"{total['steps_again'] / len(some):.1f} ({max(int(row['steps_again']) for row in some)})",
      sum(int(row["different"]) > 0 for row in some),
    ]

  moments = dict.fromkeys(row["moment"] for row in rows)
  lines = [line(m, [row for row in rows if row["moment"] == m]) for m in moments]
  return markdown_table(
    ["killed while", "kills", "half-written states, exports", "half-written lines",
     "whole states lost", "steps done again, mean (most)", "other bytes at the end"],
    [*lines, line("**all**", rows)],
  )  # fmt: skip


def of_writers(rows: Sequence[Row]) -> str:
  """A line for each command, over nothing and over something earlier."""

  def line(name: str, some: Sequence[Row]) -> list[object]:
    counts = Counter(row["found"] for row in some)
    return [
      name,
      len(some),
      counts["nothing"] + counts["earlier"],
      counts["new"],
      sum(counts[fault] for fault in WRITERS_FAULTS),
      sum(row["again"] == "stuck" for row in some),
      sum(int(row["stayed"]) > 0 for row in some),
    ]

  names = dict.fromkeys((row["file"], row["over"]) for row in rows)
  lines = [
    line(
      name + (", over an earlier one" if over == "1" else ""),
      [row for row in rows if (row["file"], row["over"]) == (name, over)],
    )
    for name, over in names
  ]
  return markdown_table(
    ["killed while it writes", "kills", "found as before", "found whole",
     "half taken for whole, or lost", "not done again", "something left after that"],
    [*lines, line("**all**", rows)],
  )  # fmt: skip


def of_fuzz(rows: Sequence[Row]) -> str:
  """A line for each kind of file."""

  def line(name: str, some: Sequence[Row]) -> list[object]:
    counts = Counter(row["outcome"] for row in some)
    return [name, len(some), *(counts[o] or "" for o in OUTCOMES[:4]),
            sum(counts[f] for f in FAULTS)]  # fmt: skip

  kinds = dict.fromkeys(row["kind"] for row in rows)
  lines = [line(kind, [row for row in rows if row["kind"] == kind]) for kind in kinds]
  return markdown_table(
    ["file", "damaged", *OUTCOMES[:4], "faults"], [*lines, line("**all**", rows)]
  )


def columns(names: Mapping[str, str]) -> Callable[[Sequence[Row]], str]:
  """Chosen columns of the rows as they are, by the head that each gets."""
  return lambda rows: markdown_table(
    list(names.values()), ([row[name] for name in names] for row in rows)
  )


TABLES: Mapping[str, Callable[[Sequence[Row]], str]] = {
  "kills": of_kills,
  "processes": columns({
    "processes": "processes", "signal": "signal", "to": "to process", "after_step": "after step",
    "codes": "exit statuses", "ended_in_s": "all ended in, s", "saved": "newest whole state",
    "resumed": "resumed", "different": "other bytes at the end",
  }),
  "full_disk": columns({
    "bytes_left": "bytes left", "code": "exit status", "saved": "newest whole state",
    "resumed": "resumed", "changed_states": "earlier states changed",
    "different": "other bytes at the end",
  }),
  "slow_disk": columns({
    "bytes_a_second": "bytes a second", "run": "the run is", "seconds": "it took, s",
    "code": "exit status", "steps_meanwhile": "most steps beyond a state being written",
    "said_saved": "said to be saved", "saved": "newest whole state", "resumed": "resumed",
    "different": "other bytes at the end",
  }),
  "writers": of_writers,
  "fuzz": of_fuzz,
}  # fmt: skip


def written(page: str, data: Path) -> str:
  """The page with every table anew.

  Args:
    page: its text.
    data: directory of the tables' .csv.

  Raises:
    ValueError: it has no place for one of them.
  """
  for name, make in TABLES.items():
    with (data / f"{name}.csv").open(newline="") as file:
      text = make(list(csv.DictReader(file)))
    page = replace_marked(page, f"python -m tests.endurance.page from {name}.csv", text)
  return page


def main() -> int:
  """The command."""
  PAGE.write_text(written(PAGE.read_text("utf-8"), PAGE.with_suffix("")), "utf-8")
  return 0


if __name__ == "__main__":
  sys.exit(main())
