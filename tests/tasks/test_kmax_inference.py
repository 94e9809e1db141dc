"""kMaX-DeepLab's segments: the authors' answers, and each rule by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.tasks import kmax_inference as inference
from hybrid_vit.tasks.mask2former_inference import Segment
from tests import golden


@pytest.mark.parametrize("name", golden.names("dense/kmax", "kmax_inference*"))
def test_as_the_authors(name):
  description, expected = golden.load("dense/kmax", name)
  a = description["arguments"]
  logits = expected["input_class_logits"]
  grid = expected["input_mask_grid"].transpose(1, 2, 0)[None]
  masks = inference.restore_size(jnp.asarray(grid), a["image"], a["crop"], a["size"])
  scores = jax.jit(inference.semantic_scores)(logits[None], masks)
  semantic = {k: v for k, v in expected.items() if k.startswith("semantic_scores")}
  golden.assert_matches(semantic, {"semantic_scores": scores})
  np.testing.assert_array_equal(scores[0].argmax(-1), expected["semantic"])

  masks = np.asarray(masks[0])
  found, segments = inference.panoptic_segments(logits, masks, things=a["things"])
  np.testing.assert_array_equal(found, expected["panoptic"])
  rows = np.array([[s.id, s.category, s.is_thing] for s in segments], float)
  np.testing.assert_array_equal(rows, expected["segments"])

  made = inference.instances(logits, masks, max_instances=a["max_instances"], things=a["things"])
  np.testing.assert_allclose(made.scores, expected["instance_scores"], rtol=1e-5)
  np.testing.assert_array_equal(made.classes, expected["instance_classes"])
  np.testing.assert_array_equal(made.masks.sum((1, 2)), expected["instance_areas"])


def _answer(*queries, size=(4, 6)):
  """(class logits, masks) of queries (class, probability, logit, rows, columns); 4 classes."""
  logits, masks = [], []
  for category, probability, logit, rows, columns in queries:
    p = np.full(5, (1 - probability) / 4)
    p[category] = probability
    logits.append(np.log(p))
    plane = np.zeros(size)
    plane[rows, columns] = logit
    masks.append(plane)
  # Queries of no object, so that a pixel that none has is less than half of anyone's.
  for _ in range(3):
    logits.append(np.log([0.01, 0.01, 0.01, 0.01, 0.96]))
    masks.append(np.zeros(size))
  return np.array(logits, np.float32), np.stack(masks, -1).astype(np.float32)


_ALL = slice(None)


def test_panoptic_rules():
  answer = _answer(
    (2, 0.95, 9, slice(0, 2), _ALL),  # stuff
    (0, 0.90, 9, slice(2, 4), slice(0, 3)),  # a thing
    (2, 0.55, 9, 2, slice(3, 6)),  # the same stuff elsewhere
    (1, 0.65, 9, 3, slice(3, 5)),  # a thing that is not sure enough
    (4, 0.99, 9, 3, 5),  # "no object" is no class: the next best one is not sure
  )
  found, segments = inference.panoptic_segments(*answer, things=(0, 1))
  assert segments == [Segment(1, 2, False), Segment(2, 0, True)]
  np.testing.assert_array_equal(found, [[1] * 6] * 2 + [[2] * 3 + [1] * 3, [2] * 3 + [0] * 3])
  found, segments = inference.panoptic_segments(*answer, things=(0, 1), thing_threshold=0.6)
  assert [s.category for s in segments] == [2, 0, 1] and (found[3, 3:5] == 3).all()
  found, segments = inference.panoptic_segments(*answer, things=(0, 1), stuff_threshold=0.6)
  assert (found[2, 3:] == 0).all()
  # Things of one class stay apart.
  found, segments = inference.panoptic_segments(*answer, things=(0, 1, 2), thing_threshold=0.5)
  assert [s.category for s in segments] == [2, 0, 1, 2]


def test_who_paints_first():
  # Both have each a softmax of 0.5 where they overlap: the surer class paints, whatever its place.
  answer = _answer((1, 0.8, 9, slice(0, 2), _ALL), (0, 0.9, 9, slice(0, 3), _ALL))
  found, segments = inference.panoptic_segments(*answer, things=(0, 1))
  assert [s.category for s in segments] == [0]
  np.testing.assert_array_equal(found, [[1] * 6] * 3 + [[0] * 6])
  # A mask of which enough is left is painted around the first.
  answer = _answer((1, 0.8, 9, slice(1, 4), _ALL), (0, 0.9, 9, slice(0, 2), _ALL))
  found, segments = inference.panoptic_segments(*answer, things=(0, 1), overlap_threshold=0.6)
  np.testing.assert_array_equal(found, [[1] * 6] * 2 + [[2] * 6] * 2)
  # Exactly the threshold is too little.
  found, segments = inference.panoptic_segments(*answer, things=(0, 1), overlap_threshold=2 / 3)
  assert [s.category for s in segments] == [0]


def test_masks_may_come_one_at_a_time():
  rng = np.random.default_rng(0)
  logits, masks = 4 * rng.standard_normal((9, 4)), 8 * rng.standard_normal((20, 30, 9))

  class Apart:
    shape = masks.shape

    def __getitem__(self, place):
      return masks[..., place[1]]

  expected = inference.panoptic_segments(logits, masks, things=(0,))
  assert expected[1]
  found = inference.panoptic_segments(logits, Apart(), things=(0,))
  np.testing.assert_array_equal(found[0], expected[0])
  assert found[1] == expected[1]
  one, other = (inference.instances(logits, x, max_instances=5) for x in (masks, Apart()))
  np.testing.assert_array_equal(one.masks, other.masks)
  # Each mean is that of a plain softmax.
  probabilities = np.exp(masks) / np.exp(masks).sum(-1, keepdims=True)
  classes = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  for score, category, query in zip(one.scores, one.classes, one.queries):
    mask = probabilities[..., query]
    expected = classes[query, category] * mask[mask > 0.4].mean()
    np.testing.assert_allclose(score, expected, rtol=1e-5)


def test_no_query_has_a_pixel():
  answer = _answer(*[(0, 0.95, 0, _ALL, _ALL)] * 3)
  found, segments = inference.panoptic_segments(*answer, things=(0,))
  assert not segments and not found.any() and found.shape == (4, 6)
  made = inference.instances(*answer, max_instances=2)
  assert not made.scores.any() and not made.masks.any()


def test_sizes_are_restored():
  maps = np.random.default_rng(0).standard_normal((1, 5, 9, 2)).astype(np.float32)
  found = inference.restore_size(jnp.asarray(maps), (17, 33), (17, 33), (17, 33))
  # An odd input keeps the corners where they are.
  np.testing.assert_allclose(found[0, ::4, ::4], maps[0], atol=1e-6)
  even = inference.restore_size(jnp.asarray(maps), (20, 36), (12, 20), (30, 45))
  assert even.shape == (1, 30, 45, 2)
  np.testing.assert_allclose(even[0, 0, 0], maps[0, 0, 0], atol=1e-6)
