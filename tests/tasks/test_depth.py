"""Depth: loss, protocol and settings by their definition, every head, bad inputs, whole runs."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit import checkpoints, dry_run, evaluate, main, sharding, stored_tasks
from hybrid_vit.config import Config, ConfigError
from hybrid_vit.data.errors import CorruptDataError
from hybrid_vit.metrics.depth import DepthProtocol, depth_errors
from hybrid_vit.reporting import read_metrics
from hybrid_vit.tasks.depth import Depth
from tests import dense

TOKENS = {"name": "adabins", "queries": "tokens", "num_bins": 8}


def make(**fields):
  return dense.make_task("depth", None, **fields)


def case(rows=3, size=6, seed=0):
  """Predicted metres `[B, H, W, 1]` and a batch of which some pixels are not measured."""
  rng = np.random.default_rng(seed)
  truth = rng.uniform(0.5, 9.5, (rows, size, size)).astype(np.float32)
  predicted = truth * np.exp(0.3 * rng.normal(size=truth.shape)).astype(np.float32)
  truth[rng.random(truth.shape) < 0.3] = 0
  images = np.zeros((rows, size, size, 3), np.float32)
  return predicted[..., None], {"image": images, "depth": truth}


def silog(predicted, truth, weight=0.5):
  valid = truth > 0
  d = np.log(truth[valid].astype(float)) - np.log(predicted[..., 0][valid].astype(float))
  return np.sqrt(np.mean(d**2) - weight * np.mean(d) ** 2)


def loss_of(task, batch):
  loss, aux = task.loss({}, batch, jax.random.key(0))
  return float(loss), {k: tuple(map(float, v)) for k, v in aux["metrics"].items()}


def test_loss_and_figures_by_hand():
  predicted, batch = case()
  other, _ = case(seed=1)
  truth = batch["depth"]
  task = make(silog_weight=0.85, auxiliary_weight=0.3)
  loss, metrics = loss_of(dense.with_answers(task, predicted, auxiliary=other), batch)
  beside = silog(other, truth, 0.85)
  assert loss == pytest.approx(silog(predicted, truth, 0.85) + 0.3 * beside, rel=1e-4)
  assert metrics["auxiliary_loss"] == pytest.approx((3 * beside, 3), rel=1e-4)
  valid = truth > 0
  relative = np.abs(predicted[..., 0] - truth)[valid] / truth[valid]
  assert metrics["abs_rel"] == pytest.approx((relative.sum(), valid.sum()), rel=1e-5)
  plain, _ = loss_of(dense.with_answers(make(loss="l1"), predicted), batch)
  assert plain == pytest.approx(np.abs(predicted[..., 0] - truth)[valid].mean(), rel=1e-5)


def test_edges_and_bins_are_added_as_set():
  predicted, batch = case()
  truth = batch["depth"]
  plain, _ = loss_of(dense.with_answers(make(), predicted), batch)
  found, metrics = loss_of(dense.with_answers(make(gradient_weight=0.5), predicted), batch)
  assert found == pytest.approx(plain + 0.5 * metrics["gradient_loss"][0] / 3, rel=1e-5)
  centers = np.sort(np.random.default_rng(2).uniform(0, 10, (3, 5)), 1).astype(np.float32)
  task = make(head=TOKENS, chamfer_weight=0.1)
  found, metrics = loss_of(dense.with_answers(task, predicted, bin_centers=centers), batch)
  chamfer = 0.0
  for row, own in zip(truth, centers):
    apart = (own[:, None] - row[row > 0][None]) ** 2
    chamfer += (apart.min(0).mean() + apart.min(1).mean()) / 3
  assert metrics["chamfer_loss"] == pytest.approx((3 * chamfer, 3), rel=1e-4)
  assert found == pytest.approx(plain + 0.1 * chamfer, rel=1e-4)


def test_truth_outside_the_protocol_is_not_measured():
  task = make(protocol={"min_depth": 1.0, "max_depth": 8.0})
  batch = dense.make_batch("depth")
  rows = task.augment(batch, None, None)
  depth, seen = batch["depth"], np.asarray(rows["depth"])
  inside = (depth > 1) & (depth < 8)
  np.testing.assert_array_equal(seen, np.where(inside, depth, 0))
  assert (depth[~inside] > 0).any()
  np.testing.assert_allclose(rows["image"], (batch["image"] / 255.0 - 0.5) / 0.25, atol=1e-5)


def test_the_heads_bounds_are_the_protocols_unless_said():
  protocol = {"min_depth": 0.5, "max_depth": 80.0}
  assert make(protocol=protocol).model.head.max_depth == 80.0
  assert make(head={**dense.DEPTH_HEAD, "max_depth": 20.0}).model.head.max_depth == 20.0
  bins = make(head=TOKENS, protocol=protocol).model.head
  assert (bins.min_depth, bins.max_depth) == (0.5, 80.0)
  assert make(head={"name": "dpt_depth"}).model.head.answer == "bounded"
  task = make(protocol=protocol)
  assert isinstance(task, Depth) and task.stored_info() == {"max_depth": 80.0}
  assert task.measures["rmse"] == "min" and task.measures["d1"] == "max"
  assert not task.separable


HEADS = {
  "glpn": dense.DEPTH_HEAD,
  "mim_depth": {"name": "mim_depth", "channels": 8, "num_filters": (8,), "kernels": (2,)},
  "dpt_depth": {"name": "dpt_depth", "channels": 8},
  "adabins": {"name": "adabins", "num_bins": 8, "patch_size": 4, "num_queries": 8},
  "adabins_tokens": TOKENS,
}


@pytest.mark.parametrize("name", HEADS)
def test_every_head_has_a_gradient_and_answers_metres(name):
  chamfer = {"chamfer_weight": 0.1} if name.startswith("adabins") else {}
  task = make(head=HEADS[name], **chamfer)
  batch = dense.make_batch("depth", rows=2)
  variables = jax.jit(lambda: task.init(jax.random.key(0), batch))()

  @jax.jit
  def run(variables, key):
    rows = task.augment(batch, key, jnp.zeros((), jnp.int32))

    def loss(params):
      return task.loss({**variables, "params": params}, rows, key)

    (value, aux), slope = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return value, aux["metrics"], slope, task.predict(variables, batch)

  value, metrics, slope, answer = run(variables, jax.random.key(1))
  assert np.isfinite(value) and value > 0
  assert ("chamfer_loss" in metrics) == bool(chamfer)
  assert answer.dtype == jnp.float32 and answer.shape[-1] == 1
  assert float(answer.min()) > 0 and float(answer.max()) <= 10.0
  for path, leaf in jax.tree_util.tree_leaves_with_path(slope["head"]):
    assert np.isfinite(leaf).all(), path


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"loss": "silogg"}, r"config\.task\.loss.*silog"),
    ({"silog_weight": 2.0}, r"config\.task\.silog_weight"),
    ({"gradient_weight": -1.0}, r"config\.task\.gradient_weight"),
    ({"chamfer_weight": 0.1}, "chamfer_weight: the head 'glpn' has no bins"),
    ({"head": {"name": "upernet"}}, "head 'upernet' makes no depth: it has no `max_depth`"),
    ({"head": {"name": "glpm"}}, "did you mean 'glpn'"),
    ({"head": {"channels": 8}}, "a 'name' among its fields was expected"),
    ({"head": {"name": "dpt_depth", "answer": "inverse"}}, "answer is 'inverse', depth up to an"),
    ({"protocol": {"crop": "eigen"}}, "crop is 'eigen'; one of none, nyu_eigen"),
    ({"protocol": {"min_depth": 9.0, "max_depth": 3.0}}, "0 < min_depth < max_depth was expected"),
  ],
)
def test_settings_that_cannot_be_are_named(fields, message):
  with pytest.raises((ValueError, ConfigError), match=message):
    make(**fields)


def evaluated(source, mesh=None, batch_size=4, **fields):
  task = make(**fields)
  variables = dense.drawn(task, dense.make_batch("depth"))
  (evaluator,) = task.evaluators([dense.evaluation_set(task, source, batch_size, mesh)])
  if mesh is not None:
    where = jax.tree.map(lambda _: sharding.replicated(mesh), variables)
    variables = sharding.put_tree(variables, where)
  return task, variables, evaluator.run(variables)


@pytest.mark.parametrize(
  "protocol", [{}, {"min_depth": 2.0, "max_depth": 6.0, "clip": True}, {"median_scaling": True}]
)
def test_a_set_of_pictures_of_all_sizes_by_hand(protocol, tmp_path):
  source = dense.write_folder(tmp_path, "depth")
  task, variables, figures = evaluated(source, protocol=protocol)
  rows, answer_to = [], jax.jit(task.answers)
  for i in range(7):
    photo, _, depth = dense.example(i)
    answer = answer_to(variables, jnp.asarray(photo[None]))
    whole = jax.image.resize(answer, (1, *depth.shape, 1), "bilinear")[0, ..., 0]
    rows.append(depth_errors(np.asarray(whole), depth / 1000.0, DepthProtocol(**protocol)))
  assert figures["examples"] == 7.0
  names = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")
  found = [figures[name] for name in names]
  np.testing.assert_allclose(found, np.mean(rows, axis=0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_on_eight_devices_each_picture_counts_once(axes, tmp_path):
  source = dense.write_folder(tmp_path, "depth")
  _, _, expected = evaluated(source)
  _, _, found = evaluated(source, sharding.make_mesh(axes), batch_size=8)
  assert found == pytest.approx(expected, rel=1e-4)


def test_a_set_whose_depths_are_all_outside_is_told(tmp_path):
  source = dense.write_folder(tmp_path, "depth")
  with pytest.raises(ValueError, match=r"'held_out' is a depth between 20 and 30 m .config\.task"):
    evaluated(source, protocol={"min_depth": 20.0, "max_depth": 30.0})


def folder_config(source):
  values = dense.config("depth", source, total_steps=2, evaluate_every_steps=2)
  values.data.update(dict(batch_size=8, image_size=16, transform="decode|random_crop(16)"))
  values.evaluation.sets.held_out = dict(split="all", batch_size=8)
  return values


@pytest.mark.parametrize(
  ("bad", "message"),
  [
    (
      np.zeros((5, 5), np.uint16) + 9,
      r"002\.png is 5 x 5 and its photo .*002\.png 17 x 40.*resize",
    ),
    (np.zeros((17, 40), np.uint16), r"002\.png: no pixel is measured, all are 0\. Take the pair"),
    (np.zeros((17, 40), np.uint8), r"002\.png has mode L, 8 bits a value; a PNG of 16 bits"),
  ],
)
def test_bad_depths_stop_a_run_with_the_file_and_the_remedy(bad, message, tmp_path, caplog):
  source = dense.write_folder(tmp_path / "data", "depth", count=9)
  (tmp_path / "data" / "depth" / "002.png").write_bytes(dense.png(bad))
  with pytest.raises(CorruptDataError, match=r"images/002\.png"):
    main.train(folder_config(source), tmp_path / "run")
  assert re.search(message, caplog.text), caplog.text


def test_a_run_learns_goes_on_bit_for_bit_and_is_read_back(tmp_path, shared_programs, capsys):
  whole = tmp_path / "whole"
  results = main.train(dense.config("depth"), whole)
  lines = [x for x in read_metrics(whole / "metrics.jsonl") if x["kind"] == "train"]
  assert lines[-1]["loss"] < lines[0]["loss"] and "abs_rel" in lines[0]
  assert results["held_out/examples"] == 20 and 0 < results["held_out/rmse"] < 10
  assert (whole / "predictions.png").stat().st_size > 1000
  assert "--config.data.source=depth:/path/to/pictures" in capsys.readouterr().out
  broken = shutil.copytree(whole, tmp_path / "broken")
  for step in (6, 9, 12):
    shutil.rmtree(broken / "checkpoints" / str(step))
  main.train(dense.config("depth"), broken)
  assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
  first, again = (checkpoints.load_weights(path)[0] for path in (whole, broken))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert evaluate.evaluate(Config(dense.config("depth")), whole) == pytest.approx(results)
  photo = dense.example(3)[0]
  maps = [
    stored_tasks.load_task(path).depth(photo)
    for path in (whole, whole / "export", whole / "checkpoints" / "12")
  ]
  for found in maps:
    assert found.shape == photo.shape[:2] and found.dtype == np.float32
    assert found.min() > 0 and found.max() <= 10
    np.testing.assert_array_equal(found, maps[0])
  with pytest.raises(ValueError, match="of the task 'depth', not of 'segmentation'"):
    stored_tasks.load_task(whole).classes(photo)


def test_the_dry_run_finds_nothing_wrong_and_what_is():
  plan = dry_run.examine(Config(dense.config("depth")), devices=8)
  assert plan.problems == [] and plan.multiply_adds and plan.activation_bytes
  wrong = dense.config("depth", accumulation_steps=2)
  problems = dry_run.examine(Config(wrong), devices=8).problems
  assert any("looks at a whole batch" in text for text in problems), problems
