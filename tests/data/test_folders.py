import logging
import os

import numpy as np
import pytest

from hybrid_vit.data import folders
from hybrid_vit.data.errors import MissingDataError
from hybrid_vit.data.sources import create_source
from tests.data.pictures import encoded, photo, write_folder


def names(source):
  return [source.describe(i) for i in range(len(source))]


def touch(root, *paths):
  """Empty files of these names."""
  for path in paths:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).touch()
  return root


def classes_and_labels(spec, split="train"):
  source = create_source(spec, split)
  return source.info["class_names"], [source[i]["label"] for i in range(len(source))]


@pytest.fixture(autouse=True)
def nothing_told():
  folders._told.clear()


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


def test_folders_that_hold_something_else(tmp_path):
  with pytest.raises(MissingDataError, match="holds no picture"):
    create_source(f"folder:{tmp_path}", "train")
  write_folder(tmp_path, {"train/cat": 1, "val/cow": 1})
  with pytest.raises(ValueError, match="class 'cow' is not a class of the training part"):
    create_source(f"folder:{tmp_path}", "validation")
  small = write_folder(tmp_path / "small", {"train/cat": 3})
  with pytest.raises(MissingDataError, match="too few pictures to hold out"):
    create_source(f"folder:{small}", "validation")


def test_what_systems_and_notebooks_leave_is_no_class_and_no_picture(tmp_path, caplog):
  touch(
    tmp_path, "train/cat/1.jpg", "train/dog/1.jpg", "val/cat/1.jpg", "val/.ipynb_checkpoints/1.jpg",
    "train/.ipynb_checkpoints/1.jpg", "train/.hidden/a/1.jpg", "train/__MACOSX/cat/1.jpg",
    "train/@eaDir/1.jpg", "train/__pycache__/x.jpg", "lost+found/x.jpg", "train/cat/._1.jpg",
    "train/cat/Thumbs.db", "train/.DS_Store", "train/cat/.ipynb_checkpoints/1.jpg", ".git/a/b.jpg",
  )  # fmt: skip
  assert classes_and_labels(f"folder:{tmp_path}") == (("cat", "dog"), [0, 1])
  assert classes_and_labels(f"folder:{tmp_path}", "validation") == (("cat", "dog"), [0])
  assert not caplog.records


def test_numeric_classes_are_in_numeric_order(tmp_path):
  touch(tmp_path, *(f"train/{i}/x.png" for i in range(12)), "val/10/x.png")
  found, labels = classes_and_labels(f"folder:{tmp_path}")
  assert found == tuple(str(i) for i in range(12)) and labels == list(range(12))
  source = create_source(f"folder:{tmp_path}", "validation")
  assert source[0]["label"] == 10 and source.describe(0).endswith("val/10/x.png")


def test_nested_pictures_are_of_the_class_above(tmp_path):
  touch(tmp_path, "cat/1.png", "cat/2.png", "dog/2019/x.png", "dog/2020/05/y.png", "dog/a.png")
  source = create_source(f"folder:{tmp_path}", "train")
  assert source.info["class_names"] == ("cat", "dog")
  found = [(os.path.relpath(source.describe(i), tmp_path), source[i]["label"]) for i in range(5)]
  assert found == [
    ("cat/1.png", 0), ("cat/2.png", 0), ("dog/a.png", 1), ("dog/2019/x.png", 1),
    ("dog/2020/05/y.png", 1),
  ]  # fmt: skip
  nested = touch(
    tmp_path / "b", "train/a/0/1.jpg", "train/b/1.jpg", "val/a/x/y/2.jpg", "val/b/2.jpg"
  )
  assert classes_and_labels(f"folder:{nested}", "validation") == (("a", "b"), [0, 1])
  # The held-out tenth counts through all directories of a class.
  many = touch(tmp_path / "c", *(f"{c}/{i % 3}/{i:02d}.jpg" for c in "ab" for i in range(20)))
  held_out = create_source(f"folder:{many}", "validation")
  assert [held_out[i]["label"] for i in range(len(held_out))] == [0, 0, 1, 1]


