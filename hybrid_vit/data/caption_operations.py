"""Operations on captions: filters, the draw of a mixture, and tokens.

An example has "captions", {caption source: its captions}, such as {"alt": […], "synthetic": […]}; a
caption source with none is as good as absent. "clip_score" is a number, or one or several for each
caption source; "text_teacher", where it is a dict, has a row for each caption of a caption source,
and follows the draw.

    "decode|resize(224)|filter_captions(min_words=3)|captions('true', 'alt')|tokenize(77)"

Where an example has no captions but a "text", as the noise has on which a transform is tried, that
stands for every caption.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hybrid_vit.data import arguments as check
from hybrid_vit.data.errors import CorruptExampleError
from hybrid_vit.data.tokenizer import ClipTokenizer
from hybrid_vit.data.transform_registry import Example, Transform, register_transform

# First words of Unicode's names of letters.
_SCRIPTS = (
  "latin", "greek", "cyrillic", "armenian", "hebrew", "arabic", "devanagari", "bengali", "tamil",
  "thai", "georgian", "hangul", "hiragana", "katakana", "cjk",
)  # fmt: skip


@register_transform("captions")
def captions(*sources: str | Mapping[str, float]) -> Transform:
  """Draws captions: "text", a list of as many strings as rows were asked for.

  `captions("true", "alt")` is one caption of each of the two (two rows, whose losses are summed in
  MobileCLIP's recipe); a caption source without any is replaced by the next of those named that has
  some. `captions({"true": 0.7, "alt": 0.3})` is one caption, its source drawn for each example;
  the weights are those of the caption sources that have captions, and 0 is never drawn.
  `captions()` is one of all there are.

  The operation raises CorruptExampleError where none of those named has a caption.
  """
  rows = _rows(sources)

  def transform(example: Example, rng: np.random.Generator) -> Example:
    if (text := _plain_text(example)) is not None:
      return {**example, "text": [text] * len(rows)}
    given = {name: texts for name, texts in example["captions"].items() if len(texts)}
    drawn = []
    for weights in rows:
      name = _draw_source(given, weights, rng)
      drawn.append((name, int(rng.integers(len(given[name])))))
    teacher = example.get("text_teacher")
    if isinstance(teacher, Mapping):
      example = {**example, "text_teacher": np.stack([teacher[name][i] for name, i in drawn])}
    return {**example, "text": [given[name][i] for name, i in drawn]}

  return transform


def _rows(sources: Sequence[str | Mapping[str, float]]) -> list[dict[str, float]]:
  """The mixture of each row: weights, or infinite ones for what comes in order, or {} for all."""
  if len(sources) == 1 and isinstance(sources[0], Mapping):
    weights = {
      _name(name): check.number(f"the weight of {name!r}", weight, 0)
      for name, weight in sources[0].items()
    }
    if not any(weights.values()):
      raise ValueError(f"{sources[0]!r} draws nothing; a weight above 0 was expected")
    return [weights]
  names = [_name(source) for source in sources]
  if len(set(names)) < len(names):
    raise ValueError(f"a caption source is named twice in {', '.join(names)}")
  if not names:
    return [{}]
  # In order, beginning with the row's own.
  orders = (names[i:] + names[:i] for i in range(len(names)))
  return [dict.fromkeys(order, math.inf) for order in orders]


def _name(value: Any) -> str:
  if not isinstance(value, str) or not value:
    raise ValueError(
      f"{value!r} is no caption source; names, such as 'alt', or one dict of weights, such as "
      "{'true': 0.7, 'alt': 0.3}, were expected"
    )
  return value


def _draw_source(
  given: Mapping[str, Sequence[str]], weights: Mapping[str, float], rng: np.random.Generator
) -> str:
  """The caption source of one row; one draw, whatever the case."""
  draw = rng.random()
  counts = {name: float(len(texts)) for name, texts in given.items()}
  present = {n: w for n, w in weights.items() if n in given and w > 0} if weights else counts
  if not present:
    there = ", ".join(sorted(given)) or "none of any"
    raise CorruptExampleError(
      f"there is no caption of {', '.join(weights) or 'any caption source'} (left: {there}); all "
      "captions were empty, or filter_captions took them out"
    )
  if math.inf in present.values():
    return next(iter(present))
  ends = np.cumsum(list(present.values()))
  place = int(np.searchsorted(ends, draw * ends[-1], side="right"))
  return list(present)[min(place, len(present) - 1)]


@register_transform("all_captions")
def all_captions(count: int = 5, source: str | None = None) -> Transform:
  """The first captions of an example, for retrieval: of one caption source, or of all in order.

  "text" gets `count` strings; what is not there is empty, and `tokenize` makes zeros of it. An
  example without captions raises CorruptExampleError.
  """
  check.whole("count", count)
  if source is not None:
    _name(source)

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    if (text := _plain_text(example)) is not None:
      found = [text]
    else:
      given = example["captions"]
      found = [t for n in given for t in given[n] if source in (None, n) and t.strip()][:count]
    if not found:
      raise CorruptExampleError("there is no caption" + (f" of {source!r}" if source else ""))
    return {**example, "text": found + [""] * (count - len(found))}

  return transform


@register_transform("filter_captions")
def filter_captions(
  min_words: int = 1,
  max_words: int | None = None,
  script: str | None = None,
  min_clip_score: float | None = None,
) -> Transform:
  """Takes captions out; before `captions`.

  Kept are captions of `min_words` to `max_words` words between spaces, of whose letters more than
  half are of `script`, and whose "clip_score" is at least `min_clip_score`. One score of an example
  is that of all its captions, one of a caption source that of its captions; a caption source that
  the scores leave out is kept, and an example without scores keeps none.
  """
  check.whole("min_words", min_words, 0)
  if max_words is not None:
    check.whole("max_words", max_words, min_words)
  if script is not None:
    check.choice("script", script, _SCRIPTS)
  if min_clip_score is not None:
    check.number("min_clip_score", min_clip_score, -1e9)

  def keeps(text: str, score: float) -> bool:
    words = len(text.split())
    return (
      min_words <= words
      and (max_words is None or words <= max_words)
      and (script is None or _is_of(script, text))
      and (min_clip_score is None or score >= min_clip_score)
    )

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    if _plain_text(example) is not None:
      return example
    kept, left, teachers = {}, {}, {}
    teacher = example.get("text_teacher")
    for name, texts in example["captions"].items():
      scores = _scores(example.get("clip_score"), name, len(texts))
      chosen = [i for i, text in enumerate(texts) if keeps(text, scores[i])]
      kept[name] = [texts[i] for i in chosen]
      left[name] = [scores[i] for i in chosen]
      if isinstance(teacher, Mapping) and name in teacher:
        teachers[name] = np.asarray(teacher[name])[chosen]
    changed = {**example, "captions": kept}
    if "clip_score" in example:
      # They stay beside their captions, for a filter behind this one.
      changed["clip_score"] = left
    return {**changed, "text_teacher": teachers} if teachers else changed

  return transform


def _scores(score: Any, source: str, count: int) -> list[float]:
  """The score of each caption of a caption source."""
  if score is None:
    return [-math.inf] * count
  if isinstance(score, Mapping):
    score = score.get(source, math.inf)
  many = np.ravel(np.asarray(score, np.float64))
  if len(many) not in (1, count):
    raise CorruptExampleError(
      f"there are {len(many)} scores for the {count} captions of {source!r}: one, or one for each, "
      "was expected"
    )
  return [float(s) for s in np.broadcast_to(many, (count,))]


def _is_of(script: str, text: str) -> bool:
  """Whether more than half of the letters are of a script."""
  letters = [c for c in text if c.isalpha()]
  if text.isascii():
    return script == "latin" and bool(letters)
  of_script = sum(unicodedata.name(c, "").lower().split(" ")[0] == script for c in letters)
  return 2 * of_script > len(letters)


@register_transform("tokenize")
def tokenize(context_length: int = 77) -> Transform:
  """ "text" → CLIP's tokens int32 `[C, context_length]`; an empty string is a row of zeros."""
  check.whole("context_length", context_length, 2)
  tokenizer = _tokenizer(context_length)

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    text = example.get("text")
    if text is None:
      raise ValueError(
        "tokenize of an example without 'text': captions(…) or all_captions(…) before it draws the "
        f"captions; there are: {', '.join(sorted(example))}"
      )
    texts = [text] if isinstance(text, str) else list(text)
    rows = tokenizer(texts)
    rows[[not text.strip() for text in texts]] = 0
    return {**example, "text": rows}

  return transform


@functools.cache
def _tokenizer(context_length: int) -> ClipTokenizer:
  """One for all transforms: its tables take a while, and it remembers words."""
  return ClipTokenizer(context_length)


def _plain_text(example: Example) -> str | None:
  """The text of an example without captions; None for one with some.

  Raises:
    ValueError: it has neither.
  """
  if "captions" in example:
    return None
  text = example.get("text")
  if isinstance(text, str):
    return text
  raise ValueError(
    "there are neither 'captions', {caption source: captions}, nor a 'text'; there are: "
    f"{', '.join(sorted(example))}"
  )
