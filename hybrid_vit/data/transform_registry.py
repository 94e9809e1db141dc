"""What an operation of a transform is, and the names that strings may use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hybrid_vit.data.geometry import Plane

Example = dict[str, Any]
Transform = Callable[[Example, np.random.Generator], Example]


@dataclasses.dataclass(frozen=True)
class OnPlane:
  """An operation on the picture's plane: every key of it moves, by its kind.

  Attributes:
    draw: (height, width, generator) → what is drawn for a picture of that size; several planes are
      applied in their order.
  """

  draw: Callable[[int, int, np.random.Generator], Plane | Sequence[Plane]]


@dataclasses.dataclass(frozen=True)
class OnImages:
  """An operation that changes pictures only; several of one example get the same draws.

  Attributes:
    apply: (`[H, W, C]`, generator) → a picture of the same size.
    moves: it also moves what the picture shows, and no other key can follow: such keys are refused.
  """

  apply: Callable[[np.ndarray, np.random.Generator], np.ndarray]
  moves: bool = False


@dataclasses.dataclass(frozen=True)
class Later:
  """An operation that gives a `ScaledPicture`, which operations on the plane must follow.

  Attributes:
    apply: as any `(example, generator) → example`.
  """

  apply: Transform


REGISTRY: dict[str, Callable[..., Any]] = {}
# Given by `parse_transform`, not by the string, to the factories that ask for them.
GIVEN = ("decoder", "kinds")


def register_transform(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """Adds a factory, called with the string's arguments, to what strings may name.

  It returns an `OnPlane`, an `OnImages`, or any `(example, generator) → example`. One with a
  keyword `decoder` or `kinds` is given those of `parse_transform`.

      @register_transform("turn_half")
      def turn_half() -> OnPlane:
        return OnPlane(lambda height, width, rng: HalfTurn((height, width)))

      class HalfTurn(Plane):
        def image(self, image): return image[::-1, ::-1]
        def map(self, values, fill): return values[::-1, ::-1]
        def points(self, points): return np.array(self.size[::-1]) - points
  """

  def add(factory: Callable[..., Any]) -> Callable[..., Any]:
    if name in REGISTRY:
      raise ValueError(f"transform {name!r} is registered already")
    REGISTRY[name] = factory
    return factory

  return add


def only_key(kinds: Mapping[str, str], kind: str) -> str:
  """The one key of a task's examples that is of a kind.

  Raises:
    ValueError: none, or several.
  """
  found = [name for name, its in kinds.items() if its == kind]
  if len(found) != 1:
    raise ValueError(
      f"the task has {len(found)} keys of kind {kind!r} ({', '.join(found) or 'none'}); one was "
      "expected"
    )
  return found[0]


def value_of(example: Example, name: str) -> Any:
  """What an example has by a name.

  Raises:
    ValueError: nothing.
  """
  if name not in example:
    raise ValueError(f"the examples have no {name!r}; they have: {', '.join(sorted(example))}")
  return example[name]
