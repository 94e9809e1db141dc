"""The tables of heads and necks: each file registers what it holds by a name.

A head makes one map of a feature pyramid, a neck another pyramid. Both know the levels that they
are given (`features`: name, stride and channels of each, the finest first) and no backbone.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn

from hybrid_vit.models.registry import FeatureSpec

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


def register_head(name: str) -> Callable[[_ModuleT], _ModuleT]:
  """Adds a module class, `head(endpoints, train) → [B, h, w, num_outputs]` float32, by `name`.

  Raises:
    ValueError: the name is taken.
  """
  return _register(_HEADS, name, "head")


def register_neck(name: str) -> Callable[[_ModuleT], _ModuleT]:
  """Adds a module class, `neck(endpoints, train) → {name: map}` with `outputs`, by `name`.

  Raises:
    ValueError: the name is taken.
  """
  return _register(_NECKS, name, "neck")


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
  return _arguments(_class(_HEADS, "head", name))


def neck_arguments(name: str) -> tuple[str, ...]:
  """Names of a neck's attributes; see `head_arguments`."""
  _load()
  return _arguments(_class(_NECKS, "neck", name))


def _register(
  table: dict[str, type[nn.Module]], name: str, kind: str
) -> Callable[[_ModuleT], _ModuleT]:
  def add(module_class: _ModuleT) -> _ModuleT:
    taken = table.get(name)
    # A notebook's cell, run again, defines its head anew.
    if taken is not None and taken.__module__ != module_class.__module__:
      raise ValueError(f"a {kind} named {name!r} is already registered")
    table[name] = module_class
    return module_class

  return add


def _create(
  table: Mapping[str, type[nn.Module]],
  kind: str,
  name: str,
  features: Sequence[FeatureSpec],
  arguments: Mapping[str, Any],
) -> Any:
  made = _class(table, kind, name)
  known = _arguments(made)
  for argument in arguments:
    if argument not in known:
      close = difflib.get_close_matches(argument, known, n=1, cutoff=0.5)
      hint = f"; did you mean {close[0]!r}?" if close else ""
      raise ValueError(
        f"{kind} {name!r} has no argument {argument!r}{hint}; it has: {', '.join(known)}"
      )
  levels = tuple(FeatureSpec(*level) for level in features)
  return made(features=levels, **{k: _as_attribute(v) for k, v in arguments.items()})


def _class(table: Mapping[str, type[nn.Module]], kind: str, name: str) -> type[nn.Module]:
  if name not in table:
    close = difflib.get_close_matches(name, list(table), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"no {kind} is named {name!r}{hint}; there are: {', '.join(sorted(table))}")
  return table[name]


def _arguments(module_class: type[nn.Module]) -> tuple[str, ...]:
  fields = dataclasses.fields(module_class)
  return tuple(f.name for f in fields if f.name not in ("parent", "name", "features"))


def _as_attribute(value: Any) -> Any:
  return tuple(map(_as_attribute, value)) if isinstance(value, (list, tuple)) else value


def _load() -> None:
  for module in _MODULES:
    importlib.import_module(module)
