"""A run's directory: its own, for one process at a time; and what the system's errors mean."""

import concurrent.futures
import errno
import os
import signal
import subprocess
import sys
import textwrap

import pytest

from hybrid_vit import workdir
from hybrid_vit.workdir import WorkdirError, explain, lock, new_workdir
from tests.command import ROOT


def test_runs_that_begin_in_one_second_have_a_directory_each(tmp_path, monkeypatch):
  monkeypatch.setattr(workdir.time, "strftime", lambda format: "20260102-030405")
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda _: new_workdir("moat", tmp_path / "runs"), range(16)))
  names = sorted(path.name for path in found)
  assert len(set(names)) == 16 and all(path.is_dir() for path in found)
  assert "moat-20260102-030405" in names and "moat-20260102-030405-16" in names


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(
    WorkdirError, match=r"work directory .*file/moat-.* cannot be made: .*--workdir"
  ):
    new_workdir("moat", tmp_path / "file")


HOLDER = """
  import sys, time
  from hybrid_vit.workdir import lock
  with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def hold(directory):
  """A process that holds a directory."""
  process = subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(HOLDER), str(directory)],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == "held\n"
  return process


def test_a_directory_is_held_by_a_living_process_only(tmp_path):
  process = hold(tmp_path / "run")
  try:
    told = pytest.raises(WorkdirError, match=rf"in use by process {process.pid} on .* \(since 20")
    with told, lock(tmp_path / "run"):
      raise AssertionError("two processes hold it")
    # Of a distributed run process 0 has asked for all of them.
    with lock(tmp_path / "run", process_index=1):
      pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock(tmp_path / "run"):
      pass
  finally:
    process.kill()
    process.wait()
    process.stdout.close()


def test_it_is_free_after_an_error_within(tmp_path):
  with pytest.raises(KeyError), lock(tmp_path):
    raise KeyError
  with lock(tmp_path), pytest.raises(WorkdirError, match="is in use"), lock(tmp_path):
    pass


def test_a_file_system_without_locks_is_no_reason_to_refuse(tmp_path, monkeypatch):
  def refuse(file, how):
    raise OSError(errno.ENOLCK, "No locks available")

  monkeypatch.setattr(workdir.fcntl, "flock", refuse)
  with lock(tmp_path):
    pass


@pytest.mark.parametrize(
  ("number", "cause"),
  [
    (errno.EROFS, "that file system can only be read (EROFS): choose a place that can be written"),
    (errno.EACCES, "you have no right to it (EACCES): change its permissions"),
    (errno.ENOSPC, "the disk is full (ENOSPC): free some space"),
  ],
)
@pytest.mark.parametrize("call", ["open", "pwrite"])
def test_a_directory_that_cannot_be_written_is_told(tmp_path, monkeypatch, number, cause, call):
  def fail(path, *arguments, **options):
    raise OSError(number, os.strerror(number), *([path] if call == "open" else []))

  with monkeypatch.context() as patch:
    patch.setattr(workdir.os, call, fail)
    with pytest.raises(WorkdirError) as error, lock(tmp_path / "run"):
      raise AssertionError("it is held")
  message = str(error.value)
  assert "\n" not in message and f"{tmp_path}/run/lock: {cause}" in message
  assert message.startswith(f"work directory {tmp_path}/run cannot be ")
  with lock(tmp_path / "run"):  # nothing is left held
    pass


def wrapped(inner, *outer):
  """An error that others have wrapped in their own words."""
  error = inner
  for cause in outer:
    cause.__cause__ = error
    error = cause
  return error


@pytest.mark.parametrize(
  ("error", "expected"),
  [
    (
      OSError(errno.EROFS, "Read-only file system", "/data/run"),
      "/data/run: that file system can only be read (EROFS): choose a place that can be written",
    ),
    (
      wrapped(OSError(errno.ENOSPC, "No space left on device"), RuntimeError("save failed")),
      "the disk is full (ENOSPC): free some space, or put it on another disk",
    ),
    (
      wrapped(
        ValueError('Error writing "/data/c/d/0": [OS error 122: EDQUOT Disk quota exceeded]'),
        Exception("while saving"),
        RuntimeError("step 3"),
      ),
      "/data/c/d/0: your quota of that disk is used up (EDQUOT): free some space, or put it "
      "elsewhere",
    ),
    (
      ValueError("OUT_OF_RANGE: Failed to write 9 bytes: No space left [os_error_code='28']"),
      "the disk is full (ENOSPC): free some space, or put it on another disk",
    ),
    (
      wrapped(
        RuntimeError("INTERNAL: Barrier failed because: Task 1 heartbeat timeout. This indicates"),
        TimeoutError("Timed out while waiting for async_write_complete barrier."),
      ),
      "another process of this run is gone, or does not answer; its output says why. The same "
      "command in all of them goes on from the last checkpoint",
    ),
    (
      RuntimeError("Could not determine home directory."),
      "the home directory is not known: set HOME, or give paths without ~",
    ),
    (KeyError("HOME"), "the home directory is not known: set HOME, or give paths without ~"),
    (OSError(errno.ENOENT, "No such file or directory", "/data/x"), None),
    (ValueError("config.seed is -1"), None),
  ],
)
def test_errors_of_the_system_in_words(error, expected):
  assert explain(error) == expected


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_a_disk_that_is_full_indeed():
  with pytest.raises(OSError) as error, open("/dev/full", "w") as file:
    file.write("x")
    file.flush()
  assert explain(error.value).endswith(
    "the disk is full (ENOSPC): free some space, or put it on another disk"
  )


ENDS = """
import threading, time
from hybrid_vit import main

class Waits(threading.Thread):
  def run(self):
    time.sleep(600)

def fails(arguments):
  Waits.__module__ = "orbax.checkpoint"
  Waits().start()
  print("error: the disk is full")
  return 3

main.main = fails
main.entry_point()
"""


def test_a_run_whose_save_failed_does_not_wait_for_orbaxs_threads():
  ended = subprocess.run([sys.executable, "-c", ENDS], capture_output=True, timeout=300)
  assert (ended.returncode, ended.stdout) == (3, b"error: the disk is full\n")


COMMAND = ("-m", "hybrid_vit.main", "--config=configs/quickstart.py")


@pytest.mark.parametrize(
  ("options", "environment", "last"),
  [
    (["--workdir=/proc/nobody/run"], {}, "/proc/nobody"),
    (["--workdir=~/run"], {"HOME": "/proc/nobody"}, "/proc/nobody"),
  ],
)
def test_the_command_ends_with_the_cause(options, environment, last, tmp_path):
  done = subprocess.run(
    [sys.executable, *COMMAND, *options],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path), **environment},
    capture_output=True,
    text=True,
    timeout=180,
  )
  assert done.returncode == 1
  *_, hint, error = done.stderr.strip().splitlines()
  assert error.startswith("error: work directory") and last in error
  assert hint.startswith("(with HYBRID_VIT_TRACEBACK=1") and "Traceback" not in done.stderr
