"""Pairs of picture files and a table of captions."""

import json

import pytest

from hybrid_vit.data.errors import CorruptExampleError, MissingDataError
from hybrid_vit.data.loader import Reading, eval_batches
from hybrid_vit.data.sources import create_source
from hybrid_vit.data.spec import Field
from hybrid_vit.data.transforms import parse_transform
from tests.data.pictures import encoded, photo


@pytest.fixture
def folder(tmp_path):
  """Pictures a.jpg, b.jpg and sub/c.png."""
  (tmp_path / "sub").mkdir()
  for number, name in enumerate(("a.jpg", "b.jpg", "sub/c.png")):
    kind = "PNG" if name.endswith("png") else "JPEG"
    (tmp_path / name).write_bytes(encoded(photo(number, 20, 24), kind))
  return tmp_path


def write(path, *lines, encoding="utf-8"):
  path.write_text("\n".join(lines) + "\n", encoding=encoding)
  return f"captions:{path}"


def captions(source):
  return [source[i]["captions"] for i in range(len(source))]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_csv(folder, encoding):
  spec = write(
    folder / "t.csv", "image, caption,caption2,url", 'a.jpg,"A dog, asleep",ein Hund,x',
    'b.jpg,"two', 'lines",,y', "sub/c.png,é,,z", encoding=encoding,
  )  # fmt: skip
  source = create_source(spec, "train")
  assert captions(source) == [
    {"caption": ["A dog, asleep", "ein Hund"]}, {"caption": ["two\nlines"]}, {"caption": ["é"]},
  ]  # fmt: skip
  assert source[2]["image"] == (folder / "sub/c.png").read_bytes()
  assert source[0]["key"] == "a.jpg" and "clip_score" not in source[0]
  assert source.describe(1) == f"{folder}/t.csv, line 4 (b.jpg)"
  part = create_source(spec, "validation[-1:]")
  assert captions(part) == [{"caption": ["é"]}]


def test_columns_of_several_sources_and_scores(folder):
  spec = write(folder / "t.csv", "image,alt_text,long,score", "a.jpg,dog,A dog,0.25", "b.jpg,cat,,")
  source = create_source(spec + "?captions=alt:alt_text,long&clip_score=score", "train")
  assert captions(source) == [{"alt": ["dog"], "long": ["A dog"]}, {"alt": ["cat"]}]
  assert source[0]["clip_score"] == 0.25 and "clip_score" not in source[1]


def test_jsonl(folder):
  (folder / "tables").mkdir()
  rows = [
    {"image": "a.jpg", "caption": ["one", "two"], "clip_score": {"caption": [0.1, 0.2]}},
    {"image": "b.jpg", "captions": {"alt": "x", "syn": ["y", ""]}, "caption": "z"},
    {"image": "sub/c.png", "captions": ["p", "q"]},
  ]
  path = folder / "tables" / "t.jsonl"
  spec = write(path, *map(json.dumps, rows[:2]), "", json.dumps(rows[2]))
  source = create_source(f"{spec}?images={folder}", "train")
  assert captions(source) == [
    {"caption": ["one", "two"]}, {"alt": ["x"], "syn": ["y"], "caption": ["z"]},
    {"caption": ["p", "q"]},
  ]  # fmt: skip
  assert source[0]["clip_score"] == {"caption": [0.1, 0.2]}
  assert source.describe(2) == f"{path}, line 4 (sub/c.png)"


def test_rows_that_cannot_be_read_are_named_by_file_and_line(folder):
  jsonl = create_source(
    write(
      folder / "t.jsonl", '{"image": "gone.jpg", "caption": "x"}', "{", "[1]", '{"caption": "x"}',
      '{"image": "a.jpg", "caption": 3}', '{"image": "a.jpg", "caption": ""}',
      '{"image": "a.jpg", "caption": "x", "clip_score": "high"}',
      '{"image": "a.jpg", "caption": "a caption"}',
    ),
    "train",
  )  # fmt: skip
  for index, message in enumerate(
    (
      rf"{folder}/gone.jpg is not there: copy it there, or .*t.jsonl\?images=", "is no JSON",
      "the line is .1.", "its image is None", "'caption' is 3; a caption or a list",
      "it has no caption", "the CLIP score is 'high'",
    )
  ):  # fmt: skip
    with pytest.raises(CorruptExampleError, match=message):
      jsonl[index]
    assert jsonl.describe(index).startswith(f"{folder}/t.jsonl, line {index + 1}")
  fields = {"image": Field("image", "uint8", (8, 8, 3)), "text": Field("text", "int32", (1, 9))}
  reading = Reading(4, parse_transform("decode|resize(8)|captions|tokenize(9)"), fields)
  batches = eval_batches(jsonl, reading, max_corrupt_fraction=1.0)
  assert sum(batch["mask"].sum() for batch, _ in batches) == 1
  # Threads read them; which is told first is not said.
  assert f"{folder}/t.jsonl, line 1 (gone.jpg)" in batches.corrupt.names
  table = create_source(write(folder / "t.csv", "image,caption", "a.jpg,dogs, cats"), "train")
  with pytest.raises(CorruptExampleError, match=r"more fields than the first line.*'cats'"):
    table[0]


@pytest.mark.parametrize(
  ("lines", "error", "message"),
  [
    (["picture,caption", "a.jpg,x"], ValueError, "columns picture, caption and lacks image"),
    (["image,alt", "a.jpg,x"], ValueError, r"lacks caption; .* or captions=SOURCE:COLUMN"),
    (["image,caption"], MissingDataError, "has no row"),
  ],
)
def test_tables_that_cannot_be_read(folder, lines, error, message):
  with pytest.raises(error, match=message):
    create_source(write(folder / "t.csv", *lines), "train")


def test_a_missing_table_or_column_is_told(folder):
  with pytest.raises(MissingDataError, match=r"looked for at .*none.csv and is not there"):
    create_source(f"captions:{folder}/none.csv", "train")
  spec = write(folder / "t.csv", "image,alt", "a.jpg,x")
  with pytest.raises(ValueError, match="lacks long"):
    create_source(spec + "?captions=alt,long", "train")
