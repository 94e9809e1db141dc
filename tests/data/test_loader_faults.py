"""Examples that cannot be read, are corrupt or out of range."""

import functools
import logging
import re

import numpy as np
import pytest

from hybrid_vit.data import examples
from hybrid_vit.data.errors import CorruptDataError, DataReadError
from hybrid_vit.data.loader import Reading, eval_batches, train_batches
from hybrid_vit.data.spec import Field
from tests.data.batches import (
  Numbers,
  Pictures,
  X,
  assert_same,
  evaluate,
  indices,
  numbers,
  same,
  take,
  train,
)


def test_a_value_out_of_range_names_its_example():
  for label, message in ((5, "'label' is 5, above the largest"), (-1, "'label' is -1, below")):
    source = Pictures(6, labels=[0, 1, label, 3, 4, 0])
    with pytest.raises(ValueError, match=f"picture 2: {message}"):
      take(train(source), 2)
    with pytest.raises(ValueError, match=f"picture 2: {message}"):
      list(evaluate(source, max_corrupt_fraction=1.0))
  with pytest.raises(
    ValueError, match=r"picture \d+: 'image' has shape \[20, 24, 3\]; \[8, 8, 3\]"
  ):
    next(train(transform="decode"))
  reading = Reading(2, same, {"depth": Field("depth", "float32", (2, 2))})
  with pytest.raises(ValueError, match=r"number \d has no 'depth' behind the transform; it has: x"):
    next(train_batches(Numbers(3), [reading], seed=0))


def test_corrupt_pictures_are_replaced_counted_and_named_once(caplog):
  source = Pictures(broken=(3, 7, 11))
  with caplog.at_level(logging.WARNING):
    batches = train(source, max_corrupt_fraction=0.2)
    seen = take(batches, 15)  # nearly three epochs
  assert not {3, 7, 11} & set(indices(seen))
  assert batches.corrupt.count == 3
  assert sorted(batches.corrupt.names) == ["picture 11", "picture 3", "picture 7"]
  messages = [r.getMessage() for r in caplog.records if "is corrupt" in r.getMessage()]
  assert len(messages) == 3 and all("skipped an example" in message for message in messages)
  # What replaces them depends on the step alone, too.
  assert_same(take(train(source, max_corrupt_fraction=0.2, start_step=4), 11), seen[4:])
  whole = take(train(), 15)
  for ours, healthy in zip(seen, whole):
    drawn = np.isin(healthy["index"], (3, 7, 11))
    np.testing.assert_array_equal(ours["replaced"], drawn.astype(np.float32))
    # The others are as they would have been.
    np.testing.assert_array_equal(ours["image"][~drawn], healthy["image"][~drawn])
    assert (ours["index"][drawn] != healthy["index"][drawn]).all()


def test_a_replacement_is_the_next_of_the_order_under_a_draw_of_its_own():
  order = indices(take(numbers(Numbers(6), (6, 1))))
  (batch,) = take(numbers(Numbers(6, broken=order[2:4]), (6, 1), max_corrupt_fraction=1.0))
  assert batch["index"].tolist() == [*order[:2], order[4], order[4], *order[4:]]
  for row, attempt in ((2, 2), (3, 1)):
    expected = np.random.default_rng((0, 1, row, attempt)).random(3).astype(np.float32)
    np.testing.assert_array_equal(batch["noise"][row], expected)


def test_too_many_corrupt_pictures_stop_the_run():
  with pytest.raises(CorruptDataError, match=r"3 of the 23 examples .* = 0.1 allows"):
    take(train(Pictures(broken=(3, 7, 11)), max_corrupt_fraction=0.1), 20)
  with pytest.raises(CorruptDataError, match="100 examples in a row are corrupt"):
    take(numbers(Numbers(23, broken=range(23)), (4, None), max_corrupt_fraction=1.0), 1)
  assert take(numbers(Numbers(20, broken=(3, 7)), (4, None), max_corrupt_fraction=0.1), 20)


