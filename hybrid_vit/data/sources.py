"""Where pictures come from: random access by index, one spec string for each kind.

    digits                  1,797 handwritten digits, shipped with the package
    folder:/path            train/<class>/*, a part val or test where there is one
    zip:/path.zip           the same, in a zip
    fashion_mnist[:/path]   the four files of Fashion-MNIST
    tfds:name[/config][:version]   a prepared TFDS data set, ArrayRecord or TFRecord, or tfds:/path
                            of its directory; no TensorFlow needed

A split is "train", "validation" or "test", with a slice in TFDS's manner: "train[:90%]". Where a
source has no validation part, a fixed tenth of each class of the training part is held out.
"""

from __future__ import annotations

import gzip
import importlib.resources
import io
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from hybrid_vit.data.errors import MissingDataError
from hybrid_vit.data.tfds_source import TfdsSource

SPLITS = ("train", "validation", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm")
_SPLIT_FOLDERS = {
  "train": ("train", "training"),
  "validation": ("val", "valid", "validation"),
  "test": ("test", "testing"),
}
# Every tenth picture of a class, in the order of names, where nothing is set apart.
_HELD_OUT = 10


class Source(Protocol):
  """Random access to labelled pictures; thread-safe."""

  num_classes: int
  class_names: tuple[str, ...]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{"image": encoded bytes or uint8 `[H, W, 3]`, "label": int}."""
    ...

  def describe(self, index: int) -> str:
    """The example's name for people: its path, or its place in the data set."""
    ...


def create_source(spec: str, split: str, data_dir: str | None = None) -> Source:
  """Opens a source.

  Args:
    spec: see the head of this file.
    split: see there.
    data_dir: where prepared TFDS data lies; None for TFDS's own default.

  Raises:
    ValueError: unknown kind or split.
    MissingDataError: nothing there.
  """
  kind, _, rest = spec.partition(":")
  if kind == "tfds":
    return TfdsSource(rest, split, data_dir)
  name, part = parse_split(split)
  source: Source
  if kind == "digits":
    source = _digits(name)
  elif kind == "folder":
    source = _files(_FolderReader(Path(rest).expanduser()), name)
  elif kind == "zip":
    source = _files(_ZipReader(Path(rest).expanduser()), name)
  elif kind == "fashion_mnist":
    source = _fashion_mnist(Path(rest or "/usr/share/datasets/fashion-mnist"), name)
  else:
    raise ValueError(
      f"unknown data source {spec!r}; there are: digits, folder:/path, zip:/path.zip, "
      "fashion_mnist[:/path], tfds:name"
    )
  chosen = range(len(source))[part_slice(part, len(source))]
  if not len(chosen):
    raise ValueError(f"split {split!r} of {spec!r} is empty")
  return source if len(chosen) == len(source) else _Slice(source, chosen)


def parse_split(split: str) -> tuple[str, str]:
  """ "train[:90%]" → ("train", ":90%")."""
  match = re.fullmatch(r"(\w+)(?:\[([^\[\]]*)\])?", split)
  aliases = {alias: name for name, others in _SPLIT_FOLDERS.items() for alias in others}
  if not match or aliases.get(match[1]) is None:
    raise ValueError(
      f"split {split!r}: one of {', '.join(SPLITS)} was expected, with a slice where one is wanted "
      '("train[:90%]", "train[100:200]")'
    )
  return aliases[match[1]], match[2] or ":"


def part_slice(part: str, length: int) -> slice:
  """ ":90%" or "100:200" → a slice of so many examples."""
  bounds = part.split(":")
  if len(bounds) != 2:
    raise ValueError(f"slice [{part}]: [from:to] was expected, in examples or in percent")

  def bound(text: str) -> int | None:
    text = text.strip()
    if not text:
      return None
    number = re.fullmatch(r"(-?\d+)(%?)", text)
    if not number:
      raise ValueError(f"slice [{part}]: {text!r} is neither a number nor a percentage")
    return round(int(number[1]) * length / 100) if number[2] else int(number[1])

  return slice(bound(bounds[0]), bound(bounds[1]))


class ArraySource:
  """Pictures held in memory, uint8 `[N, H, W, 3]`."""

  def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]):
    self._name, self._images, self._labels = name, images, labels
    self.class_names = tuple(class_names)
    self.num_classes = len(self.class_names)

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": self._images[index], "label": int(self._labels[index])}

  def describe(self, index: int) -> str:
    """See `Source`."""
    return f"{self._name} #{index}"


