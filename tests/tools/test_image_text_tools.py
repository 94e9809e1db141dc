"""predict --zero_shot, embed and search by commands, on a small model and plain pictures."""

import csv
import dataclasses

import numpy as np
import pytest
from PIL import Image

from hybrid_vit import checkpoints
from hybrid_vit.data.prompts import prompts, read_templates
from hybrid_vit.data.sources import create_source
from hybrid_vit.embeddings import Embeddings, pictures_in
from hybrid_vit.tools import embed, evaluate_sets, predict, probe, search
from tests.clips import IMAGE, SMALL_VIT, write_small_clip
from tests.data.pictures import write_folder

COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250), "grey": (90,) * 3}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  directory = tmp_path_factory.mktemp("weights") / "w"
  write_small_clip(directory)
  return directory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Four pictures, one of them below; a broken one; what is no picture, and what is hidden."""
  root = tmp_path_factory.mktemp("photos")
  (root / "below").mkdir()
  (root / ".hidden").mkdir()
  for name, colour in COLOURS.items():
    picture = np.full((20, 24, 3), colour, np.uint8)
    Image.fromarray(picture).save((root / "below" if name == "blue" else root) / f"{name}.png")
  (root / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
  (root / "notes.txt").write_text("no picture")
  (root / ".hidden" / "red.png").write_bytes((root / "red.png").read_bytes())
  return root


@pytest.fixture(scope="module")
def embedded(weights, folder):
  path = folder.parent / "made" / "embeddings.npz"
  assert embed.main([f"--weights={weights}", str(folder), f"--out={path}"]) == 2
  return path


def test_zero_shot_names_the_likeliest_text(weights, folder, tmp_path, capsys):
  output = tmp_path / "seen.png"
  photos = [str(folder / "red.png"), str(folder / "broken.jpg"), str(folder / "below" / "blue.png")]
  said = [
    f"--weights={weights}",
    f"--output={output}",
    "--zero_shot=a cat, a dog,a house,",
    *photos,
  ]
  assert predict.main(said) == 2
  out, err = capsys.readouterr()
  assert f"skipped {photos[1]}" in err and output.stat().st_size > 5000
  lines = [line.split(maxsplit=1) for line in out.splitlines() if "%  " in line]
  assert {name for _, name in lines[:3]} == {"a cat", "a dog", "a house"}
  assert sum(float(share[:-1]) for share, _ in lines[:3]) == pytest.approx(100, abs=0.3)
  model = write_small_clip(tmp_path / "again")
  texts = ["a cat", "a dog", "a house"]
  expected = model.probabilities(model.encode_image([photos[0]]), model.encode_text(texts))[0]
  assert [name for _, name in lines[:3]] == [texts[i] for i in np.argsort(-expected)]


def test_after_a_sigmoid_each_text_stands_by_itself(folder, tmp_path, capsys):
  write_small_clip(tmp_path / "w", loss="sigmoid")
  photo = str(folder / "red.png")
  said = [f"--weights={tmp_path / 'w'}", f"--output={tmp_path / 'x.png'}", photo]
  assert predict.main([*said, "--zero_shot=a cat"]) == 0
  assert "each class stands by itself" in capsys.readouterr().out


def test_embed_names_what_it_leaves_out(weights, folder, tmp_path, capsys):
  path = tmp_path / "x.npz"
  assert embed.main([f"--weights={weights}", str(folder), f"--out={path}"]) == 2
  out, err = capsys.readouterr()
  assert "4 pictures, 8 numbers each, 1 left out" in out
  assert err.startswith(f"left out {folder / 'broken.jpg'}: ") and len(err.splitlines()) == 1
  made = Embeddings.load(path)
  assert made.files == ("below/blue.png", "green.png", "grey.png", "red.png")
  model = write_small_clip(tmp_path / "w")
  alone = model.encode_image([folder / name for name in made.files])
  np.testing.assert_allclose(made.vectors, alone, atol=1e-6)
  assert made.fingerprint == model.fingerprint
  assert [p.name for p in pictures_in(folder)] == [
    "blue.png", "broken.jpg", "green.png", "grey.png", "red.png",
  ]  # fmt: skip


def test_search_by_a_text_and_by_a_picture(embedded, folder, weights, tmp_path, capsys):
  sheet, query = tmp_path / "sheet.png", str(folder / "green.png")
  assert search.main([f"--embeddings={embedded}", query, "--count=3", f"--sheet={sheet}"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 4 and lines[0].split() == ["1.0000", query]
  drawn = np.asarray(Image.open(sheet).convert("RGB"))
  assert drawn.shape[1] > 400
  # The pictures are on it: the first one is green.
  assert (drawn[..., 1].astype(int) - drawn[..., 0] > 100).mean() > 0.02
  text = "a " * 300 + "red circle"  # longer than any file's name
  for asked in ("a red circle", text):
    assert search.main([f"--embeddings={embedded}", asked]) == 0
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    model = write_small_clip(tmp_path / "w")
    cosines = Embeddings.load(embedded).vectors @ model.encode_text(asked)[0]
    names = Embeddings.load(embedded).files
    assert [p for _, p in found] == [str(folder / names[i]) for i in np.argsort(-cosines)]
    np.testing.assert_allclose([float(c) for c, _ in found], sorted(cosines)[::-1], atol=1e-4)


def test_errors_say_what_is_wrong(embedded, weights, folder, tmp_path, capsys):
  write_small_clip(tmp_path / "other", seed=5)
  variables = {"params": {"head": {"kernel": np.ones((16, 3))}}, "batch_stats": {}}
  checkpoints.export(tmp_path / "one", variables, {"name": IMAGE, "arguments": SMALL_VIT})
  (tmp_path / "empty").mkdir()
  (tmp_path / "broken").mkdir()
  (tmp_path / "broken" / "a.png").write_bytes(b"no")
  (tmp_path / "text.npz").write_text("no")
  photo, out = str(folder / "red.png"), f"--out={tmp_path / 'out.npz'}"
  for tool, arguments, message in (
    (predict, [f"--weights={tmp_path / 'one'}", "--zero_shot=a,b", photo], "has no text tower"),
    (predict, [f"--weights={weights}", "--zero_shot=a cat", photo], "1 texts (a cat); at least 2"),
    (predict, [f"--weights={weights}", "--zero_shot=,", photo], "has 0 texts"),
    (predict, [f"--weights={weights}", photo], "their outputs are no classes"),
    (embed, [f"--weights={tmp_path / 'one'}", str(folder), out], "has no text tower"),
    (embed, [f"--weights={weights}", str(tmp_path / "empty"), out], "holds no picture: looked for"),
    (embed, [f"--weights={weights}", str(tmp_path / "none"), out], "none is no folder"),
    (embed, [f"--weights={weights}", str(tmp_path / "broken"), out], "none of 1 pictures can be"),
    (search, [f"--embeddings={embedded}", f"--weights={tmp_path / 'other'}", "x"], "other weights"),
    (search, [f"--embeddings={tmp_path / 'text.npz'}", "x"], "is no file of embeddings"),
    (search, [f"--embeddings={tmp_path / 'gone.npz'}", "x"], "No such file"),
    (search, [f"--embeddings={embedded}", "x", "--count=0"], "at least 1 was expected"),
    (
      search,
      [f"--embeddings={embedded}", str(folder / "broken.jpg")],
      "broken.jpg cannot be read: ",
    ),
  ):
    assert tool.main(arguments) == 1, arguments
    assert message in capsys.readouterr().err
  assert not (tmp_path / "out.npz").exists()
  moved = dataclasses.replace(Embeddings.load(embedded), folder=str(tmp_path / "gone"))
  moved.save(tmp_path / "moved.npz")
  said = [f"--embeddings={tmp_path / 'moved.npz'}", "x", f"--sheet={tmp_path / 's.png'}"]
  assert search.main(said) == 1
  err = capsys.readouterr().err
  assert err.count("not drawn") == 4 and "can be read any more" in err


def test_probes_take_the_image_tower(weights, tmp_path, capsys):
  source = write_folder(tmp_path / "data", {"train/a": 4, "train/b": 4, "val/a": 2, "val/b": 2})
  said = [f"--weights={weights}", f"--data=folder:{source}", "--k=2", "--shots=1", "--seeds=2"]
  assert probe.main(said) == 0
  assert "16 features; 8 pictures of 2 classes known, 4 asked" in capsys.readouterr().out


def test_sets_are_measured_by_the_names_of_their_classes(weights, tmp_path, capsys):
  counts = dict.fromkeys(("red_dog", "cat", "tree"), 3)
  source = f"folder:{write_folder(tmp_path / 'data', counts)}"
  said = [f"--weights={weights}", f"--set=mine={source}", "--batch_size=8", "--split=all"]
  table = tmp_path / "table"
  assert evaluate_sets.main([*said, "--templates=imagenet", f"--table={table}"]) == 0
  assert "mine at 16: top-1" in capsys.readouterr().out
  (row,) = csv.DictReader(table.with_suffix(".csv").open())
  assert row["examples"] == "9.0"
  # By hand.
  model, opened = write_small_clip(tmp_path / "w"), create_source(source, "all")
  rows = prompts(opened.info["class_names"], read_templates("imagenet"))
  classes = np.stack([model.encode_text(texts).mean(0) for texts in rows])
  classes /= np.linalg.norm(classes, axis=-1, keepdims=True)
  images = model.encode_image(sorted((tmp_path / "data").rglob("*.*g")))
  labels = [opened[i]["label"] for i in range(9)]
  right = (images @ classes.T).argmax(-1) == labels
  assert float(row["top1"]) == pytest.approx(right.mean())
  assert evaluate_sets.main([*said, "--kind=retrieval"]) == 1
  assert "there are neither 'captions'" in capsys.readouterr().err
