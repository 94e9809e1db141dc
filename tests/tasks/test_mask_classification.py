"""Segmentation by masks: targets, a step, its devices, measures of right and wrong, whole runs."""

import functools
import json
import shutil

import flax.traverse_util
import jax
import numpy as np
import optax
import pytest

from hybrid_vit import build, checkpoints, evaluate, main, sharding
from hybrid_vit.config import Config, ConfigError
from hybrid_vit.data.scenes import SceneSource
from hybrid_vit.data.segments import panoptic_fields
from hybrid_vit.ops.mask_forms import bitmaps
from hybrid_vit.reporting import read_metrics
from hybrid_vit.tasks.panoptic_evaluation import PanopticEvaluator, counted, true_picture
from hybrid_vit.train_state import create_state, make_train_step
from hybrid_vit.weights.transfer import is_head
from tests import dense, masks, small
from tests.evaluation_sets import SceneSet
from tests.models import contract

NAMES = tuple(masks.TRANSFORMS)


@pytest.mark.parametrize("name", NAMES)
def test_targets_are_the_segments_of_each_picture(name):
  task = masks.make_task(name)
  batch = masks.make_batch(task, name, transform=masks.TRANSFORMS[name].replace("flip_lr|", ""))
  if name == "mask_segmentation":
    batch = masks.make_batch(task, name, transform="decode")
  found = task.targets(batch)
  whole = np.asarray(bitmaps(found.masks))
  for i, (labels, valid, maps) in enumerate(zip(found.labels, found.valid, whole)):
    scene = masks.SCENES[i]
    truth = {}
    if name == "instance_segmentation":
      for mask, label in zip(scene["masks"], scene["box_labels"]):
        truth.setdefault(int(label), []).append(mask)
    elif name == "panoptic_segmentation":
      for number, label in enumerate(scene["segment_labels"]):
        truth.setdefault(int(label), []).append(scene["segments"] == number)
    else:
      truth = {int(c): [scene["map"] == c] for c in np.unique(scene["map"])}
    assert valid.sum() == min(sum(map(len, truth.values())), 5)
    for slot in np.flatnonzero(valid):
      assert any((maps[slot] == mask).all() for mask in truth[int(labels[slot])]), (i, slot)


def test_of_more_segments_than_there_is_room_for_the_first_are_kept():
  task = masks.make_task(max_objects=2)
  batch = masks.make_batch(task, transform="decode")
  found = task.targets(batch)
  assert found.labels.shape == (4, 2)
  np.testing.assert_array_equal(
    np.asarray(bitmaps(found.masks))[0, 1], masks.SCENES[0]["segments"] == 1
  )


def test_masks_that_are_not_packed_are_refused():
  task = masks.make_task("instance_segmentation")
  batch = masks.make_batch(task, "instance_segmentation", transform="decode")
  with pytest.raises(ValueError, match=r"\[5, 32, 32\] and pictures 32 x 32: end .* pack_masks"):
    task.targets(batch)


@functools.cache
def panoptic():
  """(task, batch of which the last picture has no segment, variables of noise)."""
  task = masks.make_task()
  batch = masks.make_batch(task)
  batch["segment_labels"][-1], batch["segments"][-1] = -1, 255
  return task, batch, dense.drawn(task, batch)


def test_a_step_is_finite_and_reaches_every_parameter():
  task, batch, variables = panoptic()

  @jax.jit
  def step(params, batch, key):
    def loss(params):
      return task.loss({**variables, "params": params}, task.augment(batch, key, 0), key)

    return jax.value_and_grad(loss, has_aux=True)(params)

  (total, aux), gradient = step(variables["params"], batch, jax.random.key(1))
  found = {name: float(a / b) for name, (a, b) in aux["metrics"].items()}
  assert set(found) == {"class_loss", "mask_loss", "dice_loss", "loss"}
  assert np.isclose(found["loss"], total) and 0 < sum(found.values()) - found["loss"] < total
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all(), path
    assert np.abs(leaf).max() > 0, path
  again = step(variables["params"], batch, jax.random.key(1))[0][0]
  other = step(variables["params"], batch, jax.random.key(2))[0][0]
  assert float(again) == float(total) != float(other)
  nothing = {**batch, "segment_labels": np.full_like(batch["segment_labels"], -1)}
  (alone, aux), gradient = step(variables["params"], nothing, jax.random.key(1))
  assert float(aux["metrics"]["mask_loss"][0]) == 0 and np.isfinite(alone)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@functools.cache
