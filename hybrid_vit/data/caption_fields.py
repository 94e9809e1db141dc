"""Arguments of image–text sources, and what is a caption in their files.

tar:/path/{00000..00099}.tar?captions=alt:txt,synthetic:syn.json/syn_text&clip_score=json/score
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hybrid_vit.data.errors import CorruptExampleError

# The caption source of plain pairs.
CAPTION = "caption"


def split_arguments(spec: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
  """ "/path?name=value&name=value" → the path and the arguments; a path may have "?" of its own.

  Raises:
    ValueError: an argument that is not known, or given twice.
  """
  match = re.fullmatch(r"(.*)\?(\w+=[^?]*)", spec)
  if match is None:
    return spec, {}
  found: dict[str, str] = {}
  for part in match[2].split("&"):
    name, _, value = part.partition("=")
    if name not in known or name in found or not value:
      near = difflib.get_close_matches(name, known, n=1)
      hint = f"did you mean {near[0]}=…?" if near else f"there are: {', '.join(known)}"
      fault = "is given twice" if name in found else "has no value" if name in known else hint
      raise ValueError(f"{spec!r}: argument {part!r} {fault}")
    found[name] = value
  return match[1], found


def caption_fields(text: str) -> dict[str, str]:
  """ "alt:txt,synthetic" → {"alt": "txt", "synthetic": "synthetic"}: caption source → field."""
  found = {}
  for part in text.split(","):
    name, colon, field = part.strip().partition(":")
    if not name or name in found or (colon and not field):
      raise ValueError(
        f"captions={text!r}: names of caption sources, each once, were expected, with the field "
        'that they stand in where that is another: "alt:txt,synthetic:json/syn_text"'
      )
    found[name] = field or name
  return found


def as_captions(value: Any, field: str) -> list[str]:
  """A field's value as captions, stripped; empty ones stay "".

  Raises:
    CorruptExampleError: neither a string, nor a list of them, nor nothing.
  """
  many = [] if value is None else [value] if isinstance(value, str) else value
  if not isinstance(many, list) or not all(isinstance(text, str) for text in many):
    raise CorruptExampleError(f"{field!r} is {value!r}; a caption or a list of them was expected")
  return [text.strip() for text in many]


def without_empty(captions: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
  """The captions that are not empty, of caption sources that have some.

  Raises:
    CorruptExampleError: none is left.
  """
  found = {name: [text for text in texts if text] for name, texts in captions.items()}
  found = {name: texts for name, texts in found.items() if texts}
  if not found:
    raise CorruptExampleError(
      f"it has no caption: {', '.join(captions) or 'every field'} is empty or missing"
    )
  return found


def as_score(value: Any) -> Any:
  """A stored CLIP score: a number, or numbers by caption source.

  Raises:
    CorruptExampleError: anything else.
  """
  try:
    if isinstance(value, Mapping):
      return {name: np.asarray(score, np.float64).tolist() for name, score in value.items()}
    return float(value)
  except (TypeError, ValueError) as error:
    raise CorruptExampleError(f"the CLIP score is {value!r}; a number was expected") from error