def test_the_limit_of_corrupt_pictures_is_that_of_a_part():
  # 12 of 100 are corrupt, and half of those are of the same process's part.
  order = indices(take(numbers(Numbers(100), (20, 5))))
  mine = [order[20 * step + row] for step in range(5) for row in range(5)]
  source = functools.partial(Numbers, 100, broken=mine[:6])
  settings = {"process_count": 4, "max_corrupt_fraction": 0.2, "num_threads": 1}
  with pytest.raises(CorruptDataError, match=r"6 of the 25 examples that this process reads"):
    take(numbers(source(), (20, 5), process_index=0, **settings))
  assert len(take(numbers(source(), (20, 5), process_index=1, **settings))) == 5
  # Later epochs bring a part the corrupt ones of others; each epoch counts for itself.
  batches = numbers(
    Numbers(100, broken=range(10)),
    (20, 100),
    process_index=0,
    **{**settings, "max_corrupt_fraction": 0.3},
  )
  assert len(take(batches)) == 100 and batches.corrupt.count == 10


def test_a_read_error_is_tried_again_and_never_corrupt(monkeypatch, caplog):
  monkeypatch.setattr(examples, "_WAITS", (0.0, 0.01, 0.0))
  healthy = take(numbers(Numbers(10), (5, 2)))
  batches = numbers(Numbers(10, failing={3: 3, 7: 1}), (5, 2), max_corrupt_fraction=0.0)
  with caplog.at_level(logging.WARNING):
    assert_same(take(batches), healthy)
  assert batches.corrupt.count == 0
  assert sum("trying again" in r.getMessage() for r in caplog.records) == 4
  message = r"number 3 could not be read in 4 tries over 0.01 s: \[Errno 5\] Input/output error"
  for fraction in (0.0, 1.0):
    with pytest.raises(DataReadError, match=message) as caught:
      take(numbers(Numbers(10, failing={3: 4}), (5, 2), max_corrupt_fraction=fraction))
    assert isinstance(caught.value.__cause__, OSError)
  with pytest.raises(DataReadError, match=message):
    list(eval_batches(Numbers(10, failing={3: 4}), Reading(5, same, X), max_corrupt_fraction=1.0))


def test_a_missing_file_stops_the_run(monkeypatch):
  monkeypatch.setattr(examples, "_WAITS", (0.0,))

  class Gone(Numbers):
    def __getitem__(self, index):
      raise FileNotFoundError(2, "No such file or directory", f"/data/{index}.jpg")

  with pytest.raises(DataReadError, match=r"in 2 tries.*No such file or directory: '/data/0.jpg'"):
    list(eval_batches(Gone(1), Reading(1, same, X), max_corrupt_fraction=1.0))


def test_corrupt_pictures_keep_their_row_in_evaluation(caplog):
  source = Pictures(broken=(0, 9))
  with pytest.raises(
    CorruptDataError, match=r"max_corrupt_fraction = 0 allows; among them: picture"
  ):
    list(evaluate(source))
  batches = evaluate(source, max_corrupt_fraction=0.2)
  caplog.clear()
  with caplog.at_level(logging.WARNING):
    rows = list(batches) + list(batches)
  assert sum(b["mask"].sum() for b, _ in rows) == 2 * 21
  assert rows[0][0]["mask"][0] == 0 and rows[0][0]["index"][0] == 0
  assert batches.corrupt.count == 2
  assert sum("is corrupt" in r.getMessage() for r in caplog.records) == 2
  # All of them may be, if one says so.
  ((batch, _),) = evaluate(Pictures(8, broken=range(8)), max_corrupt_fraction=1.0)
  assert not batch["mask"].any()
  # The limit is that of the part: 1 of the 12 that this process reads.
  one = functools.partial(
    evaluate, Pictures(broken=(9,)), process_count=2, max_corrupt_fraction=0.06
  )
  assert len(list(one(process_index=1))) == 3
  with pytest.raises(CorruptDataError, match="1 of the 12 examples"):
    list(one(process_index=0))


def test_names_in_errors_are_whole():
  # In one thread: of several one may meet the fourth before another one meets the third.
  reading = Reading(2, same, X)
  batches = eval_batches(
    Numbers(4, broken=range(4)), reading, max_corrupt_fraction=0.5, num_threads=1
  )
  with pytest.raises(CorruptDataError) as caught:
    list(batches)
  names = r"among them: number 0, number 1, number 2\. The last one: half of it is missing$"
  assert re.search(names, str(caught.value))
