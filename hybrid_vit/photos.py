"""Files of photos → the arrays that weights expect."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hybrid_vit import recipes
from hybrid_vit.data.errors import CorruptExampleError
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.models.registry import Preprocessing


def prepare(photo: str | Path, preprocessing: Preprocessing) -> np.ndarray:
  """A photo as the weights expect it, before normalising: uint8 `[S, S, 3]`.

  Raises:
    CorruptExampleError: it is no picture, or only part of one.
    OSError: it cannot be opened.
  """
  # PIL's resizing is the one that published figures were measured with.
  transform = parse_transform(recipes.eval_transform(preprocessing), decoder="pil")
  example = transform({"image": Path(photo).read_bytes()}, np.random.default_rng(0))
  return example["image"]


def read_photos(
  photos: Sequence[str | Path], preprocessing: Preprocessing
) -> tuple[dict[Path, np.ndarray], dict[Path, str]]:
  """(path → prepared photo, path → why it could not be read), in the order given."""
  images, skipped = {}, {}
  for photo in map(Path, photos):
    try:
      images[photo] = prepare(photo, preprocessing)
    except (CorruptExampleError, OSError) as error:
      # PIL names the buffer it was given, which nobody knows.
      skipped[photo] = re.sub(r" <_io\.BytesIO .*>", "", str(error))
  return images, skipped
