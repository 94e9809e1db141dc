"""Checks of what a transform's string gives as arguments: errors that name the argument.

Each returns the value in its type or raises ValueError: what it is, and what would be right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def whole(name: str, value: Any, least: int = 1) -> int:
  """A whole number of at least `least`."""
  if not _is_whole(value) or value < least:
    raise ValueError(f"{name} is {value!r}; a whole number of at least {least} was expected")
  return value


def number(name: str, value: Any, low: float, high: float = math.inf) -> float:
  """A finite number in [low, high]."""
  if not _is_number(value) or not low <= value <= high or math.isinf(value):
    upper = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"of at least {low:g}"
    raise ValueError(f"{name} is {value!r}; a number {upper} was expected")
  return float(value)


def positive(name: str, value: Any) -> float:
  """A finite number above 0."""
  if not _is_number(value) or not 0 < value < math.inf:
    raise ValueError(f"{name} is {value!r}; a number above 0 was expected")
  return float(value)


def deviation(name: str, value: Any) -> float:
  """A number of at least 0, or "inf"."""
  if value == "inf":
    return math.inf
  if not _is_number(value) or not value >= 0:
    raise ValueError(f"{name} is {value!r}; a number of at least 0 or 'inf' was expected")
  return float(value)


def rising(name: str, value: Any, high: float = math.inf) -> tuple[float, float]:
  """Two numbers above 0 and up to `high`, the second not below the first."""
  pair = _items(value)
  if len(pair) != 2 or not all(map(_is_number, pair)) or not 0 < pair[0] <= pair[1] <= high:
    upper = f", at most {high:g}," if math.isfinite(high) else ""
    raise ValueError(f"{name} is {value!r}; a rising pair of numbers above 0{upper} was expected")
  if math.isinf(pair[1]):
    raise ValueError(f"{name} is {value!r}; finite numbers were expected")
  return float(pair[0]), float(pair[1])


def sides(name: str, value: Any) -> tuple[int, int]:
  """One whole number for both sides, or (height, width)."""
  pair = (value, value) if isinstance(value, int) else _items(value)
  if len(pair) != 2 or not all(_is_whole(n) and n > 0 for n in pair):
    raise ValueError(f"{name} is {value!r}; a whole number from 1 or (height, width) was expected")
  return pair[0], pair[1]


def wholes(name: str, value: Any) -> tuple[int, ...]:
  """One or more whole numbers above 0."""
  many = (value,) if _is_whole(value) else _items(value)
  if not many or not all(_is_whole(n) and n > 0 for n in many):
    raise ValueError(f"{name} is {value!r}; whole numbers from 1 were expected")
  return many


def colour(name: str, value: Any) -> tuple[int, int, int]:
  """(red, green, blue), each 0 to 255."""
  three = _items(value)
  if len(three) != 3 or not all(_is_whole(n) and 0 <= n <= 255 for n in three):
    raise ValueError(f"{name} is {value!r}; (red, green, blue) of 0 to 255 was expected")
  return three[0], three[1], three[2]


def channels(name: str, value: Any) -> tuple[float, ...]:
  """One number for each of the three channels, or one for all of them."""
  many = (value,) if _is_number(value) else _items(value)
  if len(many) not in (1, 3) or not all(_is_number(n) and math.isfinite(n) for n in many):
    raise ValueError(f"{name} is {value!r}; a number, or one for each of 3 channels was expected")
  return tuple(map(float, many))


def choice(name: str, value: Any, among: Sequence[str]) -> str:
  """One of the words."""
  if value not in among:
    raise ValueError(f"{name} {value!r} is not one of {', '.join(among)}")
  return value


def _items(value: Any) -> tuple[Any, ...]:
  return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else ()


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
