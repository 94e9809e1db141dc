"""Files of photos → the arrays that weights expect."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from hybrid_vit import recipes
from hybrid_vit.data.errors import CorruptExampleError
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.models.registry import Preprocessing

_FoundT = TypeVar("_FoundT")


def prepare(photo: str | Path, preprocessing: Preprocessing | None) -> np.ndarray:
  """A photo as the weights expect it, before normalising: uint8 `[S, S, 3]`.

  Args:
    photo: its path.
    preprocessing: what is done to it; None to leave it at its own size, `[H, W, 3]`.

  Raises:
    CorruptExampleError: it is no picture, or only part of one.
    OSError: it cannot be opened.
  """
  text = "decode" if preprocessing is None else recipes.eval_transform(preprocessing)
  # PIL's resizing is the one that published figures were measured with.
  transform = parse_transform(text, decoder="pil")
  example = transform({"image": Path(photo).read_bytes()}, np.random.default_rng(0))
  return example["image"]


def for_each_photo(
  photos: Sequence[str | Path],
  preprocessing: Preprocessing | None,
  use: Callable[[Path, np.ndarray], _FoundT],
) -> tuple[list[_FoundT], dict[Path, str]]:
  """What `use(path, photo)` makes of each photo that can be read.

  Args:
    photos: files.
    preprocessing: see `prepare`.
    use: called in the order of the photos.

  Returns:
    (what it gave, in that order; path → why it could not be read).
  """
  found, skipped = [], {}
  for photo in map(Path, photos):
    try:
      image = prepare(photo, preprocessing)
    except (CorruptExampleError, OSError) as error:
      # PIL names the buffer it was given, which nobody knows.
      skipped[photo] = re.sub(r" <_io\.BytesIO .*>", "", str(error))
      continue
    found.append(use(photo, image))
  return found, skipped


def unused_names(photos: Sequence[Path], suffix: str) -> list[str]:
  """A file name of each photo's, numbered where two photos' are the same."""
  names: list[str] = []
  for photo in photos:
    name, number = f"{photo.stem}{suffix}", 1
    while name in names:
      number += 1
      name = f"{photo.stem}_{number}{suffix}"
    names.append(name)
  return names


def read_photos(
  photos: Sequence[str | Path], preprocessing: Preprocessing
) -> tuple[dict[Path, np.ndarray], dict[Path, str]]:
  """(path → prepared photo, path → why it could not be read), in the order given."""
  images, skipped = for_each_photo(photos, preprocessing, lambda photo, image: (photo, image))
  return dict(images), skipped