class FileSource:
  """Pictures in files, read when they are asked for."""

  def __init__(self, reader: Any, names: Sequence[str], labels: Sequence[int], classes: Any):
    self._reader, self._names, self._labels = reader, tuple(names), tuple(labels)
    self.class_names = tuple(classes)
    self.num_classes = len(self.class_names)

  def __len__(self) -> int:
    return len(self._names)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": self._reader.read(self._names[index]), "label": self._labels[index]}

  def describe(self, index: int) -> str:
    """See `Source`."""
    return self._reader.full_name(self._names[index])


class _Slice:
  def __init__(self, source: Source, chosen: Sequence[int]):
    self._source, self._chosen = source, chosen
    self.num_classes, self.class_names = source.num_classes, source.class_names

  def __len__(self) -> int:
    return len(self._chosen)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._source[self._chosen[index]]

  def describe(self, index: int) -> str:
    return self._source.describe(self._chosen[index])


def _digits(split: str) -> ArraySource:
  """Class by class, every fifth example is held out; validation and test are the same 360."""
  resource = importlib.resources.files("hybrid_vit.data") / "embedded" / "digits.csv.gz"
  table = np.loadtxt(io.BytesIO(gzip.decompress(resource.read_bytes())), delimiter=",")
  labels = table[:, -1].astype(np.int64)
  grey = np.round(table[:, :-1].reshape(-1, 8, 8) * (255.0 / 16.0)).astype(np.uint8)
  held_out = np.zeros(len(labels), bool)
  held_out[np.argsort(labels, kind="stable")[::5]] = True
  chosen = ~held_out if split == "train" else held_out
  images = np.repeat(grey[chosen][..., None], 3, axis=-1)
  names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
  return ArraySource(f"digits {split}", images, labels[chosen], names)


def _rank_in_class(labels: np.ndarray) -> np.ndarray:
  """For each example, how many of its class come before it."""
  rank = np.zeros(len(labels), np.int64)
  for label in np.unique(labels):
    members = np.flatnonzero(labels == label)
    rank[members] = np.arange(len(members))
  return rank


def _fashion_mnist(folder: Path, split: str) -> ArraySource:
  """Validation and test are the same 10,000 pictures."""
  stem = "train" if split == "train" else "t10k"

  def read(suffix: str, offset: int) -> np.ndarray:
    for name in (f"{stem}-{suffix}-ubyte.gz", f"{stem}-{suffix}-ubyte"):
      path = folder / name
      if path.is_file():
        raw = path.read_bytes()
        return np.frombuffer(gzip.decompress(raw) if name.endswith(".gz") else raw, np.uint8)[
          offset:
        ]
    raise MissingDataError(
      f"Fashion-MNIST's file {stem}-{suffix}-ubyte[.gz] was looked for in {folder} and is not "
      "there. `apt install dataset-fashion-mnist` puts the four files in "
      "/usr/share/datasets/fashion-mnist; or name the folder that has them: fashion_mnist:/path"
    )

  labels = read("labels-idx1", 8)
  images = read("images-idx3", 16).reshape(-1, 28, 28)
  if images.shape[0] != labels.shape[0]:
    raise ValueError(
      f"Fashion-MNIST in {folder}: {images.shape[0]} {stem} pictures and {labels.shape[0]} labels; "
      "as many of both were expected"
    )
  names = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "boot",
  )  # fmt: skip
  return ArraySource(
    f"fashion_mnist {split}", np.repeat(images[..., None], 3, axis=-1), labels, names
  )


class _FolderReader:
  def __init__(self, root: Path):
    if not root.is_dir():
      raise MissingDataError(
        f"an image folder was looked for at {root} and is not there. It should hold "
        "train/<class>/*.jpg, and val/<class>/*.jpg where a validation part is set apart"
      )
    self.root = root

  def names(self) -> list[str]:
    found, visited = [], set()
    # Class folders are often links; a link back up must not be followed for ever.
    for directory, subdirectories, files in os.walk(self.root, followlinks=True):
      real = os.path.realpath(directory)
      if real in visited:
        subdirectories.clear()
        continue
      visited.add(real)
      inside = Path(directory).relative_to(self.root).as_posix()
      found += [name if inside == "." else f"{inside}/{name}" for name in files]
    return found

  def read(self, name: str) -> bytes:
    return (self.root / name).read_bytes()

  def full_name(self, name: str) -> str:
    return str(self.root / name)


