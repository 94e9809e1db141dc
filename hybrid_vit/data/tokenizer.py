"""CLIP's tokenizer: byte-pair encoding of captions, as OpenAI's CLIP and open_clip have it.

Alec Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML
2021, arXiv:2103.00020; padding and cutting as open_clip's `SimpleTokenizer` and
apple/ml-mobileclip. The 48,894 merges are embedded. Captions beyond plain ASCII are repaired by
ftfy first (mended encodings, straight quotes, one form of each character), as there: it comes with
`pip install hybrid_vit[clip]`.

Where the library `tokenizers` is installed, it does the merging, several times faster and
with the same ids; what is written out here is the reference, and serves where it is not.
"""

import gzip
import html
import importlib.resources
import itertools
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from hybrid_vit.data.fast_tokenizer import FastEncoder, is_available

_MERGES_FILE = "bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49152 - 256 - 2
_SPECIAL = ("<start_of_text>", "<end_of_text>")
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_WORD_END = "</w>"
_PLAIN = re.compile(r"[\t\n\f\r -%'-~]*")


class ClipTokenizer:
  """Captions to token ids and back.

  Attributes:
    context_length: of a row of ids.
    vocabulary_size: number of ids.
    start: id before a caption.
    end: id after it; the largest, so that a text tower finds it by argmax.
    fast: whether the library `tokenizers` is used.
  """

  def __init__(self, context_length: int = 77, fast: bool | None = None):
    """`fast`: whether to use `tokenizers`; None where it is installed.

    Raises:
      ValueError: no room for a word.
      ImportError: `fast` is asked for and the library is not there.
    """
    if context_length < 2:
      raise ValueError(f"context_length is {context_length}; start and end alone take 2")
    self.context_length = context_length
    self._byte_symbols = _byte_symbols()
    merges = _read_merges()
    symbols = list(self._byte_symbols.values())
    symbols += [s + _WORD_END for s in symbols]
    symbols += ["".join(pair) for pair in merges]
    symbols += _SPECIAL
    self._ids = {symbol: i for i, symbol in enumerate(symbols)}
    self._symbols = symbols
    self._ranks = {pair: i for i, pair in enumerate(merges)}
    self._words: dict[str, list[int]] = {}
    self.vocabulary_size = len(symbols)
    self.start, self.end = (self._ids[s] for s in _SPECIAL)
    self.fast = is_available() if fast is None else fast
    self._fast = None
    if self.fast:
      self._fast = FastEncoder(
        self._ids, merges, self._byte_symbols, _CONTRACTIONS, _kind, _WORD_END
      )

  def __call__(self, captions: str | Sequence[str]) -> np.ndarray:
    """Rows of ids int32 `[captions, context_length]`: start, caption, end, zeros.

    A caption that is too long is cut, its last id being the end's.

    Raises:
      ImportError: where a caption needs ftfy and it is not installed.
    """
    captions = [captions] if isinstance(captions, str) else captions
    return self.rows_of([_clean(caption) for caption in captions])

  def rows_of(self, cleaned: list[str]) -> np.ndarray:
    """As a call gives them, of captions that are cleaned already."""
    rows = np.zeros((len(cleaned), self.context_length), np.int32)
    kept = [encoded[: self.context_length - 2] for encoded in self._encode_all(cleaned)]
    lengths = np.array([len(encoded) for encoded in kept], np.int64)
    places = np.arange(self.context_length - 1)
    # One array for all: one for each row costs more than its tokens.
    rows[:, 1:][places < lengths[:, None]] = list(itertools.chain.from_iterable(kept))
    rows[:, 0] = self.start
    rows[np.arange(len(kept)), lengths + 1] = self.end
    return rows

  def encode(self, caption: str) -> list[int]:
    """Ids of a caption, without start and end."""
    return self._encode_all([_clean(caption)])[0]

  def _encode_all(self, texts: list[str]) -> list[list[int]]:
    """Ids of cleaned captions."""
    if self._fast is None or any(s in text for text in texts for s in _SPECIAL):
      return [self._encode_words(text) for text in texts]
    return self._fast(texts)

  def _encode_words(self, text: str) -> list[int]:
    ids = []
    for word in _words(text):
      if word not in self._words:
        self._words[word] = self._encode_word(word)
      ids += self._words[word]
    return ids

  def decode(self, ids: Sequence[int]) -> str:
    """The caption of some ids, cleaned as it was; start and end are written out."""
    text = "".join(self._symbols[i] for i in ids)
    values = {symbol: value for value, symbol in self._byte_symbols.items()}
    raw = bytes(values[symbol] for symbol in text if symbol in values)
    return raw.decode("utf-8", errors="replace").replace(_WORD_END, " ").strip()

  def _encode_word(self, word: str) -> list[int]:
    """Merges neighbours of a word's bytes, those of the lowest rank first."""
    if word in _SPECIAL:
      return [self._ids[word]]
    symbols = [self._byte_symbols[b] for b in word.encode("utf-8")]
    symbols[-1] += _WORD_END
    while len(symbols) > 1:
      pairs = list(itertools.pairwise(symbols))
      best = min(pairs, key=lambda pair: self._ranks.get(pair, len(self._ranks)))
      if best not in self._ranks:
        break
      merged, i = [], 0
      while i < len(symbols):
        if i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == best:
          merged.append(symbols[i] + symbols[i + 1])
          i += 2
        else:
          merged.append(symbols[i])
          i += 1
      symbols = merged
    return [self._ids[symbol] for symbol in symbols]


