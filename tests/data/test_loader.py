import itertools
import logging

import numpy as np
import pytest

from hybrid_vit.data.loader import CorruptDataError, eval_batches, train_batches
from tests.data.pictures import encoded, photo

TRANSFORM = "decode|random_resized_crop(8)|flip_lr|color_jitter(0.4)"


class Pictures:
  """Twenty-odd encoded pictures, some of them broken."""

  num_classes, class_names = 5, tuple("abcde")

  def __init__(self, length=23, broken=(), missing=()):
    self.raw = [encoded(photo(i, 20, 24)) for i in range(length)]
    for i in broken:
      self.raw[i] = self.raw[i][: len(self.raw[i]) // 2]
    self.missing = set(missing)

  def __len__(self):
    return len(self.raw)

  def __getitem__(self, index):
    if index in self.missing:
      raise FileNotFoundError(f"{index}.jpg")
    return {"image": self.raw[index], "label": index % 5}

  def describe(self, index):
    return f"picture {index}"


SOURCE = Pictures()


def train(source=SOURCE, transform=TRANSFORM, batch_size=4, seed=0, **settings):
  return train_batches(source, transform, batch_size=batch_size, seed=seed, **settings)


def take(batches, count):
  return list(itertools.islice(batches, count))


def assert_same(a, b):
  assert len(a) == len(b)
  for one, other in zip(a, b):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


WHOLE = take(train(num_threads=1), 12)


def test_a_batch():
  batches = train()
  assert batches.steps_per_epoch == 5
  batch = next(batches)
  assert batch["image"].shape == (4, 8, 8, 3) and batch["image"].dtype == np.uint8
  assert batch["label"].dtype == batch["index"].dtype == np.int32
  np.testing.assert_array_equal(batch["label"], batch["index"] % 5)


@pytest.mark.parametrize("threads", [2, 7])
def test_the_number_of_threads_changes_nothing(threads):
  assert_same(take(train(num_threads=threads), 12), WHOLE)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_disjoint_parts_of_the_same_batches(processes):
  parts = [take(train(process_index=p, process_count=processes), 12) for p in range(processes)]
  joined = [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]} for step in zip(*parts)
  ]
  assert_same(joined, WHOLE)


@pytest.mark.parametrize("start", [1, 5, 9])
def test_a_resumed_run_sees_the_batches_that_would_have_come(start):
  assert_same(take(train(start_step=start), 12 - start), WHOLE[start:])
  # … also on another number of processes.
  part = take(train(start_step=start, process_index=1, process_count=2), 12 - start)
  for mine, whole in zip(part, WHOLE[start:]):
    np.testing.assert_array_equal(mine["image"], whole["image"][2:])


def test_epochs_are_permutations_in_new_orders():
  epochs = [np.concatenate([b["index"] for b in WHOLE[i : i + 5]]) for i in (0, 5)]
  for epoch in epochs:
    assert len(set(epoch.tolist())) == 20  # 5 batches of 4; the other 3 of 23 wait
  assert epochs[0].tolist() != epochs[1].tolist()
  other = np.concatenate([b["index"] for b in take(train(seed=1), 5)])
  assert other.tolist() != epochs[0].tolist()


def test_every_row_has_its_own_chance():
  rows = take(train(Pictures(1), batch_size=1), 6)
  assert len({row["image"].tobytes() for row in rows}) == 6


def test_repeated_augmentation():
  batches = take(train(batch_size=6, repeats=3), 3)
  indices = np.concatenate([b["index"] for b in batches]).reshape(-1, 3)
  assert (indices == indices[:, :1]).all() and len(set(indices[:, 0].tolist())) == 6
  images = np.concatenate([b["image"] for b in batches])
  assert len({image.tobytes() for image in images}) == 18
  halves = [
    take(train(batch_size=6, repeats=3, process_index=p, process_count=2), 3) for p in (0, 1)
  ]
  assert_same(
    [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*halves)],
    batches,
  )


