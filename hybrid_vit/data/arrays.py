"""Small data sets that are held in memory: digits and Fashion-MNIST."""

from __future__ import annotations

import gzip
import importlib.resources
import io
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit.data.errors import MissingDataError


class ArraySource:
  """Pictures held in memory, uint8 `[N, H, W, 3]`."""

  def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]):
    self._name, self._images, self._labels = name, images, labels
    self.info: dict[str, Any] = {"class_names": tuple(class_names)}

  def __len__(self) -> int:
    return len(self._labels)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"image": self._images[index], "label": int(self._labels[index])}

  def describe(self, index: int) -> str:
    """See `sources.Source`."""
    return f"{self._name} #{index}"

  @property
  def labels(self) -> np.ndarray:
    """The class of each, int `[N]`."""
    return self._labels


def digits(split: str) -> ArraySource:
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


def fashion_mnist(folder: Path, split: str) -> ArraySource:
  """Validation and test are the same 10,000 pictures.

  Raises:
    MissingDataError: one of its files is not there.
    ValueError: another number of pictures than of labels, or a damaged file.
  """
  stem = "train" if split == "train" else "t10k"

  def read(suffix: str, sides: tuple[int, ...]) -> np.ndarray:
    for name in (f"{stem}-{suffix}-ubyte.gz", f"{stem}-{suffix}-ubyte"):
      if (folder / name).is_file():
        return _read_idx(folder / name, sides)
    raise MissingDataError(
      f"Fashion-MNIST's file {stem}-{suffix}-ubyte[.gz] was looked for in {folder} and is not "
      "there. `apt install dataset-fashion-mnist` puts the four files in "
      "/usr/share/datasets/fashion-mnist; or name the folder that has them: fashion_mnist:/path"
    )

  labels = read("labels-idx1", ())
  images = read("images-idx3", (28, 28))
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


def _read_idx(path: Path, sides: tuple[int, ...]) -> np.ndarray:
  """A file of MNIST's format, uint8 `[N, *sides]`.

  Raises:
    ValueError: it is none, is damaged, or of arrays of another size.
  """
  raw = path.read_bytes()
  if path.name.endswith(".gz"):
    try:
      raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
      raise ValueError(f"{path} cannot be unpacked: {error}. Get it anew") from error
  # Two zeros, 8 for uint8, the number of axes; then the length of each, big-endian.
  head = 4 * (2 + len(sides))
  if raw[:4] != bytes((0, 0, 8, 1 + len(sides))) or len(raw) < head:
    raise ValueError(f"{path} is no file of {1 + len(sides)} axes of bytes in MNIST's format")
  shape = tuple(int(n) for n in np.frombuffer(raw[4:head], ">u4"))
  if shape[1:] != sides or len(raw) - head != math.prod(shape):
    raise ValueError(
      f"{path} says {' x '.join(map(str, shape))} and holds {len(raw) - head:,} bytes; "
      f"{' x '.join(map(str, (shape[0], *sides)))} were expected: it may be cut short"
    )
  return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)
