"""Mask2Former's segments: the authors' answers, and each rule by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.tasks import mask2former_inference as inference
from tests import golden

_HIGH, _LOW = 8.0, -8.0


@pytest.mark.parametrize("name", golden.names("dense/mask2former_inference"))
def test_as_the_authors(name):
  description, expected = golden.load("dense/mask2former_inference", name)
  a = description["arguments"]
  size = tuple(a["image"])
  first, last = map(int, a["things"].split()[-1].split(".."))
  things = range(first, last + 1)
  logits = expected["class_logits"]
  grid = expected["mask_grid"][:, 0].transpose(1, 2, 0)[None]
  masks = inference.restore_size(jnp.asarray(grid), size, size, size)
  scores = jax.jit(inference.semantic_scores)(logits[None], masks)
  semantic = {k: v for k, v in expected.items() if k.startswith("semantic_scores")}
  golden.assert_matches(semantic, {"semantic_scores": scores})
  np.testing.assert_array_equal(scores[0].argmax(-1), expected["semantic"])

  masks = np.asarray(masks[0])
  found, segments = inference.panoptic_segments(
    logits, masks, things=things, object_threshold=a["object_mask_threshold"],
    overlap_threshold=a["overlap_threshold"],
  )  # fmt: skip
  np.testing.assert_array_equal(found, expected["panoptic"])
  rows = np.array([[s.id, s.category, s.is_thing] for s in segments], float)
  np.testing.assert_array_equal(rows.reshape(-1), expected["segments"].reshape(-1))

  made = inference.instances(logits, masks, max_instances=a["test_topk_per_image"], things=things)
  np.testing.assert_allclose(made.scores, expected["instance_scores"], rtol=1e-5)
  np.testing.assert_array_equal(made.classes, expected["instance_classes"])
  np.testing.assert_array_equal(made.masks.sum((1, 2)), expected["instance_areas"])


def _answer(*queries, size=(4, 6)):
  """(class logits, masks) of queries (class, probability, rows, columns); 4 classes."""
  logits, masks = [], []
  for category, probability, rows, columns in queries:
    p = np.full(5, (1 - probability) / 4)
    p[category] = probability
    logits.append(np.log(p))
    plane = np.full(size, _LOW)
    plane[rows, columns] = _HIGH
    masks.append(plane)
  return np.array(logits, np.float32), np.stack(masks, -1).astype(np.float32)


_ALL = slice(None)


def test_panoptic_rules():
  answer = _answer(
    (2, 0.95, slice(0, 2), _ALL),  # stuff
    (0, 0.90, slice(2, 4), slice(0, 3)),  # a thing
    (2, 0.85, slice(2, 4), slice(3, 6)),  # the same stuff elsewhere
    (1, 0.85, slice(0, 2), slice(0, 3)),  # owns nothing of its own mask
    (4, 0.99, _ALL, _ALL),  # no object
    (0, 0.70, _ALL, _ALL),  # not sure enough
  )
  found, segments = inference.panoptic_segments(*answer, things=(0, 1))
  assert segments == [inference.Segment(1, 2, False), inference.Segment(2, 0, True)]
  np.testing.assert_array_equal(found, [[1] * 6] * 2 + [[2] * 3 + [1] * 3] * 2)
  found, segments = inference.panoptic_segments(*answer, things=(0, 1, 2))
  assert [s.id for s in segments] == [1, 2, 3] and (found[2:, 3:] == 3).all()


def test_a_segment_that_is_mostly_hidden_is_dropped():
  answer = _answer((0, 0.95, slice(0, 3), _ALL), (1, 0.9, _ALL, _ALL))
  found, segments = inference.panoptic_segments(*answer, things=(0, 1))
  assert [s.category for s in segments] == [0]
  np.testing.assert_array_equal(found, [[1] * 6] * 3 + [[0] * 6])
  found, segments = inference.panoptic_segments(*answer, things=(0, 1), overlap_threshold=0.2)
  assert [s.category for s in segments] == [0, 1] and (found[3] == 2).all()
  found, segments = inference.panoptic_segments(*answer, things=(), object_threshold=0.99)
  assert not segments and not found.any()


def test_instances_take_a_query_more_than_once():
  answer = _answer((0, 0.6, slice(0, 2), _ALL), (3, 0.9, slice(2, 4), slice(0, 2)))
  made = inference.instances(*answer, max_instances=3)
  np.testing.assert_array_equal(made.classes, [3, 0, 1])
  np.testing.assert_array_equal(made.queries, [1, 0, 0])
  np.testing.assert_allclose(made.scores, [0.9, 0.6, 0.1], rtol=1e-3)
  np.testing.assert_array_equal(made.masks.sum((1, 2)), [4, 12, 12])
  only = inference.instances(*answer, max_instances=3, things=(0,))
  np.testing.assert_array_equal(only.classes, [0])
  empty = inference.instances(*_answer((0, 0.9, slice(0, 0), _ALL)), max_instances=1)
  assert empty.scores[0] == 0 and not empty.masks.any()
  assert inference.instances(*answer, things=()).masks.shape == (0, 4, 6)


def test_sizes_are_restored():
  maps = np.random.default_rng(0).standard_normal((1, 4, 6, 2)).astype(np.float32)
  found = inference.restore_size(jnp.asarray(maps), (16, 24), (12, 20), (30, 45))
  assert found.shape == (1, 30, 45, 2)
  np.testing.assert_allclose(found[0, 0, 0], maps[0, 0, 0], atol=1e-6)
  same = inference.restore_size(jnp.asarray(maps), (4, 6), (3, 5), (3, 5))
  np.testing.assert_array_equal(same, maps[:, :3, :5])
