import gzip
import struct

import numpy as np
import pytest

from hybrid_vit.data.errors import MissingDataError
from hybrid_vit.data.sources import create_source


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
def test_slices_of_arrays_are_those_of_tfds(split, chosen):
  source, whole = create_source("digits", split), create_source("digits", "train")
  assert len(source) == len(chosen)
  for i in (0, len(chosen) - 1):
    assert source.describe(i) == whole.describe(chosen[i])
    np.testing.assert_array_equal(source[i]["image"], whole[chosen[i]]["image"])


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
    ("folder:", "train", ValueError, "'folder:' names no path"),
    ("folder:gs://b/x", "train", ValueError, "only tfds: reads from an object store"),
    ("zip:gs://b/x.zip", "train", ValueError, "only tfds: reads from an object store"),
    ("fashion_mnist:s3://b", "train", ValueError, "only tfds: reads from an object store"),
    ("folder:hdfs://b/x", "train", ValueError, "paths of kind hdfs:// cannot be read"),
  ],
)
def test_errors_name_what_was_looked_for(spec, split, error, message):
  with pytest.raises(error, match=message):
    create_source(spec, split)


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (lambda raw: gzip.compress(raw)[:-20], "train-images-idx3-ubyte.gz cannot be unpacked: .*anew"),
    (lambda raw: gzip.compress(raw)[:30] + b"x" * 400, "ubyte.gz cannot be unpacked"),
    (lambda raw: gzip.compress(b"\0\0\x0d" + raw[3:]), "ubyte.gz is no file of 3 axes of bytes"),
    (lambda raw: gzip.compress(raw[:-9]), r"says 6 x 28 x 28 and holds 4,695 bytes; 6 x 28 x 28"),
    (lambda raw: gzip.compress(raw[:8] + raw[4:8] + raw[12:]), "says 6 x 6 x 28 and holds"),
  ],
)
def test_damaged_files_of_fashion_mnist_are_named(tmp_path, damage, message):
  write_fashion_mnist(tmp_path / "fm")
  path = tmp_path / "fm" / "train-images-idx3-ubyte.gz"
  path.write_bytes(damage(gzip.decompress(path.read_bytes())))
  with pytest.raises(ValueError, match=message) as caught:
    create_source(f"fashion_mnist:{tmp_path / 'fm'}", "train")
  assert str(path) in str(caught.value)
