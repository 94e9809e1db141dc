"""CLIP's tokenizer against the authors' own, caption by caption."""

import numpy as np
import pytest

from hybrid_vit.data.tokenizer import ClipTokenizer
from tests import golden

DESCRIPTION, EXPECTED = golden.load("mobileclip", "tokenizer_20")


@pytest.fixture(scope="module")
def tokenizer():
  return ClipTokenizer(fast=False)


@pytest.mark.parametrize("index", range(len(DESCRIPTION["captions"])))
def test_captions(tokenizer, index):
  caption = DESCRIPTION["captions"][index]
  if not caption.isascii() or "&" in caption:
    pytest.importorskip("ftfy")
  for length, key in ((77, "tokens"), (256, "tokens_256"), (12, "tokens_12")):
    tokenizer.context_length = length
    np.testing.assert_array_equal(tokenizer(caption)[0], EXPECTED[key][index])


def test_ids(tokenizer):
  assert (tokenizer.vocabulary_size, tokenizer.start, tokenizer.end) == (49408, 49406, 49407)
  ids = tokenizer.encode("a  photo of 12\tdogs; it's \N{LATIN SMALL LETTER A} <start_of_text>")
  text = "<start_of_text>"
  assert tokenizer.decode(ids) == f"a photo of 1 2 dogs ; it 's a {text}"
  assert ids[-1] == tokenizer.start


def test_what_is_cut_keeps_its_end(tokenizer):
  tokenizer.context_length = 4
  rows = tokenizer(["a b c d e f", "a"])
  assert rows.dtype == np.int32 and rows.shape == (2, 4)
  assert rows[0, -1] == tokenizer.end and rows[1].tolist()[2:] == [tokenizer.end, 0]


def test_errors_say_what_is_wrong(monkeypatch):
  with pytest.raises(ValueError, match="context_length is 1; start and end alone take 2"):
    ClipTokenizer(1)
  monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
  with pytest.raises(ImportError, match=r"'caf\xe9' is not plain ASCII and needs ftfy"):
    ClipTokenizer()("caf\xe9")


@pytest.fixture(scope="module")
def fast():
  pytest.importorskip("tokenizers")
  return ClipTokenizer(fast=True)


def made_text(rng):
  """Characters of all kinds: words of many scripts, digits, marks, contractions, specials."""
  scripts = [(0x61, 0x7A), (0x41, 0x5A), (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF)]
  scripts += [(0x5D0, 0x5EA), (0x620, 0x64A), (0x900, 0x97F), (0xE00, 0xE5B), (0x3041, 0x30FF)]
  scripts += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F6FF), (0x30, 0x39), (0x660, 0x669)]
  scripts += [(0x21, 0x2F), (0x3A, 0x40), (0x2000, 0x206F), (0x2460, 0x249B), (0x300, 0x36F)]
  fixed = ["'s", "'\u017f", "'ll", "n't", "!'re", "'", "''d", "<start_of_text>", "&amp;", "\u00ad"]
  fixed += [
    "<end_of_text>",
    "</w>",
    "\x00\x1c",
    "\u3000",
    "\t",
    "\ufeff",
    "\U0001f468\u200d\U0001f469",
  ]
  parts = []
  for _ in range(rng.integers(0, 14)):
    if rng.random() < 0.2:
      parts.append(fixed[rng.integers(len(fixed))])
    else:
      low, high = scripts[rng.integers(len(scripts))]
      parts.append("".join(map(chr, rng.integers(low, high + 1, rng.integers(1, 12)))))
    if rng.random() < 0.6:
      parts.append(" ")
  return "".join(parts)


def test_the_fast_one_is_the_reference_on_any_text(fast):
  reference = ClipTokenizer(fast=False)
  rng = np.random.default_rng(0)
  # As they come, without ftfy: a repair would hide most of what is strange in them.
  texts = [" ".join(made_text(rng).split()).lower() for _ in range(3000)]
  assert sum(not text.isascii() for text in texts) > 2000
  together = fast.rows_of(texts)
  np.testing.assert_array_equal(together, reference.rows_of(texts))
  np.testing.assert_array_equal(
    np.concatenate([fast.rows_of([text]) for text in texts[:200]]), together[:200]
  )
  every = ["".join(map(chr, range(a, a + 64))) for a in range(0, 0x3000, 64)]
  every = [text for text in every if not any(0xD800 <= ord(c) < 0xE000 for c in text)]
  for text in every:
    assert fast._encode_all([text]) == reference._encode_all([text]), text


@pytest.mark.parametrize("index", range(len(DESCRIPTION["captions"])))
def test_the_fast_one_on_the_golden_captions(fast, index):
  test_captions(fast, index)


def test_the_fast_one_forgets_when_it_knows_too_many(fast, monkeypatch):
  from hybrid_vit.data import fast_tokenizer

  monkeypatch.setattr(fast_tokenizer, "_MOST_WORDS", 2)
  fast.context_length = 77
  reference = ClipTokenizer(fast=False)
  for text in ("one two three", "four one two", "two five six", "one"):
    assert fast.encode(text) == reference.encode(text)
  assert len(fast._fast._known) <= 6


def test_the_reference_serves_where_the_library_is_not(monkeypatch):
  from hybrid_vit.data import tokenizer as module

  monkeypatch.setattr(module, "is_available", lambda: False)
  assert not ClipTokenizer().fast
  monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
  with pytest.raises(ImportError, match=r"needs the library tokenizers: pip install"):
    ClipTokenizer(fast=True)
