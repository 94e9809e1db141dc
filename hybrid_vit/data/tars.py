"""Image–text pairs in tars, as WebDataset packs them, read by index and never unpacked.

    tar:/path/{00000..00099}.tar    a range; also a list {a,b}, a glob, a tar, or a folder of tars

Each key is one example: its picture (jpg, jpeg, png, webp, bmp or ppm), "txt" and "json". Arguments
follow a "?", joined by "&" (see `TarSource`):

    captions=alt:txt,synthetic:syn.json/syn_text   caption source : member, or member/key of a JSON
    clip_score=json/clip_b32_similarity_score      a number, or numbers by caption source
    image_teacher=npz/image_emb                    stored embeddings: of the picture,
    text_teacher=npz/text_emb                      and of the captions, in the order of `captions`
    teachers=2                                     so many, one after another in a row

Nothing of it needs TensorFlow or the package webdataset.
"""

from __future__ import annotations

import collections
import glob
import io
import json
import os
import re
import threading
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
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
from hybrid_vit.data.tar_index import TarIndex, read_index

ARGUMENTS = ("captions", "clip_score", "image_teacher", "text_teacher", "teachers")
_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm")
_ARRAYS = ("npy", "npz")
# Tars kept open; more are opened anew when they are asked for.
_OPEN = 128
# Of an example's members: so much more than them is read at once, for one request in place of many.
_GAP = 64 * 1024
_THREADS = 8


