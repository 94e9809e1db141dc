"""Configurations: a page of plain Python, and a reader that tolerates no field that nobody reads.

A file in `configs/` defines `get_config(argument)`. What follows the colon in
`--config=configs/moat.py:moat_1,batch_size=512` is that argument; `parse_argument` splits it. The
run reads the result through `Config`, which remembers what was asked for, so that a misspelt or
forgotten field is an error that names its neighbour instead of a silent default.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_collections

_REQUIRED = object()


class ConfigError(ValueError):
  """A configuration that cannot be run as it stands; the message names the field."""


def closest(name: str, candidates: Iterable[str]) -> str | None:
  """The candidate spelt most like `name`, or None where nothing is near."""
  matches = difflib.get_close_matches(name, sorted(set(candidates)), n=1, cutoff=0.5)
  return matches[0] if matches else None


class Config:
  """Read access to a ConfigDict that records every field that was asked for.

  `config.name` reads a required field, `config.get(name, default)` an optional one; a group of
  fields comes back as another `Config` that shares the record. Lists come back as tuples.
  """

  def __init__(self, values: Mapping[str, Any], path: str = "config", record: Any = None):
    if isinstance(values, ml_collections.ConfigDict):
      values = values.copy_and_resolve_references().to_dict()
    self._values = dict(values)
    self._path = path
    # Full path of every field asked for, whether it was there or not.
    self._asked: set[str] = set() if record is None else record

  def __getattr__(self, name: str) -> Any:
    if name.startswith("_"):
      raise AttributeError(name)
    return self.get(name, _REQUIRED)

  def __contains__(self, name: str) -> bool:
    self._asked.add(f"{self._path}.{name}")
    return self._values.get(name) is not None

  def get(self, name: str, default: Any = None) -> Any:
    """Returns the field, or `default` where it is absent or None.

    Raises:
      ConfigError: the field is required (read as an attribute) and absent.
    """
    full_name = f"{self._path}.{name}"
    self._asked.add(full_name)
    value = self._values.get(name)
    if value is None:
      if default is not _REQUIRED:
        return default
      near = closest(name, self._values)
      hint = f"; did you mean `{self._path}.{near}`, which is there?" if near else ""
      raise ConfigError(f"`{full_name}` is needed and was not given{hint}")
    if isinstance(value, Mapping):
      return Config(value, full_name, self._asked)
    return tuple(value) if isinstance(value, list) else value

  def group(self, name: str) -> Config:
    """The group of fields `name`; an empty one where it is absent."""
    found = self.get(name)
    if found is None:
      return Config({}, f"{self._path}.{name}", self._asked)
    if not isinstance(found, Config):
      raise ConfigError(
        f"`{self._path}.{name}` is {found!r}; a group of fields was expected, e.g. dict(...)"
      )
    return found

  def choice(self, name: str, choices: Iterable[str], default: Any = _REQUIRED) -> str:
    """A field that must be one of `choices`."""
    value = self.get(name, default)
    choices = list(choices)
    if value not in choices:
      near = closest(str(value), choices)
      hint = f"; did you mean {near!r}?" if near else ""
      raise ConfigError(
        f"`{self._path}.{name}` is {value!r}, which is not one of {', '.join(choices)}{hint}"
      )
    return value

  def names(self) -> tuple[str, ...]:
    """The names in this group, in the order of the file; none of them counts as read."""
    return tuple(self._values)

  def as_dict(self) -> dict[str, Any]:
    """The whole group as a plain dict, every field of it counted as read.

    For arguments that are handed on whole to a function which refuses unknown names itself.
    """
    self._mark(self._values, self._path)
    return dict(self._values)

  def resolved(self) -> dict[str, Any]:
    """The whole group as a plain dict for the record; nothing of it counts as read."""
    return dict(self._values)

  def _mark(self, values: Mapping[str, Any], path: str) -> None:
    for name, value in values.items():
      self._asked.add(f"{path}.{name}")
      if isinstance(value, Mapping):
        self._mark(value, f"{path}.{name}")

  def assert_all_read(self) -> None:
    """Raises ConfigError for the first field that nothing in the run asked for."""
    for full_name in _leaves(self._values, self._path):
      if full_name in self._asked:
        continue
      parent, _, name = full_name.rpartition(".")
      asked_here = [a.rpartition(".")[2] for a in self._asked if a.rpartition(".")[0] == parent]
      near = closest(name, asked_here)
      if near:
        hint = f"did you mean `{parent}.{near}`?"
      elif asked_here:
        hint = f"what this run reads in `{parent}`: {', '.join(sorted(asked_here))}"
      else:
        hint = f"this run reads nothing in `{parent}`"
      raise ConfigError(f"`{full_name}` is not read by anything in this run; {hint}")


def _leaves(values: Mapping[str, Any], path: str) -> Iterable[str]:
  for name, value in values.items():
    full_name = f"{path}.{name}"
    if isinstance(value, Mapping) and value:
      yield from _leaves(value, full_name)
    elif value is not None and value != {}:
      yield full_name


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """Fields that two resolved configurations do not have alike: "config.seed: 0, now 1"."""
  # As JSON has them, in which old ones are kept: lists for tuples.
  before, after = (json.loads(json.dumps(values, default=str)) for values in (old, new))
  found = []
  for full_name in dict.fromkeys((*_leaves(before, "config"), *_leaves(after, "config"))):
    values = [_value(tree, full_name) for tree in (before, after)]
    if values[0] != values[1]:
      found.append(f"{full_name}: {values[0]!r}, now {values[1]!r}")
  return found


def _value(values: Mapping[str, Any], full_name: str) -> Any:
  value: Any = values
  for name in full_name.split(".")[1:]:
    value = value.get(name) if isinstance(value, Mapping) else None
  return value


def parse_argument(
  argument: str | None, variants: Iterable[str], default: str, **fields: Any
) -> tuple[str, dict[str, Any]]:
  """Splits the text after the colon of `--config=file.py:variant,key=value,…`.

  Args:
    argument: that text, or None.
    variants: the variants the file offers.
    default: the variant where none is named.
    **fields: the keys the file offers and their defaults; a given value is read as a Python
      literal, and as text where it is none.

  Returns:
    The variant and all keys with their values.

  Raises:
    ConfigError: an unknown variant or key, naming the closest one.
  """
  variants = list(variants)
  variant, values = default, dict(fields)
  for position, part in enumerate(p.strip() for p in (argument or "").split(",") if p.strip()):
    key, equals, text = part.partition("=")
    if not equals:
      if position or part not in variants:
        near = closest(part, variants)
        hint = f"did you mean {near!r}?" if near else f"one of: {', '.join(variants)}"
        raise ConfigError(f"unknown variant {part!r} after the colon of --config; {hint}")
      variant = part
      continue
    if key not in fields:
      near = closest(key, fields)
      hint = f"did you mean {near!r}?" if near else f"one of: {', '.join(fields) or 'none'}"
      raise ConfigError(f"unknown key {key!r} after the colon of --config; {hint}")
    try:
      values[key] = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      values[key] = text
  return variant, values


def load_config(path: str | Path, argument: str | None = None) -> ml_collections.ConfigDict:
  """Runs `get_config` of a file in `configs/`: for notebooks and tests; `main` takes flags."""
  path = Path(path)
  if not path.is_file():
    raise ConfigError(f"no configuration file {str(path)!r}")
  spec = importlib.util.spec_from_file_location(f"hybrid_vit_config_{path.stem}", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument) if argument is not None else module.get_config()
