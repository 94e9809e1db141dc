"""Small files of a heading and arrays, kept between runs and mapped into memory.

They lie in `$XDG_CACHE_HOME/hybrid_vit` (`~/.cache/…`), so that processes of a machine share them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_ALIGNMENT = 64


def cache_path(folder: str, of: str | os.PathLike[str], ending: str) -> Path | None:
  """Where what is known of a file or directory is kept; None where there is no place for any.

  Args:
    folder: below the cache.
    of: an existing path.
    ending: of the file, with its dot.
  """
  cache = os.environ.get("XDG_CACHE_HOME")
  try:
    base = Path(cache) if cache and os.path.isabs(cache) else Path.home() / ".cache"
  except RuntimeError:  # no home
    return None
  real = os.path.realpath(of)
  # Machines with a local copy each, but one home, get one each.
  key = f"{real}\n{os.stat(real).st_ino}"
  name = hashlib.sha256(os.fsencode(key)).hexdigest()[:32]
  return base / "hybrid_vit" / folder / f"{name}{ending}"


def store_arrays(
  path: Path, magic: bytes, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
  """Writes a file at once: whoever reads sees all of it or none.

  Args:
    path: of the file; its directory is made.
    magic: its first bytes.
    header: what JSON can say.
    arrays: of one dimension each.
  """
  kinds = {name: [array.dtype.str, len(array)] for name, array in arrays.items()}
  # ASCII: names that are no UTF-8 stay as they are.
  text = json.dumps({**header, "arrays": kinds}).encode("ascii")
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(magic + len(text).to_bytes(8, "little") + text)
      for array in arrays.values():
        file.write(b"\0" * (-file.tell() % _ALIGNMENT))
        file.write(np.ascontiguousarray(array).data)
    os.replace(temporary, path)
  except BaseException:
    with contextlib.suppress(OSError):
      os.unlink(temporary)
    raise


def load_arrays(path: Path, magic: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]] | None:
  """The heading and the mapped arrays; None where it is another kind of file.

  Raises:
    OSError, ValueError, KeyError, TypeError: it is not there, or not whole.
  """
  with path.open("rb") as file:
    if file.read(len(magic)) != magic:
      return None
    header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    place = file.tell()
  arrays = {}
  for name, (dtype, count) in header["arrays"].items():
    place += -place % _ALIGNMENT
    # Nothing can be mapped of no bytes.
    arrays[name] = (
      np.memmap(path, dtype, "r", place, (count,)) if count else np.empty(0, np.dtype(dtype))
    )
    place += arrays[name].nbytes
  return header, arrays
