"""Damaged files of every kind that is read: the same result, or an error that names the file.

    python -m tests.endurance.fuzz --files=200 --out=docs/results/reliability/fuzz

Each number of a file draws, from the seed and that number, the file of its kind and what happens to
it. What comes of it is one of

    same        what the whole file gives
    told        something else, with a warning that names the file or the member
    refused     an error of those that the commands print as one line, which names it
    unnoticed   something else without a word, in a format without sums: a changed pixel or digit

and, as faults, "nameless" (an error or a warning that does not say where), "traceback" (an
exception that no command catches), "silent" (as unnoticed, where the format has sums) and "lost" (a
file is gone or other than it was).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit import stored_trees
from hybrid_vit.data import examples as example_reading
from hybrid_vit.data import folders
from hybrid_vit.main import user_errors
from hybrid_vit.tables import write_table
from hybrid_vit.workdir import explain
from tests.endurance.damaged_files import KINDS, Kind

WAYS = ("flip", "flip", "truncate", "empty", "grow", "zeros", "noise")
FAULTS = ("nameless", "traceback", "silent", "lost")
_BLOCK = 64


def damaged(content: bytes, way: str, rng: np.random.Generator) -> bytes:
  """A file's bytes after what may happen to them."""
  length = len(content)
  place = int(rng.integers(max(1, length)))
  data = bytearray(content)
  if way == "flip" and length:
    data[place] ^= 1 << int(rng.integers(8))
  elif way == "truncate":
    del data[place:]
  elif way == "empty":
    data.clear()
  elif way == "grow":
    data += rng.bytes(int(rng.integers(1, 4 * _BLOCK)))
  elif way == "zeros":
    data[place : place + _BLOCK] = bytes(len(data[place : place + _BLOCK]))
  elif way == "noise":
    data[place : place + _BLOCK] = rng.bytes(len(data[place : place + _BLOCK]))
  return bytes(data)


@contextlib.contextmanager
def impatiently() -> Iterator[None]:
  """Without the seconds between tries to read, and with warnings as if each was the first."""
  waits, pauses = example_reading._WAITS, stored_trees.RETRY_SECONDS
  example_reading._WAITS, stored_trees.RETRY_SECONDS = (0.001,), (0.001,)
  folders._told.clear()
  try:
    yield
  finally:
    example_reading._WAITS, stored_trees.RETRY_SECONDS = waits, pauses


class _Heard(logging.Handler):
  def __init__(self) -> None:
    super().__init__(logging.WARNING)
    self.texts: list[str] = []

  def emit(self, record: logging.LogRecord) -> None:
    self.texts.append(record.getMessage())


@contextlib.contextmanager
def _hearing() -> Iterator[list[str]]:
  heard, logger = _Heard(), logging.getLogger()
  handlers, logger.handlers = logger.handlers, [heard]
  try:
    yield heard.texts
  finally:
    logger.handlers = handlers


def outcome(kind: Kind, place: Path, path: Path, whole: Any) -> tuple[str, str]:
  """(what comes of reading, in which words) where a file below a directory is damaged."""
  before = _contents(place, kind.lines)
  printed = io.StringIO()
  with _hearing() as heard, impatiently():
    try:
      with contextlib.redirect_stderr(printed):
        found = kind.read(place)
    except user_errors() as error:
      text = explain(error) or str(error)
      result = "refused" if _names(text, path, place, kind) else "nameless"
    except Exception:
      text = traceback.format_exc().splitlines()[-1]
      result = "traceback"
    else:
      text = "; ".join(heard)
      if found == whole:
        result = "same"
      elif heard:
        result = "told" if _names(text, path, place, kind) else "nameless"
      else:
        result = "silent" if kind.checked else "unnoticed"
  # Threads of libraries print what nobody can catch.
  if "Traceback (most recent" in printed.getvalue():
    result, text = "traceback", f"{printed.getvalue()[:600]}; {result}: {text}"
  # Files may be renamed and new ones may come; what was there is there.
  gone = Counter(filter(None, before)) - Counter(_contents(place, kind.lines))
  if gone:
    result, text = "lost", f"{len(gone)} file(s) gone or changed; {result}: {text}"
  return result, " ".join(text.split())


def _names(text: str, path: Path, place: Path, kind: Kind) -> bool:
  """Whether a text names the file, or a directory in its path below the place."""
  parts = path.relative_to(place).parts
  paths = [str(place.joinpath(*parts[:n])) for n in range(1, len(parts) + 1)]
  return any(name in text for name in (path.name, kind.named(path), *paths))


def _contents(place: Path, lines: bool) -> list[bytes]:
  """Of every file, without an unfinished line where these may go."""
  found = [path.read_bytes() for path in sorted(place.rglob("*")) if path.is_file()]
  return [data[: data.rfind(b"\n") + 1] for data in found] if lines else found


class Fuzzer:
  """Whole files of each kind, made once, and what reading them gives."""

  def __init__(self, scratch: Path, seed: int):
    self._scratch, self._seed = scratch, seed
    self._whole: dict[str, Any] = {}

  def one(self, number: int, name: str) -> dict[str, Any]:
    """A row: what was damaged, how, and what came of it."""
    kind, rng = KINDS[name], np.random.default_rng((self._seed, number))
    good, place = self._scratch / "whole" / _slug(name), self._scratch / "damaged"
    if name not in self._whole:
      good.mkdir(parents=True)
      kind.make(good)
      # Read where the damaged ones will lie: paths are in what is read.
      shutil.copytree(good, place)
      with impatiently(), _hearing():
        self._whole[name] = kind.read(place)
      shutil.rmtree(place)
    shutil.copytree(good, place)
    files = sorted(path for path in place.glob(kind.damaged) if path.is_file())
    path, way = files[int(rng.integers(len(files)))], str(rng.choice(WAYS))
    path.write_bytes(damaged(path.read_bytes(), way, rng))
    shown = str(path.relative_to(place))
    result, text = outcome(kind, place, path, self._whole[name])
    shutil.rmtree(place)
    text = text.replace(str(place), "…")
    return {
      "number": number, "kind": name, "file": shown, "damage": way, "outcome": result, "said": text,
    }  # fmt: skip


def _slug(name: str) -> str:
  return "".join(letter if letter.isalnum() else "_" for letter in name)


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; 1 where there is a fault."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--files", type=int, default=200)
  parser.add_argument("--first", type=int, default=0)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--kind", help="one of the kinds, in place of all in turn")
  parser.add_argument("--out", type=Path, help="of .csv and .md, without ending")
  options = parser.parse_args(arguments)
  names = [options.kind] if options.kind else list(KINDS)
  rows = []
  with tempfile.TemporaryDirectory() as scratch:
    fuzzer = Fuzzer(Path(scratch), options.seed)
    for number in range(options.first, options.first + options.files):
      row = fuzzer.one(number, names[number % len(names)])
      rows.append(row)
      if row["outcome"] in FAULTS:
        print("FAULT  " + "  ".join(f"{value}" for value in row.values()), flush=True)
  counts = Counter(row["outcome"] for row in rows)
  print(f"{len(rows)} files: " + ", ".join(f"{n} {what}" for what, n in counts.most_common()))
  if options.out:
    write_table(options.out, rows)
  return int(any(counts[fault] for fault in FAULTS))


if __name__ == "__main__":
  sys.exit(main())
