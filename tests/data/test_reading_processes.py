"""Processes that read: the same rows as threads, the same faults, and nothing left behind."""

import functools
import gc
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from hybrid_vit import build
from hybrid_vit.data import loader
from hybrid_vit.data.errors import CorruptDataError
from hybrid_vit.data.loader import Reading, eval_batches, train_batches
from hybrid_vit.data.pipeline import TrainingSettings, open_source, training_batches
from hybrid_vit.data.reading_processes import ReadingProcesses
from hybrid_vit.data.spec import Field
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.tools.process_figures import children
from tests.data.batches import FIELDS, TRANSFORM, Pictures, assert_same, take
from tests.data.pictures import write_folder
from tests.test_build import DIGITS, local

APPLY = parse_transform(TRANSFORM)
NAMED = {**FIELDS, "name": Field("host")}


def mine():
  return children(os.getpid())


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
  gc.collect()
  before = mine()
  yield
  gc.collect()
  end = time.monotonic() + 5
  while mine() != before and time.monotonic() < end:
    time.sleep(0.01)
  assert mine() == before


def open_files():
  return len(list(Path("/proc/self/fd").iterdir()))


def local_run(**changes):
  return build.build(local(**changes), DIGITS)


def fails_at_seven(example, rng):
  if example["label"] == 7:
    raise KeyError("of the transform")
  return {"label": example["label"]}


def ends_the_process(example, rng):
  os.kill(os.getpid(), signal.SIGKILL)


def test_the_very_batches_of_threads_corrupt_ones_and_phases_too():
  source = Pictures(broken=(3, 11))
  other = {"image": Field("image", "uint8", (12, 12, 3)), "label": FIELDS["label"]}
  readings = [
    Reading(6, APPLY, FIELDS, 3),
    Reading(4, parse_transform("decode|random_resized_crop(12)"), other, 4, replay=2),
  ]
  settings = dict(seed=5, max_corrupt_fraction=0.5)
  expected = train_batches(source, readings, num_threads=2, **settings)
  given = train_batches(source, readings, num_processes=2, **settings)
  assert_same(take(given), take(expected))
  assert given.corrupt.count == expected.corrupt.count > 0
  assert sorted(given.corrupt.names) == sorted(expected.corrupt.names)


def test_a_pass_of_an_evaluation_twice():
  source = Pictures(broken=(2,))
  expected, given = (
    eval_batches(source, Reading(5, APPLY, NAMED), max_corrupt_fraction=1.0, **how)
    for how in ({"num_threads": 1}, {"num_processes": 2})
  )
  for _ in range(2):
    passes = list(given), list(expected)
    assert_same(*([arrays for arrays, _ in one] for one in passes))
    assert [host for _, host in passes[0]] == [host for _, host in passes[1]]
    assert not mine()
  assert given.corrupt.names == ["picture 2"]


def test_a_source_is_opened_anew_where_it_cannot_be_handed_over(tmp_path):
  write_folder(tmp_path, {"train/cat": 5, "train/dog": 4, "val/cat": 1, "val/dog": 1})
  settings = TrainingSettings(f"folder:{tmp_path}", num_processes=1)
  source = open_source(settings)
  source.held = lambda: None  # which pickle refuses
  with pytest.raises(ValueError, match=r"num_processes is 1, .* cannot be handed to another"):
    train_batches(source, [Reading(3, APPLY, FIELDS, 2)], seed=0, num_processes=1)
  opens = functools.partial(open_source, settings)
  given = train_batches(
    source, [Reading(3, APPLY, FIELDS, 2)], seed=0, num_processes=1, opens=opens
  )
  assert_same(take(given), take(train_batches(source, [Reading(3, APPLY, FIELDS, 2)], seed=0)))


def test_a_run_and_its_evaluation_read_by_processes():
  threads = local_run()
  processes = local_run(data__num_processes=2, evaluation__sets__validation__num_processes=1)
  place = dict(start_step=3, process_index=0, process_count=1)
  assert_same(
    *(
      take(training_batches(run, open_source(run.data), **place), 2) for run in (processes, threads)
    )
  )
  assert not mine()