def _clean(caption: str) -> str:
  """Repaired, entities resolved twice, white space collapsed, lower case."""
  if not _is_plain(caption):
    try:
      import ftfy
    except ImportError as error:
      raise ImportError(
        f"the caption {caption!r} is not plain ASCII and needs ftfy: pip install hybrid_vit[clip]"
      ) from error
    caption = ftfy.fix_text(caption)
  caption = html.unescape(html.unescape(caption)).strip()
  return " ".join(caption.split()).lower()


def _is_plain(caption: str) -> bool:
  """Whether ftfy would surely leave it as it is, but for the ends of lines."""
  return _PLAIN.fullmatch(caption) is not None


def _words(text: str) -> list[str]:
  """Special strings, contractions, runs of letters, single digits, and runs of all the rest."""
  words, i = [], 0
  # What the authors' pattern, which ignores case, takes for an "s" too.
  folded = text.replace("\u017f", "s")
  while i < len(text):
    if text[i] == " ":
      i += 1
      continue
    fixed = [s for s in _SPECIAL if text.startswith(s, i)]
    fixed += [s for s in _CONTRACTIONS if folded.startswith(s, i)]
    kind = _kind(text[i])
    end = i + 1
    if fixed:
      end = i + len(fixed[0])
    elif kind != "N":
      while end < len(text) and _kind(text[end]) == kind:
        end += 1
    words.append(text[i:end])
    i = end
  return words


def _kind(character: str) -> str:
  """What a character is: "L" a letter, "N" a number, " " a space, "" anything else."""
  if character == " ":
    return character
  kind = unicodedata.category(character)[0]
  return kind if kind in "LN" else ""


def _byte_symbols() -> dict[int, str]:
  """A printable character for each byte, itself where it is one, in the order of the ids."""
  printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
  rest = [b for b in range(256) if b not in printable]
  symbols = {b: chr(b) for b in printable}
  return symbols | {b: chr(256 + i) for i, b in enumerate(rest)}


def _read_merges() -> list[tuple[str, str]]:
  file = importlib.resources.files("hybrid_vit.data") / "embedded" / _MERGES_FILE
  lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
  pairs = (line.split() for line in lines[1 : 1 + _MERGES])  # the first line is a heading
  return [(left, right) for left, right in pairs]
