"""Batches' memory: taken again when nobody holds it, and never before."""

import gc

import jax
import numpy as np
import pytest

from hybrid_vit.data.batch_memory import BatchMemory
from hybrid_vit.data.loader import Reading, train_batches
from hybrid_vit.data.spec import Field

WIDE = (64, 128, 128, 3)


def address(array):
  return array.__array_interface__["data"][0]


def test_memory_comes_back_when_the_array_is_gone():
  memory = BatchMemory()
  first = memory.empty(WIDE, np.uint8)
  second = memory.empty(WIDE, np.uint8)
  place = address(first)
  assert first.shape == WIDE and first.flags.writeable and address(second) != place
  del first
  again = memory.empty((*WIDE[:3], 3), np.uint8)
  assert address(again) == place
  del again
  floats = memory.empty((64, 128, 96), np.float32)  # as many bytes of another type
  assert address(floats) == place and floats.dtype == np.float32


@pytest.mark.parametrize(
  "hold",
  [
    lambda a: a[3:],
    lambda a: a[0, ..., 0].T,
    lambda a: a.reshape(-1)[::2],
    lambda a: memoryview(a),
    lambda a: jax.device_put(a),
    lambda a: jax.device_put(a[1:]),
    lambda a: np.from_dlpack(a),
  ],
)
def test_what_somebody_holds_is_not_taken_again(hold):
  memory = BatchMemory()
  array = memory.empty(WIDE, np.uint8)
  array[:] = 7
  held = hold(array)
  del array
  gc.collect()
  others = [memory.empty(WIDE, np.uint8) for _ in range(3)]
  for other in others:
    other[:] = 9
  assert (np.asarray(held) == 7).all()


def test_small_arrays_are_left_to_the_allocator():
  array = BatchMemory().empty((4,), np.int32)
  assert array.base is None and array.flags.owndata


def test_a_loader_makes_few_batches_and_gives_every_one_unharmed():
  class Source:
    info = {}  # noqa: RUF012

    def __len__(self):
      return 64

    def __getitem__(self, index):
      return {"image": np.full((64, 64, 3), index, np.uint8)}

    def describe(self, index):
      return str(index)

  def reading(steps):
    fields = {"image": Field("image", "uint8", (64, 64, 3))}
    return [Reading(128, lambda example, rng: example, fields, steps)]

  kept = list(train_batches(Source(), reading(6), seed=0, num_threads=2))
  assert len({address(batch["image"]) for batch in kept}) == 6
  for batch in kept:
    assert (batch["image"] == batch["index"][:, None, None, None]).all()
  places = set()
  for batch in train_batches(Source(), reading(20), seed=0, num_threads=2):
    assert (batch["image"] == batch["index"][:, None, None, None]).all()
    places.add(address(batch["image"]))
  assert len(places) <= 5
