"""The order of classes, and whether two sets of data mean the same classes by their numbers."""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# What data and weights say of their classes: of pictures, of maps and of objects.
CLASS_NAMES = ("class_names", "map_class_names", "object_class_names")
# These, and what else tasks ask for.
CLASS_FACTS = (*CLASS_NAMES, "palette", "category_ids", "thing_classes")

_AROUND = 3  # names shown on either side of a difference


class ClassesError(ValueError):
  """Two sets of data give their numbers to different classes."""


def class_facts(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """Of what lies beside weights that which data of the same classes would say."""
  return {name: metadata[name] for name in CLASS_FACTS if metadata.get(name)}


def sort_classes(names: Iterable[str]) -> list[str]:
  """The order in which folders' names are numbered: as numbers if all are, else alphabetical."""
  names = set(names)
  if all(name.isascii() and name.isdecimal() for name in names):
    return sorted(names, key=lambda name: (int(name), name))
  return sorted(names)


def names_or_numbers(names: Sequence[str], count: int) -> tuple[str, ...]:
  """The names, or where there are none "class 0" and so on."""
  return tuple(names) or tuple(f"class {i}" for i in range(count))


def check_same_classes(expected: Sequence[str], found: Sequence[str], what: str) -> None:
  """Raises where two lists of class names do not mean the same classes in the same order.

  ImageNet's classes are known under their WordNet numbers ("n01440764", also TFDS's names), under
  all of their words ("tench, Tinca tinca") and under the first of them ("tench"), in parts of
  ImageNet too; and, where there are all 1,000, under plain numbers from 0.

  Args:
    expected: e.g. the training data's, or the weights'.
    found: those to be compared.
    what: whose `found` are, for the message: "evaluation set 'validation'".

  Raises:
    ClassesError: they differ, in number, names or order; the message shows both lists.
  """
  expected, found = list(expected), list(found)
  if expected == found:
    return
  if len(expected) == len(found):
    different = [
      i for i, (a, b) in enumerate(zip(expected, found)) if not _same(a, b, len(found), i)
    ]
    if not different:
      return
    first = different[0]
  else:
    first = next(
      (i for i, (a, b) in enumerate(zip(expected, found)) if a != b),
      min(len(expected), len(found)),
    )
  if len(expected) != len(found):
    kind = f"there are {len(found):,} where {len(expected):,} were expected"
  elif sorted(expected) == sorted(found):
    kind = "they are the same in another order, which numbers them otherwise"
  else:
    kind = f"{len(different):,} of {len(found):,} differ"
  raise ClassesError(
    f"the classes of {what} are not those expected: {kind}; the first difference is at number "
    f"{first}.\n  expected: {_shown(expected, first)}\n  found:    {_shown(found, first)}"
  )


def matching_classes(old: Sequence[str], new: Sequence[str]) -> np.ndarray:
  """For each of `new`, its number in `old`, -1 where it is not there; int64 `[len(new)]`.

  A name counts as another one where both are the same class of ImageNet and of no second one.
  """
  number = {name: i for i, name in enumerate(old)}
  by_meaning: dict[str, int] = {}
  for i, name in enumerate(old):
    if len(meanings := _meanings(name)) == 1:
      by_meaning.setdefault(next(iter(meanings)), i)

  def find(name: str) -> int:
    meanings = _meanings(name)
    fallback = by_meaning.get(next(iter(meanings)), -1) if len(meanings) == 1 else -1
    return number.get(name, fallback)

  return np.array([find(name) for name in new], np.int64)


def wordnet_numbers() -> tuple[str, ...]:
  """Of the 1,000 classes of ImageNet-1K, in their order."""
  return tuple(_imagenet()[0])


def _same(a: str, b: str, count: int, number: int) -> bool:
  if a == b:
    return True
  one, other = _meanings(a), _meanings(b)
  if one & other:
    return True
  numbers, _ = _imagenet()
  if count != len(numbers):
    return False
  plain = str(number)
  return (a == plain and numbers[number] in other) or (b == plain and numbers[number] in one)


def _meanings(name: str) -> frozenset[str]:
  """The WordNet numbers that a name may stand for; empty for a name that is none of ImageNet's."""
  _, meanings = _imagenet()
  return meanings.get(name, frozenset())


@functools.cache
def _imagenet() -> tuple[list[str], dict[str, frozenset[str]]]:
  """The WordNet numbers in order, and each name → the numbers that it may stand for."""
  resource = importlib.resources.files("hybrid_vit.data") / "embedded" / "imagenet1k_classes.txt"
  numbers, meanings = [], dict[str, frozenset[str]]()
  for line in resource.read_text().splitlines():
    number, _, words = line.partition("\t")
    numbers.append(number)
    for name in {number, words, words.partition(",")[0]}:
      meanings[name] = meanings.get(name, frozenset()) | {number}
  return numbers, meanings


def _shown(names: Sequence[str], first: int) -> str:
  start, end = max(0, first - _AROUND), min(len(names), first + _AROUND + 1)
  shown = ", ".join(repr(name) for name in names[start:end])
  before = f"({start:,} names), " if start else ""
  after = f", ({len(names) - end:,} more)" if end < len(names) else ""
  return (before + shown + after) if shown else f"(only {len(names):,} names)"
