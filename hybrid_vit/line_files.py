"""Files that grow line by line, and are never shortened without a copy."""

from __future__ import annotations

import io
import itertools
import logging
import os
import time
from collections.abc import Callable
from typing import TextIO

from etils import epath

from hybrid_vit.paths import is_remote
from hybrid_vit.workdir import explain, naming

# An object store takes whole files only: seconds between two of them.
_UPLOAD_SECONDS = 60.0


class LineFile:
  """A file opened for appending; on a local disk each line is there at once.

  In an object store the whole file is written anew from time to time and at the end.

  Args:
    path: the file; its directory exists.
    keep: which lines of a file that is there stay, given without their ends; the others are cut
      out. Where a whole line is cut out, the file is first kept as `<name>.1`, `<name>.2` … A last
      line without an end, which a kill leaves, goes without a copy. None: all stay as they are.
    header: the first line of a new file; it always stays.

  Attributes:
    copy: the name of the file that was kept, None where none was.
  """

  def __init__(
    self,
    path: epath.Path,
    keep: Callable[[bytes], bool] | None = None,
    *,
    header: str | None = None,
  ):
    self.copy: str | None = None
    self._path = path
    self._file: TextIO | None = None
    self._whole = io.StringIO()
    self._uploaded = 0.0
    content = path.read_bytes() if path.exists() else b""
    begins = header.encode() + b"\n" if header is not None else b""
    kept = content
    if keep is not None:
      lines = whole_lines(content.removeprefix(begins))
      kept = b"".join(line + b"\n" for line in lines if keep(line))
      if len(kept) < sum(len(line) + 1 for line in lines):
        self.copy = _copy(path, content)
    if not kept.startswith(begins) or not kept:
      kept = begins + kept
    if is_remote(path):
      self._whole.write(kept.decode())
      self._upload()
      return
    if kept != content:
      # Beside the file first: a kill in here must not lose the history.
      fresh = path.with_name(path.name + ".new")
      with naming(fresh):
        fresh.write_bytes(kept)
      os.replace(fresh, path)
    self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

  def write(self, text: str) -> None:
    """Appends text, which ends with a newline."""
    if self._file is not None:
      with naming(self._path):
        self._file.write(text)
        self._file.flush()
      return
    self._whole.write(text)
    if time.monotonic() - self._uploaded >= _UPLOAD_SECONDS:
      self._upload()

  def close(self) -> None:
    """Writes what is left; calling it again does nothing."""
    if self._file is not None:
      with naming(self._path):
        self._file.close()
    elif not self._whole.closed:
      self._upload()
      self._whole.close()

  def _upload(self) -> None:
    self._uploaded = time.monotonic()
    try:
      self._path.write_text(self._whole.getvalue())
    except Exception as error:
      # The next one holds all of it again; a training does not end for this.
      logging.warning("%s cannot be written just now: %s", self._path, explain(error) or error)


def whole_lines(content: bytes) -> list[bytes]:
  """Lines that end in a newline: a killed process can leave a part of one at the end."""
  return [line for line in content.split(b"\n")[:-1] if line]


def _copy(path: epath.Path, content: bytes) -> str:
  names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
  free = next(name for name in names if not name.exists())
  with naming(free):
    free.write_bytes(content)
  return free.name
