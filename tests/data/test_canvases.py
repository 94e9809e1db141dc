"""Batches of one canvas each: which one a step has, and that nothing is lost or seen twice."""

import itertools
import types

import numpy as np
import pytest

from hybrid_vit.data import loader
from hybrid_vit.data.canvases import canvas_groups, photo_sizes, turns
from hybrid_vit.data.loader import Reading
from hybrid_vit.data.spec import Field

CANVASES = ((4, 6), (6, 4))
COUNTS = (23, 9)


class Photos:
  """Lying photos first, then standing ones; each has its number everywhere."""

  info = types.MappingProxyType({})
  sizes = np.array([(4, 6)] * COUNTS[0] + [(6, 4)] * COUNTS[1])

  def __len__(self):
    return len(self.sizes)

  def __getitem__(self, index):
    return {"x": np.full(self.sizes[index], index, np.int32)}

  def describe(self, index):
    return f"photo {index}"


def noisy(example, rng):
  return {**example, "draw": rng.integers(1 << 30)}


def fields(size):
  return {"x": Field("value", "int32", size), "draw": Field("value", "int64")}


def readings(*phases):
  return [
    Reading(size, noisy, fields((4, 6)), steps, others=(Reading(size, noisy, fields((6, 4))),))
    for size, steps in phases
  ]


GROUPS = canvas_groups(Photos.sizes, CANVASES)
PHASES = readings((4, 10), (2, 30))


def batches(start=0, stop=40, **process):
  found = loader.train_batches(
    Photos(), PHASES, seed=3, start_step=start, groups=GROUPS, num_threads=2, **process
  )
  taken = list(itertools.islice(found, stop - start))
  found.close()
  return taken


@pytest.fixture(scope="module")
def whole():
  return batches()


def test_photos_go_where_they_can_be_largest():
  sizes = np.array([(480, 640), (640, 480), (500, 500), (200, 1000)])
  groups = canvas_groups(sizes, ((800, 1344), (1344, 800)))
  np.testing.assert_array_equal(groups, [0, 1, 0, 0])
  with pytest.raises(ValueError, match="no photo fits the canvas 1344 x 800 best"):
    canvas_groups(sizes[[0, 2]], ((800, 1344), (1344, 800)))
  with pytest.raises(ValueError, match="does not know beforehand; coco: does"):
    photo_sizes(object())


def test_a_batch_is_of_one_canvas_and_canvases_take_turns_in_proportion(whole):
  kinds = [int(np.unique(GROUPS[batch["index"]]).item()) for batch in whole]
  shapes = [batch["x"].shape[1:] for batch in whole]
  assert shapes == [CANVASES[kind] for kind in kinds]
  # At each moment a canvas has had its part of all photos, to within a batch.
  read = np.cumsum([len(batch["index"]) for batch in whole])
  standing = np.cumsum([len(b["index"]) * kind for b, kind in zip(whole, kinds)])
  assert np.abs(standing - read * COUNTS[1] / sum(COUNTS)).max() <= 4


def test_each_stream_is_one_epoch_after_the_other_in_new_orders(whole):
  for kind, count in enumerate(COUNTS):
    stream = np.concatenate([b["index"] for b in whole if GROUPS[b["index"][0]] == kind])
    epochs = [stream[i : i + count] for i in range(0, len(stream) - count + 1, count)]
    assert len(epochs) >= 2
    for epoch in epochs:
      np.testing.assert_array_equal(np.sort(epoch), np.flatnonzero(kind == GROUPS))
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_position_follows_from_the_step_for_any_start_and_any_process(whole):
  for start in (1, 9, 10, 27):
    for ours, theirs in zip(batches(start), whole[start:], strict=True):
      for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
  parts = [batches(process_index=p, process_count=2) for p in range(2)]
  for first, second, one in zip(*parts, whole, strict=True):
    for name in one:
      np.testing.assert_array_equal(np.concatenate([first[name], second[name]]), one[name])


def test_no_two_rows_have_one_chance(whole):
  draws = np.concatenate([batch["draw"] for batch in whole])
  assert len(np.unique(draws)) == len(draws)


def test_turns_of_one_canvas_are_the_positions():
  assert [turn.position for turn in turns([5], iter([4, 4, 2, 2]))] == [0, 4, 8, 10]


def test_what_does_not_fit_together_is_said():
  plain = [Reading(4, noisy, fields((4, 6)))]
  with pytest.raises(ValueError, match="2 groups of examples, read in 1 ways"):
    loader.train_batches(Photos(), plain, seed=0, groups=GROUPS)
  with pytest.raises(ValueError, match=r"groups of \[23, 8\] examples, 32 in all"):
    loader.train_batches(Photos(), PHASES, seed=0, groups=GROUPS[:-1])