class TarSource:
  """The examples of some tars, in the order of the tars and of the keys in each.

  An example has "image" (encoded), "captions" and "key"; "clip_score", "image_teacher" float32
  `[T, E]` and "text_teacher" {caption source: float32 `[captions, T, E]`} where they are.

  Without an argument `captions`, the JSON's "captions" (a dict of caption sources, or a list) are
  read, and "txt" or else the JSON's "caption" as the source "caption".

  Args:
    spec: what follows "tar:".

  Raises:
    MissingDataError: no such tar, or no example in them.
    ValueError: an unknown argument, or a tar that is compressed.
  """

  def __init__(self, spec: str):
    pattern, arguments = split_arguments(spec, ARGUMENTS)
    self._captions = caption_fields(arguments["captions"]) if "captions" in arguments else None
    self._score = arguments.get("clip_score", "json/clip_score")
    self._teachers = {n: arguments[n] for n in ("image_teacher", "text_teacher") if n in arguments}
    if "text_teacher" in self._teachers and self._captions is None:
      raise ValueError(
        f"tar:{spec}: text_teacher needs captions=…, whose order is that of the stored rows"
      )
    for name, field in self._teachers.items():
      if field.partition("/")[0].rpartition(".")[2] not in _ARRAYS:
        raise ValueError(f"tar:{spec}: {name}={field}: a member .npy, or .npz/key, was expected")
    count = arguments.get("teachers", "1")
    if not count.isdecimal() or int(count) < 1:
      raise ValueError(f"tar:{spec}: teachers={count}; a whole number of at least 1 was expected")
    self._count = int(count)
    paths = find_tars(pattern)
    with ThreadPoolExecutor(_THREADS) as pool:
      self._indices = list(pool.map(read_index, paths))
    self._ends = np.cumsum([len(index) for index in self._indices])
    if not self._ends[-1]:
      raise MissingDataError(
        f"tar:{pattern} holds no example; members such as 000.jpg and 000.txt were expected"
      )
    self._files = _OpenFiles()
    self.info: dict[str, Any] = {}

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> dict[str, Any]:
    tar, number = self._place(index)
    members = tar.members(number)
    cut = [name for name, (_, size) in members.items() if size < 0]
    if cut:
      raise CorruptExampleError(
        f"{', '.join(cut)}: the tar ends within it; get {tar.path} anew and compare its checksum"
      )
    picture = next((name for name in _PICTURES if name in members), None)
    if picture is None:
      raise CorruptExampleError(
        f"it has no picture ({', '.join(_PICTURES)}), only {', '.join(members)}; pack it with one"
      )
    wanted = {picture, *self._names()} & members.keys()
    example = _Example(self._files.read(tar.path, {name: members[name] for name in wanted}))
    rows = self._rows(example)
    found: dict[str, Any] = {
      "image": example.members[picture],
      "captions": without_empty(rows),
      "key": tar.keys[number],
    }
    score = example.field(self._score)
    if score is not None:
      found["clip_score"] = as_score(score)
    if "image_teacher" in self._teachers:
      found["image_teacher"] = self._image_teacher(example)
    if "text_teacher" in self._teachers:
      found["text_teacher"] = self._text_teacher(example, rows)
    return found

  def describe(self, index: int) -> str:
    """See `sources.Source`."""
    tar, number = self._place(index)
    return f"{tar.path}:{tar.keys[number]}"

  def _place(self, index: int) -> tuple[TarIndex, int]:
    if not 0 <= index < len(self):
      raise IndexError(f"example {index} of {len(self)}")
    k = int(np.searchsorted(self._ends, index, side="right"))
    return self._indices[k], index - int(self._ends[k - 1] if k else 0)

  def _names(self) -> set[str]:
    """Extensions of the members that are read besides the picture."""
    fields = list(self._captions.values()) if self._captions else ["txt", "json"]
    return {field.partition("/")[0] for field in (*fields, self._score, *self._teachers.values())}

  def _rows(self, example: _Example) -> dict[str, list[str]]:
    """Captions by caption source, empty ones included."""
    if self._captions is not None:
      return {
        name: as_captions(example.field(field), field) for name, field in self._captions.items()
      }
    found = example.field("json/captions")
    rows = found if isinstance(found, Mapping) else {CAPTION: found}
    rows = {name: as_captions(value, f"json/captions/{name}") for name, value in rows.items()}
    plain = example.field("txt")
    plain = example.field("json/caption") if plain is None else plain
    if plain is not None and not rows.get(CAPTION):
      rows[CAPTION] = as_captions(plain, "txt")
    return rows

  def _image_teacher(self, example: _Example) -> np.ndarray:
    field = self._teachers["image_teacher"]
    stored = example.array(field)
    if stored.ndim > 1 and len(stored) not in (1, self._count):
      raise ValueError(
        f"{field} has shape {list(stored.shape)}, embeddings of several augmentations; one row of "
        f"{self._count} teachers' was expected: pack the one whose picture is stored"
      )
    return _by_teacher(stored.reshape(1, -1), self._count, field)[0]

  def _text_teacher(
    self, example: _Example, rows: Mapping[str, list[str]]
  ) -> dict[str, np.ndarray]:
    field = self._teachers["text_teacher"]
    stored = example.array(field)
    stored = stored.reshape(1, -1) if stored.ndim == 1 else stored
    total = sum(map(len, rows.values()))
    if len(stored) != total:
      raise CorruptExampleError(
        f"{field} has {len(stored)} rows for {total} captions of {', '.join(rows)}: one for each, "
        "in this order, was expected"
      )
    stored, found, start = _by_teacher(stored, self._count, field), {}, 0
    for name, texts in rows.items():
      kept = [start + i for i, text in enumerate(texts) if text]
      start += len(texts)
      if kept:
        found[name] = stored[kept]
    return found


class _Example:
  """The members that were read of one example."""

  def __init__(self, members: Mapping[str, bytes]):
    self.members = members
    self._parsed: dict[str, Any] = {}

  def field(self, field: str) -> Any:
    """A text member, or a key of a JSON member; None where it is not there."""
    name, _, key = field.partition("/")
    if name not in self.members:
      return None
    if name not in self._parsed:
      self._parsed[name] = self._parse(name)
    value = self._parsed[name]
    if not key:
      return value
    return value.get(key) if isinstance(value, Mapping) else None

  def array(self, field: str) -> np.ndarray:
    """float32 of a .npy member, or of a key of a .npz member."""
    name, _, key = field.partition("/")
    if name not in self.members:
      raise CorruptExampleError(f"it has no member .{name}, in which {field} was looked for")
    try:
      loaded = np.load(io.BytesIO(self.members[name]), allow_pickle=False)
      return np.asarray(loaded[key] if key else loaded, np.float32)
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, TypeError) as error:
      raise CorruptExampleError(f"no array can be read from {field}: {error}") from error

  def _parse(self, name: str) -> Any:
    data = self.members[name]
    if name.rpartition(".")[2] != "json":
      return data.decode("utf-8", errors="replace")
    try:
      return json.loads(data)
    except ValueError as error:
      raise CorruptExampleError(f"its .{name} is no JSON: {error}") from error


