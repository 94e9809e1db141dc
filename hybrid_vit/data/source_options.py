"""Options behind the path of a source: "maps:/path?classes=21,ignore=0"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Option(NamedTuple):
  """What an option may be.

  Attributes:
    read: text → value; None, "" or a ValueError or KeyError for what it cannot be.
    expected: what would be right, for the message.
  """

  read: Callable[[str], Any]
  expected: str


def read_options(kind: str, text: str, known: Mapping[str, Option]) -> dict[str, Any]:
  """ "classes=21,ignore=0" → values.

  Raises:
    ValueError: an unknown option, or one that cannot be.
  """
  out: dict[str, Any] = {}
  for part in filter(None, text.split(",")):
    name, equals, value = (piece.strip() for piece in part.partition("="))
    if not equals or name not in known:
      there = f"there are {', '.join(known)}" if known else "it has none"
      raise ValueError(f"data source {kind}: {part!r} is none of its options; {there}")
    try:
      out[name] = known[name].read(value)
    except (ValueError, KeyError):
      out[name] = None
    if out[name] is None or out[name] == "":
      raise ValueError(
        f"data source {kind}: {name} is {value!r}; {known[name].expected} was expected"
      )
  return out


def between(low: float, high: float, kind: type) -> Callable[[str], Any]:
  """Reads a number in [low, high]."""

  def read(text: str) -> Any:
    value = kind(text)
    return value if low <= value <= high else None

  return read


BOOLEAN = Option({"true": True, "false": False}.__getitem__, "true or false")
