"""The command on tiny weights: its files, its words, and what it refuses."""

import numpy as np
import pytest
from PIL import Image

from hybrid_vit.heat_maps import HeatMapper
from hybrid_vit.photos import prepare
from hybrid_vit.tools import visualize
from hybrid_vit.weights.stored import load_network
from tests.clips import write_small_clip
from tests.test_stored_tasks import written
from tests.tools.test_predict import CROP, NAMES, photo, trained  # noqa: F401

METHODS = ("grad_cam", "attention", "pca")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  directory = tmp_path_factory.mktemp("clip") / "w"
  write_small_clip(directory)
  return directory


def test_a_folder_of_maps_for_each_photo(trained, tmp_path, capsys):  # noqa: F811
  (tmp_path / "other").mkdir()
  photos = [photo(tmp_path / "a.png", 40, 60), photo(tmp_path / "other" / "a.jpg", 50, 50, seed=1)]
  out = tmp_path / "out"
  assert visualize.main([f"--weights={trained}", f"--out={out}", *map(str, photos)]) == 0
  printed = capsys.readouterr().out
  assert "tiny_moat_0, classification, weights from" in printed
  assert "resize_center_crop(32, 0.875, 'bicubic')" in printed
  names = {"sheet.png", "photo.png", *(f"{method}.png" for method in METHODS)}
  for folder in ("a", "a_2"):
    assert {path.name for path in (out / folder).iterdir()} == names
    assert all(f"written: {out / folder / name}\n" in printed for name in names)
  image = prepare(photos[0], CROP)
  seen = np.asarray(Image.open(out / "a" / "photo.png"))
  np.testing.assert_array_equal(seen[::7, ::7], image)
  assert Image.open(out / "a" / "grad_cam.png").size == (224, 224)
  (cam,) = HeatMapper(load_network(trained)).maps("grad_cam", [image])
  assert (
    cam.title.removeprefix("Grad-CAM: ") in NAMES and f"  {cam.title}: stage4, 1 x 1" in printed
  )


def test_files_that_are_there_stay_as_they_are(trained, tmp_path, capsys):  # noqa: F811
  path = photo(tmp_path / "a.png", 40, 60)
  said = [f"--weights={trained}", f"--out={tmp_path}", "--methods=pca", str(path)]
  mine = tmp_path / "a" / "pca.png"
  mine.parent.mkdir()
  mine.write_text("mine")
  assert visualize.main(said) == 1
  error = capsys.readouterr().err
  assert error == f"error: {mine} would be written over: give --overwrite, or another --out\n"
  assert mine.read_text() == "mine" and len(list(mine.parent.iterdir())) == 1
  assert visualize.main([*said, "--overwrite"]) == 0
  assert Image.open(mine).size == (224, 224)
  assert {p.name for p in mine.parent.iterdir()} == {"sheet.png", "photo.png", "pca.png"}


def test_class_and_layer_of_ones_choice(trained, tmp_path, capsys):  # noqa: F811
  path = str(photo(tmp_path / "a.png", 40, 60))
  said = [f"--weights={trained}", f"--out={tmp_path / 'o'}", "--methods=grad_cam"]
  assert visualize.main([*said, "--class=Fox", "--endpoint=stage2", path]) == 0
  assert "  Grad-CAM: fox: stage2, 4 x 4\n" in capsys.readouterr().out


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (["--class=fax"], "no class is named 'fax'; did you mean 'fox'?"),
    (["--methods=pca", "--class=fox"], "--class is of grad_cam, and none is made"),
    (
      ["--methods=attention", "--endpoint=stage1"],
      "--endpoint is of grad_cam and pca, and neither",
    ),
    (["--methods=rollout"], "rollout: tiny_moat_0 (MOAT) does not attend over one whole map"),
    (["--methods=modulators"], "of it there are: grad_cam, attention, pca"),
    (["--methods=,"], "--methods names none; there are: grad_cam, attention, pca"),
    (["--endpoint=stage9"], "no map is named 'stage9'; did you mean 'stage"),
    (["--zero_shot=a,b"], "these weights (tiny_moat_0, classification) have no text tower"),
    (["--arch=moat_0"], "holds weights of tiny_moat_0, not of moat_0"),
  ],
)
def test_errors_are_one_line(trained, tmp_path, capsys, options, message):  # noqa: F811
  path = str(photo(tmp_path / "a.png", 40, 60))
  assert visualize.main([f"--weights={trained}", f"--out={tmp_path / 'o'}", *options, path]) == 1
  printed = capsys.readouterr()
  assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
  assert message in printed.err and not (tmp_path / "o").exists()


def test_a_photo_that_cannot_be_read_is_skipped(trained, tmp_path, capsys):  # noqa: F811
  good, bad = photo(tmp_path / "a.png", 40, 60), tmp_path / "bad.jpg"
  bad.write_text("no picture")
  said = [f"--weights={trained}", f"--out={tmp_path / 'o'}", "--methods=pca"]
  assert visualize.main([*said, str(bad), str(good)]) == 2
  assert capsys.readouterr().err.startswith(f"skipped {bad}: ")
  assert [p.name for p in (tmp_path / "o").iterdir()] == ["a"]
  assert visualize.main([*said, str(bad)]) == 2


def test_texts(clip, tmp_path, capsys):
  path = str(photo(tmp_path / "a.png", 20, 20))
  said = [f"--weights={clip}", f"--out={tmp_path / 'o'}", "--zero_shot=a cat, a dog"]
  assert visualize.main([*said, "--class=a dog", path]) == 0
  printed = capsys.readouterr().out
  assert "vit_base_patch16_clip_224 + clip_vit_b16, pictures and texts" in printed
  assert "  Grad-CAM: a dog: " in printed and "Attention rollout" in printed
  assert visualize.main([said[0], f"--out={tmp_path / 'p'}", "--methods=grad_cam", path]) == 1
  assert "no classes (give texts, where the weights are of two towers)" in capsys.readouterr().err
  assert visualize.main([*said[:1], f"--out={tmp_path / 'p'}", "--zero_shot= ,", path]) == 1
  assert "no text was given" in capsys.readouterr().err


def test_a_backbone_under_a_decoder(tmp_path, capsys):
  weights = written(tmp_path / "w", "segmentation")
  path = str(photo(tmp_path / "a.png", 40, 60))
  assert visualize.main([f"--weights={weights}", f"--out={tmp_path / 'o'}", path]) == 0
  assert "convnext_tiny, segmentation, weights from" in capsys.readouterr().out
  assert {p.name for p in (tmp_path / "o" / "a").iterdir()} == {"sheet.png", "photo.png", "pca.png"}
  assert visualize.main([f"--weights={weights}", "--methods=grad_cam", path]) == 1
  assert "grad_cam: convnext_tiny has no classifier here; of it there are: pca" in (
    capsys.readouterr().err
  )
