"""`tools.predict` on weights of segmentation and depth: files that are read back, and a sheet."""

import numpy as np
import pytest
from PIL import Image

from hybrid_vit.data.map_reading import read_depth, read_labels
from hybrid_vit.map_prediction import predict_maps, save_maps
from hybrid_vit.stored_tasks import load_task
from hybrid_vit.tools import predict
from tests import dense
from tests.test_stored_tasks import NAMES, written


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  """Directories by task."""
  root = tmp_path_factory.mktemp("weights")
  return {name: written(root / name, name) for name in ("segmentation", "depth")}


def write_photos(directory, count=2):
  directory.mkdir(parents=True, exist_ok=True)
  paths = [directory / f"photo{i}.png" for i in range(count)]
  for i, path in enumerate(paths):
    path.write_bytes(dense.png(dense.example(i)[0]))
  return paths


def test_maps_are_files_that_training_reads(weights, tmp_path, capsys):
  photos = write_photos(tmp_path / "photos")
  out, sheet = tmp_path / "maps", tmp_path / "sheet.png"
  said = [f"--weights={weights['segmentation']}", f"--output={sheet}", f"--maps={out}"]
  assert predict.main([*said, "--top=2", *map(str, photos)]) == 0
  printed = capsys.readouterr().out
  assert "convnext_tiny, segmentation, weights from" in printed and f"drawn in {sheet}" in printed
  assert any(name in printed for name in NAMES) and "%" in printed
  stored = load_task(weights["segmentation"])
  for i, photo in enumerate(photos):
    path = out / photo.name
    assert f"written: {path}" in printed
    labels = read_labels(path.read_bytes(), str(path))
    np.testing.assert_array_equal(labels, stored.classes(dense.example(i)[0]))
    colors = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(colors, np.array(stored.task.palette, np.uint8)[labels])
  assert sheet.stat().st_size > 1000


def test_depth_is_written_in_millimetres(weights, tmp_path, capsys):
  photos = write_photos(tmp_path / "photos")
  said = [f"--weights={weights['depth']}", f"--output={tmp_path / 'x.png'}", "--task=depth"]
  assert predict.main([*said, f"--maps={tmp_path / 'maps'}", *map(str, photos)]) == 0
  assert " m, in the middle " in capsys.readouterr().out
  stored = load_task(weights["depth"])
  for i, photo in enumerate(photos):
    encoded = (tmp_path / "maps" / photo.name).read_bytes()
    found = read_depth(encoded, photo.name, 1000.0, None)
    np.testing.assert_allclose(found, stored.depth(dense.example(i)[0]), atol=6e-4)


def test_what_cannot_be_read_is_named_and_skipped(weights, tmp_path, capsys):
  (photo,) = write_photos(tmp_path / "photos", 1)
  bad = tmp_path / "photos" / "bad.jpg"
  bad.write_bytes(b"no picture")
  said = [f"--weights={weights['segmentation']}", f"--output={tmp_path / 'x.png'}"]
  assert predict.main([*said, str(bad), str(photo), str(tmp_path / "none.jpg")]) == 2
  printed = capsys.readouterr()
  assert "bad.jpg" in printed.err and "none.jpg" in printed.err
  assert "photo0.png" in printed.out and (tmp_path / "x.png").exists()
  assert predict.main([*said[:1], f"--output={tmp_path / 'y.png'}", str(bad)]) == 2
  assert not (tmp_path / "y.png").exists()


def test_photos_of_one_name_do_not_overwrite_each_other(weights, tmp_path):
  photos = [*write_photos(tmp_path / "a", 1), *write_photos(tmp_path / "b", 1)]
  stored = load_task(weights["segmentation"])
  predictions, skipped = predict_maps(stored, photos)
  assert not skipped and [p.photo for p in predictions] == photos
  paths = save_maps(stored, predictions, tmp_path / "maps")
  assert [path.name for path in paths] == ["photo0.png", "photo0_2.png"]
  assert all(path.is_file() for path in paths)


def test_errors_are_one_line(weights, tmp_path, capsys):
  (photo,) = write_photos(tmp_path / "photos", 1)
  classifier = written(tmp_path / "classifier", "depth", task="classification")
  for arguments, message in [
    ([f"--weights={weights['depth']}", "--task=segmentation"], "task 'depth', not 'segmentation'"),
    ([f"--weights={weights['depth']}", "--task=classification"], "'depth', not 'classification'"),
    ([f"--weights={classifier}", "--maps=maps"], "of the task 'classification', give no maps"),
    ([f"--weights={tmp_path}"], "no weights in"),
  ]:
    assert predict.main([*arguments, str(photo)]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
