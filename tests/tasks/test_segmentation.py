"""Segmentation: loss, measures and settings by their definition, bad inputs, then whole runs."""

import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_vit import checkpoints, dry_run, evaluate, main, sharding, stored_tasks
from hybrid_vit.config import Config, ConfigError
from hybrid_vit.data.errors import CorruptDataError, MissingDataError
from hybrid_vit.metrics.segmentation import segmentation_metrics
from hybrid_vit.reporting import read_metrics
from hybrid_vit.tasks.segmentation import Segmentation
from hybrid_vit.train_state import create_state, make_train_step
from tests import dense, small

IGNORE = 255


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def case(seed=0, rows=3, classes=4, size=5):
  """Logits at the map's own size, and labels of which some are no class."""
  rng = np.random.default_rng(seed)
  logits = 2 * rng.normal(size=(rows, size, size, classes))
  labels = rng.integers(0, classes, (rows, size, size)).astype(np.int32)
  labels[rng.random(labels.shape) < 0.3] = IGNORE
  images = np.zeros((rows, size, size, 3), np.float32)
  return logits.astype(np.float32), {"image": images, "map": labels}


def entropy(logits, labels, average="all", weights=None):
  valid = labels != IGNORE
  own = np.take_along_axis(
    log_softmax(logits.astype(float)), np.where(valid, labels, 0)[..., None], -1
  )
  losses = np.where(valid, -own[..., 0], 0)
  if weights is not None:
    losses = losses * np.asarray(weights)[np.where(valid, labels, 0)]
  return losses.sum() / (valid.size if average == "all" else valid.sum())


def loss_of(task, batch):
  loss, aux = task.loss({}, batch, jax.random.key(0))
  return float(loss), {k: tuple(map(float, v)) for k, v in aux["metrics"].items()}


@pytest.mark.parametrize("average", ["all", "valid"])
@pytest.mark.parametrize("weights", [None, (1.0, 0.5, 2.0, 0.0)])
def test_loss_and_figures_by_hand(average, weights):
  logits, batch = case()
  other, _ = case(1)
  base = dense.make_task(average=average, class_weights=weights, auxiliary_weight=0.3)
  loss, metrics = loss_of(dense.with_answers(base, logits, auxiliary=other), batch)
  main_loss, beside = (entropy(x, batch["map"], average, weights) for x in (logits, other))
  assert loss == pytest.approx(main_loss + 0.3 * beside, rel=1e-5)
  valid = batch["map"] != IGNORE
  right = (logits.argmax(-1) == batch["map"]) & valid
  assert metrics["pixel_accuracy"] == (right.sum(), valid.sum())
  for name, value in (
    ("loss", main_loss + 0.3 * beside), ("main_loss", main_loss), ("auxiliary_loss", beside)
  ):  # fmt: skip
    assert metrics[name] == pytest.approx((3 * value, 3), rel=1e-5)
  alone, metrics = loss_of(dense.with_answers(base, logits), batch)
  assert alone == pytest.approx(main_loss, rel=1e-5) and "auxiliary_loss" not in metrics


def test_a_coarse_answer_is_resized_to_the_map_first():
  logits, batch = case(size=8)
  coarse = logits[:, ::2, ::2]
  loss, _ = loss_of(dense.with_answers(dense.make_task(), coarse), batch)
  resized = np.asarray(jax.image.resize(coarse, logits.shape, "bilinear"))
  assert loss == pytest.approx(entropy(resized, batch["map"]), rel=1e-4)
  corners = dense.make_task(inference={"align_corners": True})
  assert abs(loss_of(dense.with_answers(corners, coarse), batch)[0] - loss) > 1e-3


