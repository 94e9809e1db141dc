"""Where the members of a tar lie, grouped as WebDataset does: read once a tar, kept on disk.

A tar has no table of contents: its headers are read one after the other, without what lies between
them. What is found is kept as `manifest` keeps listings, as long as the tar has the same size and
time of change.

Members of one key are one example: "a/b.seg.png" has the key "a/b" and the extension "seg.png".
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import tarfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrid_vit.data.listing import PackedNames
from hybrid_vit.data.mapped_arrays import cache_path, load_arrays, store_arrays

_MAGIC = b"hybrid_vit tar index 1\n"
_BLOCK = 512
# Of blocks: read at once where a header was expected and none is found.
_SEARCHED = 2048
# A tar changed so lately may change again without a trace in its time.
_SETTLED_NS = 2_000_000_000
# Problems that are told one by one.
_TOLD = 5
# Types of members without bytes, whatever their size, and of files.
_EMPTY = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


@dataclasses.dataclass(frozen=True)
class TarIndex:
  """The examples of one tar.

  Attributes:
    path: of the tar.
    extensions: of members, lower case.
    keys: of the examples, in the order in which they begin.
    ends: int64 `[N]`, where each example's members end in the three arrays that follow.
    kinds: int32 `[M]`, the extension of each member.
    offsets: int64 `[M]`, where its bytes begin.
    sizes: int64 `[M]`; -1 where the tar ends before they do.
    problems: what was passed over, for people.
  """

  path: str
  extensions: tuple[str, ...]
  keys: PackedNames
  ends: np.ndarray
  kinds: np.ndarray
  offsets: np.ndarray
  sizes: np.ndarray
  problems: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.ends)

  def members(self, number: int) -> dict[str, tuple[int, int]]:
    """Extension → offset and size of an example's members."""
    start, end = int(self.ends[number - 1]) if number else 0, int(self.ends[number])
    return {
      self.extensions[self.kinds[m]]: (int(self.offsets[m]), int(self.sizes[m]))
      for m in range(start, end)
    }


def read_index(path: Path) -> TarIndex:
  """The index of a tar, the kept one where it still holds; tells of what the tar lacks.

  Raises:
    OSError: it cannot be read.
  """
  status = os.stat(path)
  heading = {"size": status.st_size, "changed": status.st_mtime_ns}
  kept = cache_path("tar_indices", path, ".tarindex")
  index = None if kept is None else _load(kept, str(path), heading)
  if index is None:
    index = build_index(path)
    if kept is not None and time.time_ns() - status.st_mtime_ns > _SETTLED_NS:
      try:
        _store(kept, heading, index)
      except OSError as error:
        logging.info("the index of %s is not kept: %s", path, error)
  for problem in index.problems[:_TOLD]:
    logging.warning("%s: %s", path, problem)
  if len(index.problems) > _TOLD:
    logging.warning("%s: … and %d more such", path, len(index.problems) - _TOLD)
  return index


def build_index(path: Path) -> TarIndex:
  """Reads a tar's headers."""
  examples: dict[str, dict[str, tuple[int, int]]] = {}
  problems: list[str] = []
  strange = 0
  for name, offset, size in _members(path, problems):
    match = _KEY.fullmatch(name.removeprefix("./"))
    if match is None:
      strange += 1
      continue
    members = examples.setdefault(match[1], {})
    extension = match[2].lower()
    if extension in members:
      problems.append(
        f"a second {name} at byte {offset - _BLOCK}; the first one is read. Keys must differ "
        "within a tar: pack it anew if these are two examples"
      )
    else:
      members[extension] = (offset, size)
  if strange:
    problems.append(f"members without key and extension, which are passed over: {strange}")
  extensions = tuple(dict.fromkeys(e for members in examples.values() for e in members))
  number = {extension: i for i, extension in enumerate(extensions)}
  places = np.array([p for m in examples.values() for p in m.values()], np.int64).reshape(-1, 2)
  names = [os.fsencode(key) for key in examples]
  return TarIndex(
    path=str(path),
    extensions=extensions,
    keys=PackedNames(
      np.frombuffer(b"".join(names), np.uint8),
      np.cumsum([len(name) for name in names], dtype=np.int64),
    ),
    ends=np.cumsum([len(members) for members in examples.values()], dtype=np.int64),
    kinds=np.array([number[e] for members in examples.values() for e in members], np.int32),
    offsets=np.ascontiguousarray(places[:, 0]),
    sizes=np.ascontiguousarray(places[:, 1]),
    problems=tuple(problems),
  )


