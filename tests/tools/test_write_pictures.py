"""Pictures of a source as files: read back as a source, without classes, what is refused."""

import numpy as np
import pytest
from PIL import Image

from hybrid_vit.data.sources import create_source
from hybrid_vit.tools import write_pictures

SCENES = "scenes:size=24,objects=1"


def test_a_folder_of_classes_is_the_same_data(tmp_path, capsys):
  place = tmp_path / "pictures"
  assert write_pictures.main([str(place), f"--source={SCENES}", "--count=12"]) == 0
  assert "12 pictures" in capsys.readouterr().out
  scenes = create_source(SCENES, "train")
  for index in range(12):
    name = scenes.info["class_names"][scenes[index]["label"]].replace(" ", "_")
    image = np.asarray(Image.open(place / "train" / name / f"{index:06}.png"))
    np.testing.assert_array_equal(image, scenes[index]["image"])
  read = create_source(f"folder:{place}", "train[:100%]")
  assert set(read.info["class_names"]) == {p.name for p in (place / "train").iterdir()}


def test_stored_files_and_parts(tmp_path):
  first, second = tmp_path / "first", tmp_path / "second"
  for part in ("train", "validation"):
    arguments = [str(first / part), "--source=digits", f"--split={part}", "--count=3"]
    assert write_pictures.main(arguments) == 0
    assert [p.name for p in (first / part).iterdir()] == [part]
  # Pictures that are files already are decoded.
  arguments = [str(second), f"--source=folder:{first / 'train'}", "--split=train[:100%]", "--flat"]
  assert write_pictures.main(arguments) == 0
  assert {p.name for p in second.iterdir()} <= {f"{k:06}.png" for k in range(3)}
  picture = np.asarray(Image.open(second / "000000.png"))
  stored = [np.asarray(Image.open(p)) for p in (first / "train").rglob("*.png")]
  assert any(np.array_equal(picture, image) for image in stored)


def test_what_is_refused(tmp_path, capsys):
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "photo.png").write_bytes(b"")
  assert write_pictures.main([str(tmp_path / "mine"), f"--source={SCENES}"]) == 1
  assert "mine is not empty: name a new directory" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    write_pictures.main([str(tmp_path / "new"), f"--source={SCENES}", "--count=0"])
  assert write_pictures.main([str(tmp_path / "new"), "--source=folder:nowhere"]) == 1
  assert "nowhere" in capsys.readouterr().err
  assert not (tmp_path / "new").exists()


def test_damaged_files_are_left_out_and_named(tmp_path, capsys):
  place = tmp_path / "damaged"
  (place / "train" / "ant").mkdir(parents=True)
  (place / "train" / "ant" / "a.png").write_bytes(b"no picture")
  Image.new("RGB", (4, 4)).save(place / "train" / "ant" / "b.png")
  arguments = [str(tmp_path / "new"), f"--source=folder:{place}", "--split=train[:100%]"]
  assert write_pictures.main(arguments) == 0
  captured = capsys.readouterr()
  assert "1 pictures" in captured.out or "0 pictures" in captured.out
  assert "a.png" in captured.err
