"""Sources that exist for the tests of the loader alone, and batches of them."""

import itertools

import numpy as np

from hybrid_vit.data.errors import CorruptExampleError
from hybrid_vit.data.loader import Reading, eval_batches, train_batches
from hybrid_vit.data.spec import Field
from hybrid_vit.data.transforms import parse_transform
from tests.data.pictures import encoded, photo

TRANSFORM = "decode|random_resized_crop(8)|flip_lr|color_jitter(0.4)"
FIELDS = {
  "image": Field("image", "uint8", (8, 8, 3)),
  "label": Field("value", "int32", (), minimum=0, maximum=4),
}


class Pictures:
  """Twenty-odd encoded pictures, some of them broken."""

  info = {"class_names": tuple("abcde")}  # noqa: RUF012

  def __init__(self, length=23, broken=(), labels=None):
    self.raw = [encoded(photo(i, 20, 24)) for i in range(length)]
    self.labels = [i % 5 for i in range(length)] if labels is None else labels
    for i in broken:
      self.raw[i] = self.raw[i][: len(self.raw[i]) // 2]

  def __len__(self):
    return len(self.raw)

  def __getitem__(self, index):
    return {"image": self.raw[index], "label": self.labels[index], "name": f"{index}.jpg"}

  def describe(self, index):
    return f"picture {index}"


class Numbers:
  """Examples that are their own index; `broken` are corrupt, `failing` raise so many OSErrors."""

  info = {}  # noqa: RUF012

  def __init__(self, length, broken=(), failing=None):
    self.length, self.broken, self.failing = length, set(broken), dict(failing or {})
    self.asked = []

  def __len__(self):
    return self.length

  def __getitem__(self, index):
    self.asked.append(index)
    if self.failing.get(index, 0) > 0:
      self.failing[index] -= 1
      raise OSError(5, "Input/output error")
    if index in self.broken:
      raise CorruptExampleError("half of it is missing")
    return {"x": index}

  def describe(self, index):
    return f"number {index}"


SOURCE = Pictures()
X = {"x": Field("value", "int32")}


def same(example, rng):
  return example


def noisy(example, rng):
  return {"x": example["x"], "noise": rng.random(3)}


NOISY = {"x": Field("value", "int32"), "noise": Field("value", "float32", (3,))}


def train(source=SOURCE, transform=TRANSFORM, batch_size=4, seed=0, **settings):
  reading = Reading(batch_size, parse_transform(transform), FIELDS)
  return train_batches(source, [reading], seed=seed, **settings)


def numbers(source, *phases, seed=0, **settings):
  """Phases are (batch size, steps)."""
  readings = [Reading(size, noisy, NOISY, steps) for size, steps in phases]
  return train_batches(source, readings, seed=seed, **settings)


def take(batches, count=None):
  return list(itertools.islice(batches, count))


def indices(batches):
  return np.concatenate([batch["index"] for batch in batches]).tolist()


def joined(parts):
  """The processes' batches as one process would have them."""
  return [{k: np.concatenate([part[k] for part in step]) for k in step[0]} for step in zip(*parts)]


def assert_same(a, b):
  assert len(a) == len(b)
  for one, other in zip(a, b):
    assert one.keys() == other.keys()
    for key in one:
      np.testing.assert_array_equal(one[key], other[key])


def evaluate(source=SOURCE, batch_size=8, **settings):
  fields = {**FIELDS, "name": Field("host")}
  return eval_batches(
    source, Reading(batch_size, parse_transform("decode|resize(8)"), fields), **settings
  )
