"""Image–text pairs as picture files and a table of captions, CSV or JSONL.

    captions:/path/file.csv       columns image, caption[, caption2, …]; pictures beside the table
    captions:/path/file.jsonl     {"image": "a.jpg", "caption": "…" or […]} in each line

Arguments follow a "?" and are joined by "&": `captions=alt:alt_text,synthetic` names the columns of
several caption sources, `clip_score=column` that of scores, and `images=/path` says where the
pictures lie if not beside the table.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit.data.caption_fields import (
  CAPTION,
  as_captions,
  as_score,
  caption_fields,
  split_arguments,
  without_empty,
)
from hybrid_vit.data.errors import CorruptExampleError, MissingDataError

ARGUMENTS = ("captions", "clip_score", "images")
# Of a row: the fields that the first line has no name for.
_TOO_MANY = "(more)"


class CaptionTable:
  """The rows of a table, in their order.

  An example has "image" (encoded), "captions" and "key" (the picture's name); "clip_score" where
  there is one. Without an argument `captions`, the columns caption, caption1, caption2, … are
  the captions of one source, "caption", and a JSONL's "captions" may be a dict of several.

  Args:
    spec: what follows "captions:".

  Raises:
    MissingDataError: no such file, or no row in it.
    ValueError: an unknown argument, or columns that are not there.
  """

  def __init__(self, spec: str):
    place, arguments = split_arguments(spec, ARGUMENTS)
    self._path = Path(place).expanduser()
    if not self._path.is_file():
      raise MissingDataError(
        f"a table of captions was looked for at {self._path} and is not there; a .csv with the "
        "columns image and caption, or a .jsonl with these keys, was expected"
      )
    self._images = Path(arguments.get("images", self._path.parent)).expanduser()
    self._captions = caption_fields(arguments["captions"]) if "captions" in arguments else None
    self._score = arguments.get("clip_score", "clip_score")
    is_csv = self._path.suffix.lower() not in (".jsonl", ".ndjson", ".json")
    # Packed as lines of JSON: a dict for each of millions of rows would take gigabytes.
    rows, ends, lines = bytearray(), [], []
    for line, row in self._csv_rows() if is_csv else _lines(self._path):
      rows += row
      ends.append(len(rows))
      lines.append(line)
    if not ends:
      raise MissingDataError(f"{self._path} has no row of a picture and its captions")
    self._rows, self._ends, self._lines = bytes(rows), np.array(ends), np.array(lines)
    self.info: dict[str, Any] = {}

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, index: int) -> dict[str, Any]:
    row = self._row(index)
    name = row.get("image")
    if not isinstance(name, str) or not name.strip():
      raise CorruptExampleError(f"its image is {name!r}; the name of a file was expected")
    captions = without_empty(self._of(row))
    try:
      image = (self._images / name).read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
      raise CorruptExampleError(
        f"its picture {self._images / name} is not there: copy it there, or say where the pictures "
        f"lie ({self._path.name}?images=/path)"
      ) from error
    found = {"image": image, "captions": captions, "key": name}
    score = row.get(self._score)
    if score not in (None, ""):
      found["clip_score"] = as_score(score)
    return found

  def describe(self, index: int) -> str:
    """See `sources.Source`."""
    try:
      name = f" ({self._row(index).get('image')})"
    except CorruptExampleError:
      name = ""
    return f"{self._path}, line {self._lines[index]}{name}"

  def _row(self, index: int) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(f"row {index} of {len(self)}")
    text = self._rows[self._ends[index - 1] if index else 0 : self._ends[index]]
    try:
      row = json.loads(text)
    except ValueError as error:
      raise CorruptExampleError(f"the line is no JSON: {error}") from error
    if not isinstance(row, dict):
      raise CorruptExampleError(f'the line is {row!r}; {{"image": …}} was expected')
    if _TOO_MANY in row:
      raise CorruptExampleError(
        f"the row has more fields than the first line; behind them: {row[_TOO_MANY]!r}. A caption "
        "with commas stands in double quotes"
      )
    return row

  def _of(self, row: Mapping[str, Any]) -> dict[str, list[str]]:
    """Captions of a row by caption source, empty ones included."""
    if self._captions is not None:
      return {name: as_captions(row.get(f), f) for name, f in self._captions.items()}
    found: dict[str, list[str]] = {}
    several = row.get("captions")
    for name, value in (several if isinstance(several, Mapping) else {CAPTION: several}).items():
      found[name] = as_captions(value, name)
    for column in row:
      if _is_caption(column):
        found.setdefault(CAPTION, []).extend(as_captions(row[column], column))
    return found

  def _csv_rows(self) -> Iterator[tuple[int, bytes]]:
    with self._path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
      reader = csv.DictReader(file, restkey=_TOO_MANY, skipinitialspace=True)
      columns = [name.strip() for name in reader.fieldnames or ()]
      reader.fieldnames = columns
      wanted = list((self._captions or {}).values())
      missing = [name for name in ("image", *wanted) if name not in columns]
      if missing or not (wanted or any(map(_is_caption, columns))):
        raise ValueError(
          f"{self._path} has the columns {', '.join(columns) or '(none)'} and lacks "
          f"{', '.join(missing) or 'caption'}; `image,caption[,caption2,…]` was expected in its "
          "first line, or captions=SOURCE:COLUMN,… behind the path"
        )
      try:
        for row in reader:
          yield reader.line_num, json.dumps(row).encode()
      except csv.Error as error:
        raise ValueError(f"{self._path}, line {reader.line_num}: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
  """The lines of a file that are not empty, with their numbers."""
  with path.open("rb") as file:
    for number, line in enumerate(file, start=1):
      text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
      if text:
        yield number, text


def _is_caption(column: str) -> bool:
  return re.fullmatch(r"caption[\s_]?\d*", column) is not None
