"""Networks of segments, stored: asked by `load_task` and `predict`, read by authors' names."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from hybrid_vit import checkpoints, dense_imports, stored_tasks
from hybrid_vit.checkpoints import load_weights
from hybrid_vit.config import load_config
from hybrid_vit.config_files import find_config
from hybrid_vit.tools import export_weights, import_weights, predict
from hybrid_vit.weights import dense_checkpoints, readers
from tests import dense, masks
from tests.tools.test_predict_maps import write_photos

KINDS = ("panoptic_segmentation", "instance_segmentation", "mask_segmentation")
# One program for all photos.
CANVAS = {"scale": (64, 64), "canvases": ((64, 64),)}


@pytest.fixture(scope="module")
def variables():
  """Weights of noise for nine classes; the network is the same in all tasks."""
  task = masks.make_task(num_classes=9, info={})
  return dense.drawn(task, masks.make_batch(task), seed=5)


def written(where, variables, name, **inference):
  """An export."""
  names = ["background", *masks.SCENES.info["object_class_names"]]
  known = {"map_class_names": names, "thing_classes": list(range(1, 9))}
  if name == "instance_segmentation":
    known = {"object_class_names": names, "category_ids": [10 * (i + 1) for i in range(9)]}
  metadata = {
    "name": dense.NETWORK,
    "arguments": masks.ARGUMENTS,
    "preprocessing": dataclasses.asdict(dense.EXPECTS),
    "task": name,
    "task_settings": {"head": masks.HEAD, "max_objects": 5, "inference": inference},
    "num_classes": 9,
    **known,
  }
  checkpoints.export(where, variables, metadata)
  return where


@pytest.mark.parametrize("name", KINDS)
def test_the_command_draws_and_writes_what_each_gives(variables, name, tmp_path, capsys):
  # Whatever the network of noise thinks of it is a segment.
  loose = {"object_threshold": 0.0, "overlap_threshold": 0.0} if "panoptic" in name else {}
  inference = {} if name == "mask_segmentation" else {**CANVAS, **loose}
  weights = written(tmp_path / "weights", variables, name, **inference)
  photos = write_photos(tmp_path / "photos", 2)
  output, maps, objects = (tmp_path / n for n in ("out.png", "maps", "objects.json"))
  to = f"--objects={objects}" if "instance" in name else f"--maps={maps}"
  extra = ["--min_score=0"] if "instance" in name else []
  code = predict.main([f"--weights={weights}", f"--output={output}", to, *extra, *map(str, photos)])
  assert code == 0, capsys.readouterr().err
  assert f"{dense.NETWORK}, {name}, weights from" in capsys.readouterr().out
  assert output.stat().st_size > 1000
  stored = stored_tasks.load_task(weights)
  with pytest.raises(ValueError, match=f"of the task '{name}', not of 'depth'"):
    stored.depth(np.zeros((8, 8, 3), np.uint8))
  if "instance" in name:
    rows = json.loads(objects.read_text())
    assert {row["image_id"] for row in rows} == {0, 1}
    assert {row["category_id"] % 10 for row in rows} == {0}
    return
  photo = np.asarray(Image.open(photos[0]).convert("RGB"))
  (png, *_) = sorted(maps.glob("*.png"))
  if name == "mask_segmentation":
    np.testing.assert_array_equal(np.asarray(Image.open(png)), stored.classes(photo))
    return
  listing = json.loads((maps / "panoptic.json").read_text())
  first, second = listing["annotations"]
  colors = np.asarray(Image.open(maps / first["file_name"])).astype(int) @ [1, 256, 65536]
  found = stored.panoptic(photo)
  np.testing.assert_array_equal(colors, found.map)
  assert second["image_id"] == 1 and found.segments
  for segment in first["segments_info"]:
    assert segment["area"] == (colors == segment["id"]).sum() > 0
    assert segment["isthing"] == int(segment["category_id"] > 0)
  assert [c["isthing"] for c in listing["categories"]] == [0] + [1] * 8


def recipe(path):
  path.write_text(
    "from hybrid_vit.config import load_config\n"
    "from hybrid_vit.config_files import find_config\n\n\n"
    "def get_config():\n"
    "  config = load_config(find_config('finetune_panoptic'), 'runlocal')\n"
    f"  config.model = dict(name={dense.NETWORK!r}, arguments={masks.ARGUMENTS!r})\n"
    f"  config.task.head = {masks.HEAD!r}\n"
    "  config.task.name = 'mask_segmentation'\n"
    "  config.task.inference = dict(mode='whole')\n"
    "  return config\n"
  )
  return path


def test_the_authors_names_come_in_and_go_out_again(variables, tmp_path, capsys):
  task = masks.make_task("mask_segmentation", num_classes=9, info={})
  weights, layout = dense_checkpoints.export_dense(variables, task.model, dense.NETWORK)
  assert layout == "official" and "sem_seg_head.predictor.query_feat.weight" in weights
  file, out, back = tmp_path / "x.safetensors", tmp_path / "out", tmp_path / "back.safetensors"
  readers.write_safetensors(file, weights, {"format": "pt"})
  base = [f"--config={recipe(tmp_path / 'r.py')}", f"--from={file}", f"--to={out}"]
  assert import_weights.main(base) == 0, capsys.readouterr().err
  said = capsys.readouterr().out
  assert "9 classes" in said and "initialised anew: 0" in said
  loaded, metadata = load_weights(out)
  assert metadata["num_classes"] == 9
  jax.tree.map(np.testing.assert_array_equal, loaded["params"], variables["params"])
  assert export_weights.main([f"--from={out}", f"--to={back}"]) == 0
  again = readers.read_checkpoint(back).weights
  assert set(again) == set(weights)
  for key, value in weights.items():
    np.testing.assert_array_equal(again[key], value, err_msg=key)


def test_which_classes_are_things_a_checkpoint_does_not_say(variables, tmp_path):
  task = masks.make_task(num_classes=9, info={})
  weights, _ = dense_checkpoints.export_dense(variables, task.model, dense.NETWORK)
  file = tmp_path / "x.safetensors"
  readers.write_safetensors(file, weights, {"format": "pt"})
  config = load_config(find_config("finetune_panoptic"), "runlocal")
  with config.unlocked():
    config.model = dict(name=dense.NETWORK, arguments=masks.ARGUMENTS)
    config.task.head = masks.HEAD
  with pytest.raises(ValueError, match="which of 9 classes are things"):
    dense_imports.import_dense_task(readers.read_checkpoint(file), config)
