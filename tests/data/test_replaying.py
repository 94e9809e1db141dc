"""Examples shown several times: what is shown, what is loaded, and that it is the step's alone."""

import collections

import numpy as np
import pytest

from hybrid_vit.data.loader import Reading, examples_before, train_batches
from hybrid_vit.data.replaying import KeptRows
from tests.data.batches import NOISY, Numbers, X, assert_same, joined, noisy, same, take

# Rows, steps, times, steps back: a phase before, two with replay, and one after.
PHASES = ((4, 2, 1, 1), (8, 6, 4, 3), (8, 4, 2, 100), (4, 3, 1, 1))
STEPS = 15


def batches(source, start=0, process=0, processes=1, **settings):
  readings = [Reading(size, noisy, NOISY, steps, k, back) for size, steps, k, back in PHASES]
  found = train_batches(
    source,
    readings,
    seed=3,
    start_step=start,
    process_index=process,
    process_count=processes,
    **settings,
  )
  return take(found)


@pytest.fixture(scope="module")
def whole():
  source = Numbers(100)
  return batches(source, num_threads=1), source.asked


def test_each_group_shows_a_new_example_and_earlier_ones_of_the_same_group(whole):
  found, asked = whole
  assert len(found) == STEPS
  before = 8
  for (size, steps, times, back), first in zip(PHASES[1:3], (2, 8)):
    loads = size // times
    loaded = []
    for step in range(steps):
      batch = found[first + step]
      rows = [(int(x), noise.tobytes()) for x, noise in zip(batch["x"], batch["noise"])]
      groups = [rows[i : i + times] for i in range(0, size, times)]
      loaded.append([group[0] for group in groups])
      for number, group in enumerate(groups):
        # Not drawn anew: the same numbers of chance as when it was loaded.
        known = [earlier[number] for earlier in loaded[max(0, step - back) : step]] or [group[0]]
        assert set(group[1:]) <= set(known)
    fresh = [row for step in loaded for row in step]
    assert len(set(fresh)) == steps * loads
    before += steps * loads
  # The positions go on where loading ended; nothing was loaded twice.
  assert len(asked) == before + 12 == len(set(asked))


def test_examples_before_counts_what_is_loaded():
  readings = [Reading(size, same, X, steps, k, back) for size, steps, k, back in PHASES]
  found = [examples_before(readings, s) for s in range(STEPS)]
  assert found == [0, 4, *range(8, 20, 2), *range(20, 36, 4), 36, 40, 44]


@pytest.mark.parametrize("settings", [dict(num_threads=3), dict(num_threads=5, prefetch=1)])
def test_threads_change_nothing(whole, settings):
  assert_same(batches(Numbers(100), **settings), whole[0])


def test_processes_change_nothing(whole):
  parts = [batches(Numbers(100), process=p, processes=2) for p in range(2)]
  assert_same(joined(parts), whole[0])


@pytest.mark.parametrize("start", [1, 2, 5, 8, 10, 12])
def test_a_resumed_run_sees_the_batches_that_would_have_come(whole, start):
  assert_same(batches(Numbers(100), start=start), whole[0][start:])


def test_what_is_replayed_is_not_loaded_again():
  source = Numbers(1000)
  take(train_batches(source, [Reading(40, same, X, 50, 4, 10)], seed=0, num_threads=2))
  assert max(collections.Counter(source.asked).values()) <= 2
  assert len(source.asked) < 1.1 * 500


def test_corrupt_examples_are_replaced_in_what_is_replayed_too():
  source = Numbers(40, broken=[3])
  reading = Reading(8, same, X, 20, 4, 3)
  found = take(train_batches(source, [reading], seed=0, max_corrupt_fraction=0.2))
  shown = np.concatenate([batch["index"] for batch in found])
  replaced = np.concatenate([batch["replaced"] for batch in found])
  assert 3 not in shown and replaced.any()
  assert len(set(shown[replaced > 0].tolist())) == 1


def test_groups_must_fit():
  with pytest.raises(ValueError, match="batch of 6 does not fall into groups of 4 rows"):
    Reading(6, same, X, 1, 4, 1)
  with pytest.raises(ValueError, match="replay is 0 and replay_steps 1; at least 1"):
    Reading(6, same, X, 1, 0, 1)
  with pytest.raises(ValueError, match="process's 2 rows of a batch do not fall into groups of 4"):
    train_batches(Numbers(9), [Reading(4, same, X, 1, 4, 1)], seed=0, process_count=2)


def test_the_oldest_rows_are_given_up():
  kept = KeptRows(2)
  for position in range(3):
    kept.put(position, str(position))
  assert [kept.get(position) for position in range(4)] == [None, "1", "2", None]
