"""Masked autoencoding: patches, masks and losses by their definition, then whole runs."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from hybrid_vit import build, checkpoints, dry_run, evaluate, main
from hybrid_vit.build import DataFacts
from hybrid_vit.config import Config, load_config
from hybrid_vit.models import mae
from hybrid_vit.models.registry import Preprocessing, create_model
from hybrid_vit.ops.hog import hog
from hybrid_vit.reporting import read_metrics
from hybrid_vit.tasks.masked_autoencoding import (
  DecoderSettings,
  MaskedAutoencodingSettings,
  build_masked_autoencoding,
  draw_histograms,
)
from hybrid_vit.tasks.pictures import Shrinking
from hybrid_vit.tasks.registry import Context
from hybrid_vit.weights.transfer import transfer
from tests.command import TINY_NETWORK

VIT = dict(width=32, depth=2, num_heads=2, patch_size=8, position_size=2)
MOAT = {**TINY_NETWORK, "drop_path_rate": 0.0}
DECODER = DecoderSettings(width=16, depth=1, num_heads=2)
EXPECTS = Preprocessing(16, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)
SPARSE, DENSE = ("vit_base_patch16_224", VIT), ("tiny_moat_0", MOAT)


def make(network=SPARSE, **settings):
  name, arguments = network
  if network is SPARSE and settings.get("masking") != "dense":
    settings.setdefault("decoder", DECODER)

  def make_network(classes):
    return create_model(name, num_classes=classes, **arguments)

  context = Context({}, None, EXPECTS, make_network)
  return build_masked_autoencoding(MaskedAutoencodingSettings(**settings), context)


def pictures(count=4, size=16, seed=0):
  images = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)
  return {"image": images, "index": np.arange(count, dtype=np.int32)}


def drawn(task, size=16):
  shapes = jax.eval_shape(task.init, jax.random.key(0), pictures(size=size))
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    noise = 0.2 * rng.normal(size=leaf.shape)
    return jnp.asarray(noise + 1.0 if path[-1].key == "var" else noise, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def test_patches_and_their_inverse():
  images = np.random.default_rng(0).normal(size=(2, 4, 6, 3))
  patches = np.asarray(mae.patchify(jnp.asarray(images), 2))
  assert patches.shape == (2, 6, 12)
  # The fifth patch of 2 x 3: second row, second column.
  np.testing.assert_allclose(patches[1, 4], images[1, 2:4, 2:4].reshape(-1), rtol=1e-6)
  np.testing.assert_allclose(mae.unpatchify(patches, (2, 3), 2), images, rtol=1e-6)
  with pytest.raises(ValueError, match="4x6 is not whole patches of 4x4"):
    mae.patchify(jnp.asarray(images), 4)


def test_a_mask_hides_as_many_in_each_row_and_restores_the_order():
  noise = jax.random.uniform(jax.random.key(0), (5, 16))
  masking = mae.mask_by_noise(noise, 0.75)
  kept, restore, mask = (np.asarray(part) for part in masking)
  assert kept.shape == (5, 4) and (mask.sum(-1) == 12).all()
  tokens = np.random.default_rng(0).normal(size=(5, 16, 3))
  seen = np.take_along_axis(tokens, kept[..., None], 1)
  filled = np.concatenate([seen, np.full((5, 12, 3), 7.0)], 1)
  restored = np.take_along_axis(filled, restore[..., None], 1)
  np.testing.assert_array_equal(restored, np.where(mask[..., None] > 0, 7.0, tokens))
  # The smallest noise stays.
  np.testing.assert_array_equal(mask > 0, np.asarray(noise) > np.sort(noise, 1)[:, 3:4])
  assert len({tuple(row) for row in kept}) == 5
  assert mae.mask_by_noise(jnp.zeros((1, 100)), 0.9).kept.shape == (1, 10)
  with pytest.raises(ValueError, match=r"ratio of 0\.75 leaves 0 of 3 patches visible"):
    mae.mask_by_noise(noise[:, :3], 0.75)


def test_positions_tell_the_column_first():
  table = mae.sincos_positions(8, (2, 3), tokens=1)
  assert table.shape == (7, 8) and not table[0].any()
  row, column, slow = 1, 2, 10000.0**-0.5
  expected = [f(p * w) for p in (column, row) for f in (np.sin, np.cos) for w in (1.0, slow)]
  np.testing.assert_allclose(table[1 + row * 3 + column], expected, rtol=1e-6)


@pytest.mark.parametrize("target", ["normalized_pixels", "pixels", "hog"])
def test_the_loss_is_of_hidden_patches_by_its_definition(target):
  task, rng = make(target=target), np.random.default_rng(0)
  images = rng.normal(size=(2, 16, 16, 3)).astype(np.float32)
  if target == "hog":
    expected = np.asarray(hog(images)).reshape(2, 4, 27)
  else:
    expected = images.reshape(2, 2, 8, 2, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 192)
    if target == "normalized_pixels":
      mean, var = expected.mean(-1, keepdims=True), expected.var(-1, ddof=1, keepdims=True)
      expected = (expected - mean) / np.sqrt(var + 1e-6)
  mask = np.array([[1, 1, 0, 1], [0, 1, 1, 1.0]])
  rebuilt = rng.normal(size=expected.shape).astype(np.float32)
  errors = ((rebuilt - expected) ** 2).mean(-1)
  losses = task.losses(jnp.asarray(rebuilt), jnp.asarray(images), jnp.asarray(mask))
  np.testing.assert_allclose(losses, (errors * mask).sum(-1) / 3, rtol=1e-4)
  # What was to be seen may be anything.
  other = jnp.asarray(np.where(mask[..., None] > 0, rebuilt, 9.0))
  np.testing.assert_allclose(task.losses(other, jnp.asarray(images), jnp.asarray(mask)), losses)


@pytest.mark.parametrize("network", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_nothing_of_a_hidden_patch_is_seen(network):
  task = make(network, mask_ratio=0.5)
  variables, batch = drawn(task), pictures()
  rows = task.augment(batch, jax.random.key(0), jnp.zeros((), jnp.int32))
  rebuilt, mask, _, _ = task._rebuild(variables, rows["image"], rows["noise"])
  size = task.patch_size
  grid = (16 // size, 16 // size)
  hidden = mae.unpatchify(jnp.repeat(mask[..., None], size**2, -1), grid, size)
  assert 0 < hidden.mean() < 1
  seen = {}
  for name, place in (("hidden", hidden), ("visible", 1 - hidden)):
    changed = jnp.where(place > 0, rows["image"] + 1.0, rows["image"])
    seen[name] = task._rebuild(variables, changed, rows["noise"])[0]
  assert np.isfinite(rebuilt).all()
  np.testing.assert_array_equal(seen["hidden"], rebuilt)
  assert jnp.abs(seen["visible"] - rebuilt).max() > 1e-3


# In the dense form no norm behind the last map has a part in it.
NORM = {"head_norm/scale", "head_norm/bias"}


@pytest.mark.parametrize(
  ("network", "settings", "still"),
  [(SPARSE, {}, {"position_embedding"}), (SPARSE, {"masking": "dense"}, NORM), (DENSE, {}, NORM)],
  ids=["sparse", "dense vit", "dense"],
)
def test_every_parameter_learns_but_those_that_shall_not(network, settings, still):
  task = make(network, mask_ratio=0.5, **settings)
  variables = drawn(task)
  rows = task.augment(pictures(), jax.random.key(0), jnp.zeros((), jnp.int32))

  def loss(params):
    return task.loss({**variables, "params": params}, rows, jax.random.key(1))[0]

  gradients = jax.device_get(jax.jit(jax.grad(loss))(variables["params"]))
  gradients = traverse_util.flatten_dict(gradients, sep="/")
  largest = {name: float(np.abs(g).max()) for name, g in gradients.items()}
  assert all(np.isfinite(value) for value in largest.values())
  assert {name for name, value in largest.items() if value == 0.0} == still
  assert not any(name.startswith("head/") for name in gradients)


def test_a_picture_is_masked_alike_whatever_batch_it_comes_in():
  task = make()
  variables, batch = drawn(task), pictures()
  rebuilt, mask = task.predict(variables, batch)
  turned = {name: value[::-1] for name, value in batch.items()}
  other, other_mask = task.predict(variables, turned)
  np.testing.assert_array_equal(other_mask[::-1], mask)
  np.testing.assert_allclose(other[::-1], rebuilt, rtol=1e-4, atol=1e-5)
  counted = {**batch, "mask": np.array([1, 1, 0, 1], np.float32)}
  some = task.evaluate_batch(variables, counted)["loss"]
  bad = counted["image"].astype(np.float32) / 100
  bad[2] = np.nan
  assert float(some[1]) == 3.0
  assert np.isfinite(task.evaluate_batch(variables, {**counted, "image": bad})["loss"][0])


@pytest.mark.parametrize(
  ("network", "settings", "message"),
  [
    (SPARSE, dict(target="edges"), "target 'edges' is not one of normalized_pixels, pixels, hog"),
    (SPARSE, dict(mask_ratio=1.0), "mask_ratio is 1.0; a number between 0 and 1"),
    (DENSE, dict(masking="sparse"), "'sparse', and MOAT sees whole pictures only: take 'dense'"),
    (DENSE, dict(decoder=DECODER), "decoder is of sparse masking"),
    (
      (SPARSE[0], {**VIT, "patch_size": 4}),
      dict(target="hog"),
      "cells of 8x8 do not divide VisionTransformer's patches of 4x4",
    ),
    (SPARSE, dict(shrink=Shrinking(8)), "ratio of 0.75 leaves 0 of 1 patches visible"),
    (SPARSE, dict(shrink=Shrinking(12)), "shrink.size is 12, and VisionTransformer's patches of 8"),
  ],
)
def test_what_cannot_be_is_refused(network, settings, message):
  with pytest.raises(ValueError, match=message):
    make(network, **settings)


def test_a_histogram_is_drawn_across_its_gradient():
  cells = np.zeros((1, 1, 1, 27), np.float32)
  cells[..., [0, 9, 18]] = 1.0
  picture = draw_histograms(cells)[0]
  assert picture.shape == (8, 8, 3)
  # Brightness that changes from row to row is a line along a row.
  assert picture[3:5].mean() > 3 * picture[[0, 1, 6, 7]].mean()


def config(network, *, classify=False, **changes):
  name, arguments = network
  values = ConfigDict()
  values.model = dict(name=name, arguments=arguments)
  values.data = dict(
    source="digits", batch_size=96, image_size=16, transform="decode|resize(16, 'bilinear')"
  )
  values.evaluation = dict(
    sets=dict(held_out=dict(split="validation", transform="decode|resize(16)"))
  )
  values.total_steps = 24
  values.task = dict(name="masked_autoencoding", mask_ratio=0.5)
  if classify:
    values.task = dict(name="classification")
  elif network is SPARSE:
    values.task.decoder = dict(width=16, depth=1, num_heads=2)
  values.optimizer = dict(
    name="adamw", learning_rate=4e-3, weight_decay=0.05, schedule=dict(name="constant")
  )
  values.evaluate_every_steps = 24
  values.log_every_steps = 4
  values.update(changes)
  return values


@pytest.mark.parametrize("network", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_a_run_learns_and_starts_a_classification(network, tmp_path, capsys):
  results = main.train(config(network), tmp_path / "run")
  lines = [x for x in read_metrics(tmp_path / "run" / "metrics.jsonl") if x["kind"] == "train"]
  assert lines[-1]["loss"] < 0.9 * lines[0]["loss"], lines
  assert set(results) == {"held_out/loss", "held_out/examples"}
  assert (tmp_path / "run" / "predictions.png").stat().st_size > 1000
  metadata = json.loads((tmp_path / "run" / "export" / "metadata.json").read_text())
  assert metadata["num_classes"] == 0 and metadata["task"] == "masked_autoencoding"
  weights, _ = checkpoints.load_weights(tmp_path / "run")
  if network is SPARSE:
    expected = mae.sincos_positions(32, (2, 2), 1)
    np.testing.assert_allclose(weights["params"]["position_embedding"], expected, atol=1e-6)
  found = evaluate.evaluate(Config(config(network)), tmp_path / "run")
  assert found == pytest.approx(results)
  # Its weights in the classification's places, the decoder left behind, the head anew.
  tuned = config(
    network, classify=True, init_from=str(tmp_path / "run"), reinitialize_head=True, total_steps=2
  )
  capsys.readouterr()
  main.train(tuned, tmp_path / "tuned")
  said = capsys.readouterr().out
  assert "params/head/kernel (as asked)" in said and "params/decoder/mask_token" in said
  run = build.build(Config(tuned), DataFacts({"class_names": tuple("0123456789")}, 1437))
  target = jax.eval_shape(run.task.init, jax.random.key(0), run.batches[0])
  _, report = transfer(weights, target, reinitialize_head=True)
  assert all(name.startswith("params/head/") for name in report.initialised)
  assert all(name.startswith("params/decoder/") for name in report.unused)


def test_a_place_has_the_same_position_at_any_size():
  full = mae.sincos_positions(8, (4, 4), made=(4, 4))
  np.testing.assert_array_equal(full, mae.sincos_positions(8, (4, 4)))
  # Half as many cells: each centre lies between two of the full size's.
  small = mae.sincos_positions(8, (2, 2), 1, made=(4, 4))
  assert not small[0].any()
  columns = np.array([0.5, 2.5])
  np.testing.assert_allclose(small[1:3, 0], np.sin(columns), rtol=1e-6)
  np.testing.assert_allclose(small[[1, 3], 4], np.sin(columns), rtol=1e-6)


def by_curriculum(network, sizes):
  """A curriculum over `sizes`, the last one the full size."""
  size = sizes[-1]
  changed = config(
    network,
    curriculum=dict(name="efficienttrain++", sizes=sizes),
    checkpoint=dict(every_steps=4, keep=9),
    log_every_steps=1,
  )
  changed.data.image_size = size
  changed.data.transform = f"decode|resize({size}, 'bilinear')"
  changed.evaluation.sets.held_out.transform = f"decode|resize({size})"
  return changed


def test_any_network_is_pretrained_by_a_curriculum():
  run = build.build(Config(by_curriculum(DENSE, (16, 32, 48))), DataFacts(num_examples=1437))
  assert {task.shrink for task in run.tasks} == {Shrinking(16), Shrinking(32), None}
  key = jax.random.key(0)
  for task, batch in zip(run.tasks, run.batches):
    rows = jax.eval_shape(task.augment, batch, key, jnp.zeros((), jnp.int32))
    size = task.shrink.size if task.shrink else 48
    assert rows["image"].shape == (96, size, size, 3)
    assert rows["noise"].shape == (96, (size // task.patch_size) ** 2)


@pytest.mark.slow
def test_it_is_trained_by_a_curriculum_and_goes_on_bit_for_bit(tmp_path, shared_programs):
  """Pictures shown at 16 px first; the fixed sines stay those of the full size."""
  name, arguments = SPARSE
  network = (name, {**arguments, "position_size": 5})
  changed = by_curriculum(network, (16, 24, 32, 40))
  changed.task.decoder = dict(width=16, depth=1, num_heads=2)
  run = build.build(Config(changed), DataFacts(num_examples=1437))
  assert run.tasks[0].shrink == Shrinking(16) and run.tasks[-1].shrink is None
  assert {task.model.position_size for task in run.tasks} == {5}
  whole = tmp_path / "whole"
  main.train(changed, whole)
  losses = [x["loss"] for x in read_metrics(whole / "metrics.jsonl") if x["kind"] == "train"]
  assert len(losses) == run.curriculum.total_steps and np.isfinite(losses).all()
  weights, _ = checkpoints.load_weights(whole)
  expected = mae.sincos_positions(32, (5, 5), 1)
  np.testing.assert_allclose(weights["params"]["position_embedding"], expected, atol=1e-6)
  broken = shutil.copytree(whole, tmp_path / "broken")
  saved = sorted(int(path.name) for path in (broken / "checkpoints").iterdir())
  for step in saved[1:]:
    shutil.rmtree(broken / "checkpoints" / str(step))
  assert saved[0] < run.curriculum.first_steps[-1]
  main.train(changed, broken)
  assert (broken / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
  jax.tree.map(np.testing.assert_array_equal, weights, checkpoints.load_weights(broken)[0])


def test_fine_tuning_of_the_recipe_takes_what_its_pretraining_leaves():
  """The configurations of both, at their own sizes, by shapes alone."""
  facts = DataFacts(num_examples=1_281_167, num_classes=1000)
  shapes = []
  for variant in ("vit_base", "vit_base_finetune"):
    made = build.build(Config(load_config("mae", variant)), facts)
    shapes.append(jax.eval_shape(made.task.init, jax.random.key(0), made.batches[0]))
  source = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes[0])
  _, report = transfer(source, shapes[1], reinitialize_head=True)
  assert [name.split(" ")[0] for name in report.initialised] == [
    "params/head/bias",
    "params/head/kernel",
  ]
  decoder = sum(leaf.size for leaf in jax.tree.leaves(shapes[0]["params"]["decoder"]))
  # By the authors' code: embed 393,728, mask token 512, 8 blocks of 3,152,384, norm 1,024,
  # prediction 393,984; its positions are no parameters here.
  assert decoder == 393_728 + 512 + 8 * 3_152_384 + 1_024 + 393_984


def test_pretraining_is_as_the_authors_code_has_it():
  made = build.build(Config(load_config("mae", "vit_base")), DataFacts(num_examples=1_281_167))
  assert made.batches[0]["image"].shape == (4096, 224, 224, 3)
  assert made.tasks[0].mask_ratio == 0.75 and made.tasks[0].target == "normalized_pixels"
  steps = 400 * 1_281_167 / 4096
  assert made.curriculum.total_steps == round(steps)
  peak = float(made.schedule(round(steps / 10)))
  assert peak == pytest.approx(1.5e-4 * 4096 / 256, rel=1e-3)
  assert float(made.schedule(made.curriculum.total_steps)) == pytest.approx(0.0, abs=1e-9)
  assert made.config["optimizer"]["b2"] == 0.95 and made.config["optimizer"]["weight_decay"] == 0.05
  assert made.settings.best_metric == "validation/loss" and not made.settings.best_is_max


@pytest.mark.parametrize(
  "name", ["cvt_13", "focalnet_tiny_srf", "smt_t", "convnext_tiny", "revcol_tiny", "mci0"]
)
def test_any_network_is_pretrained_by_dense_masking(name):
  """By shapes alone: its loss, and a classification that takes all but the head."""
  size = 256 if name == "mci0" else 224
  context = Context({}, None, EXPECTS, lambda classes: create_model(name, num_classes=classes))
  task = build_masked_autoencoding(MaskedAutoencodingSettings(mask_ratio=0.6), context)
  batch = jax.eval_shape(lambda: pictures(2, 8) | {"image": jnp.zeros((2, size, size, 3), "uint8")})
  key = jax.random.key(0)
  variables = jax.eval_shape(task.init, key, batch)
  rows = jax.eval_shape(task.augment, batch, key, jnp.zeros((), jnp.int32))
  loss, _ = jax.eval_shape(task.loss, variables, rows, key)
  assert task.masking == "dense" and loss.shape == ()
  source = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), variables)
  images = jnp.zeros((1, size, size, 3))
  target = jax.eval_shape(lambda k: create_model(name).init(k, images), key)
  _, report = transfer(source, target, reinitialize_head=True)
  assert all(path.startswith("params/head/") for path in report.initialised)
  assert all(path.startswith("params/decoder/") for path in report.unused)


def test_the_dry_run_of_the_local_tries_finds_nothing_wrong():
  for variant in ("runlocal", "runlocal_dense"):
    plan = dry_run.examine(Config(load_config("mae", variant)), devices=8)
    assert plan.problems == [] and plan.multiply_adds