def test_mining_and_dice_are_added_as_set():
  logits, batch = case()
  labels = batch["map"]
  plain = entropy(logits, labels)
  mined = dense.make_task(ohem={"threshold": 0.3, "min_kept": 1}, average="valid")
  valid = labels != IGNORE
  own = np.take_along_axis(log_softmax(logits), np.where(valid, labels, 0)[..., None], -1)[..., 0]
  limit = max(np.sort(np.exp(own[valid]))[3], 0.3)
  hard = valid & (np.exp(own) < limit)
  assert 0 < hard.sum() < valid.sum()
  found, _ = loss_of(dense.with_answers(mined, logits), batch)
  assert found == pytest.approx(-own[hard].mean(), rel=1e-4)
  p = np.where(valid[..., None], np.exp(log_softmax(logits)), 0)
  truth = np.eye(4)[np.where(valid, labels, 0)] * valid[..., None]
  both, sizes = ((p * truth).sum((1, 2)), (p**2 + truth**2).sum((1, 2)))
  dice = np.mean(1 - (2 * both + 1) / (sizes + 1))
  found, _ = loss_of(dense.with_answers(dense.make_task(dice_weight=0.5), logits), batch)
  assert found == pytest.approx(plain + 0.5 * dice, rel=1e-5)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"class_weights": (1.0, 2.0)}, "class_weights has 2 numbers; 4 were expected"),
    ({"ohem": {"threshold": 2.0}}, r"config\.task\.ohem\.threshold"),
    ({"ohem": {"min_kept": 0}}, r"config\.task\.ohem\.min_kept"),
    ({"dice_weight": -1.0}, r"config\.task\.dice_weight"),
    ({"average": "most"}, r"config\.task\.average.*all.*valid"),
    ({"auxiliary_weight": -0.1}, "auxiliary_weight is -0.1; 0 or more"),
    ({"head": {"channels": 8}}, "a 'name' among its fields was expected"),
    ({"head": {"name": "upernett"}}, "did you mean 'upernet'"),
    ({"head": {"name": "upernet", "chanels": 8}}, "did you mean 'channels'"),
    ({"neck": {"name": "fpm"}}, "did you mean 'fpn'"),
    ({"auxiliary": {"name": "fcn", "level": 4}}, None),
    ({"num_classes": None}, r"`config\.model\.num_classes` is needed"),
    ({"info": {"map_class_names": ("a", "b")}}, r"is 4 and the maps .* have 2 classes: leave it"),
    ({"inference": {"mode": "slides"}}, r"inference\.mode"),
  ],
)
def test_settings_that_cannot_be_are_named(fields, message):
  if message is None:  # told where the network is traced
    with pytest.raises(ValueError, match="level is 4, and there are 2 levels"):
      dense.drawn(dense.make_task(**fields), dense.make_batch())
    return
  with pytest.raises((ValueError, ConfigError), match=message):
    dense.make_task(**fields)


def test_what_it_says_of_itself():
  task = dense.make_task(num_classes=None, info={"map_class_names": ("sky", "road", "tree")})
  assert isinstance(task, Segmentation) and task.num_classes == 3
  stored = task.stored_info()
  assert stored["map_class_names"] == ["sky", "road", "tree"] and len(stored["palette"]) == 3
  assert task.measures == dict.fromkeys(("mean_iou", "mean_accuracy", "pixel_accuracy"), "max")
  limits = task.spec.train["map"]
  assert (limits.minimum, limits.maximum, limits.besides) == (0, 2, IGNORE)
  assert task.spec.evaluation["image"].on_host


@functools.cache
def stepped(fsdp=1, parts=1, head="plain", average="all"):
  """Two steps of SGD; the loss of each and the state."""
  fields = {"head": dense.PLAIN_HEAD}
  if head != "plain":
    fields = {"head": {**dense.HEAD, "name": "upernet"}, "auxiliary": dense.AUXILIARY}
  task = dense.make_task(average=average, **fields)
  mesh = sharding.make_mesh({"fsdp": fsdp, "data": -1}, jax.devices()[: 8 if fsdp > 1 else 1])
  # Not AdamW, which makes whole steps of noise where a gradient is 0.
  batch, optimizer = dense.make_batch(), optax.sgd(0.1, momentum=0.9)
  make = functools.partial(create_state, task=task, optimizer=optimizer, batch=batch, ema=True)
  layout = sharding.state_shardings(
    jax.eval_shape(make, jax.random.key(0)), sharding.DEFAULT_RULES, mesh
  )
  rows = sharding.batch_sharding(mesh)
  step = jax.jit(
    make_train_step(task, optimizer, small.schedule, ema_decay=0.9, accumulation_steps=parts),
    in_shardings=(layout, rows),
    out_shardings=(layout, sharding.replicated(mesh)),
  )
  state, losses = jax.jit(make, out_shardings=layout)(jax.random.key(0)), []
  for seed in range(2):
    state, report = step(state, sharding.put_batch(dense.make_batch(seed=seed), rows))
    losses.append([float(v) for v in report["metrics"]["loss"]])
  return losses, jax.device_get(state.replace(rng=None))


