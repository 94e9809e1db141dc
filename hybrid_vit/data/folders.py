"""Pictures in one folder for each class: which are of which part, which class, and what is left."""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from hybrid_vit.data.classes import sort_classes
from hybrid_vit.data.errors import MissingDataError
from hybrid_vit.data.listing import BROKEN_LINKS, EXTENSIONS, Listing, is_data
from hybrid_vit.data.manifest import read_listing
from hybrid_vit.data.splits import PARTS, SPLIT_FOLDERS, SPLIT_OF

# Every tenth picture of a class, in the order of names, where nothing is set apart.
HELD_OUT = 10

T = TypeVar("T")

_told: set[str] = set()


class Reader(Protocol):
  """A folder or an archive."""

  kind: str
  root: Path

  def listing(self) -> Listing:
    """Its pictures."""
    ...

  def read(self, name: str) -> bytes:
    """The bytes of a picture, by its path in the listing."""
    ...

  def full_name(self, name: str) -> str:
    """The same path for people."""
    ...

  def names(self) -> list[str]:
    """The paths of all files, pictures or not, sorted."""
    ...


class FolderReader:
  """Reads pictures by their paths below a directory.

  Raises:
    MissingDataError: it is not there.
  """

  kind = "folder"

  def __init__(self, root: Path):
    if not root.is_dir():
      raise MissingDataError(
        f"an image folder was looked for at {root} and is not there. It should hold "
        "train/<class>/*.jpg, and val/<class>/*.jpg where a validation part is set apart"
      )
    self.root = root

  def listing(self) -> Listing:
    """See `Reader`."""
    return read_listing(self.root)

  def read(self, name: str) -> bytes:
    """See `Reader`."""
    return (self.root / name).read_bytes()

  def full_name(self, name: str) -> str:
    """See `Reader`."""
    return str(self.root / name)

  def names(self) -> list[str]:
    """See `Reader`."""
    found = []
    for directory, inner, files in os.walk(self.root, followlinks=True):
      inner[:] = filter(is_data, inner)
      below = Path(directory).relative_to(self.root)
      found += [(below / name).as_posix() for name in files if is_data(name)]
    return sorted(found)


class FileSource:
  """Pictures in files, read when they are asked for; sorted by class.

  Args:
    reader: gives their bytes.
    listing: the reader's.
    chosen: int `[N]`, their numbers in the reader's listing.
    label_of: the class of each directory of the listing.
    classes: names.
  """

  def __init__(
    self,
    reader: Reader,
    listing: Listing,
    chosen: np.ndarray,
    label_of: Mapping[int, int],
    classes: Sequence[str],
  ):
    self._reader, self._listing = reader, listing
    self._chosen, self._label_of = chosen, dict(label_of)
    self.info: dict[str, Any] = {"class_names": tuple(classes)}

  def __len__(self) -> int:
    return len(self._chosen)

  def __getitem__(self, index: int) -> dict[str, Any]:
    number = int(self._chosen[index])
    return {
      "image": self._reader.read(self._listing.path(number)),
      "label": self._label_of[self._listing.directory(number)],
    }

  def describe(self, index: int) -> str:
    """See `sources.Source`."""
    return self._reader.full_name(self._listing.path(int(self._chosen[index])))

  @property
  def labels(self) -> np.ndarray:
    """The class of each, int32 `[N]`."""
    table = np.full(len(self._listing.directories), -1, np.int32)
    table[list(self._label_of)] = list(self._label_of.values())
    return table[np.searchsorted(self._listing.ends, self._chosen, side="right")]


def open_files(reader: Reader, split: str) -> FileSource:
  """A part of a folder or archive: "train", "validation" or "test"; "all" is every picture.

  Raises:
    MissingDataError: no pictures, or none in folders of classes.
    ValueError: the part has a class that the training part has not.
  """
  listing = reader.listing()
  if not len(listing):
    raise MissingDataError(
      f"{reader.root} holds no picture ({', '.join(EXTENSIONS)}); "
      f"train/<class>/*.jpg was looked for{_those(listing.others)}"
    )
  layout = _Layout(reader, listing)
  classes = sort_classes(name for name, _ in layout.parts["train"])
  number = {name: i for i, name in enumerate(classes)}
  parts = layout.parts
  apart = parts["validation"] or parts["test"]
  # Where one of the two is there, it serves as the other, too.
  if split == "all":
    chosen_part = [pair for part in parts.values() for pair in part]
  else:
    chosen_part = parts["train"] if split == "train" or not apart else parts[split] or apart
  strange = [(name, d) for name, d in chosen_part if name not in number]
  if strange:
    name, directory = strange[0]
    raise ValueError(
      f"{reader.full_name(listing.path(_range(listing, directory).start))}: class {name!r} is not "
      f"a class of the training part ({len(classes)} classes)"
    )
  label_of = {directory: number[name] for name, directory in chosen_part}
  # Class by class; a class's pictures in the order of their paths.
  in_order = sorted(label_of, key=lambda directory: (label_of[directory], directory))
  chosen = _ranges(listing, in_order)
  if not apart and split != "all":
    tell_once(
      f"{reader.root}: no validation part is set apart",
      "every tenth picture of each class, in the order of names, is held out for it",
    )
    counts = [len(_range(listing, directory)) for directory in in_order]
    held_out = _rank(np.repeat([label_of[d] for d in in_order], counts)) % HELD_OUT == HELD_OUT - 1
    chosen = chosen[held_out == (split != "train")]
  _tell_left_out(reader, listing, layout, classes)
  if not len(chosen):
    raise MissingDataError(f"{reader.root} has too few pictures to hold out a {split} part")
  return FileSource(reader, listing, chosen, label_of, classes)