class _ZipReader:
  def __init__(self, path: Path):
    if not path.is_file():
      raise MissingDataError(
        f"a zip of an image folder was looked for at {path} and is not there. It should hold "
        "train/<class>/*.jpg"
      )
    self.root = path
    try:
      # Its reads lock among themselves and unpack outside the lock: one handle for all threads.
      self._zip = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
      raise MissingDataError(
        f"{path} is no zip file, or is cut short ({error}); a zip that holds train/<class>/*.jpg "
        "was expected"
      ) from error

  def names(self) -> list[str]:
    return [info.filename for info in self._zip.infolist() if not info.is_dir()]

  def read(self, name: str) -> bytes:
    try:
      return self._zip.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
      raise OSError(f"damaged member of {self.root}: {error}") from error

  def full_name(self, name: str) -> str:
    return f"{self.root}:{name}"


def _files(reader: Any, split: str) -> FileSource:
  pictures = sorted(
    PurePosixPath(name)
    for name in reader.names()
    if name.lower().endswith(EXTENSIONS)
    and not PurePosixPath(name).name.startswith(".")
    and "__MACOSX" not in name
  )
  if not pictures:
    raise MissingDataError(
      f"{reader.root} holds no picture ({', '.join(EXTENSIONS)}); "
      "train/<class>/*.jpg was looked for"
    )
  # A zip often wraps everything in one directory of its own.
  while _is_wrapped(pictures):
    pictures, prefix = [PurePosixPath(*p.parts[1:]) for p in pictures], pictures[0].parts[0]
    reader = _Within(reader, prefix)
  parts = {
    name: [p for p in pictures if p.parts[0].lower() in folders and len(p.parts) > 2]
    for name, folders in _SPLIT_FOLDERS.items()
  }
  whole = parts["train"] or [p for p in pictures if len(p.parts) == 2]
  depth = 2 if parts["train"] else 1
  if not whole:
    raise MissingDataError(
      f"{reader.root} holds pictures but neither train/<class>/* nor <class>/*, e.g. {pictures[0]}"
    )
  classes = sorted({p.parts[depth - 1] for p in whole})
  number = {name: i for i, name in enumerate(classes)}
  chosen = parts[split] if split != "train" else whole
  if not parts["validation"] and not parts["test"]:
    labels = np.array([number[p.parts[depth - 1]] for p in whole])
    held_out = _rank_in_class(labels) % _HELD_OUT == _HELD_OUT - 1
    chosen = [p for p, held in zip(whole, held_out) if held == (split != "train")]
  elif not chosen:
    # One of the two is there: it serves as the other, too.
    chosen = parts["validation"] or parts["test"]
  if not chosen:
    raise MissingDataError(f"{reader.root} has too few pictures to hold out a {split} part")
  strange = [p for p in chosen if p.parts[depth - 1] not in number]
  if strange:
    raise ValueError(
      f"{reader.full_name(str(strange[0]))}: class {strange[0].parts[depth - 1]!r} is not a class "
      f"of the training part ({len(classes)} classes)"
    )
  labels_of = [number[p.parts[depth - 1]] for p in chosen]
  return FileSource(reader, [str(p) for p in chosen], labels_of, classes)


def _is_wrapped(pictures: Sequence[PurePosixPath]) -> bool:
  """Whether all lie in one directory that is neither a part nor a class."""
  tops = {p.parts[0] for p in pictures}
  parts = {folder for folders in _SPLIT_FOLDERS.values() for folder in folders}
  return (
    len(tops) == 1 and tops.pop().lower() not in parts and all(len(p.parts) > 2 for p in pictures)
  )


class _Within:
  """A reader's only top directory."""

  def __init__(self, reader: Any, prefix: str):
    self._reader, self._prefix = reader, prefix
    self.root = reader.root

  def read(self, name: str) -> bytes:
    return self._reader.read(f"{self._prefix}/{name}")

  def full_name(self, name: str) -> str:
    return self._reader.full_name(f"{self._prefix}/{name}")
