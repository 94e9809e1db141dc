"""Masks at a picture's own size one by one are those of a batch; objects and classes of them."""

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit import mask_inference
from hybrid_vit.data.mask_encoding import decode_mask
from hybrid_vit.tasks import mask2former_inference as rules

INPUT, SEEN, SIZE = (32, 64), (27, 61), (40, 90)
SETTINGS = mask_inference.PanopticInferenceSettings(scale=None, object_threshold=0.3)


@pytest.fixture(scope="module")
def answer():
  rng = np.random.default_rng(0)
  maps = 3 * rng.normal(size=(5, 8, 16)).astype(np.float32)
  masks = mask_inference.RestoredMasks(maps, INPUT, SEEN, SIZE)
  classes = 2 * rng.normal(size=(5, 4)).astype(np.float32)
  return mask_inference.MaskAnswer(SETTINGS, classes, masks)


@pytest.fixture(scope="module")
def restored(answer):
  """float32 `[H, W, Q]`, by what the authors' answers are held to."""
  maps = jnp.asarray(answer.masks.maps.transpose(1, 2, 0)[None])
  return np.asarray(rules.restore_size(maps, INPUT, SEEN, SIZE)[0])


@pytest.mark.parametrize("large", [False, True])
def test_each_mask_is_that_of_a_batch(answer, restored, large, monkeypatch):
  if large:
    monkeypatch.setattr(mask_inference, "_AT_ONCE", 0)
  assert answer.masks.shape == restored.shape == (*SIZE, 5)
  for query in range(5):
    np.testing.assert_allclose(answer.masks[..., query], restored[..., query], atol=1e-5)


def test_segments_and_classes_are_those_of_whole_arrays(answer, restored):
  scores = rules.semantic_scores(answer.class_logits[None], restored[None])
  np.testing.assert_array_equal(answer.classes(), np.asarray(scores[0]).argmax(-1))
  found = answer.panoptic(things=(0, 1))
  expected, segments = rules.panoptic_segments(
    answer.class_logits, restored, things=(0, 1), object_threshold=0.3
  )
  assert found.segments == tuple(segments)
  np.testing.assert_array_equal(found.map, expected)


def test_objects_have_boxes_around_their_masks(answer, restored):
  found = answer.objects(things=(1, 2))
  expected = rules.instances(answer.class_logits, restored, things=(1, 2))
  assert len(found.scores) == len(expected.scores) > 0
  np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4)
  for box, rle, mask in zip(found.boxes, found.masks, expected.masks):
    np.testing.assert_array_equal(decode_mask(rle), mask)
    rows, columns = np.nonzero(mask)
    edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    np.testing.assert_array_equal(box, edges)


def test_objects_without_a_pixel_are_none():
  masks = mask_inference.RestoredMasks(np.full((2, 4, 4), -9, np.float32), *[(16, 16)] * 3)
  answer = mask_inference.MaskAnswer(SETTINGS, np.zeros((2, 3), np.float32), masks)
  found = answer.objects()
  assert found.boxes.shape == (0, 4) and found.masks == () and found.scores.shape == (0,)


def test_a_picture_is_placed_and_brought_back():
  """The network's masks are where the picture is bright, whatever its size and the padding."""

  def answers(variables, images):
    bright = images.astype(jnp.float32).mean(-1)[:, 2::4, 2::4]
    masks = jnp.stack([bright - variables, variables - bright], axis=1)
    classes = jnp.array([[[9.0, 0, 0], [0, 9.0, 0]]])
    return {"class_logits": jnp.tile(classes, (len(images), 1, 1)), "mask_logits": masks}

  settings = mask_inference.PanopticInferenceSettings(scale=(96, 64), size_divisor=32)
  inference = mask_inference.MaskInference(answers, settings, (0, 0, 0))
  photo = np.zeros((50, 120, 3), np.uint8)
  photo[:25, :60] = 255
  found = inference.panoptic(128.0, photo, things=(0,))
  assert [(s.category, s.is_thing) for s in found.segments] == [(0, True), (1, False)]
  assert (found.map == np.where(photo[..., 0] > 0, 1, 2)).mean() > 0.96
  (thing, _) = inference.objects(128.0, photo).boxes[:2]
  np.testing.assert_allclose(thing, [0, 0, 60, 25], atol=3)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"object_threshold": 1.5}, "inference.object_threshold"),
    ({"overlap_threshold": -1}, "inference.overlap_threshold"),
    ({"max_instances": 0}, "inference.max_instances"),
    ({"size_divisor": 0}, "inference.size_divisor"),
    ({"scale": (0, 5)}, "inference.scale"),
  ],
)
def test_bad_settings_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    mask_inference.PanopticInferenceSettings(**fields)