def stepped(devices):
  """Two steps of SGD; the loss of each and the state."""
  task, batch, _ = panoptic()
  mesh = sharding.make_mesh({"data": devices}, jax.devices()[:devices])
  optimizer = optax.sgd(1e-2, momentum=0.9)
  make = functools.partial(create_state, task=task, optimizer=optimizer, batch=batch, ema=False)
  layout = sharding.state_shardings(
    jax.eval_shape(make, jax.random.key(0)), sharding.DEFAULT_RULES, mesh
  )
  rows = sharding.batch_sharding(mesh)
  step = jax.jit(
    make_train_step(task, optimizer, small.schedule),
    in_shardings=(layout, rows),
    out_shardings=(layout, sharding.replicated(mesh)),
  )
  state, losses = jax.jit(make, out_shardings=layout)(jax.random.key(0)), []
  for _ in range(2):
    state, report = step(state, sharding.put_batch(batch, rows))
    losses.append([float(v) for v in report["metrics"]["loss"]])
  return losses, jax.device_get(state.params)


def test_a_step_over_two_devices_is_that_of_one():
  (losses, params), (expected, whole) = stepped(2), stepped(1)
  np.testing.assert_allclose(losses, expected, rtol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), params, whole)


def test_a_batch_is_not_split():
  assert not masks.make_task().separable
  with pytest.raises(ConfigError, match="accumulation_steps` is 2, and this task's loss looks at"):
    build.build(Config(masks.config(accumulation_steps=2)), build.DataFacts(info=masks.SCENES.info))


SOURCE = SceneSource("validation", size=32, count=6)


def test_what_is_right_has_all_of_the_quality_and_other_classes_have_none():
  task = masks.make_task()
  data = SceneSet(SOURCE, 6, task)
  run = lambda how: PanopticEvaluator(task, data, masks.Perfect(task, SOURCE)).run(how)  # noqa: E731
  right, wrong = run("right"), run("wrong")
  assert set(task.measures) <= set(right) and right.pop("examples") == 6
  assert all(right[name] == 1.0 for name in task.measures)
  # Of objects every class of a query is an answer, the right one a late one.
  assert wrong["pq"] == 0 and wrong["mean_iou"] < 0.1 and wrong["mask_ap"] < 0.6


def test_crowds_and_pixels_of_no_segment_count_for_nothing():
  task, example = masks.make_task(), dict(SOURCE[0])
  things = task.thing_classes
  answer = masks.perfect(example, task)
  example["segment_crowd"] = np.arange(len(example["segment_labels"])) == 1
  example["segments"] = np.where(np.arange(32)[:, None] < 4, 255, example["segments"])
  truth = true_picture(example, things)
  assert truth.map[0, 0] == 0 and truth.map.max() == len(truth.segments)
  counts = counted(answer, example, 3, task.num_classes, things)
  # Nothing wrong is found, and the crowd is not asked for.
  assert counts.sums[:, 1].sum() == len(truth.segments) - 1 and counts.sums[:, 2:].sum() == 0
  assert counts.matrix.sum() == (truth.map > 0).sum() == np.trace(counts.matrix)
  (picture,) = counts.pictures
  assert picture.index == 3 and picture.crowd.sum() == 1


def test_more_segments_than_there_are_numbers_below_none_are_all_there():
  rows = np.arange(300).reshape(20, 15)
  example = panoptic_fields(rows, np.arange(300) % 9, np.arange(300) == 255)
  found = true_picture(example, (1, 2))
  assert [s.category for s in found.segments] == (np.arange(300) % 9).tolist()
  np.testing.assert_array_equal(found.map, rows + 1)


