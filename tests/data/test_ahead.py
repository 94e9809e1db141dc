"""Threads that read ahead: how far, in which order, and when they end."""

import gc
import math
import threading
import time

import pytest

from hybrid_vit.data import ahead
from hybrid_vit.data.loader import Reading, train_batches
from hybrid_vit.data.orders import Order
from tests.data.batches import Numbers, X, evaluate, indices, numbers, same, take


class Blocking(Numbers):
  """Waits before each example until it is let."""

  def __init__(self, length):
    super().__init__(length)
    self.go = threading.Event()

  def __getitem__(self, index):
    assert self.go.wait(10)
    return super().__getitem__(index)


def data_threads():
  return [t for t in threading.enumerate() if t.name.startswith("data")]


def wait_for_the_end(seconds=5.0):
  end = time.monotonic() + seconds
  while data_threads() and time.monotonic() < end:
    time.sleep(0.005)
  return not data_threads()


@pytest.fixture(autouse=True)
def no_threads_of_others():
  gc.collect()
  assert wait_for_the_end()


def test_threads_end_when_the_batches_are_closed_dropped_or_at_their_end():
  batches = numbers(Numbers(10), (4, None), num_threads=3)
  next(batches)
  assert len(data_threads()) == 3
  batches.close()
  assert wait_for_the_end() and next(batches, None) is None
  batches = numbers(Numbers(10), (4, None))
  next(batches)
  assert data_threads()
  del batches
  assert wait_for_the_end()
  take(numbers(Numbers(10), (4, 2)))
  assert wait_for_the_end()
  for _ in evaluate():
    break
  gc.collect()
  assert wait_for_the_end()


def test_closing_does_not_wait_for_what_is_read_ahead():
  source = Blocking(1000)
  batches = numbers(source, (100, None), num_threads=2, prefetch=3)
  taker = threading.Thread(target=lambda: next(batches, None), daemon=True)
  taker.start()
  while len(data_threads()) < 2:
    time.sleep(0.001)
  batches.close()
  source.go.set()
  assert wait_for_the_end() and len(source.asked) <= 4
  taker.join(5)


def test_errors_come_in_order_with_their_cause_and_end_the_threads():
  order = indices(take(numbers(Numbers(40), (4, 10))))

  def fails(example, rng):
    if example["x"] in (order[9], order[11]):
      time.sleep(0.02 if example["x"] == order[9] else 0)
      raise KeyError("of the transform")
    return example

  batches = train_batches(Numbers(40), [Reading(4, fails, X)], seed=0, num_threads=4, prefetch=5)
  assert indices([next(batches), next(batches)]) == order[:8]
  with pytest.raises(KeyError, match="of the transform") as caught:
    next(batches)
  assert caught.value.__notes__ == [f"while reading number {order[9]}"]
  assert wait_for_the_end() and next(batches, None) is None


def test_no_more_is_read_ahead_than_asked_for():
  source = Numbers(1000)
  batches = numbers(source, (10, None), num_threads=2, prefetch=3)
  next(batches)
  time.sleep(0.1)
  assert len(source.asked) == 40  # the one taken and three more


def test_the_order_of_an_epoch_is_drawn_once(monkeypatch):
  drawn = []
  draw = Order._draw

  def counted(self, epoch):
    drawn.append(epoch)
    time.sleep(0.02)  # long enough for every thread to come by
    return draw(self, epoch)

  monkeypatch.setattr(Order, "_draw", counted)
  take(numbers(Numbers(64), (32, 6), num_threads=16))
  assert drawn == [0, 1, 2]


def test_a_wide_batch_is_read_no_slower_than_a_narrow_one():
  def seconds(rows):
    batches = train_batches(Numbers(4096), [Reading(rows, same, X)], seed=0, num_threads=2)
    next(batches)
    begin = time.perf_counter()
    take(batches, 8192 // rows)
    return time.perf_counter() - begin

  ratios = [seconds(2048) / seconds(256) for _ in range(3)]
  assert min(ratios) < 2, ratios  # by a queue that counts its buffer it was 18


def test_the_cores_of_this_process_count_not_the_machines(monkeypatch, tmp_path):
  monkeypatch.setattr(ahead.os, "sched_getaffinity", lambda pid: set(range(6)))
  monkeypatch.setattr(ahead, "_CGROUPS", tmp_path)
  assert ahead.available_cores() == 6
  monkeypatch.setattr(ahead, "_cgroup_cores", lambda membership, root: 2.5)
  assert ahead.available_cores() == 3
  monkeypatch.setattr(ahead, "_cgroup_cores", lambda membership, root: 0.1)
  assert ahead.available_cores() == 1


@pytest.mark.parametrize(
  ("membership", "files", "cores"),
  [
    ("0::/jobs/one\n", {"jobs/one/cpu.max": "max 100000", "jobs/cpu.max": "350000 100000"}, 3.5),
    ("0::/jobs/one\n", {"cpu.max": "200000 100000"}, 2),  # a container's own mount
    ("0::/jobs/one\n", {"jobs/one/cpu.max": "max 100000"}, math.inf),
    (
      "5:memory:/m\n4:cpu,cpuacct:/jobs\n",
      {"cpu/jobs/cpu.cfs_quota_us": "150000", "cpu/jobs/cpu.cfs_period_us": "100000"},
      1.5,
    ),
    ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
    ("nonsense", {}, math.inf),
  ],
)
def test_the_quota_of_a_cgroup(tmp_path, membership, files, cores):
  (tmp_path / "membership").write_text(membership)
  for name, text in files.items():
    path = tmp_path / "root" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
  assert ahead._cgroup_cores(tmp_path / "membership", tmp_path / "root") == cores