def assert_alike(one, other):
  np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), one[1], other[1]
  )


def test_parts_of_a_batch_add_up_where_the_loss_is_separable():
  assert_alike(stepped(parts=4), stepped())
  assert dense.make_task().separable
  assert not dense.make_task(average="valid").separable
  assert not dense.make_task(ohem={}).separable
  with pytest.raises(ValueError, match="looks at a whole batch"):
    stepped(parts=4, average="valid")


def test_a_step_over_eight_devices_is_that_of_one():
  assert_alike(stepped(fsdp=4, head="upernet"), stepped(head="upernet"))


def by_hand(task, variables, count=7):
  """Confusion of a folder, pixel by pixel."""
  matrix, answer_to = np.zeros((4, 4), np.int64), jax.jit(task.answers)
  for i in range(count):
    photo, labels, _ = dense.example(i)
    answer = answer_to(variables, jnp.asarray(photo[None]))
    answer = jax.image.resize(answer, (1, *labels.shape, 4), "bilinear")[0]
    for true, found in zip(labels.ravel(), np.asarray(answer).argmax(-1).ravel()):
      if true != IGNORE:
        matrix[true, found] += 1
  return matrix


def evaluated(source, mesh=None, batch_size=4):
  """(figures, confusion, number of pictures) of drawn weights on a source."""
  task = dense.make_task()
  variables = dense.drawn(task, dense.make_batch())
  data = dense.evaluation_set(task, source, batch_size, mesh)
  (evaluator,) = task.evaluators([data])
  if mesh is not None:
    where = jax.tree.map(lambda _: sharding.replicated(mesh), variables)
    variables = sharding.put_tree(variables, where)
  matrix, examples = evaluator.confusion(variables)
  return evaluator.run(variables), matrix, examples


def test_a_set_of_pictures_of_all_sizes_by_hand(tmp_path):
  source = dense.write_folder(tmp_path)
  figures, matrix, examples = evaluated(source)
  assert examples == 7 and figures["examples"] == 7.0  # in batches of four
  task = dense.make_task()
  expected = by_hand(task, dense.drawn(task, dense.make_batch()))
  total = sum(labels.size - 12 for _, labels, _ in map(dense.example, range(7)))
  assert matrix.sum() == expected.sum() == total
  # A tie of rounding may fall to either side.
  assert np.abs(matrix - expected).sum() <= 4
  union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
  assert figures["mean_iou"] == pytest.approx(np.mean(np.diag(matrix) / union))
  assert figures["pixel_accuracy"] == pytest.approx(np.trace(matrix) / matrix.sum())
  assert figures["mean_accuracy"] == pytest.approx(np.mean(np.diag(matrix) / matrix.sum(1)))
  assert {k: v for k, v in figures.items() if k != "examples"} == segmentation_metrics(matrix)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_on_eight_devices_each_picture_counts_once(axes, tmp_path):
  source = dense.write_folder(tmp_path)
  _, expected, _ = evaluated(source)
  _, matrix, examples = evaluated(source, sharding.make_mesh(axes), batch_size=8)
  assert examples == 7 and matrix.sum() == expected.sum()
  assert np.abs(matrix - expected).sum() <= 4


def test_evaluation_on_other_classes_is_refused(tmp_path):
  task = dense.make_task()
  few = dense.evaluation_set(task, dense.write_folder(tmp_path, classes=3).replace("=3", "=9"))
  with pytest.raises(ValueError, match=r"'held_out' have 9 classes and the head 4: evaluate on a"):
    task.evaluators([few])


