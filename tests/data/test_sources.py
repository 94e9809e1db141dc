import gzip
import os
import struct
import zipfile

import numpy as np
import pytest

from hybrid_vit.data.errors import MissingDataError
from hybrid_vit.data.sources import create_source
from hybrid_vit.data.splits import parse_split, part_slice
from tests.data.pictures import write_folder, write_zip


def names(source):
  return [source.describe(i) for i in range(len(source))]


def test_digits_have_their_two_parts():
  train, held_out = create_source("digits", "train"), create_source("digits", "validation")
  assert (len(train), len(held_out)) == (1437, 360)
  assert train.info == held_out.info and len(train.info["class_names"]) == 10
  assert train.info["class_names"][7] == "seven"
  assert train[0]["image"].shape == (8, 8, 3) and train[0]["image"].dtype == np.uint8
  assert max(int(train[i]["image"].max()) for i in range(50)) == 255
  # Every class has about a tenth of each part.
  for source in (train, held_out):
    counts = np.bincount([source[i]["label"] for i in range(len(source))])
    assert counts.min() > 0.09 * len(source) and counts.max() < 0.11 * len(source)
  assert names(create_source("digits", "test")) == [
    name.replace("validation", "test") for name in names(held_out)
  ]
  pictures = {train[i]["image"].tobytes() for i in range(len(train))}
  shared = sum(held_out[i]["image"].tobytes() in pictures for i in range(len(held_out)))
  assert shared == 0


def test_folder_with_its_own_validation_part(tmp_path):
  write_folder(tmp_path, {"train/dog": 3, "train/cat": 2, "val/cat": 1, "val/dog": 2})
  (tmp_path / "train" / "cat" / "notes.txt").write_text("no picture")
  (tmp_path / "train" / "cat" / ".hidden.jpg").write_bytes(b"")
  train = create_source(f"folder:{tmp_path}", "train")
  assert train.info["class_names"] == ("cat", "dog")
  assert [train[i]["label"] for i in range(5)] == [0, 0, 1, 1, 1]
  assert train.describe(2) == str(tmp_path / "train" / "dog" / "000.jpg")
  assert train[2]["image"] == (tmp_path / "train" / "dog" / "000.jpg").read_bytes()
  assert len(create_source(f"folder:{tmp_path}", "validation")) == 3
  # The validation part serves as the test part where there is no other.
  assert len(create_source(f"folder:{tmp_path}", "test")) == 3


def test_a_folder_of_links_is_followed(tmp_path):
  real = write_folder(tmp_path / "real", {"cat": 2, "dog": 2})
  (tmp_path / "data" / "train").mkdir(parents=True)
  for name in ("cat", "dog"):
    os.symlink(real / name, tmp_path / "data" / "train" / name)
  os.symlink(tmp_path / "data", tmp_path / "data" / "train" / "cat" / "loop")
  train = create_source(f"folder:{tmp_path / 'data'}", "train[:100%]")
  assert (len(train), train.info["class_names"]) == (4, ("cat", "dog"))


@pytest.mark.parametrize("top", ["", "train/"])
def test_a_tenth_of_each_class_is_held_out_always_the_same(tmp_path, top):
  write_folder(tmp_path, {f"{top}a": 20, f"{top}b": 31}, height=4, width=4)
  train, held_out = (create_source(f"folder:{tmp_path}", s) for s in ("train", "validation"))
  assert np.bincount([held_out[i]["label"] for i in range(len(held_out))]).tolist() == [2, 3]
  assert len(train) + len(held_out) == 51 and not set(names(train)) & set(names(held_out))
  assert [name[-7:] for name in names(held_out)[:2]] == ["009.jpg", "019.jpg"]
  assert names(create_source(f"folder:{tmp_path}", "test")) == names(held_out)


@pytest.mark.parametrize("prefix", ["", "pets/", "a/b/"])
@pytest.mark.parametrize("top", ["", "train/"])
def test_zip_reads_as_the_folder_does(tmp_path, prefix, top):
  folder = write_folder(tmp_path / "pets", {f"{top}cat": 10, f"{top}dog": 3})
  path = write_zip(tmp_path / "pets.zip", folder, prefix)
  for split in ("train", "validation"):
    inside, outside = create_source(f"zip:{path}", split), create_source(f"folder:{folder}", split)
    assert inside.info["class_names"] == outside.info["class_names"] == ("cat", "dog")
    assert [inside[i] for i in range(len(inside))] == [outside[i] for i in range(len(outside))]
  assert inside.describe(0) == f"{path}:{prefix}{top}cat/009.jpg"


def test_a_damaged_member_of_a_zip_is_an_unreadable_file(tmp_path):
  folder = write_folder(tmp_path / "pets", {"train/cat": 2})
  path = write_zip(tmp_path / "pets.zip", folder)
  with zipfile.ZipFile(path) as file:
    start = file.infolist()[1].header_offset
  raw = bytearray(path.read_bytes())
  raw[start + 200] ^= 0xFF
  path.write_bytes(raw)
  source = create_source(f"zip:{path}", "train")
  assert source[0]["image"][:2] == b"\xff\xd8"
  with pytest.raises(OSError, match="damaged member"):
    source[1]