def _members(path: Path, problems: list[str]) -> Iterator[tuple[str, int, int]]:
  """(name, offset, size) of the files in a tar, -1 for the size of one that is cut short."""
  place, longer, cut = 0, dict[str, str](), False
  with path.open("rb", buffering=0) as file:
    length = os.fstat(file.fileno()).st_size
    while place < length:
      block = os.pread(file.fileno(), _BLOCK, place)
      header = _header(block)
      if header is None:
        if not block.strip(b"\0") and len(block) == _BLOCK:
          return
        after = _next_header(file.fileno(), place + _BLOCK)
        where = f"the {(after or length) - place} bytes from byte {place} on"
        rest = "to the next header" if after else "to its end"
        problems.append(
          f"{where} {rest} begin with no header of a tar and are passed over: get the file anew, "
          "or unpack it if it is compressed"
        )
        if after is None:
          return
        place, longer = after, {}
        continue
      start = place + _BLOCK
      size = int(longer.get("size", header.size)) if header.type not in _EMPTY else 0
      place = start + -(-size // _BLOCK) * _BLOCK
      if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        longer |= _extension(header.type, os.pread(file.fileno(), size, start))
        continue
      if header.type in _FILES and not header.name.endswith("/"):
        name = longer.get("path", header.name)
        if start + size > length:
          problems.append(
            f"{name} is cut short: {max(0, length - start)} of its {size} bytes are there, and "
            "nothing behind it. Get the file anew"
          )
          size, cut = -1, True
        yield name, start, size
      # Headers of the whole file and of long links say nothing of the next member's name.
      if header.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
        longer = {}
  if not cut:
    problems.append(
      "it ends without the blocks of zeros that close a tar, and may have been cut short: compare "
      "its size with the original's"
    )


class _Header(NamedTuple):
  name: str
  size: int
  type: bytes


def _header(block: bytes) -> _Header | None:
  """What a header says (POSIX.1-1988, -2001 and GNU tar); None where its checksum does not fit."""
  try:
    stored = int(block[148:156].strip(b" \0") or b"-1", 8)
    if len(block) < _BLOCK or sum(block) - sum(block[148:156]) + 8 * ord(" ") != stored:
      return None
    if block[124] & 0x80:  # GNU's for more than 8 GB
      size = int.from_bytes(block[125:136], "big")
    else:
      size = int(block[124:136].strip(b" \0") or b"0", 8)
  except ValueError:
    return None
  if size < 0:
    return None
  name = block[:100].partition(b"\0")[0]
  if block[257:263] == b"ustar\0" and block[345]:
    name = block[345:500].partition(b"\0")[0] + b"/" + name
  return _Header(os.fsdecode(name), size, block[156:157])


def _extension(kind: bytes, data: bytes) -> dict[str, str]:
  """What stands in a header before the header: "path" and "size" of the member."""
  if kind == tarfile.GNUTYPE_LONGNAME:
    return {"path": os.fsdecode(data.rstrip(b"\0"))}
  found, place = {}, 0
  while match := re.compile(rb"(\d+) ([^=]+)=").match(data, place):
    end = place + int(match[1])
    if end <= match.end():
      break
    found[os.fsdecode(match[2])] = os.fsdecode(data[match.end() : end - 1])
    place = end
  if not found.get("size", "0").isdecimal():
    del found["size"]
  return {key: value for key, value in found.items() if key in ("path", "size")}


def _next_header(handle: int, place: int) -> int | None:
  """Where the next header lies, by its magic and its checksum; None where there is none."""
  while chunk := os.pread(handle, _SEARCHED * _BLOCK, place):
    for at in range(0, len(chunk) - _BLOCK + 1, _BLOCK):
      if chunk[at + 257 : at + 262] == b"ustar" and _header(chunk[at : at + _BLOCK]):
        return place + at
    place += len(chunk) - len(chunk) % _BLOCK or _BLOCK
  return None


def _store(kept: Path, heading: Mapping[str, int], index: TarIndex) -> None:
  header = {
    **heading,
    "path": index.path,
    "extensions": list(index.extensions),
    "problems": list(index.problems),
  }
  arrays = {name: getattr(index, name) for name in ("ends", "kinds", "offsets", "sizes")}
  arrays |= {"keys": index.keys.buffer, "key_ends": index.keys.ends}
  store_arrays(kept, _MAGIC, header, arrays)


def _load(kept: Path, path: str, heading: Mapping[str, int]) -> TarIndex | None:
  try:
    found = load_arrays(kept, _MAGIC)
    if found is None:
      return None
    header, arrays = found
    if any(header[name] != value for name, value in heading.items()):
      return None
    return TarIndex(
      path=path,
      extensions=tuple(header["extensions"]),
      keys=PackedNames(arrays["keys"], arrays["key_ends"]),
      problems=tuple(header["problems"]),
      **{name: arrays[name] for name in ("ends", "kinds", "offsets", "sizes")},
    )
  except (OSError, ValueError, KeyError, TypeError):
    return None
