"""Panoptic segments: their numbers, what is chosen of them, and masks of a bit a pixel."""

import numpy as np
import pytest

from hybrid_vit.data import segments
from hybrid_vit.data.scenes import SceneSource
from hybrid_vit.data.transforms import parse_transform

RNG = np.random.default_rng(0)
KINDS = {"image": "image", "segments": "map", "segment_labels": "value"}
MASKS = {"image": "image", "masks": "masks", "box_labels": "value"}


def _apply(text, example, kinds=KINDS):
  return parse_transform(text, kinds=kinds)(dict(example), np.random.default_rng(0))


def _example(areas, crowd=(), labels=None):
  """Segments of so many pixels each, in a row, and some pixels of none."""
  line = np.concatenate([np.full(area, i) for i, area in enumerate(areas)] + [[-1, -1]])
  return {
    "image": np.zeros((1, len(line), 3), np.uint8),
    **segments.panoptic_fields(
      line[None],
      np.arange(len(areas)) % 7 if labels is None else np.array(labels),
      np.isin(np.arange(len(areas)), crowd),
    ),
  }


def test_segments_that_count_are_numbered_anew():
  example = _example([3, 0, 5, 2, 4], crowd=[2], labels=[1, 2, 3, 255, 5])
  found = _apply("keep_segments(4)", example)
  # The second has no pixel, the third is a crowd, the fourth's class is not known.
  np.testing.assert_array_equal(found["segment_labels"], [1, 5])
  expected = [0] * 3 + [255] * 7 + [1] * 4 + [255] * 2
  np.testing.assert_array_equal(found["segments"][0], expected)
  assert found["segments"].dtype == np.int32 and found["objects_left_out"] == 0
  assert not found["segment_crowd"].any()
  np.testing.assert_array_equal(example["segment_labels"], [1, 2, 3, 255, 5])


def test_of_too_many_the_largest_stay_in_their_order(caplog):
  example = _example([3, 1, 5, 2, 4])
  found = _apply("keep_segments(3)", example)
  np.testing.assert_array_equal(found["segment_labels"], [0, 2, 4])
  counts = np.bincount(found["segments"][found["segments"] != 255])
  np.testing.assert_array_equal(counts, [3, 5, 4])
  assert found["objects_left_out"] == 2


def test_a_crop_leaves_what_it_shows():
  example = _example([4, 4, 4])
  found = _apply("keep_segments|pad_to((2, 16))", {**example})
  assert (found["segments"][1] == 255).all()
  cut = {**example, "segments": example["segments"][:, 5:]}
  found = _apply("keep_segments", {**cut, "image": example["image"][:, 5:]})
  np.testing.assert_array_equal(found["segment_labels"], [1, 2])


def test_a_picture_without_segments_has_none():
  empty = {
    "image": np.zeros((2, 3, 3), np.uint8),
    **segments.panoptic_fields(np.full((2, 3), -1), np.zeros(0, int), np.zeros(0, bool)),
  }
  found = _apply("keep_segments", empty)
  assert found["segment_labels"].shape == (0,) and (found["segments"] == 255).all()


def test_more_segments_than_there_are_numbers_below_none():
  example = _example([1] * 300)
  assert len(example["segment_labels"]) == 301 and example["segment_labels"][255] == 255
  values = example["segments"][0, :300]
  assert len(set(values.tolist())) == 300 and 255 not in values
  # Each pixel's class by its number.
  np.testing.assert_array_equal(example["segment_labels"][values], np.arange(300) % 7)
  found = _apply("keep_segments(255)", example)
  assert len(found["segment_labels"]) == 255 and found["objects_left_out"] == 45
  np.testing.assert_array_equal(found["segments"][0, :255], np.arange(255))


def test_what_is_wrong_is_told():
  with pytest.raises(ValueError, match=r"a pixel is of segment 4, and 3 segments have a class"):
    example = _example([2, 2, 2])
    example["segments"][0, 0] = 4
    _apply("keep_segments", example)
  with pytest.raises(ValueError, match="at most 255 was expected"):
    _apply("keep_segments(256)", _example([1]))
  with pytest.raises(ValueError, match="'segments', which the task does not read; it reads: image"):
    _apply("keep_segments", _example([1]), MASKS)
  with pytest.raises(ValueError, match="the examples have no 'segments'; they have: image"):
    _apply("keep_segments", {"image": np.zeros((2, 2, 3), np.uint8)})
  with pytest.raises(ValueError, match="the task has 0 keys of kind 'masks'"):
    _apply("pack_masks", _example([1]))


def test_masks_become_bits():
  masks = RNG.integers(0, 2, (4, 5, 16)).astype(np.uint8)
  masks[1] = 0
  masks[3, 1:] = 0
  example = {
    "image": np.zeros((5, 16, 3), np.uint8),
    "masks": masks,
    "box_labels": np.arange(4, dtype=np.int32),
    "boxes": np.zeros((4, 4), np.float32),
  }
  found = _apply("pack_masks", example, MASKS)
  assert found["masks"].shape == (3, 5, 2) and found["masks"].dtype == np.uint8
  np.testing.assert_array_equal(np.unpackbits(found["masks"], axis=-1), masks[[0, 2, 3]])
  np.testing.assert_array_equal(found["box_labels"], [0, 2, 3])
  few = _apply("pack_masks(2)", example, MASKS)
  np.testing.assert_array_equal(few["box_labels"], [0, 2])
  assert few["objects_left_out"] == 1
  none = _apply("pack_masks", {**example, "masks": masks[:0], "box_labels": np.zeros(0)}, MASKS)
  assert none["masks"].shape == (0, 5, 2)
  with pytest.raises(ValueError, match="masks 15 wide: a multiple of 8 was expected; pad_to"):
    _apply("pack_masks", {**example, "masks": masks[..., :15], "image": example["image"][:, :15]},
           MASKS)  # fmt: skip


def test_scenes_have_a_background_and_objects():
  source = SceneSource("test", size=48, objects=5)
  things = source.info["thing_classes"]
  assert [source.info["map_class_names"][c] for c in things] == list(
    source.info["object_class_names"]
  )
  for index in range(8):
    scene = source[index]
    labels = scene["segment_labels"]
    np.testing.assert_array_equal(labels[scene["segments"]], scene["map"])
    np.testing.assert_array_equal(labels, [0, *(1 + scene["box_labels"])])
    for number, mask in enumerate(scene["masks"], 1):
      np.testing.assert_array_equal(scene["segments"] == number, mask > 0)
    assert not scene["segment_crowd"].any()