def _by_teacher(stored: np.ndarray, count: int, field: str) -> np.ndarray:
  """`[N, …]` → `[N, T, E]`."""
  width = stored[0].size
  if width % count:
    raise ValueError(f"{field} has {width} numbers in a row, which are not {count} teachers' alike")
  return np.ascontiguousarray(stored.reshape(len(stored), count, -1))


class _OpenFiles:
  """Reads from many files, the ones used last being kept open; thread-safe."""

  def __init__(self) -> None:
    self._files: collections.OrderedDict[str, io.FileIO] = collections.OrderedDict()
    self._lock = threading.Lock()

  def read(self, path: str, places: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
    """The bytes at some (offset, size), in one read where they lie close together."""
    file = self._file(path)
    start = min(offset for offset, _ in places.values())
    end = max(offset + size for offset, size in places.values())
    found = {}
    if end - start <= sum(size for _, size in places.values()) + _GAP:
      whole = memoryview(_read(file, start, end - start, path))
      for name, (offset, size) in places.items():
        found[name] = bytes(whole[offset - start : offset - start + size])
    else:
      for name, (offset, size) in places.items():
        found[name] = _read(file, offset, size, path)
    return found

  def _file(self, path: str) -> io.FileIO:
    with self._lock:
      file = self._files.pop(path, None) or io.FileIO(path)
      self._files[path] = file
      if len(self._files) > _OPEN:
        # It closes itself when the last thread that reads from it lets go of it.
        self._files.popitem(last=False)
      return file


def _read(file: io.FileIO, offset: int, size: int, path: str) -> bytes:
  data = os.pread(file.fileno(), size, offset)
  while len(data) < size:
    more = os.pread(file.fileno(), size - len(data), offset + len(data))
    if not more:
      raise OSError(f"{path} has become shorter since it was opened")
    data += more
  return data


def find_tars(pattern: str) -> list[Path]:
  """The tars of a folder, a glob, a range or list in braces, or the one tar.

  Raises:
    MissingDataError: one that is named is not there, or there is none.
    ValueError: it is compressed, or a range that goes backwards.
  """
  expanded = [os.path.expanduser(text) for text in _expand(pattern)]
  paths = []
  for text in expanded:
    if os.path.isdir(text):
      paths += sorted(Path(text).glob("*.tar"))
    elif os.path.exists(text) or not glob.has_magic(text):
      paths.append(Path(text))
    else:
      paths += sorted(map(Path, glob.glob(text, recursive=True)))
  packed = next((path for path in paths if path.suffix in (".gz", ".bz2", ".xz", ".zst")), None)
  if packed is not None:
    raise ValueError(
      f"{packed} is compressed, and has no access by index; pictures are compressed already. "
      f"Unpack it to a plain tar, e.g. gunzip {packed.name}"
    )
  gone = [str(path) for path in paths if not path.is_file()]
  if gone or not paths:
    raise MissingDataError(
      f"tars were looked for at {pattern}, and "
      + (f"{len(gone)} of {len(paths)} are not there, e.g. {gone[0]}" if gone else "there is none")
      + ". A range {00000..00099}.tar, a glob, a folder of .tar files or one of them was expected"
    )
  return [path.absolute() for path in paths]


def _expand(pattern: str) -> list[str]:
  """ "{00..02}.tar" → three names; "{a,b}.tar" → two."""
  match = re.search(r"\{([^{}]*)\}", pattern)
  if match is None:
    return [pattern]
  span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
  if span:
    first, last = int(span[1]), int(span[2])
    if last < first:
      raise ValueError(f"tar:{pattern}: the range {match[0]} goes backwards")
    width = len(span[1]) if span[1].startswith("0") else 0
    values = [str(n).zfill(width) for n in range(first, last + 1)]
  else:
    values = match[1].split(",")
  return [
    name
    for value in values
    for name in _expand(pattern[: match.start()] + value + pattern[match.end() :])
  ]
