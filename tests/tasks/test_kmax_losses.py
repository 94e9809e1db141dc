"""kMaX's losses: the authors' numbers with their own draws, and what padding must not do."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.mask_forms import LabelMasks, PackedMasks
from hybrid_vit.tasks import kmax_losses as losses
from hybrid_vit.tasks.mask2former_losses import SegmentTargets
from tests import golden
from tests.heads.kmax_golden import DECODER, run_decoder

_KINDS = {
  "ce": "class", "dice": "dice", "mask": "mask", "pixel_insdis": "contrast",
  "aux_semantic": "semantic",
}  # fmt: skip
_UNWEIGHTED = {f"{kind}_weight": 1.0 for kind in _KINDS.values()}
_SETTINGS = losses.KMaXLoss(contrast_pixels=20, semantic_pixels=30)
_losses = jax.jit(losses.kmax_losses, static_argnums=2)


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision("float32"):
    yield


@functools.partial(jax.jit, static_argnums=2)
def _value_and_gradient(answer, targets, settings, pixels):
  def total(answer):
    found = losses.kmax_losses(answer, targets, settings, pixels)
    return sum(x.sum() for x in found.values()), found

  return jax.value_and_grad(total, has_aux=True)(answer)


def _stripes(labels, size, slots):
  """Vertical stripes of each picture's labels, of which one more than there are is void."""
  count = len(labels)
  masks = np.ones((count, slots, *size), np.uint8)
  valid, classes = np.zeros((count, slots), bool), np.zeros((count, slots), np.int32)
  for i, own in enumerate(labels):
    owner = np.arange(size[1]) * (len(own) + 1) // size[1]
    for j, label in enumerate(own):
      masks[i, j], classes[i, j], valid[i, j] = owner == j, label, True
  return SegmentTargets(classes, masks, valid)


def _golden_targets(expected, size):
  labels = [expected[f"gt_labels_{i}"] for i in range(2)]
  return _stripes(labels, size, slots=6)


def _assert_matched(expected, answer, targets, size):
  masks = jnp.asarray(targets.masks * targets.valid[:, :, None, None], jnp.float32)
  stride = (targets.masks.shape[3] - 1) // (size[1] - 1)
  wanted = losses.query_targets(answer, targets, masks[:, :, ::stride, ::stride])
  for i in range(2):
    query, truth = expected[f"match_{i}"]
    void = answer["class_logits"].shape[-1] - 1
    labels = np.full(answer["class_logits"].shape[1], void)
    labels[query] = expected[f"gt_labels_{i}"][truth]
    np.testing.assert_array_equal(wanted.labels[i], labels)


def _assert_losses(names, values, found):
  for name, value in zip(names, values):
    kind, _, number = name.removeprefix("loss_").rpartition("_")
    if not number.isdigit():
      kind, number = name.removeprefix("loss_"), -1
    np.testing.assert_allclose(found[_KINDS[kind]][int(number)], value, rtol=1e-5, err_msg=name)


def test_as_the_authors_over_their_decoder():
  description, expected = golden.load("dense/kmax", DECODER)
  answer, targets = run_decoder(), _golden_targets(expected, (17, 17))
  settings = losses.KMaXLoss(**_UNWEIGHTED, contrast_pixels=8, semantic_pixels=8)
  found = _losses(answer, targets, settings, jax.random.key(0))
  assert "semantic" not in found
  _assert_losses(description["loss_names"], expected["losses"], found)
  _assert_matched(expected, answer, targets, (17, 17))


@pytest.mark.parametrize("name", golden.names("dense/kmax", "kmax_losses*"))
def test_as_the_authors(name):
  description, expected = golden.load("dense/kmax", name)
  arguments = description["arguments"]
  count = arguments["auxiliary"]
  inputs = {}
  for key, given in description["inputs"].items():
    x = golden.image({"input": given}) * np.float32(given["scale"])
    inputs[key] = x / np.linalg.norm(x, axis=-1, keepdims=True) if "pixel_f" in key else x
  auxiliary = [
    {re.sub(r"aux\d+_", "", k): v for k, v in inputs.items() if k.startswith(f"aux{i}_")}
    for i in range(count)
  ]
  last = {k: v for k, v in inputs.items() if not k.startswith("aux")}
  answer = {**last, "auxiliary": auxiliary}
  targets = _golden_targets(expected, arguments["mask_size"])
  draws = losses.PixelDraws(expected["places_contrast"], expected["places_semantic"])

  found = _losses(answer, targets, losses.KMaXLoss(**_UNWEIGHTED), draws)
  _assert_losses(description["loss_names"], expected["losses"], found)
  _assert_matched(expected, answer, targets, answer["mask_logits"].shape[2:])
  (total, _), gradient = _value_and_gradient(answer, targets, losses.KMaXLoss(), draws)
  np.testing.assert_allclose(total, expected["loss"], rtol=1e-5)
  theirs = {"pred_logits": "class_logits", "pred_masks": "mask_logits"}
  for stored, figures in expected.items():
    if not stored.startswith("gradient_"):
      continue
    part = stored.removeprefix("gradient_")
    place, _, kind = part.partition("_")
    one = gradient["auxiliary"][0] if place == "aux0" else gradient
    key = theirs.get(kind, "pixel_features") if kind else "semantic_logits"
    x = np.asarray(one[key], np.float64)
    ours = np.array([x.mean(), x.std(), np.abs(x).max()])
    np.testing.assert_allclose(ours, figures, atol=2e-5 * figures[2], err_msg=stored)


