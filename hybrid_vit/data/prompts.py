"""Texts for classes: templates of prompts."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

from hybrid_vit.data.texts import as_text

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
    ValueError: it is no text, or names nothing.
  """
  names = tuple(_lines(path, ""))
  if not names:
    raise ValueError(f"{path} names no class; a name in each line was expected")
  return names


def _lines(given: str, embedded: str) -> list[str]:
  if given == IMAGENET and embedded:
    file = importlib.resources.files("hybrid_vit.data") / "embedded" / embedded
    text = file.read_text(encoding="utf-8")
  else:
    text = as_text(Path(given).expanduser().read_bytes(), given)
  return [line.strip() for line in text.splitlines() if line.strip()]
