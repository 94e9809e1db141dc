"""docs/data.md against the code."""

import inspect
import re
from pathlib import Path

import pytest

from hybrid_vit.data import transforms
from hybrid_vit.data.transforms import DECODERS, parse_transform

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def signature_of(text):
  """ "resize(size, interpolation='bicubic')" → its name, and its arguments with their defaults."""
  namespace = {}
  exec(f"def {text}: pass", namespace)
  name = text.partition("(")[0]
  return name, {k: p.default for k, p in inspect.signature(namespace[name]).parameters.items()}


def test_the_table_of_transforms_is_the_registry():
  section = DOCUMENT.partition("| operation | what it does |")[2].partition("\n\n")[0]
  rows = re.findall(r"^\| `(\w+\(.*?\))` \| (.+) \|$", section, re.MULTILINE)
  assert all(len(meaning) > 20 for _, meaning in rows)
  documented = dict(signature_of(text) for text, _ in rows)
  registered = dict(signature_of(text) for text in transforms.transform_signatures().values())
  assert documented == registered
  for text, meaning in rows:  # what is named in the meaning is an argument
    for word in re.findall(r"`(\w+)`", meaning):
      assert word in documented[text.partition("(")[0]] or word == "original"


def test_every_transform_in_the_document_can_be_parsed():
  strings = re.findall(r'transform="([^"]+)"', DOCUMENT)
  table = DOCUMENT.partition("| timm | here |")[2].partition("\n\n")[0]
  strings += re.findall(r"\| `(\w+\([^…`]*\))`", table)
  assert len(strings) >= 7
  for text in strings:
    parse_transform(text)


@pytest.mark.parametrize("word", DECODERS)
def test_every_decoder_is_explained(word):
  assert f'* `"{word}"`' in DOCUMENT
