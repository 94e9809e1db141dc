"""Listings of large folders: read once, kept, shared and never stale."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from hybrid_vit.data import manifest
from hybrid_vit.data.sources import create_source

LONG_AGO = 1_600_000_000


def write(root, *paths):
  for path in paths:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).touch()
  return root


def age(root, seconds=LONG_AGO):
  """As if nobody had touched its directories for long."""
  for directory, _, _ in os.walk(root):
    os.utime(directory, (seconds, seconds))


@pytest.fixture
def data(tmp_path, monkeypatch):
  """A folder of 60 pictures that counts as large; its cache is in "cache" beside it."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(manifest, "_MIN_PICTURES", 20)
  root = tmp_path / "data"
  write(root, *(f"train/{c}/{i:02d}.jpg" for c in "abc" for i in range(19)))
  write(root, *(f"val/{c}/x.jpg" for c in "abc"), "notes.txt")
  age(root)
  return root


@pytest.fixture
def walks(monkeypatch):
  """The folders that were read, one entry each time."""
  done = []
  walk = manifest.list_folder

  def counted(root, many=None):
    done.append(root)
    return walk(root, many)

  monkeypatch.setattr(manifest, "list_folder", counted)
  return done


def forget():
  """As a new process would begin."""
  manifest._known.clear()


def names(root, split="train"):
  source = create_source(f"folder:{root}", split)
  return [source.describe(i) for i in range(len(source))]


def manifests(root):
  return sorted((root.parent / "cache").rglob("*.manifest"))


def test_a_folder_is_read_once_by_a_process_and_by_those_after_it(data, walks):
  train, held_out = (create_source(f"folder:{data}", split) for split in ("train", "validation"))
  assert (len(train), len(held_out)) == (57, 3) and len(walks) == 1
  assert manifests(data) == [manifest.manifest_path(data)]
  first = names(data)
  forget()
  source = create_source(f"folder:{data}", "train")
  assert names(data) == first and source.info["class_names"] == ("a", "b", "c")
  assert [source[i]["label"] for i in (0, 19, 56)] == [0, 1, 2] and source[0]["image"] == b""
  assert len(walks) == 1
  # Mapped, and not held as text.
  listing = manifest.read_listing(data)
  assert isinstance(listing.names.buffer, np.memmap) and listing.names.buffer.nbytes == 60 * 6 - 3
  assert listing.others == {".txt": (1, "notes.txt")}


def test_small_folders_touch_no_cache(data, monkeypatch):
  monkeypatch.setattr(manifest, "_MIN_PICTURES", 60)
  assert len(names(data)) == 57
  assert not (data.parent / "cache").exists()


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("change", ["add", "remove", "rename", "class", "nested"])
def test_a_change_of_the_folder_shows(data, walks, change, later):
  before = names(data)
  if later:
    forget()
  folder = data / "train" / "b"
  if change == "add":
    write(folder, "new.jpg")
  elif change == "remove":
    (folder / "07.jpg").unlink()
  elif change == "rename":
    (folder / "07.jpg").rename(folder / "aa.jpg")
  elif change == "class":
    (data / "train" / "c").rename(data / "train" / "A")
  else:
    write(folder, "deep/er/1.jpg")
  after = names(data)
  assert after != before and len(walks) == 2
  expected = {os.path.join(d, f) for d, _, files in os.walk(data / "train") for f in files}
  assert set(after) == expected


def test_a_folder_that_has_just_changed_is_not_kept(data, walks):
  # A second change within the same tick of the disk's clock would not show.
  age(data, int(time.time()))
  names(data)
  assert not manifests(data)
  names(data)
  assert len(walks) == 2


@pytest.mark.parametrize("damage", ["cut", "other", "empty"])
def test_a_damaged_manifest_is_written_anew(data, walks, damage):
  first = names(data)
  (path,) = manifests(data)
  raw = path.read_bytes()
  path.write_bytes({"cut": raw[:-40], "other": b"x" * len(raw), "empty": b""}[damage])
  forget()
  assert names(data) == first and len(walks) == 2
  forget()
  assert names(data) == first and len(walks) == 2


@pytest.mark.parametrize("place", ["no home", "read-only", "a file", "no locks", "full"])
def test_where_nothing_can_be_kept_the_folder_is_read_each_time(data, walks, monkeypatch, place):
  cache = data.parent / "cache"
  if place == "no home":
    monkeypatch.delenv("XDG_CACHE_HOME")

    def homeless():
      raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(manifest.Path, "home", homeless)
  elif place == "read-only":  # root may write anywhere; the system would say this
    monkeypatch.setattr(manifest.Path, "mkdir", lambda *a, **k: raise_(OSError(30, "Read-only")))
  elif place == "a file":
    cache.write_text("in the way")
  elif place == "no locks":
    monkeypatch.setattr(manifest.fcntl, "flock", lambda *a: raise_(OSError(37, "No locks")))
  else:
    monkeypatch.setattr(manifest.os, "replace", lambda *a: raise_(OSError(28, "No space")))
  assert len(names(data)) == 57
  forget()
  assert len(names(data)) == 57
  assert len(walks) == (1 if place == "no locks" else 2)
  if place == "full":
    assert [p.suffix for p in (cache / "hybrid_vit" / "manifests").iterdir()] == [".lock"]


def raise_(error):
  raise error


def list_in_a_process(root, queue, barrier):
  barrier.wait()
  listing = manifest.read_listing(root)
  queue.put((len(listing), isinstance(listing.names.buffer, np.memmap)))


def test_processes_of_a_machine_wait_for_the_first_one(data, monkeypatch):
  scans = data.parent / "scans"
  scandir = os.scandir

  def slow(path):
    with open(scans, "a") as file:
      file.write(f"{path}\n")
    time.sleep(0.02)
    return scandir(path)

  monkeypatch.setattr(os, "scandir", slow)
  # Each notices after the first class that it is a large one.
  monkeypatch.setattr(manifest, "_MIN_PICTURES", 0)
  context = multiprocessing.get_context("fork")
  queue, barrier = context.Queue(), context.Barrier(4)
  processes = [
    context.Process(target=list_in_a_process, args=(data, queue, barrier)) for _ in range(4)
  ]
  for process in processes:
    process.start()
  assert [queue.get(timeout=20) for _ in processes] == [(60, True)] * 4
  for process in processes:
    process.join()
  assert len(manifests(data)) == 1


HOLDER = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


def test_the_lock_of_a_process_that_died_holds_nobody(data, walks):
  lock = manifest.manifest_path(data).with_suffix(".lock")
  lock.parent.mkdir(parents=True)
  holder = subprocess.Popen([sys.executable, "-c", HOLDER, lock], stdout=subprocess.PIPE, text=True)
  assert holder.stdout.readline() == "held\n"
  holder.send_signal(signal.SIGKILL)
  holder.wait()
  assert lock.exists() and len(names(data)) == 57 and len(walks) == 1


def test_copies_on_several_machines_have_a_manifest_each(data):
  key = manifest.manifest_path(data)
  link = data.parent / "link"
  link.symlink_to(data)
  assert manifest.manifest_path(link) == key
  os.rename(data, data.parent / "old")
  data.mkdir()  # the same path, another directory
  assert manifest.manifest_path(data) != key
