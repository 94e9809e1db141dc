"""The pictures of a folder: their names, packed, so that millions of them take little memory."""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Any

import numpy as np

EXTENSIONS = (
  ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
  ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
# What file managers, notebooks and systems put beside the data, besides names with a leading dot.
_NOT_DATA = {"__macosx", "@eadir", "__pycache__", "lost+found", "thumbs.db", "desktop.ini"}
BROKEN_LINKS = "links to nothing"
# Directories are read by so many threads: on a network disk each waits for an answer.
_THREADS = 8


def is_data(name: str) -> bool:
  """Whether the name of a file or directory could be a picture's or a class's."""
  return not name.startswith(".") and name.lower() not in _NOT_DATA


class PackedNames(Sequence[str]):
  """Names one after another in one array of bytes.

  Args:
    buffer: uint8, all of them without anything between.
    ends: int64 `[N]`, where each ends.
  """

  def __init__(self, buffer: np.ndarray, ends: np.ndarray):
    self.buffer, self.ends = buffer, ends

  def __len__(self) -> int:
    return len(self.ends)

  def __getitem__(self, index: Any) -> Any:
    start = int(self.ends[index - 1]) if index else 0
    return os.fsdecode(self.buffer[start : int(self.ends[index])].tobytes())


@dataclasses.dataclass(frozen=True)
class Listing:
  """The pictures below a directory, directory by directory.

  Attributes:
    directories: all there are below it, with and without pictures; relative, parts joined by "/",
      "" the top; sorted by their parts.
    ends: int64 `[D]`: the pictures of a directory are those from the end of the one before to here.
    names: of the pictures, without their directories; sorted within each directory.
    others: what is no picture by its name: extension → how many and one of them.
    changed: int64 `[D]`, when each directory was last changed, in ns; empty where it has no clock.
    settled: whether a change after the listing would show in `changed`.
  """

  directories: Sequence[str]
  ends: np.ndarray
  names: PackedNames
  others: Mapping[str, tuple[int, str]]
  changed: np.ndarray
  settled: bool

  def __post_init__(self) -> None:
    # A list is searched faster than an array.
    object.__setattr__(self, "_ends", self.ends.tolist())

  def __len__(self) -> int:
    return len(self.names)

  def directory(self, index: int) -> int:
    """The number of a picture's directory."""
    return bisect.bisect_right(self._ends, index)  # type: ignore[attr-defined]

  def path(self, index: int) -> str:
    """A picture's path below the top."""
    directory = self.directories[self.directory(index)]
    return f"{directory}/{self.names[index]}" if directory else self.names[index]


@dataclasses.dataclass
class _Directory:
  """What one directory holds: its pictures' names, packed, and its subdirectories'."""

  path: str
  inodes: tuple[tuple[int, int], ...]  # its own and those above, to know a link that leads back
  changed: int = 0
  packed: bytes = b""
  lengths: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint16))
  children: tuple[str, ...] = ()
  others: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)

  def add(self, names: Iterable[str]) -> None:
    """Files of it, in any order."""
    pictures = []
    for name in names:
      extension = os.path.splitext(name)[1].lower()
      if extension in EXTENSIONS:
        pictures.append(name)
      else:
        _count(self.others, extension or "no extension", _join(self.path, name))
    encoded = [os.fsencode(name) for name in sorted(pictures)]
    self.packed = b"".join(encoded)
    self.lengths = np.fromiter(map(len, encoded), np.uint16, len(encoded))


def list_folder(root: str, many: tuple[int, Callable[[], None]] | None = None) -> Listing:
  """Reads a directory and all below it; links are followed.

  Args:
    root: the directory.
    many: a number of pictures and what to call, once, when there are more.

  Raises:
    OSError: one of the directories cannot be read.
  """
  begun = time.time_ns()
  found: list[_Directory] = []
  level = [_Directory("", ())]
  count = 0
  with ThreadPoolExecutor(_THREADS) as pool:
    while level:
      following: list[_Directory] = []
      for directory in pool.map(lambda item: _read(root, item), level):
        if directory is None:
          continue
        found.append(directory)
        following += [
          _Directory(_join(directory.path, name), directory.inodes) for name in directory.children
        ]
        count += len(directory.lengths)
        if many is not None and count > many[0]:
          many[1]()
          many = None
      level = following
  # The clock of a file system may tick as slowly as every two seconds.
  settled = max(directory.changed for directory in found) < begun - 2_000_000_000
  return _packed(found, settled)


def list_names(paths: Iterable[str]) -> Listing:
  """The same of the paths of all files, as an archive knows them."""
  files: dict[str, list[str]] = {"": []}
  for path in paths:
    parts = path.split("/")
    if all(map(is_data, parts)):
      files.setdefault("/".join(parts[:-1]), []).append(parts[-1])
      for depth in range(1, len(parts) - 1):
        files.setdefault("/".join(parts[:depth]), [])
  found = []
  for name, members in files.items():
    directory = _Directory(name, ())
    directory.add(members)
    found.append(directory)
  return _packed(found, settled=False)


def _read(root: str, directory: _Directory) -> _Directory | None:
  """Fills it in; None for a link that leads back up."""
  path = os.path.join(root, directory.path)
  status = os.stat(path)
  inode = (status.st_dev, status.st_ino)
  if inode in directory.inodes:
    return None
  directory.inodes += (inode,)
  directory.changed = status.st_mtime_ns
  files, children = [], []
  with os.scandir(path) as entries:
    for entry in entries:
      if not is_data(entry.name):
        continue
      if entry.is_dir():
        children.append(entry.name)
      elif entry.is_symlink() and not os.path.exists(entry.path):
        _count(directory.others, BROKEN_LINKS, _join(directory.path, entry.name))
      else:
        files.append(entry.name)
  directory.add(files)
  directory.children = tuple(children)
  return directory


def _packed(found: list[_Directory], settled: bool) -> Listing:
  found.sort(key=lambda directory: PurePosixPath(directory.path).parts)
  others: dict[str, tuple[int, str]] = {}
  for directory in found:
    for kind, (count, example) in directory.others.items():
      _count(others, kind, example, count)
  counts = [len(directory.lengths) for directory in found]
  lengths = np.concatenate([directory.lengths for directory in found])
  buffer = np.frombuffer(bytearray().join(_take_packed(found)), np.uint8)
  return Listing(
    directories=[directory.path for directory in found],
    ends=np.asarray(list(itertools.accumulate(counts)), np.int64),
    names=PackedNames(buffer, np.cumsum(lengths, dtype=np.int64)),
    others=others,
    changed=np.asarray([directory.changed for directory in found], np.int64),
    settled=settled,
  )


def _take_packed(found: list[_Directory]) -> Iterator[bytes]:
  for directory in found:
    yield directory.packed


def _count(others: dict[str, tuple[int, str]], kind: str, example: str, count: int = 1) -> None:
  before, first = others.get(kind, (0, example))
  others[kind] = (before + count, first)


def _join(directory: str, name: str) -> str:
  return f"{directory}/{name}" if directory else name
