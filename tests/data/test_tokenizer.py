"""CLIP's tokenizer against the authors' own, caption by caption."""

import numpy as np
import pytest

from hybrid_vit.data.tokenizer import ClipTokenizer
from tests import golden

DESCRIPTION, EXPECTED = golden.load("mobileclip", "tokenizer_20")


@pytest.fixture(scope="module")
def tokenizer():
  return ClipTokenizer()


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