def test_corrupt_pictures_are_skipped_counted_and_named_once(caplog):
  source = Pictures(broken=(3, 11), missing=(7,))
  with caplog.at_level(logging.WARNING):
    batches = train(source, max_corrupt_fraction=0.2)
    seen = take(batches, 15)  # three epochs
  assert not {3, 7, 11} & set(np.concatenate([b["index"] for b in seen]).tolist())
  assert batches.corrupt.count == 3
  assert sorted(batches.corrupt.names) == ["picture 11", "picture 3", "picture 7"]
  messages = [r.getMessage() for r in caplog.records if "cannot be read" in r.getMessage()]
  assert len(messages) == 3 and all("skipped a picture" in message for message in messages)
  assert any("picture 7 (7.jpg)" in message for message in messages)
  # What replaces them depends on the step alone, too.
  assert_same(take(train(source, max_corrupt_fraction=0.2, start_step=4), 11), seen[4:])
  healthy = [
    np.array_equal(a["image"][i], b["image"][i])
    for a, b in zip(seen, take(train(), 15))
    for i in range(4)
    if a["index"][i] == b["index"][i]
  ]
  assert len(healthy) >= 45 and all(healthy)  # the others are as they would have been


def test_too_many_corrupt_pictures_stop_the_run():
  with pytest.raises(CorruptDataError, match=r"3 of 23 pictures cannot be read.* = 0.1 allows"):
    take(train(Pictures(broken=(3, 7, 11)), max_corrupt_fraction=0.1), 20)
  with pytest.raises(CorruptDataError, match="23 pictures"):
    take(train(Pictures(broken=range(23)), max_corrupt_fraction=0.5), 1)
  with pytest.raises(CorruptDataError, match="in a row cannot be read"):
    take(train(Pictures(broken=range(23)), max_corrupt_fraction=1.0), 1)


def evaluate(source=SOURCE, batch_size=8, **settings):
  return eval_batches(source, "decode|resize(8)", batch_size=batch_size, **settings)


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_every_picture_is_evaluated_exactly_once(processes):
  counted = []
  for process in range(processes):
    batches = evaluate(process_index=process, process_count=processes)
    assert len(batches) == 3
    rows = list(batches)
    assert [len(b["image"]) for b in rows] == [8 // processes] * 3
    for batch in rows:
      assert batch["mask"].dtype == np.float32
      counted += batch["index"][batch["mask"] > 0].tolist()
      assert (batch["image"][batch["mask"] == 0] == 0).all()
  assert sorted(counted) == list(range(23))


def test_evaluation_can_be_iterated_again():
  batches = evaluate()
  assert_same(list(batches), list(batches))


@pytest.mark.parametrize("length", [1, 8, 9])
def test_processes_with_nothing_but_padding_keep_the_shape(length):
  source = Pictures(length)
  parts = [list(evaluate(source, process_index=p, process_count=4)) for p in range(4)]
  assert {b["image"].shape for part in parts for b in part} == {(2, 8, 8, 3)}
  assert sum(b["mask"].sum() for part in parts for b in part) == length


def test_corrupt_pictures_keep_their_row_in_evaluation(caplog):
  source = Pictures(broken=(0, 9), missing=(22,))
  batches = evaluate(source, max_corrupt_fraction=0.2)
  with caplog.at_level(logging.WARNING):
    rows = list(batches) + list(batches)
  assert sum(b["mask"].sum() for b in rows) == 2 * 20
  assert rows[0]["mask"][0] == 0 and rows[0]["index"][0] == 0
  assert batches.corrupt.count == 3
  assert sum("cannot be read" in r.getMessage() for r in caplog.records) == 3
  with pytest.raises(CorruptDataError):
    list(evaluate(source, max_corrupt_fraction=0.05))
  with pytest.raises(CorruptDataError, match="no picture of the evaluation set can be read"):
    list(evaluate(Pictures(8, broken=range(8)), max_corrupt_fraction=1.0))


def test_settings_that_cannot_be():
  with pytest.raises(ValueError, match="larger than the data"):
    train(batch_size=24)
  with pytest.raises(ValueError, match="does not fall into 3 processes' parts"):
    train(process_count=3)
  with pytest.raises(ValueError, match="does not fall into 3"):
    evaluate(process_count=3)


def test_float_pictures_pass():
  text = "decode|resize(8)|normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))|random_erasing(1.0)"
  batch = next(train(transform=text))
  assert batch["image"].dtype == np.float32 and batch["image"].min() < -0.5
