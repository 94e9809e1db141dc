"""The ids of `tokenizer.ClipTokenizer`, faster: words are found by one regular expression, known
ones are remembered, and new ones are merged, many at once, by the library `tokenizers`.

The expression is made of Python's own Unicode categories, so that no character falls into another
word than in the reference, whatever version of Unicode the library has.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

# Words in one text of the library, and texts in one call: its costs are by the text.
_TOGETHER = 64
# Remembered words; so many take some hundred megabytes.
_MOST_WORDS = 1 << 20


def is_available() -> bool:
  """Whether the library is installed."""
  return importlib.util.find_spec("tokenizers") is not None


class FastEncoder:
  """Cleaned captions without special strings → their ids."""

  def __init__(
    self,
    ids: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    byte_symbols: Mapping[int, str],
    contractions: tuple[str, ...],
    kind: Callable[[str], str],
    word_end: str,
  ):
    """Sets the library up.

    Args:
      ids: of all symbols.
      merges: pairs of symbols, the first ones before the others.
      byte_symbols: the symbol of each byte.
      contractions: that are words of their own.
      kind: of a character: "L" a letter, "N" a number, " " a space, "" anything else.
      word_end: ends the last symbol of a word.

    Raises:
      ImportError: the library is not installed.
    """
    try:
      import tokenizers
      from tokenizers import models, pre_tokenizers
    except ImportError as error:
      raise ImportError(
        "the fast tokenizer needs the library tokenizers: pip install hybrid_vit[clip]"
      ) from error
    # Words are remembered here; its own memory would only cost.
    model: Any = models.BPE(dict(ids), list(merges), end_of_word_suffix=word_end, cache_capacity=0)
    self._library = tokenizers.Tokenizer(model)
    self._library.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    self._find, self._find_plain = (p.findall for p in _patterns(contractions, kind))
    self._bytes = {byte: symbol for byte, symbol in byte_symbols.items() if chr(byte) != symbol}
    self._ends = frozenset(i for symbol, i in ids.items() if symbol.endswith(word_end))
    self._known: dict[str, tuple[int, ...]] = {}

  def __call__(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text."""
    split = [(self._find_plain if t.isascii() else self._find)(t) for t in texts]
    known = self._known
    new = [w for w in dict.fromkeys(chain.from_iterable(split)) if w not in known]
    if new:
      if len(known) > _MOST_WORDS:
        # Another thread may be looking words up in the old one.
        known = self._known = {}
        new = list(dict.fromkeys(chain.from_iterable(split)))
      known.update(zip(new, self._merge(new)))
    return [list(chain.from_iterable(map(known.__getitem__, words))) for words in split]

  def _merge(self, words: Sequence[str]) -> list[tuple[int, ...]]:
    """Ids of each word; tuples, which the collector of garbage need not look through."""
    # The symbol of a printable ASCII character is itself.
    spelt = [
      word
      if word.isascii() and word.isprintable()
      else word.encode("utf-8").decode("latin-1").translate(self._bytes)
      for word in words
    ]
    joined = [" ".join(spelt[i : i + _TOGETHER]) for i in range(0, len(spelt), _TOGETHER)]
    found: list[tuple[int, ...]] = []
    for encoded in self._library.encode_batch_fast(joined, add_special_tokens=False):
      ids, start = encoded.ids, 0
      for end, last in enumerate(map(self._ends.__contains__, ids), start=1):
        if last:
          found.append(tuple(ids[start:end]))
          start = end
    return found


@functools.cache
def _patterns(
  contractions: tuple[str, ...], kind: Callable[[str], str]
) -> tuple[re.Pattern[str], re.Pattern[str]]:
  """The words of `tokenizer._words` as regular expressions: of any text, and of ASCII (faster)."""
  # The reference takes the long s for an s there.
  fixed = "|".join(text.replace("s", "[s\u017f]") for text in contractions)
  made = []
  for most in (sys.maxunicode, 127):
    letters, numbers = (_ranges(wanted, kind, most) for wanted in ("L", "N"))
    made.append(re.compile(f"{fixed}|[{letters}]+|[{numbers}]|[^ {letters}{numbers}]+"))
  return made[0], made[1]


def _ranges(wanted: str, kind: Callable[[str], str], most: int) -> str:
  """All characters of a kind up to a code, as the inside of a character class."""
  found: list[list[int]] = []
  for code in range(most + 1):
    if kind(chr(code)) != wanted:
      continue
    if found and found[-1][1] == code - 1:
      found[-1][1] = code
    else:
      found.append([code, code])
  return "".join(f"{chr(first)}-{chr(last)}" for first, last in found)
