"""Batches as a function of the step."""

import itertools

import numpy as np
import pytest

from hybrid_vit.data import spec
from hybrid_vit.data.loader import Reading, eval_batches, examples_before, train_batches
from hybrid_vit.data.spec import Field
from hybrid_vit.data.transforms import parse_transform
from tests.data.batches import (
  SOURCE,
  Numbers,
  Pictures,
  X,
  assert_same,
  evaluate,
  indices,
  joined,
  numbers,
  same,
  take,
  train,
)

WHOLE = take(train(num_threads=1), 12)


def test_a_batch():
  batch = next(train())
  assert set(batch) == {"image", "label", "index", "replaced"}
  assert batch["image"].shape == (4, 8, 8, 3) and batch["image"].dtype == np.uint8
  assert batch["label"].dtype == batch["index"].dtype == np.int32
  assert batch["replaced"].dtype == np.float32 and not batch["replaced"].any()
  np.testing.assert_array_equal(batch["label"], batch["index"] % 5)


@pytest.mark.parametrize("threads", [2, 7])
def test_the_number_of_threads_changes_nothing(threads):
  assert_same(take(train(num_threads=threads), 12), WHOLE)
  assert_same(take(train(num_threads=threads, prefetch=1), 12), WHOLE)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_disjoint_parts_of_the_same_batches(processes):
  parts = [take(train(process_index=p, process_count=processes), 12) for p in range(processes)]
  assert_same(joined(parts), WHOLE)


@pytest.mark.parametrize("start", [1, 5, 9])
def test_a_resumed_run_sees_the_batches_that_would_have_come(start):
  assert_same(take(train(start_step=start), 12 - start), WHOLE[start:])
  # … also on another number of processes.
  part = take(train(start_step=start, process_index=1, process_count=2), 12 - start)
  for mine, whole in zip(part, WHOLE[start:]):
    np.testing.assert_array_equal(mine["image"], whole["image"][2:])


def test_every_epoch_is_every_example_once_and_batches_straddle():
  seen = indices(WHOLE)  # 48 rows of 23 examples
  first, second = seen[:23], seen[23:46]
  assert sorted(first) == sorted(second) == list(range(23)) and first != second
  assert indices(take(train(seed=1), 6))[:23] != first
  # A batch may be larger than the source.
  large = indices(take(numbers(Numbers(5), (12, 2))))
  assert [sorted(large[i : i + 5]) for i in range(0, 20, 5)] == [list(range(5))] * 4


def test_every_row_has_its_own_chance():
  rows = take(train(Pictures(1), batch_size=1), 6)
  assert len({row["image"].tobytes() for row in rows}) == 6
  # It follows from seed and position alone.
  batch = take(numbers(Numbers(10), (4, None), seed=3), 3)[2]
  for row in range(4):
    expected = np.random.default_rng((3, 1, 8 + row, 0)).random(3).astype(np.float32)
    np.testing.assert_array_equal(batch["noise"][row], expected)


def test_repeated_augmentation():
  batches = take(train(batch_size=6, repeats=3), 3)
  drawn = np.array(indices(batches)).reshape(-1, 3)
  assert (drawn == drawn[:, :1]).all() and len(set(drawn[:, 0].tolist())) == 6
  assert len({image.tobytes() for batch in batches for image in batch["image"]}) == 18
  halves = [
    take(train(batch_size=6, repeats=3, process_index=p, process_count=2), 3) for p in (0, 1)
  ]
  assert_same(joined(halves), batches)
  # An epoch keeps its length, 10 rows: the last example comes once and not three times.
  epoch = indices(take(numbers(Numbers(10), (5, 2), repeats=3)))
  assert [len(list(group)) for _, group in itertools.groupby(epoch)] == [3, 3, 3, 1]


PHASES = ((4, 3), (6, 2), (2, 0), (8, None))


def test_phases_go_on_where_the_one_before_ended():
  whole = take(numbers(Numbers(10), *PHASES), 8)
  assert [len(b["x"]) for b in whole] == [4, 4, 4, 6, 6, 8, 8, 8]
  seen = indices(whole)
  assert [sorted(seen[i : i + 10]) for i in range(0, 40, 10)] == [list(range(10))] * 4
  # One batch size or another: position p is the same example under the same draws.
  rows = {k: np.concatenate([b[k] for b in whole]) for k in ("x", "noise")}
  plain = take(numbers(Numbers(10), (1, 48)))
  for key, value in rows.items():
    np.testing.assert_array_equal(value, np.concatenate([b[key] for b in plain]))
  readings = [Reading(size, same, X, steps) for size, steps in PHASES]
  assert [examples_before(readings, s) for s in range(7)] == [0, 4, 8, 12, 18, 24, 32]
  with pytest.raises(ValueError, match="end 2 steps before"):
    examples_before(readings[:2], 7)


@pytest.mark.parametrize("start", range(8))
@pytest.mark.parametrize("processes", [1, 2])
def test_resuming_inside_phases_and_at_their_borders(start, processes):
  whole = take(numbers(Numbers(10), *PHASES), 8)
  parts = [
    take(
      numbers(
        Numbers(10), *PHASES, start_step=start, process_index=p, process_count=processes,
        num_threads=3,
      ),
      8 - start,
    )
    for p in range(processes)
  ]  # fmt: skip
  assert_same(joined(parts), whole[start:])


