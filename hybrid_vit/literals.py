"""Values as a command line gives them: Python's literals, and text for what is none."""

from __future__ import annotations

import argparse
import ast
from typing import Any

_WORDS = {"true": True, "false": False, "none": None}
# What is no text when it is no literal either: a bracket or a quote that is not closed, a call.
_BRACKETS_AND_QUOTES = frozenset("()[]{}'\"")


def literal(text: str) -> Any:
  """ "0.1", "(1, 2)", "'a'"; "true", "false", "none" in any case, as absl takes them; else text."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return _WORDS.get(text.lower(), text)


def named_literal(text: str) -> tuple[str, Any]:
  """ "depths=(1, 1, 2, 1)" → its name and value: a type for argparse.

  Raises:
    argparse.ArgumentTypeError: no name, no value, or one that is neither a literal nor plain text.
  """
  name, equals, value = text.partition("=")
  if not (name.isidentifier() and equals and value):
    raise argparse.ArgumentTypeError(f"{text!r}: NAME=VALUE was expected")
  read = literal(value)
  if read is value and not _BRACKETS_AND_QUOTES.isdisjoint(value):
    raise argparse.ArgumentTypeError(
      f"{value!r} of {name} is no value as Python writes it, such as 0.1, (1, 1, 2, 1) or 'text'"
    )
  return name, read