def _answer(batch=2, queries=6, classes=3, layers=2, size=(9, 13)):
  rng = np.random.default_rng(0)

  def normal(*shape):
    return rng.standard_normal((batch, *shape)).astype(np.float32)

  def one(size):
    features = normal(*size, 4)
    return {
      "class_logits": normal(queries, classes + 1),
      "mask_logits": 3 * normal(queries, *size),
      "pixel_features": features / np.linalg.norm(features, axis=-1, keepdims=True),
    }

  auxiliary = [one((5, 7)) for _ in range(layers - 1)]
  return {**one(size), "auxiliary": auxiliary, "semantic_logits": normal(*size, classes + 1)}


_TARGETS = _stripes([[2, 0], [1]], (33, 49), slots=3)


def test_empty_slots_add_nothing():
  answer, key = _answer(), jax.random.key(2)
  expected = _losses(answer, _TARGETS, _SETTINGS, key)
  assert {name: len(x) for name, x in expected.items()} == {
    "class": 2, "dice": 2, "mask": 2, "contrast": 2, "semantic": 1,
  }  # fmt: skip
  labels, masks, valid = (np.asarray(x) for x in _TARGETS)
  wider = SegmentTargets(
    np.concatenate([np.full((2, 2), 77, np.int32), labels], 1),
    np.concatenate([np.ones((2, 2, 33, 49), np.uint8), masks], 1),
    np.concatenate([np.zeros((2, 2), bool), valid], 1),
  )
  found = _losses(answer, wider, _SETTINGS, key)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_no_targets_and_more_targets_than_queries():
  answer, key = _answer(), jax.random.key(0)
  nothing = _TARGETS._replace(valid=np.zeros((2, 3), bool))
  (_, found), gradient = _value_and_gradient(answer, nothing, _SETTINGS, key)
  for name in ("dice", "mask", "contrast", "semantic"):
    assert not np.any(found[name]), name
  assert (found["class"] > 0).all()
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
  many = _stripes([[0, 1, 2, 0, 1, 2, 0, 1, 2]] * 2, (33, 49), slots=9)
  wanted = losses.query_targets(answer, many, jnp.asarray(many.masks[:, :, ::4, ::4], jnp.float32))
  # Each query has one; pixels of those that have none are void, as the last stripe's.
  assert (wanted.labels < 3).all() and wanted.void[:, :, -1].all()
  (_, found), gradient = _value_and_gradient(answer, many, _SETTINGS, key)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((found, gradient)))


def test_a_right_answer_has_a_small_loss():
  answer = _answer(layers=1)
  masks = np.asarray(_TARGETS.masks)[:, :, ::4, ::4]
  for name, good in (("class_logits", 20.0), ("mask_logits", 30.0), ("semantic_logits", 20.0)):
    answer[name] = np.full_like(answer[name], -good)
  answer["class_logits"][..., 3], answer["mask_logits"][:, 5] = 20.0, 0.0
  answer["pixel_features"][:] = np.eye(4)[3]
  for i, slots in enumerate(_TARGETS.valid):
    for slot in np.flatnonzero(slots):
      query, label, inside = 4 - slot, _TARGETS.labels[i, slot], masks[i, slot] > 0
      answer["class_logits"][i, query] = -20.0
      answer["class_logits"][i, query, label] = 20.0
      answer["mask_logits"][i, query][inside] = 30.0
      answer["semantic_logits"][i, inside, label] = 20.0
      answer["pixel_features"][i, inside] = np.eye(4)[slot]
  settings = losses.KMaXLoss(contrast_pixels=60, semantic_pixels=60, contrast_temperature=0.01)
  (_, found), _ = _value_and_gradient(answer, _TARGETS, settings, jax.random.key(0))
  for name, most in (("class", 1e-4), ("dice", 1e-4), ("mask", 1e-6), ("semantic", 1e-6)):
    assert found[name].sum() < most, name
  # A pixel is like each of its target's, so that the least is the logarithm of their number.
  assert found["contrast"].sum() < np.log(60)
  worse = _losses(_answer(layers=1), _TARGETS, settings, jax.random.key(0))
  assert all(worse[name].sum() > found[name].sum() for name in found)