def write_fashion_mnist(folder, *, compressed=True, sizes=(6, 4)):
  folder.mkdir()
  rng = np.random.default_rng(0)
  arrays = {}
  for stem, size in zip(("train", "t10k"), sizes):
    images = rng.integers(0, 256, (size, 28, 28), dtype=np.uint8)
    labels = np.arange(size, dtype=np.uint8) % 10
    arrays[stem] = images, labels
    for suffix, header, data in (
      ("images-idx3", struct.pack(">IIII", 2051, size, 28, 28), images),
      ("labels-idx1", struct.pack(">II", 2049, size), labels),
    ):
      raw = header + data.tobytes()
      name = f"{stem}-{suffix}-ubyte" + (".gz" if compressed else "")
      (folder / name).write_bytes(gzip.compress(raw) if compressed else raw)
  return arrays


@pytest.mark.parametrize("compressed", [True, False])
def test_fashion_mnist_from_its_four_files(tmp_path, compressed):
  arrays = write_fashion_mnist(tmp_path / "fm", compressed=compressed)
  for split, stem in (("train", "train"), ("validation", "t10k"), ("test", "t10k")):
    source = create_source(f"fashion_mnist:{tmp_path / 'fm'}", split)
    images, labels = arrays[stem]
    assert len(source) == len(labels) and len(source.info["class_names"]) == 10
    for i in range(len(source)):
      np.testing.assert_array_equal(source[i]["image"], np.stack([images[i]] * 3, -1))
      assert source[i]["label"] == labels[i]
  assert source.info["class_names"][9] == "boot"


def test_fashion_mnist_says_what_is_missing(tmp_path):
  write_fashion_mnist(tmp_path / "fm")
  (tmp_path / "fm" / "t10k-labels-idx1-ubyte.gz").unlink()
  with pytest.raises(MissingDataError, match="t10k-labels-idx1-ubyte"):
    create_source(f"fashion_mnist:{tmp_path / 'fm'}", "test")


@pytest.mark.parametrize(
  ("split", "chosen"),
  [
    ("train[:90%]", range(1293)),
    ("train[90%:]", range(1293, 1437)),
    ("train[100:102]", range(100, 102)),
    ("train[-3:]", range(1434, 1437)),
    ("train[:]", range(1437)),
  ],
)
def test_slices_are_those_of_tfds(split, chosen):
  source, whole = create_source("digits", split), create_source("digits", "train")
  assert len(source) == len(chosen)
  for i in (0, len(chosen) - 1):
    assert source.describe(i) == whole.describe(chosen[i])
    np.testing.assert_array_equal(source[i]["image"], whole[chosen[i]]["image"])


def test_parse_split_knows_the_usual_names():
  assert parse_split("val[:5]") == ("validation", ":5")
  assert part_slice("10%:20%", 1000) == slice(100, 200)


@pytest.mark.parametrize(
  ("spec", "split", "error", "message"),
  [
    ("mnist", "train", ValueError, "unknown data source 'mnist'; there are: digits"),
    ("digits", "training_set", ValueError, "split 'training_set': one of train, validation, test"),
    ("digits", "train[5]", ValueError, r"slice \[5\]: \[from:to\] was expected"),
    ("digits", "train[a:]", ValueError, "'a' is neither a number nor a percentage"),
    ("digits", "train[2000:]", ValueError, "is empty"),
    ("folder:/not/there", "train", MissingDataError, "looked for at /not/there"),
    ("zip:/not/there.zip", "train", MissingDataError, "looked for at /not/there.zip"),
    ("fashion_mnist:/not/there", "train", MissingDataError, "looked for in /not/there"),
  ],
)
def test_errors_name_what_was_looked_for(spec, split, error, message):
  with pytest.raises(error, match=message):
    create_source(spec, split)


def test_folders_that_hold_something_else(tmp_path):
  with pytest.raises(MissingDataError, match="holds no picture"):
    create_source(f"folder:{tmp_path}", "train")
  write_folder(tmp_path, {"train/cat": 1, "val/cow": 1})
  with pytest.raises(ValueError, match="class 'cow' is not a class of the training part"):
    create_source(f"folder:{tmp_path}", "validation")
  small = write_folder(tmp_path / "small", {"train/cat": 3})
  with pytest.raises(MissingDataError, match="too few pictures to hold out"):
    create_source(f"folder:{small}", "validation")
  (tmp_path / "no.zip").write_bytes(b"PK but no zip")
  with pytest.raises(MissingDataError, match="is no zip file"):
    create_source(f"zip:{tmp_path / 'no.zip'}", "train")
