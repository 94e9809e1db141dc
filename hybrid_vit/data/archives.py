"""Pictures in a zip, which stays packed."""

from __future__ import annotations

import importlib.util
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from hybrid_vit.data.errors import CorruptExampleError, MissingDataError
from hybrid_vit.data.listing import Listing, is_data, list_names

_METHODS = {
  1: "Shrink", 6: "Implode", 9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "XZ",
  96: "JPEG", 97: "WavPack", 98: "PPMd", 99: "AES encryption",
}  # fmt: skip
# What this Python unpacks: some are built without bz2 or lzma, newer ones know Zstandard.
_UNPACKED = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED} | {
  method
  for method, module in ((12, "bz2"), (14, "lzma"), (93, "compression.zstd"))
  if importlib.util.find_spec(module.partition(".")[0]) is not None
  and (method != 93 or hasattr(zipfile, "ZIP_ZSTANDARD"))
}


class ZipReader:
  """Reads pictures by their paths in a zip; thread-safe.

  Raises:
    MissingDataError: no such file, or it is no zip.
    ValueError: pictures in it are encrypted or packed by a method that Python cannot unpack.
  """

  kind = "zip"

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
    except _damage() as error:
      raise MissingDataError(
        f"{path} is no zip file, or is cut short or damaged ({error}); a zip that holds "
        "train/<class>/*.jpg was expected"
      ) from error
    self._members = {
      _path_of(member.filename): member
      for member in self._zip.infolist()
      if not member.filename.endswith(("/", "\\"))
    }
    self._listing = list_names(self._members)
    self._check()

  def listing(self) -> Listing:
    """Its pictures."""
    return self._listing

  def read(self, name: str) -> bytes:
    """A picture's bytes; see `sources.Source` for what it raises."""
    try:
      return self._zip.read(self._members[name])
    except OSError as error:
      # bz2 tells damaged data by an OSError of no number; one of the system has a number.
      if error.errno is None:
        raise CorruptExampleError(f"damaged member of {self.root}: {error}") from error
      raise
    except _damage() as error:
      raise CorruptExampleError(f"damaged member of {self.root}: {error}") from error

  def full_name(self, name: str) -> str:
    """Its name for people."""
    return f"{self.root}:{self._members[name].filename}"

  def names(self) -> list[str]:
    """The paths of all files, pictures or not, sorted."""
    return sorted(name for name in self._members if all(map(is_data, name.split("/"))))

  def _check(self) -> None:
    paths = map(self._listing.path, range(len(self._listing)))
    pictures = [self._members[path] for path in paths]
    repack = (
      f"Unpack it with a tool that can and pack it anew, e.g. `7z x {self.root.name} -odata && "
      f"(cd data && zip -r -0 ../new.zip .)`; pictures are compressed already"
    )
    locked = next((member for member in pictures if member.flag_bits & 1), None)
    if locked is not None:
      raise ValueError(
        f"{self.root}: {locked.filename} is encrypted, and no password is asked for. {repack}"
      )
    for member in pictures:
      if member.compress_type not in _UNPACKED:
        method = _METHODS.get(member.compress_type, "unknown")
        raise ValueError(
          f"{self.root}: {member.filename} is packed by method {member.compress_type} ({method}), "
          f"which this Python cannot unpack. {repack}"
        )


def _damage() -> tuple[type[Exception], ...]:
  found: list[type[Exception]] = [
    zipfile.BadZipFile, zlib.error, EOFError, struct.error, NotImplementedError, ValueError,
  ]  # fmt: skip
  if 14 in _UNPACKED:
    import lzma

    found.append(lzma.LZMAError)
  return tuple(found)


def _path_of(member: str) -> str:
  """A member's path with "/" between its parts; some programs on Windows write a backslash."""
  parts = PurePosixPath(member.replace("\\", "/")).parts
  return "/".join(part for part in parts if part not in ("/", "..", "."))
