"""PyTorch in a process of its own, which waits while others are measured.

Within one process its threads and its memory slow XLA's calls down to a half. A module that serves
names its calls to `serve`; the benchmark makes them through `served`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

# Before each line that the process answers with.
_MARK = "benchmark: "


class PeerError(RuntimeError):
  """What was asked for cannot be had in PyTorch here; the message says what to do."""


@contextlib.contextmanager
def served(
  module: str, peer: str, arguments: Sequence[str]
) -> Iterator[tuple[dict[str, Callable[[], str]], dict[str, str]]]:
  """Calls that a module serves in a process of its own, by their names.

  Args:
    module: is run with the arguments and calls `serve`.
    peer: the library beside torch that it needs.
    arguments: of the module.

  Yields:
    (the calls, each of which returns what it answered; versions of the libraries).

  Raises:
    PeerError: a library is not installed, or the process ended.
  """
  for name in ("torch", peer):
    if importlib.util.find_spec(name) is None:
      raise PeerError(f"--against={peer} needs {name}: pip install {name}")
  with subprocess.Popen(
    [sys.executable, "-m", module, *arguments],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
  ) as process:  # fmt: skip
    assert process.stdin is not None and process.stdout is not None

    def answer() -> str:
      # Libraries print lines of their own.
      for line in process.stdout or ():
        if line.startswith(_MARK):
          return line.removeprefix(_MARK).rstrip("\n")
      raise PeerError(f"{peer}'s process ended with status {process.wait()}; see above")

    def called(form: str) -> str:
      print(form, file=process.stdin, flush=True)
      return answer()

    versions = dict(part.split("=") for part in answer().split())
    forms = answer().split("|")
    try:
      yield {form: functools.partial(called, form) for form in forms}, versions
    finally:
      process.stdin.close()


def serve(versions: Mapping[str, str], made: Callable[[], Mapping[str, Callable[[], Any]]]) -> None:
  """Prepares the calls, then makes one for each line that names it, and answers its result.

  What a call returns is written in one line.
  """
  print(_MARK + " ".join(f"{k}={v}" for k, v in versions.items()), flush=True)
  forms = made()
  print(_MARK + "|".join(forms), flush=True)
  for line in sys.stdin:
    said = str(forms[line.rstrip("\n")]())
    assert "\n" not in said, f"{line!r} answered several lines"
    print(f"{_MARK}{said}", flush=True)
