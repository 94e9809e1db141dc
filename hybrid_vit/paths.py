"""Paths of this machine and of object stores, by one kind of object."""

from __future__ import annotations

import os
from typing import Any

from etils import epath

# Stores that etils reads where its back end for them is installed.
REMOTE = ("gs", "s3", "az")


def as_path(path: Any) -> epath.Path:
  """A path that is the same from everywhere: "~" filled in, local ones absolute.

  Raises:
    ValueError: a kind of store that cannot be read; the message says which can.
  """
  text = os.fspath(path)
  scheme, separator, _ = text.partition("://")
  if separator:
    if scheme not in REMOTE:
      raise ValueError(
        f"{text!r}: paths of kind {scheme}:// cannot be read; there are: local paths, "
        f"{', '.join(f'{name}://' for name in REMOTE)}. Mount it, or copy it to a local disk"
      )
    return epath.Path(text)
  return epath.Path(os.path.abspath(os.path.expanduser(text)))


def is_remote(path: Any) -> bool:
  """Whether it lies in an object store: no appending, no locks, no renaming of directories."""
  return "://" in os.fspath(path)