def test_a_set_without_any_class_and_labels_beyond_the_head_are_told(tmp_path):
  task = dense.make_task()
  variables = dense.drawn(task, dense.make_batch())
  source = dense.write_folder(tmp_path, count=1)
  labels = tmp_path / "annotations" / "000.png"
  labels.write_bytes(dense.png(np.full(dense.SIZES[0], IGNORE, np.uint8)))
  (evaluator,) = task.evaluators([dense.evaluation_set(task, source)])
  with pytest.raises(ValueError, match="no pixel of evaluation set 'held_out' has a class"):
    evaluator.run(variables)
  # A source that does not know its classes.
  data = dense.evaluation_set(task, source)
  image, wrong = dense.example(0)[0], np.full(dense.SIZES[0], 7, np.int32)
  data.info, data.batches = {}, lambda: iter([({}, {"image": [None, image], "map": [None, wrong]})])
  (evaluator,) = task.evaluators([data])
  with pytest.raises(ValueError, match=r"'held_out', row 1 of a batch of 2: .*7"):
    evaluator.run(variables)


def folder_config(source):
  values = dense.config(source=source, total_steps=2, evaluate_every_steps=2)
  values.data.update(
    dict(batch_size=8, image_size=16, transform="decode|random_crop_map(16, 0.75)|pad(16)")
  )
  values.evaluation.sets.held_out = dict(split="all", batch_size=8)
  return values


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (np.zeros((5, 5), np.uint8), "002.png is 5 x 5 and its photo .*images/002.png 17 x 40.*resize"),
    (np.full((17, 40), 7, np.uint8), "002.png holds label 7; 0 to 3, or 255 .*classes="),
    (np.zeros((17, 40, 3), np.uint8), "002.png is a picture of colours .RGB.*palette picture"),
  ],
)
def test_bad_maps_stop_a_run_with_the_file_and_the_remedy(bad, message, tmp_path, caplog):
  source = dense.write_folder(tmp_path / "data", count=9)
  (tmp_path / "data" / "annotations" / "002.png").write_bytes(dense.png(bad))
  with pytest.raises(CorruptDataError, match=r"images/002\.png"):
    main.train(folder_config(source), tmp_path / "run")
  assert re.search(message, caplog.text), caplog.text


def test_a_photo_without_its_map_stops_a_run_before_it_begins(tmp_path):
  source = dense.write_folder(tmp_path / "data")
  (tmp_path / "data" / "annotations" / "002.png").unlink()
  with pytest.raises(MissingDataError, match=r"1 of 7 photos have no map: .*002\.png\. Take them"):
    main.train(folder_config(source), tmp_path / "run")
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_run_learns_goes_on_bit_for_bit_and_is_read_back(tmp_path, shared_programs, capsys):
  whole = tmp_path / "whole"
  results = main.train(dense.config(), whole)
  lines = [x for x in read_metrics(whole / "metrics.jsonl") if x["kind"] == "train"]
  assert lines[-1]["loss"] < lines[0]["loss"] and "auxiliary_loss" in lines[0]
  assert results["held_out/examples"] == 20 and results["held_out/mean_iou"] > 0
  assert (whole / "predictions.png").stat().st_size > 1000
  assert "--config.data.source=maps:/path/to/pictures" in capsys.readouterr().out
  broken = shutil.copytree(whole, tmp_path / "broken")
  for step in (6, 9, 12):
    shutil.rmtree(broken / "checkpoints" / str(step))
  main.train(dense.config(), broken)
  assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
  first, again = (checkpoints.load_weights(path)[0] for path in (whole, broken))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert evaluate.evaluate(Config(dense.config()), whole) == pytest.approx(results)
  # Export and checkpoint alike are the task.
  photo = dense.example(3)[0]
  maps = [
    stored_tasks.load_task(path).classes(photo)
    for path in (whole, whole / "export", whole / "checkpoints" / "12")
  ]
  for found in maps:
    assert found.shape == photo.shape[:2] and found.dtype == np.int32
    np.testing.assert_array_equal(found, maps[0])
  with pytest.raises(ValueError, match="of the task 'segmentation', not of 'depth'"):
    stored_tasks.load_task(whole).depth(photo)


def test_the_dry_run_finds_nothing_wrong_and_what_is():
  plan = dry_run.examine(Config(dense.config()), devices=8)
  assert plan.problems == [] and plan.multiply_adds and plan.activation_bytes
  wrong = dense.config(checkpoint=dict(best_metric="held_out/top1"))
  problems = dry_run.examine(Config(wrong), devices=8).problems
  assert any("there are: held_out/mean_iou" in text for text in problems), problems