def test_each_phase_has_its_own_transform_and_fields():
  small = Reading(
    4, parse_transform("decode|resize(4)"), {"image": Field("image", "uint8", (4, 4, 3))}, 2
  )
  large = Reading(
    2, parse_transform("decode|resize(9)"), {"image": Field("image", "uint8", (9, 9, 3))}, 1
  )
  shapes = [b["image"].shape for b in train_batches(SOURCE, [small, large], seed=0)]
  assert shapes == [(4, 4, 4, 3), (4, 4, 4, 3), (2, 9, 9, 3)]


def test_a_training_of_known_length_ends():
  batches = numbers(Numbers(10), (4, 3), (6, 2))
  assert len(take(batches)) == 5 and next(batches, None) is None
  assert take(numbers(Numbers(10), (4, 3), start_step=3)) == []


def test_rows_are_what_the_fields_declare():
  fields = {
    "boxes": Field("boxes", "float32", (3, 4), ragged=True, pad=-1),
    "flag": Field("value", "float32", (), pad=0),
    "name": Field("host"),
  }

  def make(example, rng):
    x = example["x"]
    return {"boxes": np.full((x, 4), x), "flag": x % 2, "name": f"n{x}", "unused": 1}

  (batch,) = take(train_batches(Numbers(6), [Reading(6, make, fields, 1)], seed=0))
  assert set(batch) == {"boxes", "flag", "index", "replaced"}
  for index, boxes, flag in zip(batch["index"], batch["boxes"], batch["flag"]):
    kept = min(index, 3)
    assert (boxes[:kept] == index).all() and (boxes[kept:] == -1).all() and flag == index % 2
  batches = eval_batches(Numbers(6), Reading(4, make, fields))
  (first, host), (second, last) = batches
  assert host == {"name": ["n0", "n1", "n2", "n3"]} and last == {"name": ["n4", "n5", None, None]}
  assert second["mask"].tolist() == [1, 1, 0, 0] and second["boxes"].shape == (4, 3, 4)
  assert (second["boxes"][2:] == -1).all() and set(first) == {"boxes", "flag", "index", "mask"}


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_every_picture_is_evaluated_exactly_once(processes):
  counted, names = [], []
  for process in range(processes):
    batches = evaluate(process_index=process, process_count=processes)
    assert len(batches) == 3
    rows = list(batches)
    assert [len(b["image"]) for b, _ in rows] == [8 // processes] * 3
    for batch, host in rows:
      assert batch["mask"].dtype == np.float32
      counted += batch["index"][batch["mask"] > 0].tolist()
      names += [name for name in host["name"] if name is not None]
      assert (batch["image"][batch["mask"] == 0] == 0).all()
      assert [name is not None for name in host["name"]] == (batch["mask"] > 0).tolist()
  assert sorted(counted) == list(range(23))
  assert sorted(names) == sorted(f"{i}.jpg" for i in range(23))


def test_evaluation_can_be_iterated_again():
  batches = evaluate()
  for (one, host), (other, again) in zip(batches, batches, strict=True):
    assert_same([one], [other])
    assert host == again


@pytest.mark.parametrize("length", [1, 8, 9])
def test_processes_with_nothing_but_padding_keep_the_shape(length):
  source = Pictures(length)
  parts = [list(evaluate(source, process_index=p, process_count=4)) for p in range(4)]
  assert {b["image"].shape for part in parts for b, _ in part} == {(2, 8, 8, 3)}
  assert sum(b["mask"].sum() for part in parts for b, _ in part) == length


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"process_count": 3}, "does not fall into 3 processes' parts"),
    ({"process_index": 2, "process_count": 2}, "process 2 of 2"),
    ({"seed": -1}, "seed is -1"),
    ({"start_step": -1}, "start_step is -1"),
    ({"repeats": 0}, "repeats is 0"),
    ({"prefetch": 0}, "prefetch is 0"),
    ({"num_threads": 0}, "num_threads is 0"),
    ({"max_corrupt_fraction": 1.5}, "max_corrupt_fraction is 1.5"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"source": Pictures(0)}, "the source is empty"),
  ],
)
def test_settings_that_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    train(**settings)
  if not settings.keys() & {"seed", "start_step", "repeats", "prefetch"}:
    with pytest.raises(ValueError, match=message):
      evaluate(**settings)


def test_readings_that_cannot_be():
  with pytest.raises(ValueError, match="no phases"):
    train_batches(SOURCE, [], seed=0)
  with pytest.raises(ValueError, match="without end stands before others"):
    numbers(Numbers(3), (2, None), (2, 1))
  with pytest.raises(ValueError, match="a phase of -1 steps"):
    numbers(Numbers(3), (2, -1))
  with pytest.raises(ValueError, match="a field is called 'index'"):
    Reading(2, same, {"index": Field("value", "int32")})
  with pytest.raises(ValueError, match="shape or type of 'image' is not known"):
    Reading(2, same, {"image": Field("image", shape=(None, None, 3))})


@pytest.mark.parametrize("decoder", ["opencv", "pil"])
def test_fields_can_be_found_by_the_transform(decoder):
  apply = parse_transform("decode|resize(8)|normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))", decoder)
  fields = spec.resolve({"image": Field("image", shape=(None, None, 3))}, apply)
  batch = next(train_batches(SOURCE, [Reading(4, apply, fields)], seed=0))
  assert batch["image"].dtype == np.float32 and batch["image"].min() < -0.5
  picture = parse_transform("decode|resize(8)", decoder)(
    SOURCE[int(batch["index"][0])], np.random.default_rng(0)
  )["image"]
  np.testing.assert_allclose(batch["image"][0], picture / 127.5 - 1, atol=1e-6)
