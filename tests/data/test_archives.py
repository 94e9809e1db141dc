import logging
import zipfile

import numpy as np
import pytest

from hybrid_vit.data import archives, folders
from hybrid_vit.data.errors import CorruptExampleError, MissingDataError
from hybrid_vit.data.loader import Reading, train_batches
from hybrid_vit.data.sources import create_source
from hybrid_vit.data.spec import Field
from hybrid_vit.data.transforms import parse_transform
from tests.data.pictures import encoded, photo, write_folder, write_zip


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


def test_a_damaged_member_of_a_zip_is_a_corrupt_picture(tmp_path):
  folder = write_folder(tmp_path / "pets", {"train/cat": 2})
  path = write_zip(tmp_path / "pets.zip", folder)
  with zipfile.ZipFile(path) as file:
    start = file.infolist()[1].header_offset
  raw = bytearray(path.read_bytes())
  raw[start + 200] ^= 0xFF
  path.write_bytes(raw)
  source = create_source(f"zip:{path}", "train")
  assert source[0]["image"][:2] == b"\xff\xd8"
  with pytest.raises(CorruptExampleError, match="damaged member"):
    source[1]


def pictures_in_a_zip(path, names, method=zipfile.ZIP_STORED):
  with zipfile.ZipFile(path, "w", method) as file:
    for number, name in enumerate(names):
      # Set afterwards: the constructor would turn no backslash, and refuse nothing.
      member = zipfile.ZipInfo("x")
      member.filename, member.compress_type = name, method
      file.writestr(member, encoded(photo(number)))
  return path


def change_members(path, **fields):
  """Writes these into every header of the zip: `method`, `flags`."""
  raw = bytearray(path.read_bytes())
  for signature, flags, method in ((b"PK\x03\x04", 6, 8), (b"PK\x01\x02", 8, 10)):
    start = raw.find(signature)
    while start >= 0:
      if "flags" in fields:
        raw[start + flags] |= fields["flags"]
      if "method" in fields:
        raw[start + method : start + method + 2] = fields["method"].to_bytes(2, "little")
      start = raw.find(signature, start + 4)
  path.write_bytes(raw)
  return path


def test_names_with_backslashes_are_read_as_paths(tmp_path):
  path = pictures_in_a_zip(
    tmp_path / "x.zip",
    [
      "pets\\train\\cat\\1.png",
      "pets\\train\\dog\\1.png",
      "pets\\val\\dog\\1.png",
      "pets\\empty\\",
    ],
  )
  train, held_out = (create_source(f"zip:{path}", split) for split in ("train", "validation"))
  assert train.info["class_names"] == ("cat", "dog") and held_out[0]["label"] == 1
  assert train[1]["image"] == encoded(photo(1)) and held_out[0]["image"] == encoded(photo(2))
  assert train.describe(0) == f"{path}:pets\\train\\cat\\1.png"


def test_names_with_leading_dots_and_slashes(tmp_path):
  path = pictures_in_a_zip(
    tmp_path / "x.zip",
    ["./train/a/1.png", "/train/b/1.png", "val/a/1.png", "__MACOSX/train/c/._1.png"],
  )
  assert create_source(f"zip:{path}", "train").info["class_names"] == ("a", "b")


@pytest.mark.parametrize(
  ("method", "name"), [(9, "Deflate64"), (93, "Zstandard"), (98, "PPMd"), (77, "unknown")]
)
def test_a_method_that_python_cannot_unpack_is_named_at_once(tmp_path, method, name):
  if method in archives._UNPACKED:
    pytest.skip("this Python can")
  path = pictures_in_a_zip(tmp_path / "x.zip", ["train/cat/1.png", "val/cat/1.png"])
  change_members(path, method=method)
  message = rf"train/cat/1.png is packed by method {method} \({name}\).*cannot unpack.*7z x x.zip"
  with pytest.raises(ValueError, match=message):
    create_source(f"zip:{path}", "train")


def test_a_method_whose_module_this_python_lacks_is_named_too(tmp_path, monkeypatch):
  path = pictures_in_a_zip(
    tmp_path / "x.zip", ["train/cat/1.png", "val/cat/1.png"], zipfile.ZIP_BZIP2
  )
  assert create_source(f"zip:{path}", "train")[0]["image"] == encoded(photo(0))
  monkeypatch.setattr(archives, "_UNPACKED", {0, 8})
  with pytest.raises(ValueError, match=r"method 12 \(bzip2\)"):
    create_source(f"zip:{path}", "train")