class _Layout:
  """Which directories hold pictures of which part and class.

  Attributes:
    parts: split → (class, number of the directory); a class may have several directories.
    loose: directories whose pictures are of no class.
    empty: names of classes' directories without a picture.
  """

  def __init__(self, reader: Reader, listing: Listing):
    split = [tuple(name.split("/")) if name else () for name in listing.directories]
    holding = [d for d in range(len(split)) if len(_range(listing, d))]
    # A zip often wraps everything in one directory of its own, and so does what was unpacked.
    depth = 0
    while _is_wrapped({split[d][depth:] for d in holding}):
      depth += 1
    top = split[holding[0]][:depth]
    inside = {d: path[depth:] for d, path in enumerate(split) if path[:depth] == top}
    of_part = {d: SPLIT_OF.get(path[0].lower()) for d, path in inside.items() if len(path) > 1}
    self.parts: dict[str, list[tuple[str, int]]] = {
      name: [(inside[d][1], d) for d in holding if of_part.get(d) == name] for name in SPLIT_FOLDERS
    }
    place = 1
    if not self.parts["train"]:
      self.parts["train"] = [(inside[d][0], d) for d in holding if inside[d] and not of_part.get(d)]
      place = 0
    whole = self.parts["train"]
    if not whole or (not place and all(name.lower() in SPLIT_OF for name, _ in whole)):
      raise MissingDataError(
        f"{reader.root} holds pictures but neither train/<class>/* nor <class>/*, e.g. "
        f"{listing.path(_range(listing, holding[0]).start)}"
      )
    used = {d for part in self.parts.values() for _, d in part}
    self.loose = [d for d in holding if d not in used]
    full = {name for name, _ in whole}
    self.empty = sorted(
      path[place]
      for path in inside.values()
      if len(path) == place + 1
      and (SPLIT_OF.get(path[0].lower()) == "train" if place else path[0].lower() not in SPLIT_OF)
      and path[place] not in full
    )


def _is_wrapped(paths: set[tuple[str, ...]]) -> bool:
  """Whether all lie in one directory that is neither a part nor a class."""
  tops = {path[0] for path in paths if len(path) > 1}
  return (
    len(tops) == 1 and tops.pop().lower() not in SPLIT_OF and all(len(path) > 1 for path in paths)
  )


def _range(listing: Listing, directory: int) -> range:
  start = int(listing.ends[directory - 1]) if directory else 0
  return range(start, int(listing.ends[directory]))


def _ranges(listing: Listing, directories: Sequence[int]) -> np.ndarray:
  """The numbers of all pictures of some directories, int32."""
  return np.concatenate(
    [np.arange(r.start, r.stop, dtype=np.int32) for r in (_range(listing, d) for d in directories)]
  )


def _rank(labels: np.ndarray) -> np.ndarray:
  """For each example of a set sorted by class, how many of its class come before it."""
  begins = np.flatnonzero(np.diff(labels, prepend=-1))
  lengths = np.diff(begins, append=len(labels))
  return np.arange(len(labels)) - np.repeat(begins, lengths)


def _tell_left_out(
  reader: Reader, listing: Listing, layout: _Layout, classes: Sequence[str]
) -> None:
  said = []
  unknown = {kind: found for kind, found in listing.others.items() if kind != BROKEN_LINKS}
  if unknown:
    kinds = ", ".join(f"{kind}: {count:,}" for kind, (count, _) in sorted(unknown.items()))
    total = sum(count for count, _ in unknown.values())
    said.append(f"{total:,} files of other kinds ({kinds}), e.g. {next(iter(unknown.values()))[1]}")
  if BROKEN_LINKS in listing.others:
    count, example = listing.others[BROKEN_LINKS]
    said.append(f"{count:,} {BROKEN_LINKS}, e.g. {example}")
  if layout.loose:
    count = sum(len(_range(listing, d)) for d in layout.loose)
    example = listing.path(_range(listing, layout.loose[0]).start)
    said.append(f"{count:,} pictures outside the folders of classes, e.g. {example}")
  if layout.empty:
    names = ", ".join(layout.empty[:5]) + (", …" if len(layout.empty) > 5 else "")
    said.append(f"{len(layout.empty):,} folders without a picture, which are no class ({names})")
  if said:
    tell_once(
      f"{reader.root}: left out",
      f"{'; '.join(said)}. Read are {', '.join(EXTENSIONS)} in {len(classes):,} classes",
    )


def choose_part(
  root: Path, parts: Mapping[str, Sequence[T]], split: str, what: str = "pair"
) -> list[T]:
  """The items of a split; a tenth held out where nothing is set apart.

  Args:
    root: where they are, for messages.
    parts: items of "train", "validation" and "test".
    split: one of these, or "all".
    what: an item is called.

  Raises:
    MissingDataError: there is none.
  """
  apart = parts["validation"] or parts["test"]
  if split == "all":
    chosen = [item for part in PARTS for item in parts[part]]
  elif apart:
    chosen = list(parts["train"] if split == "train" else parts[split] or apart)
  else:
    tell_once(
      f"{root}: no validation part is set apart",
      f"every tenth {what}, in the order of names, is held out for it",
    )
    chosen = [
      item
      for i, item in enumerate(parts["train"])
      if (i % HELD_OUT == HELD_OUT - 1) == (split != "train")
    ]
  if not chosen:
    raise MissingDataError(f"{root} has no {what}, or too few, for its {split} part")
  return chosen


def tell_once(head: str, text: str) -> None:
  """A warning, once in a process."""
  if head not in _told:
    _told.add(head)
    logging.warning("%s: %s", head, text)


def _those(others: Mapping[str, tuple[int, str]]) -> str:
  if not others:
    return ""
  counts = collections.Counter({kind: count for kind, (count, _) in others.items()})
  return "; it holds " + ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common(3))
