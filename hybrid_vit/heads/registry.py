"""The tables of heads and necks: each file registers what it holds by a name.

A head makes one map of a feature pyramid, a neck another pyramid. Both know the levels that they
are given (`features`: name, stride and channels of each, the finest first) and no backbone.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn

from hybrid_vit.models.registry import FeatureSpec, closest_hint

# The modules that register heads and necks when imported.
_MODULES = (
  "hybrid_vit.heads.upernet",
  "hybrid_vit.heads.fcn",
  "hybrid_vit.heads.semantic_fpn",
  "hybrid_vit.heads.deeplab",
  "hybrid_vit.heads.segformer",
  "hybrid_vit.heads.mim_depth",
  "hybrid_vit.heads.dpt",
  "hybrid_vit.heads.glpn",
  "hybrid_vit.heads.adabins",
  "hybrid_vit.heads.fpn",
  "hybrid_vit.heads.feature_pyramid",
)

_HEADS: dict[str, type[nn.Module]] = {}
_NECKS: dict[str, type[nn.Module]] = {}
_ModuleT = TypeVar("_ModuleT", bound=type[nn.Module])
_MadeT = TypeVar("_MadeT", bound=Callable[..., Any])


def register_head(name: str) -> Callable[[_ModuleT], _ModuleT]:
  """Adds a module class, `head(endpoints, train) → [B, h, w, num_outputs]` float32, by `name`.

  Raises:
    ValueError: the name is taken.
  """
  return register_in(_HEADS, name, "head")


def register_neck(name: str) -> Callable[[_ModuleT], _ModuleT]:
  """Adds a module class, `neck(endpoints, train) → {name: map}` with `outputs`, by `name`.

  Raises:
    ValueError: the name is taken.
  """
  return register_in(_NECKS, name, "neck")


def head_names() -> list[str]:
  """Names of all heads."""
  _load()
  return sorted(_HEADS)


def neck_names() -> list[str]:
  """Names of all necks."""
  _load()
  return sorted(_NECKS)


def create_head(
  name: str, features: Sequence[FeatureSpec], num_outputs: int, **arguments: Any
) -> Any:
  """A head over a pyramid.

  Args:
    name: as registered.
    features: the levels that it reads.
    num_outputs: channels of its map: classes, or 1 of depth.
    **arguments: attributes that replace its own; lists become tuples.

  Raises:
    ValueError: an unknown name or attribute; the message gives the closest.
  """
  _load()
  return _create(_HEADS, "head", name, features, {"num_outputs": num_outputs, **arguments})


def create_neck(name: str, features: Sequence[FeatureSpec], **arguments: Any) -> Any:
  """A neck over a pyramid; see `create_head`."""
  _load()
  return _create(_NECKS, "neck", name, features, arguments)


def head_arguments(name: str) -> tuple[str, ...]:
  """Names of a head's attributes.

  Raises:
    ValueError: an unknown name.
  """
  _load()
  return _arguments(find_in(_HEADS, name, "head"))


def neck_arguments(name: str) -> tuple[str, ...]:
  """Names of a neck's attributes; see `head_arguments`."""
  _load()
  return _arguments(find_in(_NECKS, name, "neck"))


def register_in(table: dict[str, Any], name: str, kind: str) -> Callable[[_MadeT], _MadeT]:
  """Adds what it decorates to a table.

  Raises:
    ValueError: the name is taken.
  """

  def add(made: _MadeT) -> _MadeT:
    taken = table.get(name)
    # A notebook's cell, run again, defines its head anew.
    if taken is not None and taken.__module__ != made.__module__:
      raise ValueError(f"a {kind} named {name!r} is already registered")
    table[name] = made
    return made

  return add


def find_in(table: Mapping[str, Any], name: str, kind: str) -> Any:
  """What a table has by a name.

  Raises:
    ValueError: an unknown name; the message gives the closest.
  """
  if name not in table:
    raise ValueError(
      f"no {kind} is named {name!r}{closest_hint(name, table)}; there are: "
      f"{', '.join(sorted(table))}"
    )
  return table[name]


def check_arguments(given: Iterable[str], known: Sequence[str], name: str, kind: str) -> None:
  """Raises ValueError for the first argument that is not known; the message gives the closest."""
  for argument in given:
    if argument not in known:
      raise ValueError(
        f"{kind} {name!r} has no argument {argument!r}{closest_hint(argument, known)}; it has: "
        f"{', '.join(known)}"
      )


def as_attribute(value: Any) -> Any:
  """A value of a configuration as an attribute of a module: lists become tuples, inside, too."""
  if isinstance(value, Mapping):
    return {key: as_attribute(part) for key, part in value.items()}
  return tuple(map(as_attribute, value)) if isinstance(value, (list, tuple)) else value


def _create(
  table: Mapping[str, type[nn.Module]],
  kind: str,
  name: str,
  features: Sequence[FeatureSpec],
  arguments: Mapping[str, Any],
) -> Any:
  made = find_in(table, name, kind)
  check_arguments(arguments, _arguments(made), name, kind)
  levels = tuple(FeatureSpec(*level) for level in features)
  return made(features=levels, **{k: as_attribute(v) for k, v in arguments.items()})


def _arguments(module_class: type[nn.Module]) -> tuple[str, ...]:
  fields = dataclasses.fields(module_class)
  return tuple(f.name for f in fields if f.name not in ("parent", "name", "features"))


def _load() -> None:
  for module in _MODULES:
    importlib.import_module(module)
