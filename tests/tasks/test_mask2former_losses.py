"""Mask2Former's losses: transformers' numbers with its own draws, and what padding must not do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.mask_forms import bitmaps
from hybrid_vit.tasks import mask2former_losses as losses
from tests import golden
from tests.heads.mask2former_golden import run_golden

_SETTINGS = losses.Mask2FormerLoss(num_points=32)
_losses = jax.jit(losses.mask2former_losses, static_argnums=2)


def _stacked(draws):
  return jax.tree.map(lambda *x: np.stack(x), *draws)


@functools.partial(jax.jit, static_argnums=3)
def _match(prediction, targets, points, settings):
  costs = losses.matching_costs(prediction, targets, points, settings)
  return losses.match_targets(costs, targets.valid)


def _ellipse(box, size):
  """The ellipse in a box (x, y, x, y), at pixel centres."""
  y, x = np.mgrid[: size[0], : size[1]] + 0.5
  half = (box[2:] - box[:2]) / 2
  centre = (box[2:] + box[:2]) / 2
  return ((x - centre[0]) / half[0]) ** 2 + ((y - centre[1]) / half[1]) ** 2 <= 1


def _golden_targets(expected, size, slots):
  batch = sum(k.startswith("gt_boxes") for k in expected)
  labels = np.zeros((batch, slots), np.int32)
  masks = np.ones((batch, slots, *size), np.uint8)
  valid = np.zeros((batch, slots), bool)
  for i in range(batch):
    for j, (box, label) in enumerate(zip(expected[f"gt_boxes_{i}"], expected[f"gt_labels_{i}"])):
      labels[i, j], masks[i, j], valid[i, j] = label, _ellipse(box, size), True
  return losses.SegmentTargets(labels, masks, valid)


def _golden_draws(expected, predictions, targets, settings):
  """The recorded draws, whose pairs are picture by picture in the order of their queries."""
  batch, slots = targets.labels.shape
  stored = iter(expected[f"uniform_{i}"] for i in range((batch + 2) * len(predictions)))
  found = []
  for prediction in [predictions[-1], *predictions[:-1]]:
    matching = np.concatenate([next(stored) for _ in range(batch)])
    query = np.asarray(_match(prediction, targets, matching, settings))
    pairs = [(i, j) for i in range(batch) for j in np.argsort(query[i]) if query[i, j] >= 0]
    rest = []
    for _ in range(2):
      drawn = next(stored)
      assert len(drawn) == len(pairs)
      part = np.full((batch, slots, *drawn.shape[1:]), 0.5, np.float32)
      for pair, places in zip(pairs, drawn):
        part[pair] = places
      rest.append(part)
    found.append(losses.PointDraws(matching, *rest))
  return _stacked([*found[1:], found[0]])


@pytest.mark.parametrize("name", golden.names("dense/mask2former"))
def test_as_transformers(name):
  description, expected = golden.load("dense/mask2former", name)
  answer = run_golden(name)[-1][-1]
  settings = losses.Mask2FormerLoss(num_points=description["arguments"]["train_num_points"])
  targets = _golden_targets(expected, description["input"]["shape"][1:3], slots=4)
  predictions = [*answer["auxiliary"], answer]
  draws = _golden_draws(expected, predictions, targets, settings)
  found = _losses(answer, targets, settings, draws)
  kinds = {"cross_entropy": "class", "mask": "mask", "dice": "dice"}
  for stored, value in zip(description["loss_names"], expected["losses"]):
    kind, _, number = stored.removeprefix("loss_").rpartition("_")
    if not number.isdigit():
      kind, number = stored.removeprefix("loss_"), -1
    np.testing.assert_allclose(found[kinds[kind]][int(number)], value, rtol=2e-5, err_msg=stored)
  np.testing.assert_allclose(sum(x.sum() for x in found.values()), expected["loss"], rtol=1e-5)


def _answer(seed=0, batch=2, queries=6, classes=3, layers=2):
  rng = np.random.default_rng(seed)

  def one():
    return {
      "class_logits": rng.standard_normal((batch, queries, classes + 1)).astype(np.float32),
      "mask_logits": 3 * rng.standard_normal((batch, queries, 8, 12)).astype(np.float32),
    }

  return {**one(), "auxiliary": [one() for _ in range(layers - 1)]}


def _targets(slots=3):
  rng = np.random.default_rng(1)
  masks = (rng.random((2, slots, 32, 48)) < 0.4).astype(np.uint8)
  labels = rng.integers(0, 3, (2, slots)).astype(np.int32)
  return losses.SegmentTargets(labels, masks, np.ones((2, slots), bool))


@functools.partial(jax.jit, static_argnums=2)
def _value_and_gradient(answer, targets, settings, key):
  def total(answer):
    found = losses.mask2former_losses(answer, targets, settings, key)
    return sum(x.sum() for x in found.values()), found

  return jax.value_and_grad(total, has_aux=True)(answer)


def test_a_right_answer_has_a_small_loss():
  targets = _targets()._replace(masks=np.zeros((2, 3, 32, 48), np.uint8))
  for slot in range(3):
    targets.masks[:, slot, :, 16 * slot : 16 * (slot + 1)] = 1
  answer = _answer(layers=1)
  classes = np.full((2, 6, 4), -20.0, np.float32)
  classes[..., 3] = 20.0
  masks = np.full((2, 6, 8, 12), -30.0, np.float32)
  for slot, query in enumerate((4, 0, 2)):
    classes[:, query] = -20.0
    classes[np.arange(2), query, targets.labels[:, slot]] = 20.0
    masks[:, query, :, 4 * slot : 4 * slot + 4] = 30.0
  answer = {"class_logits": classes, "mask_logits": masks, "auxiliary": []}
  points = np.random.default_rng(0).random((2, 32, 2), np.float32)
  np.testing.assert_array_equal(_match(answer, targets, points, _SETTINGS), [[4, 0, 2]] * 2)
  (_, found), _ = _value_and_gradient(answer, targets, _SETTINGS, jax.random.key(0))
  assert found["class"] < 1e-6 and found["mask"] < 3.0 and found["dice"] < 1.0
  (worse, _), _ = _value_and_gradient(_answer(layers=1), targets, _SETTINGS, jax.random.key(0))
  assert worse > 3 * sum(x.sum() for x in found.values())


def test_empty_slots_add_nothing():
  answer, targets = _answer(), _targets()
  key = jax.random.key(2)
  drawn = [losses.draw_points(k, (2, 3), _SETTINGS) for k in jax.random.split(key, 2)]
  expected = _losses(answer, targets, _SETTINGS, _stacked(drawn))
  wider = losses.SegmentTargets(
    np.concatenate([np.full((2, 1), 77, np.int32), targets.labels, targets.labels], 1),
    np.concatenate([np.ones((2, 1, 32, 48), np.uint8), targets.masks, targets.masks], 1),
    np.concatenate([np.zeros((2, 1), bool), targets.valid, np.zeros((2, 3), bool)], 1),
  )
  padded = []
  for one in drawn:
    parts = [np.pad(x, ((0, 0), (1, 3), (0, 0), (0, 0))) for x in one[1:]]
    padded.append(losses.PointDraws(one.matching, *parts))
  found = _losses(answer, wider, _SETTINGS, _stacked(padded))
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5)
  # The draws of a key are those of draw_points.
  by_key = _losses(answer, targets, _SETTINGS, key)
  for name, value in expected.items():
    np.testing.assert_allclose(by_key[name], value, rtol=1e-5)


def test_no_targets_and_more_targets_than_queries():
  answer, targets = _answer(), _targets()
  nothing = targets._replace(valid=np.zeros((2, 3), bool))
  (_, found), gradient = _value_and_gradient(answer, nothing, _SETTINGS, jax.random.key(0))
  assert not found["mask"].any() and not found["dice"].any() and (found["class"] > 0).all()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
  assert not gradient["mask_logits"].any()
  many = _targets(slots=9)
  points = np.random.default_rng(0).random((2, 4, 2), np.float32)
  last = {k: v for k, v in answer.items() if k != "auxiliary"}
  query = np.asarray(_match(last, many, points, _SETTINGS))
  assert [sorted(row[row >= 0]) for row in query] == [list(range(6))] * 2
  (_, found), gradient = _value_and_gradient(answer, many, _SETTINGS, jax.random.key(0))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((found, gradient)))


def test_semantic_targets():
  labels = np.full((2, 4, 5), 255)
  labels[0, :2], labels[0, 2, 0] = 2, 0
  found = losses.semantic_targets(jnp.asarray(labels), 3)
  maps = bitmaps(found.masks)
  assert maps.shape == found.masks.shape == (2, 3, 4, 5)
  np.testing.assert_array_equal(found.valid, [[True, True, False], [False] * 3])
  np.testing.assert_array_equal(found.labels[0, :2], [2, 0])
  np.testing.assert_array_equal(maps[0, 0], labels[0] == 2)
  np.testing.assert_array_equal(maps[0, 1], labels[0] == 0)
  assert not maps[1].any()
  few = losses.semantic_targets(jnp.asarray(labels), 3, max_targets=1)
  np.testing.assert_array_equal(few.labels[0], [2])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_least_are_one_thing_on_all_platforms(platform, monkeypatch):
  def branch(x, *, default, **others):
    return others.get(platform, default)(x)

  monkeypatch.setattr(jax.lax, "platform_dependent", branch)
  x = np.random.default_rng(0).integers(0, 5, (2, 3, 40)).astype(np.float32)
  expected = np.argsort(x, axis=-1, kind="stable")[..., :12]
  np.testing.assert_array_equal(losses.least_places(x, 12), expected)


def test_wrong_arguments_are_told():
  answer, targets = _answer(), _targets()
  with pytest.raises(ValueError, match="do not belong together"):
    losses.mask2former_losses(
      answer, targets._replace(valid=np.ones((2, 4), bool)), _SETTINGS, jax.random.key(0)
    )
  with pytest.raises(ValueError, match="targets are of 2 pictures, and the answer of 1"):
    losses.mask2former_losses(_answer(batch=1), targets, _SETTINGS, jax.random.key(0))
  drawn = _stacked([losses.draw_points(jax.random.key(0), (2, 3), _SETTINGS)])
  with pytest.raises(ValueError, match="drawn for 1 predictions of 2"):
    losses.mask2former_losses(answer, targets, _SETTINGS, drawn)
  with pytest.raises(ValueError, match="16 candidates for 24 points"):
    losses.Mask2FormerLoss(num_points=32, oversampling=0.5)
