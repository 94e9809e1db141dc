"""Captions of several sources: the draw of a mixture, filters, tokens."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from hybrid_vit import build, recipes
from hybrid_vit.config import Config
from hybrid_vit.data import spec
from hybrid_vit.data.errors import CorruptExampleError
from hybrid_vit.data.spec import Field
from hybrid_vit.data.tokenizer import ClipTokenizer
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.models.registry import Preprocessing

CAPTIONS = {"true": ["a red disc", "one disc, red"], "alt": ["disc"], "none": []}


def draw(text, seed=0, **example):
  example = {"captions": CAPTIONS, **example}
  return parse_transform(text)(example, np.random.default_rng(seed))


def texts(text, count=300, **example):
  return [draw(text, seed, **example)["text"] for seed in range(count)]


def test_one_caption_of_each_source():
  rows = texts("captions('true', 'alt')")
  assert {row[0] for row in rows} == set(CAPTIONS["true"])
  assert {row[1] for row in rows} == {"disc"} and {len(row) for row in rows} == {2}
  assert draw("captions('true')", 5)["text"] == rows[5][:1]  # of the seed alone


def test_a_mixture_draws_its_source():
  rows = texts("captions({'true': 0.7, 'alt': 0.3, 'none': 5})", 2000)
  assert np.mean([row == ["disc"] for row in rows]) == pytest.approx(0.3, abs=0.04)
  assert np.mean([row == ["a red disc"] for row in rows]) == pytest.approx(0.35, abs=0.04)
  assert texts("captions({'true': 0, 'alt': 1})", 20) == [["disc"]] * 20


def test_no_argument_is_one_of_all_there_are():
  rows = texts("captions", 900)
  for text in ("a red disc", "one disc, red", "disc"):
    assert np.mean([row == [text] for row in rows]) == pytest.approx(1 / 3, abs=0.06)


def test_what_a_missing_source_falls_back_to():
  assert {row[0] for row in texts("captions('none', 'true', 'alt')", 50)} == set(CAPTIONS["true"])
  assert draw("captions('true', 'alt')", captions={"alt": ["disc"]})["text"] == ["disc"] * 2
  assert texts("captions({'gone': 0.9, 'alt': 0.1})", 20) == [["disc"]] * 20
  # Another source than those named never comes in their place.
  for text in ("captions('gone', 'none')", "captions({'none': 1, 'alt': 0})"):
    with pytest.raises(CorruptExampleError, match=r"no caption of \w+, \w+ \(left: alt, true\)"):
      draw(text)
  with pytest.raises(CorruptExampleError, match="any caption source"):
    draw("captions", captions={"alt": []})


@pytest.mark.parametrize(
  ("operation", "kept"),
  [
    ("filter_captions(min_words=2)", ["two words", "два слова", "two три четыре"]),
    ("filter_captions(max_words=2)", ["one", "two words", "два слова", "12"]),
    ("filter_captions(script='latin')", ["one", "two words"]),
    ("filter_captions(script='cyrillic')", ["два слова", "two три четыре"]),
    ("filter_captions(min_clip_score=0.25)", ["two words", "два слова"]),
    ("filter_captions(min_clip_score=0.25)|filter_captions(min_clip_score=0.35)", ["два слова"]),
  ],
)
def test_filters(operation, kept):
  given = ["one", "two words", "два слова", "two три четыре", "12"]
  example = draw(operation, captions={"alt": given}, clip_score={"alt": [0.2, 0.3, 0.4, 0.1, 0.0]})
  assert example["captions"] == {"alt": kept}


def test_scores_of_an_example_of_a_source_and_none():
  strict = "filter_captions(min_clip_score=0.5)"
  assert draw(strict, clip_score=0.6)["captions"] == CAPTIONS
  assert not any(draw(strict, clip_score=0.4)["captions"].values())
  assert draw(strict, clip_score={"alt": 0.4})["captions"] == {**CAPTIONS, "alt": []}
  with pytest.raises(CorruptExampleError, match="filter_captions took them out"):
    draw(strict + "|captions")
  with pytest.raises(CorruptExampleError, match="3 scores for the 2 captions of 'true'"):
    draw(strict, clip_score={"true": [0.1, 0.2, 0.3]})


def test_stored_embeddings_follow_their_captions():
  stored = {"true": np.arange(12).reshape(2, 2, 3), "alt": -np.ones((1, 2, 3))}
  for seed in range(20):
    found = draw("filter_captions|captions('true', 'alt')", seed, text_teacher=stored)
    number = CAPTIONS["true"].index(found["text"][0])
    np.testing.assert_array_equal(found["text_teacher"], [stored["true"][number], -np.ones((2, 3))])
  found = draw("filter_captions(min_words=3)|captions('true')", text_teacher=stored)
  assert found["text_teacher"].shape == (1, 2, 3)


def test_tokens():
  found = draw("captions('true', 'alt')|tokenize(9)", 1)["text"]
  words = draw("captions('true', 'alt')", 1)["text"]
  np.testing.assert_array_equal(found, ClipTokenizer(9)(words))
  assert found.shape == (2, 9) and found.dtype == np.int32
  with pytest.raises(
    ValueError, match=r"captions.* before it draws the captions; there are: image"
  ):
    parse_transform("tokenize")({"image": 0}, np.random.default_rng(0))


def test_all_captions_for_retrieval():
  found = draw("all_captions(5)|tokenize(8)")["text"]
  assert found.shape == (5, 8)
  np.testing.assert_array_equal(found[:3], ClipTokenizer(8)(CAPTIONS["true"] + CAPTIONS["alt"]))
  assert not found[3:].any()
  assert draw("all_captions(2)")["text"] == CAPTIONS["true"]
  assert draw("all_captions(2, 'alt')")["text"] == [*CAPTIONS["alt"], ""]
  with pytest.raises(CorruptExampleError, match="no caption of 'human'"):
    draw("all_captions(2, 'human')")


@pytest.mark.parametrize(
  ("operation", "rows"),
  [
    ("captions", 1), ("captions('true', 'alt')", 2), ("captions({'true': 1, 'alt': 0.5})", 1),
    ("all_captions(4)", 4),
  ],
)  # fmt: skip
def test_shapes_are_known_without_data(operation, rows):
  fields = {
    "image": Field("image", "uint8", (None, None, 3)),
    "text": Field("text", "int32", (None, None)),
  }
  text = f"decode|resize(16)|filter_captions(min_words=9)|{operation}|tokenize(12)"
  found = spec.resolve(fields, parse_transform(text, kinds=spec.kinds(fields)))
  assert found["text"].shape == (rows, 12) and found["text"].resolved


def test_shapes_of_stored_embeddings_are_those_of_the_data():
  fields = {
    "text": Field("text", "int32", (None, None)),
    "text_teacher": Field("value", "float32", (None, None, None)),
  }
  transform = parse_transform("captions('true', 'alt')|tokenize(9)", kinds=spec.kinds(fields))
  stored = {"true": np.ones((2, 3, 4)), "alt": np.ones((1, 3, 4))}
  example = {"captions": CAPTIONS, "text_teacher": stored}
  found = spec.resolve(fields, transform, lambda: example)
  assert found["text_teacher"].shape == (2, 3, 4) and found["text"].shape == (2, 9)
  assert (
    spec.row(
      found["text_teacher"], "t", transform(example, np.random.default_rng(0))["text_teacher"]
    ).dtype
    == np.float32
  )


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("captions(3)", "3 is no caption source"),
    ("captions('a', 'a')", "named twice"),
    ("captions({'a': 0})", "draws nothing"),
    ("captions({'a': -1})", "weight of 'a' is -1"),
    ("filter_captions(script='runes')", "script 'runes' is not one of latin"),
    ("filter_captions(min_words=5, max_words=2)", "max_words is 2; a whole number of at least 5"),
    ("tokenize(1)", "context_length is 1"),
    ("all_captions(0)", "count is 0"),
  ],
)
def test_wrong_arguments_are_told(text, message):
  with pytest.raises(ValueError, match=message):
    parse_transform(text)


def test_a_mixture_over_the_training_is_phases():
  transform = "decode|resize({image_size})|captions|tokenize"
  config = ConfigDict(dict(data=dict(transform=transform, batch_size=4), total_steps=30))
  recipes.caption_schedule(config, {"alt": 1.0}, {"true": 0.8, "alt": 0.2}, 3)
  size = Preprocessing(32, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)
  phases = build.read_curriculum(Config(config), 100, size).phases
  assert [(phase.steps, phase.transform) for phase in phases] == [
    (10, f"decode|resize(32)|captions({weights})|tokenize")
    for weights in (
      "{'alt': 1.0, 'true': 0.0}", "{'alt': 0.6, 'true': 0.4}", "{'alt': 0.2, 'true': 0.8}",
    )
  ]  # fmt: skip
  for phase in phases:
    parse_transform(phase.transform)
  with pytest.raises(ValueError, match="one operation `captions` in it"):
    recipes.caption_schedule(ConfigDict(dict(data=dict(transform="decode"))), {}, {}, 3)
