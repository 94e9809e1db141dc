"""The task of detection: a step on scenes, COCO's figures of right and wrong, bad settings."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from hybrid_vit import build, evaluate
from hybrid_vit.box_inference import BoxInferenceSettings, Objects
from hybrid_vit.build import DataFacts
from hybrid_vit.config import Config, load_config
from hybrid_vit.data.lazy_masks import as_lazy
from hybrid_vit.data.scenes import open_scenes
from hybrid_vit.data.spec import on_device, row
from hybrid_vit.heads.detectors import detector_names
from hybrid_vit.metrics.coco_ap import coco_metrics, evaluate_coco
from hybrid_vit.tasks.detection import DetectionEvaluator, Picture, as_rows
from tests.evaluation_sets import SceneSet
from tests.models import contract

CONFIG = Path(__file__).parents[2] / "configs" / "finetune_detection.py"


def facts(source):
  return DataFacts(info=source.info, num_examples=len(source), example=lambda: source[0])


@pytest.fixture(scope="module")
def scenes():
  return open_scenes("scenes:size=64,count=64", "train")


@pytest.fixture(scope="module")
def run(scenes):
  config = Config(load_config(CONFIG, "runlocal"))
  made = build.build(config, facts(scenes))
  config.assert_all_read()
  return made


@pytest.fixture(scope="module")
def batch(run, scenes):
  reading, rows = run.readings[0], []
  for i in range(4):
    example = reading.transform(dict(scenes[i]), np.random.default_rng(i))
    rows.append({n: row(f, n, example[n]) for n, f in on_device(reading.fields).items()})
  return {name: np.stack([r[name] for r in rows]) for name in rows[0]}


@pytest.fixture(scope="module")
def variables(run, batch):
  return contract.initialize(run.task, batch)


def test_a_step_has_every_loss_and_a_gradient(run, batch, variables):
  task = run.task

  @jax.jit
  def step(params, key):
    def loss(params):
      return task.loss({**variables, "params": params}, task.augment(batch, key, 0), key)

    return jax.value_and_grad(loss, has_aux=True)(params)

  (total, aux), gradient = step(variables["params"], jax.random.key(1))
  found = {name: float(a / b) for name, (a, b) in aux["metrics"].items()}
  assert set(found) == {"rpn_class", "rpn_box", "class0", "box0", "mask0", "loss"}
  assert np.isclose(found.pop("loss"), sum(found.values()), rtol=1e-5)
  assert np.isfinite(total) and float(total) > 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all(), path
  for part in ("backbone", "neck", "rpn", "box_head0", "mask_head0"):
    assert max(float(np.abs(g).max()) for g in jax.tree.leaves(gradient[part])) > 0, part


def test_an_evaluation_runs_and_draws(run, scenes, variables, tmp_path):
  (evaluator,) = run.task.evaluators([SceneSet(scenes, 3, run.task)])
  assert isinstance(evaluator, DetectionEvaluator)
  found = evaluator.run(variables)
  assert found["examples"] == 3
  assert set(run.task.measures) <= set(found)
  assert all(0 <= found[name] <= 1 for name in run.task.measures)
  assert evaluator.draw(variables, tmp_path / "drawn.png")
  assert (tmp_path / "drawn.png").stat().st_size > 1000
  said = []
  again = evaluate.run_and_write(evaluator, variables, said.append, tmp_path / "new")
  assert again == found
  rows = json.loads((tmp_path / "new" / "detections_held_out.json").read_text())
  # As the source numbers them.
  assert rows and {row["image_id"] for row in rows} <= {10, 20, 30}
  assert {row["category_id"] for row in rows} <= set(range(100, 108))
  table = (tmp_path / "new" / "classes_held_out.md").read_text()
  assert all(name in table for name in scenes.info["object_class_names"]) and "mask_ap50" in table
  assert "scene 0" in (tmp_path / "new" / "failures_held_out.html").read_text()
  assert "detections_held_out.json" in said[0] and len(said) == 1
  # Figures do not depend on what can be written.
  (tmp_path / "file").write_text("")
  assert evaluate.run_and_write(evaluator, variables, said.append, tmp_path / "file") == found
  assert "could not be written" in said[1]


def _picture(scenes, index, found=None):
  example = scenes[index]
  lazy = as_lazy(example["masks"])
  masks = tuple(lazy.rle(i) for i in range(len(lazy)))
  boxes, labels = example["boxes"], example["box_labels"]
  right = Objects(boxes, np.linspace(1, 0.5, len(boxes), dtype=np.float32), labels, masks)
  crowd = np.zeros(len(boxes), bool)
  return Picture(index, right if found is None else found(right), boxes, labels, crowd, masks)


@pytest.mark.parametrize("kind", ["boxes", "masks"])
def test_what_is_right_has_all_of_the_ap_and_other_classes_have_none(scenes, kind):
  classes = len(scenes.info["object_class_names"])

  def ap(found=None):
    truth, detected = as_rows([_picture(scenes, i, found) for i in range(12)])
    return coco_metrics(evaluate_coco(truth, detected, range(classes), kind=kind))["AP"]

  assert ap() == 1.0
  moved = lambda o: Objects(o.boxes, o.scores, (o.labels + 1) % classes, o.masks)  # noqa: E731
  assert ap(moved) < 0.2


def test_boxes_come_back_in_the_pictures_own_pixels():
  settings = BoxInferenceSettings(scale=(128, 64), size_divisor=32, canvases=((64, 96), (96, 128)))
  assert settings.input_size((100, 150)) == (64, 96)
  assert settings.canvas((64, 96)) == (64, 96)
  assert settings.canvas((70, 90)) == (96, 128)
  assert settings.canvas((130, 10)) == (160, 32)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"detector": {"name": "mask_rcn"}}, "did you mean 'mask_rcnn'"),
    ({"detector": {}}, "a 'name' among its fields"),
    ({"mask_size": -1}, "mask_size"),
    ({"max_objects": 0}, "max_objects"),
  ],
)
def test_bad_settings_are_named(scenes, changes, message):
  config = load_config(CONFIG, "runlocal")
  for name, value in changes.items():
    config.task[name] = value
  with pytest.raises(ValueError, match=message):
    build.build(Config(config), facts(scenes))


@pytest.mark.parametrize("name", detector_names())
def test_every_detector_traces_a_step(scenes, name):
  config = load_config(CONFIG, "runlocal")
  config.task.detector = {"name": name}
  if name == "dino":
    config.task.detector.head = {"num_queries": 30}
  has_masks = "mask" in name
  if not has_masks:
    config.task.mask_size = 0
    config.data.transform = config.data.transform.replace("|crop_masks(28)", "")
  run = build.build(Config(config), facts(scenes))
  task, key = run.task, jax.eval_shape(lambda: jax.random.key(0))
  variables = jax.eval_shape(task.init, key, run.batches[0])
  augmented = jax.eval_shape(task.augment, run.batches[0], key, 0)
  loss, _ = jax.eval_shape(task.loss, variables, augmented, key)
  assert loss.shape == ()
  found = jax.eval_shape(task.predict, variables, {"image": run.batches[0]["image"]})
  assert {"boxes", "scores", "labels", "valid"} <= set(found)
  assert ("masks" in found) == has_masks


def test_masks_of_a_detector_that_has_none_are_an_error(scenes):
  config = load_config(CONFIG, "runlocal")
  config.task.detector = {"name": "retinanet"}
  with pytest.raises(ValueError, match=r"retinanet finds boxes alone: config.task.mask_size=0"):
    build.build(Config(config), facts(scenes))
