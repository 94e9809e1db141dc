"""Listings of large folders, read once, kept on disk and shared by all processes of a machine.

A manifest lies in `$XDG_CACHE_HOME/hybrid_vit/manifests` (`~/.cache/…`) and is mapped into memory.
It is used as long as no directory of the folder has changed since; where it cannot be written, the
folder is read each time. A folder of few pictures has none.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hybrid_vit.data.listing import Listing, PackedNames, list_folder
from hybrid_vit.data.mapped_arrays import cache_path, load_arrays, store_arrays

# Fewer are read faster than anybody would notice.
_MIN_PICTURES = 10_000
_MAGIC = b"hybrid_vit manifest 1\n"
_THREADS = 8

_known: weakref.WeakValueDictionary[str, Listing] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def read_listing(root: Path) -> Listing:
  """The pictures below a folder; read once by all of this process, and of this machine if large.

  Raises:
    OSError: a directory cannot be read.
  """
  real = os.path.realpath(root)
  with _lock:
    listing = _known.get(real)
    if listing is None or not listing.settled or not _unchanged(real, listing):
      listing = _known[real] = _from_manifest(real)
    return listing


def manifest_path(root: Path) -> Path | None:
  """Where a folder's manifest lies, if there is one; None where there is no place for any."""
  return cache_path("manifests", root, ".manifest")


class _WrittenError(Exception):
  """Another process has written the manifest meanwhile."""


def _from_manifest(root: str) -> Listing:
  path = manifest_path(Path(root))
  if path is None:
    return list_folder(root)
  found = _load(path, root)
  if found is not None:
    return found
  with contextlib.ExitStack() as stack:

    def many() -> None:
      stack.enter_context(_locked(path.with_suffix(".lock"), root))
      nonlocal found
      found = _load(path, root)
      if found is not None:
        raise _WrittenError

    try:
      listing = list_folder(root, (_MIN_PICTURES, many))
    except _WrittenError:
      assert found is not None
      return found
    if not listing.settled or len(listing) <= _MIN_PICTURES:
      return listing
    try:
      _store(path, root, listing)
    except OSError as error:
      logging.info("the listing of %s is not kept: %s", root, error)
      return listing
    # Mapped, so that processes share its memory.
    return _load(path, root) or listing


@contextlib.contextmanager
def _locked(path: Path, root: str) -> Iterator[None]:
  """One process at a time; the system takes the lock from one that dies."""
  with contextlib.ExitStack() as stack:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      file = stack.enter_context(path.open("a"))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        logging.info("another process is listing %s; waiting for it", root)
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:  # a disk that is read-only or knows no locks
      logging.info("listing %s without a lock: %s", root, error)
    yield


def _store(path: Path, root: str, listing: Listing) -> None:
  arrays = {
    "ends": listing.ends,
    "changed": listing.changed,
    "name_ends": listing.names.ends,
    "names": listing.names.buffer,
  }
  header = {
    "root": root,
    "directories": list(listing.directories),
    "others": dict(listing.others),
  }
  store_arrays(path, _MAGIC, header, arrays)


def _load(path: Path, root: str) -> Listing | None:
  """None where there is none, it is not whole, or the folder has changed."""
  try:
    found = load_arrays(path, _MAGIC)
    if found is None:
      return None
    header, arrays = found
    listing = Listing(
      directories=header["directories"],
      ends=arrays["ends"],
      names=PackedNames(arrays["names"], arrays["name_ends"]),
      others={kind: (count, example) for kind, (count, example) in header["others"].items()},
      changed=arrays["changed"],
      settled=True,
    )
  except (OSError, ValueError, KeyError, TypeError):
    return None
  return listing if header["root"] == root and _unchanged(root, listing) else None


def _unchanged(root: str, listing: Listing) -> bool:
  """Whether every directory is as it was: adding, removing and renaming in it changes its time."""

  def same(start: int) -> bool:
    return all(
      os.stat(os.path.join(root, directory)).st_mtime_ns == changed
      for directory, changed in zip(
        listing.directories[start::_THREADS], listing.changed[start::_THREADS].tolist()
      )
    )

  try:
    with ThreadPoolExecutor(_THREADS) as pool:
      return all(pool.map(same, range(_THREADS)))
  except OSError:
    return False