def test_encrypted_members_are_named_at_once(tmp_path):
  path = pictures_in_a_zip(tmp_path / "x.zip", ["train/cat/1.png", "val/cat/1.png"])
  with pytest.raises(ValueError, match=r"train/cat/1.png is encrypted.*7z x"):
    create_source(f"zip:{change_members(path, flags=1)}", "train")


def test_members_that_are_no_pictures_may_be_packed_as_they_like(tmp_path):
  path = pictures_in_a_zip(tmp_path / "x.zip", ["notes.txt"])
  change_members(path, method=9, flags=1)
  with zipfile.ZipFile(path, "a") as file:
    for name in ("train/cat/1.png", "val/cat/1.png"):
      file.writestr(name, b"")
  assert len(create_source(f"zip:{path}", "train")) == 1


@pytest.mark.parametrize(
  "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
@pytest.mark.parametrize("part", ["header", "middle"])
def test_damage_is_a_verdict_by_every_method_and_nothing_is_tried_again(
  tmp_path, monkeypatch, method, part
):
  path = pictures_in_a_zip(tmp_path / "x.zip", [f"train/cat/{i}.png" for i in range(9)], method)
  with zipfile.ZipFile(path) as file:
    members = file.infolist()
  raw = bytearray(path.read_bytes())
  place = members[2].header_offset
  if part == "header":
    raw[place] ^= 0xFF
  else:
    middle = place + 30 + len(members[2].filename) + members[2].compress_size // 2
    raw[middle : middle + 20] = bytes(20)
  path.write_bytes(raw)
  source = create_source(f"zip:{path}", "train")
  with pytest.raises(CorruptExampleError, match=r"damaged member of .*x.zip"):
    source[2]
  apply = parse_transform("decode|resize(4)")
  reading = Reading(3, apply, {"image": Field("image", "uint8", (4, 4, 3))}, 3)
  batches = train_batches(source, [reading], seed=0, max_corrupt_fraction=0.2)
  assert sum(batch["replaced"].sum() for batch in batches) == 1
  assert batches.corrupt.names == [f"{path}:train/cat/2.png"]


def test_an_error_of_the_disk_is_no_damage(tmp_path, monkeypatch):
  path = pictures_in_a_zip(tmp_path / "x.zip", ["train/cat/1.png", "val/cat/1.png"])
  source = create_source(f"zip:{path}", "train")

  def fails(*arguments):
    raise OSError(116, "Stale file handle")

  monkeypatch.setattr(zipfile.ZipFile, "read", fails)
  with pytest.raises(OSError, match="Stale file handle"):
    source[0]


def test_what_a_zip_leaves_out_is_told_once(tmp_path, caplog):
  folders._told.clear()
  path = pictures_in_a_zip(tmp_path / "x.zip", ["train/a/1.png", "val/a/1.png", "train/b/1.heic"])
  with caplog.at_level(logging.WARNING):
    for split in ("train", "validation"):
      create_source(f"zip:{path}", split)
  (message,) = [record.getMessage() for record in caplog.records]
  assert "1 files of other kinds (.heic: 1), e.g. train/b/1.heic" in message and "(b)" in message
  assert np.array_equal(create_source(f"zip:{path}", "train").labels, [0])


def test_a_damaged_directory_of_a_zip_is_told(tmp_path):
  """Names that are no UTF-8 where the zip says so, and a version that nobody knows."""
  folder = write_folder(tmp_path / "f", {"train/a": 1, "train/b": 1})
  good = write_zip(tmp_path / "x.zip", folder, "é/").read_bytes()
  start = good.rfind(b"PK\x01\x02")
  for place, value in ((start + 46, 0xFF), (start + 6, 200)):
    bad = bytearray(good)
    bad[place] = value
    (tmp_path / "x.zip").write_bytes(bad)
    with pytest.raises(MissingDataError, match=r"x.zip is no zip file, or is cut short or dam"):
      create_source(f"zip:{tmp_path / 'x.zip'}", "train")
