"""Losses of maps against pixel by pixel arithmetic, golden figures and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.resize import resize_bilinear
from hybrid_vit.tasks.map_losses import cross_entropy, dice_loss, ohem_cross_entropy
from tests import golden

_CLASSES = 5
_WEIGHTS = (0.5, 2.0, 1.0, 0.0, 3.0)
_PLAIN = dict(ignore=255, class_weights=None, average="all")
_MINING = dict(_PLAIN, threshold=0.3, min_kept=8)
_LOSSES = {
  "all": lambda x, y: cross_entropy(x, y, **_PLAIN),
  "valid": lambda x, y: cross_entropy(x, y, **dict(_PLAIN, average="valid")),
  "weighted": lambda x, y: cross_entropy(x, y, **dict(_PLAIN, class_weights=_WEIGHTS)),
  "ohem": lambda x, y: ohem_cross_entropy(x, y, **_MINING),
  "ohem_valid": lambda x, y: ohem_cross_entropy(x, y, **dict(_MINING, average="valid")),
  "dice": lambda x, y: dice_loss(x, y, ignore=255),
}


def _case(seed=0, shape=(2, 6, 7)):
  rng = np.random.default_rng(seed)
  logits = 2 * rng.standard_normal((*shape, _CLASSES)).astype(np.float32)
  labels = rng.integers(0, _CLASSES, shape).astype(np.int32)
  labels[:, :2, 3:] = 255
  return logits, labels


def _softmax(logits):
  x = np.asarray(logits, np.float64)
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def _certainties(logits, labels):
  """(probability of the class, class) of each pixel that has one, in order."""
  return [
    (_softmax(logits[i])[labels[i]], int(labels[i]))
    for i in np.ndindex(labels.shape)
    if labels[i] != 255
  ]


@pytest.mark.parametrize("weights", [None, _WEIGHTS])
@pytest.mark.parametrize("average", ["all", "valid"])
def test_cross_entropy(average, weights):
  logits, labels = _case()
  pixels = _certainties(logits, labels)
  total = sum(-np.log(p) * (weights[k] if weights else 1.0) for p, k in pixels)
  found = cross_entropy(logits, labels, ignore=255, class_weights=weights, average=average)
  divisor = labels.size if average == "all" else len(pixels)
  assert found.dtype == jnp.float32 and found.shape == ()
  np.testing.assert_allclose(found, total / divisor, rtol=1e-6)


def test_cross_entropy_of_mmsegmentation():
  described, stored = golden.load("dense/semantic_fpn_mmseg", "semantic_fpn_64x96")
  size = tuple(described["arguments"]["image"])
  classes = described["arguments"]["num_classes"]
  labels = np.random.RandomState(described["extra_inputs"]["labels_seed"])
  labels = labels.randint(0, classes, (2, *size)).astype(np.int32)
  labels[:, :5] = 255
  logits = resize_bilinear(jnp.asarray(stored["logits_stride4"]), size, align_corners=False)
  np.testing.assert_allclose(cross_entropy(logits, labels, **_PLAIN), stored["loss"][0], rtol=1e-5)


def _mined(logits, labels, threshold, kept):
  """Sum of the losses of hard pixels, and how many there are; probabilities in float32, as ours."""
  pixels = sorted(np.float32(p) for p, _ in _certainties(logits, labels))
  limit = max(pixels[min(kept, len(pixels) - 1)], threshold)
  hard = [p for p in pixels if p < limit]
  return sum(-np.log(float(p)) for p in hard), len(hard)


# More pixels below the threshold than asked for; fewer; more asked for than there are.
@pytest.mark.parametrize(("threshold", "min_kept"), [(0.7, 3), (0.02, 8), (0.02, 1000), (1.0, 3)])
@pytest.mark.parametrize("average", ["all", "valid"])
def test_mining(threshold, min_kept, average):
  logits, labels = _case(1)
  total, number = _mined(logits, labels, threshold, min_kept * len(labels))
  found = ohem_cross_entropy(
    logits, labels, **dict(_MINING, threshold=threshold, min_kept=min_kept, average=average)
  )
  np.testing.assert_allclose(
    found, total / (labels.size if average == "all" else number), rtol=1e-5
  )
  if threshold == 0.02 and min_kept == 8:
    assert number == 16


def test_mining_multiplies_weights_after_choosing():
  logits, labels = _case(1)
  settings = dict(_MINING, threshold=1.0)
  pixels = sorted(_certainties(logits, labels))
  total = sum(-np.log(p) * _WEIGHTS[k] for p, k in pixels)
  found = ohem_cross_entropy(logits, labels, **dict(settings, class_weights=_WEIGHTS))
  np.testing.assert_allclose(found, total / labels.size, rtol=1e-5)


def test_no_gradient_at_easy_pixels():
  logits, labels = _case(1)
  slope = jax.grad(_LOSSES["ohem"])(jnp.asarray(logits), labels)
  moved = np.abs(np.asarray(slope)).max(-1) > 0
  _, number = _mined(logits, labels, _MINING["threshold"], _MINING["min_kept"] * len(labels))
  assert moved.sum() == number < (labels != 255).sum()
  assert not moved[labels == 255].any()


@pytest.mark.parametrize("exponent", [1, 2])
def test_dice(exponent):
  logits, labels = _case(2)
  probabilities, losses = _softmax(logits), []
  for b in range(len(labels)):
    for k in range(_CLASSES):
      both = sizes = 0.0
      for i in np.ndindex(labels.shape[1:]):
        if labels[b][i] == 255:
          continue
        p, t = probabilities[b][i][k], float(labels[b][i] == k)
        both, sizes = both + p * t, sizes + p**exponent + t**exponent
      losses.append(1 - (2 * both + 1) / (sizes + 1))
  found = dice_loss(logits, labels, ignore=255, exponent=exponent)
  np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)


def test_dice_of_the_truth_is_nothing():
  _, labels = _case()
  logits = 100.0 * np.eye(_CLASSES, dtype=np.float32)[np.where(labels == 255, 0, labels)]
  assert float(dice_loss(logits, labels, ignore=255)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", _LOSSES)
def test_gradient_is_the_slope(name):
  logits, labels = _case(3)
  loss = jax.jit(_LOSSES[name])
  slope = np.asarray(jax.grad(_LOSSES[name])(jnp.asarray(logits), labels))
  direction = np.random.default_rng(4).standard_normal(logits.shape).astype(np.float32)
  # Small enough that mining chooses the same pixels.
  step = 1e-2
  ends = [float(loss(logits + sign * step * direction, labels)) for sign in (1, -1)]
  assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(np.sum(slope * direction), rel=5e-3)


@pytest.mark.parametrize("name", _LOSSES)
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_what_has_no_class_does_not_count(name, value):
  logits, labels = _case()
  outside = labels == 255
  spoiled = np.where(outside[..., None], np.float32(value), logits)
  before, after = (jax.value_and_grad(_LOSSES[name])(jnp.asarray(x), labels)
                   for x in (logits, spoiled))  # fmt: skip
  np.testing.assert_array_equal(after[0], before[0])
  np.testing.assert_array_equal(after[1], before[1])
  assert not np.asarray(after[1])[outside].any()


@pytest.mark.parametrize("name", _LOSSES)
def test_without_any_class(name):
  logits, labels = _case()
  value, slope = jax.value_and_grad(_LOSSES[name])(
    jnp.asarray(logits), np.full_like(labels, 255)
  )  # fmt: skip
  assert float(value) == 0
  assert not np.asarray(slope).any()


@pytest.mark.parametrize("name", _LOSSES)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_are_summed_in_long_ones(name, dtype):
  logits, labels = _case(5, (1, 40, 60))
  short = jnp.asarray(logits, dtype)
  found, slope = jax.value_and_grad(_LOSSES[name])(short, labels)
  assert found.dtype == jnp.float32 and slope.dtype == dtype
  np.testing.assert_allclose(found, _LOSSES[name](short.astype(jnp.float32), labels), rtol=1e-6)


@pytest.mark.parametrize("name", _LOSSES)
def test_labels_beyond_the_classes_do_not_count(name):
  logits, labels = _case()
  beyond = np.where(labels == 255, np.where(np.arange(7) % 2, _CLASSES, -1), labels)
  loss = _LOSSES[name]
  np.testing.assert_array_equal(loss(logits, beyond.astype(np.int32)), loss(logits, labels))


def test_large_logits():
  labels = np.array([[[0, 1]]], np.int32)
  logits = np.array([[[[1e4, -1e4], [1e4, -1e4]]]], np.float32)
  found = cross_entropy(logits, labels, **dict(_PLAIN, average="valid"))
  np.testing.assert_allclose(found, 1e4, rtol=1e-6)


def test_errors():
  logits, labels = _case()
  with pytest.raises(ValueError, match="average is 'some'; 'all' or 'valid' was expected"):
    cross_entropy(logits, labels, **dict(_PLAIN, average="some"))
  for loss, settings in ((cross_entropy, _PLAIN), (ohem_cross_entropy, _MINING)):
    with pytest.raises(ValueError, match="class_weights has 2 numbers; one for each of 5 classes"):
      loss(logits, labels, **dict(settings, class_weights=(1.0, 2.0)))