def test_instances_are_written_by_the_numbers_of_their_data(tmp_path):
  task = masks.make_task("instance_segmentation", inference={"scale": None})
  batch = masks.make_batch(task, "instance_segmentation")
  variables = contract.initialize(task, batch)
  (evaluator,) = task.evaluators([SceneSet(SOURCE, 3, task)])
  found = evaluate.run_and_write(evaluator, variables, print, tmp_path)
  assert found["examples"] == 3 and set(task.measures) <= set(found)
  rows = json.loads((tmp_path / "detections_held_out.json").read_text())
  assert {row["image_id"] for row in rows} == {10, 20, 30}
  assert rows[0]["category_id"] >= 100 and rows[0]["segmentation"]["size"] == [32, 32]


def test_only_the_classifier_begins_anew_for_other_classes():
  _, _, variables = panoptic()
  names = flax.traverse_util.flatten_dict(variables, sep="/")
  found = {name for name in names if is_head(name, dense=True)}
  assert found == {f"params/head/predictor/classifier/{leaf}" for leaf in ("kernel", "bias")}


def test_a_set_that_cannot_be_measured_is_told():
  task = masks.make_task()
  data = SceneSet(SOURCE, 6, task)
  data.info = {"map_class_names": ("a", "b")}
  with pytest.raises(ValueError, match="'held_out' have 2 classes and the head 9"):
    task.evaluators([data])
  unknown = masks.make_task(info={}, num_classes=9)
  data.info = {}
  with pytest.raises(ValueError, match="'held_out' does not say which classes are things"):
    unknown.evaluators([data])
  data = SceneSet(SOURCE, 6, task)
  empty = {**SOURCE[0], "segments": np.full((32, 32), 255)}
  data.batches = lambda: iter(
    [({"index": np.zeros(1, int)}, {key: [value] for key, value in empty.items()})]
  )
  with pytest.raises(ValueError, match="no pixel of evaluation set 'held_out' has a segment"):
    PanopticEvaluator(task, data, masks.Perfect(task, SOURCE)).run("right")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"head": {"channels": 8}}, "a 'name' among its fields was expected"),
    ({"head": {"name": "mask2formre"}}, "did you mean 'mask2former'"),
    ({"head": {"name": "mask2former", "querys": 8}}, "no argument 'querys'"),
    ({"neck": {"name": "fpm"}}, "did you mean 'fpn'"),
    ({"max_objects": 256}, "max_objects is 256; at most 255"),
    ({"loss": {"num_points": 0}}, "num_points is 0"),
    ({"inference": {"overlap_threshold": 2.0}}, "inference.overlap_threshold"),
    ({"num_classes": 4}, "is 4 and the segments of the training data have 9"),
  ],
)
def test_settings_that_cannot_be_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    masks.make_task(**fields)


def test_what_it_says_of_itself():
  stored = masks.make_task().stored_info()
  assert stored["num_classes"] == 9 and stored["thing_classes"] == list(range(1, 9))
  assert len(stored["palette"]) == 9 and stored["map_class_names"][0] == "background"
  objects = masks.make_task("instance_segmentation").stored_info()
  assert objects["num_classes"] == 8 and objects["object_class_names"][0] == "circle"
  assert "thing_classes" not in masks.make_task("mask_segmentation").stored_info()


@pytest.mark.parametrize(
  "name", [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]
)
def test_a_run_goes_on_bit_for_bit(name, tmp_path, shared_programs):
  whole, values = tmp_path / "whole", masks.config(name)
  results = main.train(values, whole)
  task = masks.make_task(name)
  found = {key.removeprefix("held_out/"): value for key, value in results.items()}
  assert found["examples"] == 12
  # Of so short a training nothing may be found: a quality without a class is left out.
  assert next(iter(task.measures)) in found
  assert all(0 <= found[k] <= 1 for k in task.measures if k in found)
  assert (whole / "predictions.png").stat().st_size > 1000
  lines = [x for x in read_metrics(whole / "metrics.jsonl") if x["kind"] == "train"]
  assert lines[-1]["loss"] < lines[0]["loss"]
  broken = shutil.copytree(whole, tmp_path / "broken")
  for step in (6, 9, 12):
    shutil.rmtree(broken / "checkpoints" / str(step))
  main.train(masks.config(name), broken)
  assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
  first, again = (checkpoints.load_weights(path)[0] for path in (whole, broken))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert evaluate.evaluate(Config(masks.config(name)), whole) == pytest.approx(results)
  assert checkpoints.load_weights(whole)[1]["name"] == dense.NETWORK
