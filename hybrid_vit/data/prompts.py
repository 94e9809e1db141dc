"""Texts for classes and pictures: templates of prompts, and all captions of a picture."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit.data import arguments as check
from hybrid_vit.data.tokenizer import ClipTokenizer
from hybrid_vit.data.transform_registry import Transform, register_transform

DEFAULT_TEMPLATES = ("a photo of a {}.",)
# Instead of a file: OpenAI's 80 templates for ImageNet, in the order of its notebook.
IMAGENET = "imagenet"
_IMAGENET_FILE = "imagenet_templates.txt"


def read_templates(given: str | Sequence[str]) -> tuple[str, ...]:
  """Templates with one {} for the class: "imagenet" (80), a text file with one a line, or a list.

  Raises:
    ValueError: none, or one without exactly one {}; the message shows it.
    OSError: the file cannot be read.
  """
  if isinstance(given, str):
    lines = _lines(given, _IMAGENET_FILE)
    where = f"templates {given!r}"
  else:
    lines, where = list(given), "templates"
  if not lines:
    raise ValueError(f"{where} holds none: one a line was expected, such as {DEFAULT_TEMPLATES[0]}")
  for line in lines:
    if line.count("{}") != 1:
      raise ValueError(f"{where} has {line!r}; exactly one {{}} for the class was expected")
  return tuple(lines)


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[list[str]]:
  """For each class a prompt of each template; underscores of folders' names become spaces."""
  spoken = [name.replace("_", " ") for name in names]
  return [[template.replace("{}", name) for template in templates] for name in spoken]


def read_names(path: str) -> tuple[str, ...]:
  """Class names of a text file, one a line.

  Raises:
    OSError: it cannot be read.
  """
  return tuple(_lines(path, ""))


def _lines(given: str, embedded: str) -> list[str]:
  if given == IMAGENET and embedded:
    file = importlib.resources.files("hybrid_vit.data") / "embedded" / embedded
    text = file.read_text(encoding="utf-8")
  else:
    text = Path(given).expanduser().read_text(encoding="utf-8")
  return [line.strip() for line in text.splitlines() if line.strip()]


@register_transform("all_captions")
def all_captions(context_length: int = 77, most: int = 5, source: str | None = None) -> Transform:
  """ "captions" → "text", int32 `[K, context_length]` with K up to `most`: for retrieval.

  Those of one source, or of all in their order; empty ones are left out.
  """
  check.whole("context_length", context_length, 2)
  check.whole("most", most, 1)

  def apply(example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    given = example.get("captions", example.get("text"))
    if given is None:
      raise ValueError(f"the example has no captions; it has: {', '.join(sorted(example))}")
    if isinstance(given, Mapping):
      if source is not None and source not in given:
        raise ValueError(f"no captions of {source!r}; the example has: {', '.join(sorted(given))}")
      given = (
        given[source] if source is not None else [c for found in given.values() for c in found]
      )
    listed = [given] if isinstance(given, str) else list(given)
    kept = [caption for caption in listed if caption.strip()][:most]
    tokens = _tokenizer(context_length)(kept)
    return {**{k: v for k, v in example.items() if k != "captions"}, "text": tokens}

  return apply


@functools.lru_cache(maxsize=4)
def _tokenizer(context_length: int) -> ClipTokenizer:
  return ClipTokenizer(context_length)