def test_errors_come_with_their_names_and_end_the_processes():
  source = Pictures(labels=range(23))
  fields = {"label": Field("value", "int32")}
  batches = train_batches(source, [Reading(23, fails_at_seven, fields)], seed=0, num_processes=2)
  with pytest.raises(KeyError, match="of the transform") as caught:
    next(batches)
  assert caught.value.__notes__[0] == "while reading picture 7"
  assert "fails_at_seven" in caught.value.__notes__[1]
  assert not mine()
  reading = Reading(4, APPLY, {**FIELDS, "label": Field("value", "int32", maximum=3)})
  with pytest.raises(
    ValueError, match=r"picture \d+: 'label' is \d+, above the largest allowed, 3"
  ):
    take(train_batches(source, [reading], seed=0, num_processes=1), 9)
  with pytest.raises(CorruptDataError, match="of the 23 examples that this process reads"):
    take(
      train_batches(
        Pictures(broken=range(23)), [Reading(4, APPLY, FIELDS)], seed=0, num_processes=1
      ),
      9,
    )


def test_a_source_that_cannot_be_opened_there_says_so(tmp_path):
  opens = functools.partial(open_source, TrainingSettings(f"folder:{tmp_path}/gone"))
  batches = train_batches(
    Pictures(), [Reading(4, APPLY, FIELDS)], seed=0, num_processes=1, opens=opens
  )
  with pytest.raises(FileNotFoundError, match="an image folder was looked for at"):
    next(batches)


def test_a_process_that_dies_is_an_error_and_no_silence():
  reading = Reading(4, ends_the_process, FIELDS)
  batches = train_batches(Pictures(), [reading], seed=0, num_processes=2)
  with pytest.raises(RuntimeError, match=r"ended with status -9 while it read picture \d+"):
    next(batches)


def test_processes_end_when_the_batches_are_closed_or_dropped_or_their_reader_is_gone():
  files = open_files()
  batches = train_batches(Pictures(), [Reading(4, APPLY, FIELDS)], seed=0, num_processes=2)
  next(batches)
  assert len(mine()) == 2
  batches.close()
  assert not mine() and next(batches, None) is None
  batches = train_batches(Pictures(), [Reading(4, APPLY, FIELDS)], seed=0, num_processes=1)
  next(batches)
  del batches
  gc.collect()
  assert not mine() and open_files() == files  # pipes and shared memory, too
  # Their pipe ends with the one who reads, however that one ends.
  reader = loader._reader(Pictures(), [Reading(4, APPLY, FIELDS)], 1, None, None)
  (pid,) = mine()
  process = reader._idle.get()
  process.pipe.close()
  assert process.popen.wait(20) == 0 and not Path(f"/proc/{pid}/stat").exists()


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(num_processes=0), "num_processes is 0; at least 1 was expected"),
    (dict(num_processes=2, num_threads=2), "num_threads is 2 and num_processes 2; one of them"),
  ],
)
def test_what_cannot_be(settings, message):
  with pytest.raises(ValueError, match=message):
    train_batches(Pictures(), [Reading(4, APPLY, FIELDS)], seed=0, **settings)
  with pytest.raises(ValueError, match=message):
    eval_batches(Pictures(), Reading(4, APPLY, FIELDS), **settings)


def test_a_row_is_not_another_one_s_while_it_is_read():
  reading = Reading(4, APPLY, FIELDS)
  reader = loader._reader(Pictures(), [reading], 2, None, None)
  with reader.row(reading, 0, 0) as first, reader.row(reading, 1, 1) as second:
    kept = first["image"].copy()
    assert (first["image"] != second["image"]).any()
    np.testing.assert_array_equal(first["image"], kept)
  reader.close()


def test_another_system_is_told(monkeypatch):
  monkeypatch.delattr("os.memfd_create")
  with pytest.raises(ValueError, match="num_processes is 2, which needs Linux"):
    ReadingProcesses(2, None, list, [])