@pytest.mark.parametrize(
  ("extension", "format_name"),
  [
    (".tif", "TIFF"), (".TIFF", "TIFF"), (".gif", "GIF"), (".jfif", "JPEG"), (".jpe", "JPEG"),
    (".ppm", "PPM"), (".pgm", "PPM"), (".pnm", "PPM"), (".webp", "WEBP"), (".bmp", "BMP"),
    (".PNG", "PNG"), (".pbm", "PPM"),
  ],
)  # fmt: skip
def test_a_class_may_be_of_any_format_that_is_read(tmp_path, extension, format_name):
  from hybrid_vit.data.transforms import parse_transform

  touch(tmp_path, "train/a/1.jpg", "val/a/1.jpg")
  (tmp_path / "train" / "b").mkdir()
  (tmp_path / "train" / "b" / f"1{extension}").write_bytes(encoded(photo(0), format_name))
  source = create_source(f"folder:{tmp_path}", "train")
  assert source.info["class_names"] == ("a", "b")
  for decoder in ("pil", "opencv"):
    example = parse_transform("decode", decoder)(source[1], np.random.default_rng(0))
    assert example["image"].shape == (40, 60, 3)


def test_what_is_left_out_is_counted_and_named_once(tmp_path, caplog):
  touch(
    tmp_path, "train/cat/1.jpg", "train/cat/1.heic", "train/cat/2.heic", "train/loose.jpg",
    "val/cat/1.jpg", "extra/dog/1.jpg", "README.md", "train/cow/LICENSE",
  )  # fmt: skip
  (tmp_path / "train" / "bird").mkdir()
  (tmp_path / "train" / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
  with caplog.at_level(logging.INFO):
    for split in ("train", "validation", "train"):
      create_source(f"folder:{tmp_path}", split)
  (message,) = [record.getMessage() for record in caplog.records]
  assert message.startswith(f"{tmp_path}: left out: 4 files of other kinds")
  for part in (
    "(.heic: 2, .md: 1, no extension: 1)",
    "1 links to nothing, e.g. train/cat/gone.jpg",
    "2 pictures outside the folders of classes, e.g. extra/dog/1.jpg",
    "2 folders without a picture, which are no class (bird, cow)",
    "in 1 classes",
  ):
    assert part in message


def test_folders_without_a_part_for_it_say_once_what_is_held_out(tmp_path, caplog):
  touch(tmp_path, *(f"{c}/{i}.jpg" for c in "ab" for i in range(10)), "a/notes.txt")
  (tmp_path / "empty").mkdir()
  for split in ("train", "validation"):
    create_source(f"folder:{tmp_path}", split)
  held_out, left_out = [record.getMessage() for record in caplog.records]
  assert "every tenth picture of each class, in the order of names, is held out" in held_out
  assert "e.g. a/notes.txt" in left_out and "1 folders without a picture" in left_out
  caplog.clear()
  apart = touch(tmp_path / "apart", "train/a/1.jpg", "test/a/1.jpg")
  create_source(f"folder:{apart}", "train")
  assert not caplog.records


def test_a_folder_may_be_wrapped_in_others(tmp_path):
  touch(tmp_path, "pets/v1/train/cat/1.jpg", "pets/v1/train/dog/1.jpg", "pets/v1/val/dog/1.jpg")
  (tmp_path / "pets" / "v1" / "train" / "cow").mkdir()
  assert classes_and_labels(f"folder:{tmp_path}", "val") == (("cat", "dog"), [1])
  source = create_source(f"folder:{tmp_path}", "train")
  assert source.describe(0) == str(tmp_path / "pets/v1/train/cat/1.jpg")


def test_pictures_that_lie_in_no_class(tmp_path):
  with pytest.raises(
    MissingDataError, match=r"neither train/<class>/\* nor <class>/\*, e.g. 1.jpg"
  ):
    create_source(f"folder:{touch(tmp_path / 'a', '1.jpg', '2.jpg')}", "train")
  with pytest.raises(MissingDataError, match=r"e.g. train/1.jpg"):
    create_source(f"folder:{touch(tmp_path / 'b', 'train/1.jpg', 'val/1.jpg')}", "train")
  with pytest.raises(MissingDataError, match=r"it holds 2 .heic, 1 .txt"):
    create_source(f"folder:{touch(tmp_path / 'c', 'x/1.heic', 'x/2.HEIC', 'x.txt')}", "train")
  # A class may be called as a part is, where there are others.
  flat = touch(
    tmp_path / "d", *(f"{c}/{i}.jpg" for c in ("running", "training") for i in range(10))
  )
  assert create_source(f"folder:{flat}", "train").info["class_names"] == ("running", "training")


def test_a_slice_of_a_folder_holds_every_class_in_proportion(tmp_path):
  sizes = {"a": 40, "b": 8, "c": 20}
  touch(
    tmp_path, *(f"train/{c}/{i:02d}.jpg" for c, n in sizes.items() for i in range(n)), "val/a/1.jpg"
  )
  whole = create_source(f"folder:{tmp_path}", "train")
  for percent, counts in ((75, [30, 6, 15]), (25, [10, 2, 5])):
    parts = [
      create_source(f"folder:{tmp_path}", f"train[{s}]") for s in (f":{percent}%", f"{percent}%:")
    ]
    labels = [[part[i]["label"] for i in range(len(part))] for part in parts]
    assert np.bincount(labels[0]).tolist() == counts
    assert sorted(names(parts[0]) + names(parts[1])) == sorted(names(whole))
    assert labels[0] == sorted(labels[0])  # in the order of the whole
    for part, of_part in zip(parts, labels):
      assert [whole.info["class_names"][i] for i in of_part] == [
        n.split("/")[-2] for n in names(part)
      ]
      assert part.info == whole.info
  assert len(create_source(f"folder:{tmp_path}", "train[:10]")) == 10
  assert names(create_source(f"folder:{tmp_path}", "train[:100%]")) == names(whole)
  # No run of neighbouring names.
  third = names(create_source(f"folder:{tmp_path}", "train[:34]"))
  assert any("/a/3" in name for name in third) and any("/a/0" in name for name in third)


def test_a_directory_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
  touch(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg")
  scandir = os.scandir

  def guarded(path):
    if str(path).endswith("dog"):
      raise PermissionError(13, "Permission denied", path)
    return scandir(path)

  monkeypatch.setattr(os, "scandir", guarded)
  with pytest.raises(PermissionError, match="dog"):
    create_source(f"folder:{tmp_path}", "train")


def test_names_that_are_no_utf8_and_two_links_to_one_folder(tmp_path):
  touch(tmp_path, "real/1.jpg", "train/ünï/é.jpg", "val/ünï/1.jpg")
  (tmp_path / "train" / "a").symlink_to(tmp_path / "real")
  (tmp_path / "train" / "b").symlink_to(tmp_path / "real")
  odd = os.fsencode(tmp_path / "train" / "ünï") + b"/\xff.jpg"
  with open(odd, "wb") as file:
    file.write(b"odd")
  source = create_source(f"folder:{tmp_path}", "train")
  assert source.info["class_names"] == ("a", "b", "ünï") and len(source) == 4
  assert [source[i]["label"] for i in range(4)] == [0, 1, 2, 2]
  assert {source[i]["image"] for i in (2, 3)} == {b"", b"odd"}


@pytest.mark.parametrize("top", ["", "train/"])
def test_all_is_every_picture_and_slices_of_it_hold_out_a_number_of_ones_own(tmp_path, top):
  write_folder(tmp_path, {f"{top}cat": 30, f"{top}dog": 10, **({"val/cat": 4} if top else {})})
  spec, count = f"folder:{tmp_path}", 44 if top else 40
  whole = create_source(spec, "all")
  held_out, rest = create_source(spec, "all[:8]"), create_source(spec, "all[8:]")
  assert (len(whole), len(held_out), len(rest)) == (count, 8, count - 8)
  assert sorted(names(held_out) + names(rest)) == sorted(names(whole))
  labels = [held_out[i]["label"] for i in range(8)]
  assert labels.count(1) == 2 and whole.info["class_names"] == ("cat", "dog")
  with pytest.raises(ValueError, match="digits has train, validation and test"):
    create_source("digits", "all")
