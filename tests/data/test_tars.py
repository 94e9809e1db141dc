"""Pairs in WebDataset's tars: the index, what examples hold, what is broken, and resuming."""

import io
import logging
import os
import tarfile

import numpy as np
import pytest

from hybrid_vit.data import tar_index
from hybrid_vit.data.errors import CorruptExampleError, MissingDataError
from hybrid_vit.data.loader import Reading, eval_batches, train_batches
from hybrid_vit.data.sources import create_source
from hybrid_vit.data.spec import Field
from hybrid_vit.data.tar_index import build_index, read_index
from hybrid_vit.data.transforms import parse_transform
from tests.data.batches import assert_same, joined, take
from tests.data.pictures import encoded, photo
from tests.data.tar_files import pair, write_tar

FIELDS = {
  "image": Field("image", "uint8", (8, 8, 3)),
  "text": Field("text", "int32", (1, 10)),
}
TRANSFORM = "decode|random_resized_crop(8)|captions|tokenize(10)"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """An empty one."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_three(folder):
  """Three tars of 7, 5 and 9 pairs."""
  for k, count in enumerate((7, 5, 9)):
    pairs = {f"{k}{i:03d}": pair(10 * k + i) for i in range(count)}
    write_tar(folder / f"{k:05d}.tar", pairs)
  return folder


def npz(**arrays):
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  return buffer.getvalue()


def age(path):
  os.utime(path, (1_600_000_000, 1_600_000_000))
  return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_as_tarfile_finds_them(tmp_path, format):
  keys = ["short", "d/" + "e" * 90 + "/" + "f" * 90, "dir.with.dots/a", "ünï"]
  if format != tarfile.USTAR_FORMAT:
    keys.append("g" * 240)
  path = write_tar(tmp_path / "a.tar", {k: pair(i, n=i) for i, k in enumerate(keys)}, format)
  index = build_index(path)
  assert list(index.keys) == keys and not index.problems
  with tarfile.open(path) as tar:
    places = {member.name: (member.offset_data, member.size) for member in tar}
  for number, key in enumerate(keys):
    found = index.members(number)
    assert {f"{key}.{extension}": place for extension, place in found.items()} == {
      name: place for name, place in places.items() if name.startswith(f"{key}.")
    }


def test_an_index_is_kept_while_the_tar_stays_as_it_is(tmp_path, monkeypatch):
  path = age(write_tar(tmp_path / "a.tar", {"a": pair(1), "b": pair(2)}))
  first = read_index(path)
  with monkeypatch.context() as patch:
    patch.setattr(tar_index, "build_index", None)
    again = read_index(path)
  assert list(again.keys) == list(first.keys) == ["a", "b"]
  assert [again.members(i) for i in range(2)] == [first.members(i) for i in range(2)]
  write_tar(path, {"c": pair(3)})
  assert list(read_index(path).keys) == ["c"]


def test_what_an_example_holds(tmp_path):
  members = pair(4, caption="of the json", clip_score=0.3)
  source = create_source(f"tar:{write_tar(tmp_path / 'a.tar', {'x/7': members})}", "train")
  assert source[0] == {
    "image": members["jpg"],
    "captions": {"caption": ["picture number 4"]},
    "clip_score": 0.3,
    "key": "x/7",
  }
  assert source.describe(0) == f"{tmp_path}/a.tar:x/7"


def test_captions_of_several_sources(tmp_path):
  json = pair(1, captions={"alt": "an alt text", "synthetic": ["one", " ", "two"], "none": []})
  del json["txt"]
  plain = {**pair(2, caption="not this one", syn_text=["three"]), "syn.json": b'{"a": ["four"]}'}
  path = write_tar(tmp_path / "a.tar", {"1": json, "2": plain})
  source = create_source(f"tar:{path}", "train")
  assert source[0]["captions"] == {"alt": ["an alt text"], "synthetic": ["one", "two"]}
  assert source[1]["captions"] == {"caption": ["picture number 2"]}
  named = create_source(f"tar:{path}?captions=alt:txt,syn:json/syn_text,b:syn.json/a", "all[1:]")
  assert named[0]["captions"] == {"alt": ["picture number 2"], "syn": ["three"], "b": ["four"]}


def test_stored_embeddings(tmp_path):
  rng = np.random.default_rng(0)
  image, text = rng.random((1, 6), np.float32), rng.random((4, 6), np.float32)
  members = {
    **pair(1, syn=["a", "", "c"]), "npz": npz(image=image.astype(np.float16), text=text),
  }  # fmt: skip
  path = write_tar(tmp_path / "a.tar", {"1": members})
  arguments = "image_teacher=npz/image&text_teacher=npz/text&teachers=2"
  source = create_source(f"tar:{path}?captions=alt:txt,syn:json/syn&{arguments}", "train")
  example = source[0]
  np.testing.assert_array_equal(example["image_teacher"], image.astype(np.float16).reshape(2, 3))
  assert example["image_teacher"].dtype == np.float32
  assert example["captions"]["syn"] == ["a", "c"]
  np.testing.assert_array_equal(example["text_teacher"]["alt"], text[:1].reshape(1, 2, 3))
  np.testing.assert_array_equal(example["text_teacher"]["syn"], text[[1, 3]].reshape(2, 2, 3))
  drawn = parse_transform("captions('alt', 'syn')")(example, np.random.default_rng(0))
  assert drawn["text_teacher"].shape == (2, 2, 3)
  wrong = create_source(f"tar:{path}?captions=syn:json/syn&{arguments}", "train")
  with pytest.raises(CorruptExampleError, match="4 rows for 3 captions of syn"):
    wrong[0]


@pytest.mark.parametrize(
  "pattern", ["{00000..00002}.tar", "*.tar", "", "0000{0,1,2}.tar", "0*[!x].tar"]
)
def test_patterns_and_slices(tmp_path, pattern):
  write_three(tmp_path)
  source = create_source(f"tar:{tmp_path}/{pattern}", "train")
  assert len(source) == 21
  assert [source[i]["key"] for i in (0, 6, 7, 11, 12, 20)] == [
    "0000", "0006", "1000", "1004", "2000", "2008",
  ]  # fmt: skip
  part = create_source(f"tar:{tmp_path}/{pattern}", "validation[6:8]")
  assert [part[i]["key"] for i in range(len(part))] == ["0006", "1000"]


@pytest.mark.parametrize(
  ("spec", "error", "message"),
  [
    ("{00000..00004}.tar", MissingDataError, r"2 of 5 are not there, e.g. .*00003.tar"),
    ("gone", MissingDataError, r"1 of 1 are not there"),
    ("x*.tar", MissingDataError, "there is none"),
    ("{3..1}.tar", ValueError, "goes backwards"),
    ("packed.tar.gz", ValueError, "compressed.*gunzip packed.tar.gz"),
    ("00000.tar?caption=alt:txt", ValueError, "did you mean captions="),
    ("00000.tar?captions=a:txt,a:json/b", ValueError, "each once"),
    ("00000.tar?captions=", ValueError, "has no value"),
    ("00000.tar?text_teacher=npz/text", ValueError, "text_teacher needs captions="),
    ("00000.tar?image_teacher=json/a", ValueError, "a member .npy, or .npz/key"),
    ("00000.tar?teachers=no", ValueError, "teachers=no"),
  ],
)
def test_wrong_specs_are_told(tmp_path, spec, error, message):
  write_three(tmp_path)
  (tmp_path / "packed.tar.gz").touch()
  with pytest.raises(error, match=message):
    create_source(f"tar:{tmp_path}/{spec}", "train")


def broken(path):
  """A tar of eight examples of which "good1" and "good2" alone can be read; and its bytes."""
  picture = encoded(photo(1))
  write_tar(
    path,
    {
      "good1": pair(1),
      "no_picture": {"txt": b"words"},
      "empty": {"jpg": picture, "txt": b" \n"},
      "no_caption": {"jpg": picture},
      "bad_json": {"jpg": picture, "json": b"{"},
      "lost": pair(2),
      "good2": pair(3),
      "half": {"txt": b"half a picture", "jpg": picture},
    },
  )
  data = bytearray(path.read_bytes())
  start = data.index(b"lost.jpg")
  data[start : start + 512] = b"\xff" * 512  # the header of lost.jpg
  end = data.index(b"half.jpg") + 512 + 100
  path.write_bytes(data[:end])
  return path


def test_broken_members_are_skipped_counted_and_named(tmp_path, caplog):
  path = broken(tmp_path / "a.tar")
  with caplog.at_level(logging.WARNING):
    source = create_source(f"tar:{path}", "train")
  assert "begin with no header of a tar and are passed over" in caplog.text
  assert "half.jpg is cut short: 100 of its" in caplog.text
  why = {}
  for i in range(len(source)):
    try:
      source[i]
    except CorruptExampleError as error:
      why[source.describe(i).rpartition(":")[2]] = str(error)
  assert why.keys() == {"no_picture", "empty", "no_caption", "bad_json", "lost", "half"}
  assert "it has no picture (jpg" in why["no_picture"] and "only txt" in why["lost"]
  assert "it has no caption: caption is empty or missing" in why["empty"] == why["no_caption"]
  assert "its .json is no JSON" in why["bad_json"] and "get " in why["half"]
  reading = Reading(2, parse_transform(TRANSFORM), FIELDS)
  batches = eval_batches(source, reading, max_corrupt_fraction=0.9)
  assert sum(batch["mask"].sum() for batch, _ in batches) == 2
  assert batches.corrupt.count == 6 and f"{path}:empty" in batches.corrupt.names


def test_duplicates_and_what_is_no_tar(tmp_path, caplog):
  path = tmp_path / "a.tar"
  write_tar(path, {"a": pair(1)})
  with tarfile.open(path, "a") as tar:
    for name in ("a.txt", "nothing"):
      tar.addfile(tarfile.TarInfo(name))
  assert build_index(path).problems == (
    "a second a.txt at byte 2560; the first one is read. Keys must differ within a tar: pack it "
    "anew if these are two examples",
    "members without key and extension, which are passed over: 1",
  )
  (tmp_path / "b.tar").write_bytes(b"<html>" * 500)
  source = create_source(f"tar:{tmp_path}", "train")
  assert len(source) == 1 and source[0]["captions"] == {"caption": ["picture number 1"]}
  assert "b.tar: the 3000 bytes from byte 0 on to its end begin with no header" in caplog.text
  with pytest.raises(MissingDataError, match="holds no example"):
    create_source(f"tar:{tmp_path / 'b.tar'}", "train")


def test_a_tar_cut_between_members_or_in_a_header(tmp_path):
  path = write_tar(tmp_path / "a.tar", {"./a": {"txt": b"x" * 512}, "b": {"txt": b"y" * 512}})
  whole = path.read_bytes()
  assert list(build_index(path).keys) == ["a", "b"] and not build_index(path).problems
  path.write_bytes(whole[:1024])
  index = build_index(path)
  assert list(index.keys) == ["a"] and "ends without the blocks of zeros" in index.problems[0]
  path.write_bytes(whole[:1500])
  index = build_index(path)
  assert list(index.keys) == ["a"] and "the 476 bytes from byte 1024 on" in index.problems[0]
  # A header with a negative size, which would be read for ever.
  header = bytearray(whole[:512])
  header[124:136], header[148:156] = b"-0000002000\0", b" " * 8
  header[148:156] = b"%06o\0 " % sum(header)
  path.write_bytes(bytes(header) + whole[512:])
  assert list(build_index(path).keys) == ["b"]


def test_resuming_in_the_middle_of_a_tar_on_any_number_of_processes(tmp_path):
  source = create_source(f"tar:{write_three(tmp_path / 'tars')}", "train")
  reading = Reading(4, parse_transform(TRANSFORM), FIELDS)

  def batches(count, **settings):
    return take(train_batches(source, [reading], seed=3, **settings), count)

  whole = batches(11)
  assert len({batch["text"][0].tobytes() for batch in whole}) > 5
  for start in (1, 5, 7):
    assert_same(batches(11 - start, start_step=start), whole[start:])
    parts = [
      batches(11 - start, start_step=start, process_index=p, process_count=2, num_threads=3)
      for p in range(2)
    ]
    assert_same(joined(parts), whole[start:])


def test_a_tar_that_shrinks_is_an_error_of_the_disk(tmp_path):
  path = write_tar(tmp_path / "a.tar", {"a": pair(1)})
  source = create_source(f"tar:{path}", "train")
  os.truncate(path, 600)
  with pytest.raises(OSError, match="has become shorter"):
    source[0]
