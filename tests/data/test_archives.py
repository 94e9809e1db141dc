import zipfile

import pytest

from hybrid_vit.data.errors import CorruptExampleError
from hybrid_vit.data.sources import create_source
from tests.data.pictures import write_folder, write_zip


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