def test_pixels_are_drawn_by_the_size_of_their_target():
  owner = np.zeros((1, 20, 20), int)
  owner[0, :5, :8] = 1  # 40 of 400 cells
  owner[0, :, 16:] = 2  # void
  masks = np.stack([owner == 0, owner == 1], 1).astype(np.float32)
  answer = {
    "class_logits": np.zeros((1, 4, 3), np.float32),
    "mask_logits": np.zeros((1, 4, 20, 20), np.float32),
  }
  targets = SegmentTargets(np.array([[0, 1]]), masks, np.ones((1, 2), bool))
  wanted = losses.query_targets(answer, targets, jnp.asarray(masks))
  np.testing.assert_allclose(np.exp(wanted.rarity[0, 0, 0]), 10.0, rtol=1e-5)
  settings = losses.KMaXLoss(contrast_pixels=60, semantic_pixels=10_000)
  draws = losses.draw_pixels(jax.random.key(0), wanted, settings, 3)
  assert draws.contrast.shape == (3, 1, 60) and draws.semantic.shape == (1, 400)
  for places in draws.contrast[:, 0]:
    assert len(set(places.tolist())) == 60
    of_small = np.isin(places, np.flatnonzero(owner == 1)).mean()
    assert of_small > 0.3  # an eighth of the pixels that are not void
    assert not np.isin(places, np.flatnonzero(owner == 2)).any()
  assert len(set(map(tuple, np.asarray(draws.contrast[:, 0])))) == 3
  # All are asked for: void ones come last.
  void = np.isin(draws.semantic[0], np.flatnonzero(owner == 2))
  assert not void[:320].any() and void[320:].all()


def test_semantic_labels():
  masks = np.zeros((1, 3, 1, 4), np.float32)
  masks[0, 0, 0, :2], masks[0, 2, 0, 1:3] = 1, 1
  targets = SegmentTargets(np.array([[2, 0, 1]]), masks, np.ones((1, 3), bool))
  found = losses.semantic_labels(targets, jnp.asarray(masks), 5)
  np.testing.assert_array_equal(found, [[[2, 1, 1, 5]]])


def test_wrong_arguments_are_told():
  answer, key = _answer(), jax.random.key(0)
  with pytest.raises(ValueError, match="do not belong together"):
    losses.kmax_losses(answer, _TARGETS._replace(valid=np.ones((2, 4), bool)), _SETTINGS, key)
  with pytest.raises(ValueError, match="targets are of 2 pictures, and the answer of 1"):
    losses.kmax_losses(_answer(batch=1), _TARGETS, _SETTINGS, key)
  with pytest.raises(ValueError, match=r"masks of \[30, 49\] pixels for mask logits of \[9, 13\]"):
    losses.kmax_losses(answer, _TARGETS._replace(masks=_TARGETS.masks[:, :, :30]), _SETTINGS, key)
  draws = losses.PixelDraws(np.zeros((1, 2, 4), np.int32), np.zeros((2, 4), np.int32))
  with pytest.raises(ValueError, match="drawn for 1 predictions of 2"):
    losses.kmax_losses(answer, _TARGETS, _SETTINGS, draws)
  with pytest.raises(ValueError, match=r"semantic logits are .4, 4. cells and masks .9, 13."):
    losses.kmax_losses(
      {**answer, "semantic_logits": np.zeros((2, 4, 4, 4))}, _TARGETS, _SETTINGS, key
    )
  with pytest.raises(ValueError, match="contrast_pixels is 0; at least 1"):
    losses.KMaXLoss(contrast_pixels=0)
  with pytest.raises(ValueError, match=r"contrast_temperature is 0\.0; above 0"):
    losses.KMaXLoss(contrast_temperature=0.0)


@pytest.mark.parametrize("form", ["labels", "bits"])
def test_masks_of_fewer_bytes_are_their_bitmaps(form):
  """Where no slot is valid bitmaps are ones, and in a map of numbers nothing is."""
  whole = _stripes([[0, 2, 1], [1]], (16, 32), slots=4)
  maps = np.where(whole.valid[:, :, None, None], whole.masks, 0)
  numbers = np.broadcast_to(np.arange(4, dtype=np.int32), (2, 4))
  labelled = np.where(maps.any(1), maps.argmax(1), 255)
  smaller = {
    "labels": lambda: LabelMasks(jnp.asarray(labelled), jnp.asarray(numbers)),
    "bits": lambda: PackedMasks(jnp.asarray(np.packbits(whole.masks, axis=-1))),
  }[form]()
  rng = np.random.default_rng(0)
  features = rng.normal(size=(2, 4, 8, 6)).astype(np.float32)
  answer = {
    "class_logits": rng.normal(size=(2, 5, 4)).astype(np.float32),
    "mask_logits": rng.normal(size=(2, 5, 4, 8)).astype(np.float32),
    "pixel_features": features / np.linalg.norm(features, axis=-1, keepdims=True),
    "semantic_logits": rng.normal(size=(2, 4, 8, 4)).astype(np.float32),
  }
  expected = _losses(answer, whole, _SETTINGS, jax.random.key(0))
  found = _losses(answer, whole._replace(masks=smaller), _SETTINGS, jax.random.key(0))
  assert set(found) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
