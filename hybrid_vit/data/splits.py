"""Splits and slices, "train[:90%]", and orders in which a part of a set stands for all of it."""

from __future__ import annotations

import re

import numpy as np

PARTS = ("train", "validation", "test")
# Every picture of a set, whatever its part.
WHOLE = "all"
SPLITS = (*PARTS, WHOLE)
SPLIT_FOLDERS = {
  "train": ("train", "training"),
  "validation": ("val", "valid", "validation"),
  "test": ("test", "testing"),
}
SPLIT_OF = {alias: name for name, aliases in SPLIT_FOLDERS.items() for alias in aliases}
_NAMES = {**SPLIT_OF, WHOLE: WHOLE}

# 2^64 divided by the golden ratio: multiples of it fill a circle evenly, however many there are.
_GOLDEN = 0x9E3779B97F4A7C15


def parse_split(split: str) -> tuple[str, str]:
  """ "train[:90%]" → ("train", ":90%")."""
  match = re.fullmatch(r"(\w+)(?:\[([^\[\]]*)\])?", split)
  if not match or match[1] not in _NAMES:
    raise ValueError(
      f"split {split!r}: one of {', '.join(SPLITS)} was expected, with a slice where one is wanted "
      '("train[:90%]", "train[100:200]")'
    )
  return _NAMES[match[1]], match[2] or ":"


def part_slice(part: str, length: int) -> slice:
  """ ":90%" or "100:200" → a slice of so many examples."""
  bounds = part.split(":")
  if len(bounds) != 2:
    raise ValueError(f"slice [{part}]: [from:to] was expected, in examples or in percent")

  def bound(text: str) -> int | None:
    text = text.strip()
    if not text:
      return None
    number = re.fullmatch(r"(-?\d+)(%?)", text)
    if not number:
      raise ValueError(f"slice [{part}]: {text!r} is neither a number nor a percentage")
    return round(int(number[1]) * length / 100) if number[2] else int(number[1])

  return slice(bound(bounds[0]), bound(bounds[1]))


def spread_order(labels: np.ndarray) -> np.ndarray:
  """An order of which every beginning holds each class in proportion, to one example.

  Within a class it goes through the whole of its range from the start, in golden steps, so that a
  beginning is no run of neighbouring names. It follows from the labels alone.

  Args:
    labels: int `[N]`, not negative.

  Returns:
    A permutation, int64 `[N]`.
  """
  by_class = np.argsort(labels, kind="stable")
  label = np.asarray(labels)[by_class]
  counts = np.bincount(label) if len(label) else np.zeros(0, np.int64)
  rank = np.arange(len(label)) - (np.cumsum(counts) - counts)[label]
  turn = (rank + 1).astype(np.uint64) * np.uint64(_GOLDEN)
  visited = by_class[np.lexsort((turn, label))]
  return visited[np.lexsort((label, (rank + 0.5) / counts[label]))]


def sample_indices(length: int, count: int) -> list[int]:
  """`count` indices at even distances, all of them where there are fewer: an even sample.

  The first of a set sorted by class are all of one class; these are of as many as may be.
  """
  count = min(count, length)
  return [(2 * k + 1) * length // (2 * count) for k in range(count)]
