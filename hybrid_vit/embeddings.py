"""Embeddings of a folder's pictures in a file, and the nearest of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit.data.listing import EXTENSIONS
from hybrid_vit.photos import read_photos
from hybrid_vit.weights.stored_clip import StoredClip

# Pictures that are read and encoded at once.
_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Embeddings:
  """Unit-length embeddings of pictures, and by which weights.

  Attributes:
    vectors: float32 `[N, D]`.
    files: N paths below `folder`.
    folder: where they lie.
    weights: directory of the weights.
    fingerprint: of the weights, see `StoredClip.fingerprint`.
  """

  vectors: np.ndarray
  files: tuple[str, ...]
  folder: str
  weights: str
  fingerprint: str

  def save(self, path: Path) -> None:
    """Writes an `.npz`, whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with contextlib.ExitStack() as stack:
      stack.callback(partial.unlink, missing_ok=True)
      held: dict[str, Any] = {
        field.name: np.asarray(getattr(self, field.name)) for field in dataclasses.fields(self)
      }
      with partial.open("wb") as file:
        np.savez(file, **held)
      partial.replace(path)

  @classmethod
  def load(cls, path: Path) -> Embeddings:
    """Reads what `save` wrote.

    Raises:
      ValueError: the file holds something else.
      OSError: it cannot be read.
    """
    try:
      with np.load(path, allow_pickle=False) as found:
        held = {f.name: found[f.name] for f in dataclasses.fields(cls)}
    except OSError as error:
      # One of the system has a number; a damaged zip brings up others.
      if error.errno is not None:
        raise
      raise ValueError(f"{path} is damaged: {error}") from error
    except Exception as error:  # zipfile's, zlib's or NumPy's, as the damage has it
      raise ValueError(
        f"{path} is no file of embeddings (hybrid_vit.tools.embed): {error}"
      ) from error
    texts = {name: str(held[name]) for name in ("folder", "weights", "fingerprint")}
    return cls(vectors=held["vectors"], files=tuple(map(str, held["files"])), **texts)

  def nearest(self, query: np.ndarray, count: int) -> list[tuple[Path, float]]:
    """Pictures and cosines, the nearest first, of a unit-length `[D]`.

    Raises:
      ValueError: an embedding of another width.
    """
    if query.shape != self.vectors.shape[1:]:
      raise ValueError(
        f"an embedding of {query.shape[0]} numbers; {self.vectors.shape[1]} were expected"
      )
    cosines = self.vectors @ query
    best = np.argsort(-cosines, kind="stable")[:count]
    return [(Path(self.folder) / self.files[i], float(cosines[i])) for i in best]


def pictures_in(folder: Path) -> list[Path]:
  """All pictures below a folder, in the order of their names; hidden ones are passed over.

  Raises:
    ValueError: it is no folder, or holds none.
  """
  if not folder.is_dir():
    raise ValueError(f"{folder} is no folder")
  found = sorted(
    path
    for path in folder.rglob("*")
    if path.suffix.lower() in EXTENSIONS
    and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    and path.is_file()
  )
  if not found:
    endings = ", ".join(sorted(EXTENSIONS))
    raise ValueError(f"{folder} holds no picture: looked for {endings} in it and its folders")
  return found


def embed(
  model: StoredClip,
  folder: Path,
  weights: str,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Embeddings, dict[Path, str]]:
  """Embeddings of a folder's pictures, and the reason for each that could not be read.

  Raises:
    ValueError: no picture there, or none that can be read.
  """
  found = pictures_in(folder)
  vectors: list[np.ndarray] = []
  files: list[str] = []
  skipped: dict[Path, str] = {}
  for start in range(0, len(found), _AT_ONCE):
    images, unread = read_photos(found[start : start + _AT_ONCE], model.preprocessing)
    skipped |= unread
    if images:
      vectors.append(model.encode_image(np.stack(list(images.values()))))
    files += _names(images, folder)
    progress(min(start + _AT_ONCE, len(found)), len(found))
  if not files:
    first, reason = next(iter(skipped.items()))
    raise ValueError(f"none of {len(found)} pictures can be read, e.g. {first}: {reason}")
  whole = np.concatenate(vectors)
  return Embeddings(whole, tuple(files), str(folder.resolve()), weights, model.fingerprint), skipped


def _names(paths: Iterable[Path], folder: Path) -> list[str]:
  return [str(path.relative_to(folder)) for path in paths]
