"""A command's output where who read it has gone, as `head` does after ten lines.

The command goes on and writes its files; what it would print is dropped. Without this a training
would end with its log's reader, and a tool would call a closed pipe an error of its own.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

_OUTPUT, _ERRORS = 1, 2  # file descriptors


def run_tool(main: Callable[[Sequence[str]], int | None]) -> NoReturn:
  """Calls `main` with the command's arguments and ends the process with its status."""
  outlive_readers()
  sys.exit(main(sys.argv[1:]))


def outlive_readers() -> None:
  """From here on a pipe that was closed at its other end swallows what is printed to it."""
  sys.stdout = _outliving(sys.stdout, _OUTPUT)
  sys.stderr = _outliving(sys.stderr, _ERRORS)


def _outliving(stream: TextIO, descriptor: int) -> TextIO:
  """The stream anew where it writes to the descriptor; what stands in its place is left alone."""
  try:
    if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != descriptor:
      return stream
  except (OSError, ValueError):  # it has none, or is closed
    return stream
  stream.flush()
  return io.TextIOWrapper(
    io.BufferedWriter(_Descriptor(descriptor)),
    encoding=stream.encoding,
    errors=stream.errors,
    line_buffering=stream.line_buffering,
    write_through=stream.write_through,
  )


class _Descriptor(io.RawIOBase):
  """A file descriptor that is written to, and from its first closed pipe on leads nowhere."""

  def __init__(self, descriptor: int):
    self._descriptor = descriptor

  def fileno(self) -> int:
    return self._descriptor

  def writable(self) -> bool:
    return True

  def isatty(self) -> bool:
    return os.isatty(self._descriptor)

  def write(self, data: Any) -> int:
    try:
      return os.write(self._descriptor, data)
    except BrokenPipeError:
      # For libraries, too, that write to the descriptor themselves.
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._descriptor)
      os.close(nowhere)
      return len(data)
