"""Configurations: a page of plain Python, and a reader that tolerates no field that nobody reads.

A file in `configs/` defines `get_config(argument)`. What follows the colon in
`--config=configs/moat.py:moat_1,batch_size=512` is that argument; `parse_argument` splits it. The
run reads the result through `Config`, which remembers what was asked for, so that a misspelt or
forgotten field is an error that names its neighbour instead of a silent default.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import inspect
import json
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import ml_collections

from hybrid_vit.literals import literal

_REQUIRED: Any = object()

_T = TypeVar("_T")


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

  def groups(self, name: str) -> list[Config]:
    """A field that is a list of groups; [] where it is absent.

    Each keeps a record of its own: call `assert_all_read` of it when it has been read.
    """
    found = self.get(name, ())
    if not isinstance(found, tuple) or not all(isinstance(item, Mapping) for item in found):
      raise ConfigError(
        f"`{self._path}.{name}` is {found!r}; a list of groups was expected, e.g. "
        "(dict(...), dict(...))"
      )
    return [Config(item, f"{self._path}.{name}[{k}]") for k, item in enumerate(found)]

  def nothing(self, name: str) -> Config:
    """A group without fields, for what may be given and was not."""
    return Config({}, f"{self._path}.{name}")

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

  def integer(self, name: str, default: Any = _REQUIRED, *, minimum: int | None = None) -> Any:
    """A whole number (None where the default is None and nothing was given).

    Raises:
      ConfigError: another type, or below `minimum`.
    """
    return self._bounded(name, self.typed(name, int, default), minimum, None)

  def number(
    self,
    name: str,
    default: Any = _REQUIRED,
    *,
    minimum: float | None = None,
    above: float | None = None,
  ) -> Any:
    """A number as float (None where the default is None and nothing was given).

    Raises:
      ConfigError: another type, below `minimum`, or not above `above`.
    """
    return self._bounded(name, self.typed(name, float, default), minimum, above)

  def flag(self, name: str, default: Any = _REQUIRED) -> bool:
    """True or False."""
    return self.typed(name, bool, default)

  def text(self, name: str, default: Any = _REQUIRED) -> Any:
    """A string (None where the default is None and nothing was given)."""
    return self.typed(name, str, default)

  def typed(self, name: str, kind: Any, default: Any = _REQUIRED) -> Any:
    """The field as a value of `kind`: a type, or what a dataclass's annotation says.

    Raises:
      ConfigError: it is of another type; the message names the field and both types.
    """
    value = self.get(name, default)
    return value if value is default else _converted(value, kind, f"{self._path}.{name}")

  def _bounded(self, name: str, value: Any, minimum: Any, above: Any) -> Any:
    if value is not None:
      if minimum is not None and not value >= minimum:
        raise ConfigError(f"`{self._path}.{name}` is {value}; at least {minimum} was expected")
      if above is not None and not value > above:
        raise ConfigError(f"`{self._path}.{name}` is {value}; more than {above} was expected")
    return value

  def as_dataclass(self, cls: type[_T], **given: Any) -> _T:
    """The group as an instance of a dataclass, whose fields are those of the group.

    A field that is None has its default, but where None is one of the values that it may have.

    Args:
      cls: a dataclass; fields without a default are needed.
      **given: fields that come from elsewhere and are not read here.

    Raises:
      ConfigError: a field is missing or of another type.
    """
    hints = typing.get_type_hints(cls)
    values = dict(given)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
      if field.name in given:
        continue
      needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
      value = self.typed(field.name, hints[field.name], _REQUIRED if needed else None)
      meant = field.name in self._values and type(None) in typing.get_args(hints[field.name])
      if value is not None or meant:
        values[field.name] = value
    return cls(**values)

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


def _converted(value: Any, kind: Any, path: str) -> Any:
  """`value` as `kind`; whole numbers serve as floats, and floats without a fraction as integers."""
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    if value is None and type(None) in inner:
      return None
    options = [option for option in inner if option is not type(None)]
    for option in options:
      try:
        return _converted(value, option, path)
      except ConfigError:
        if option is options[-1]:
          raise
  kind = origin or kind
  if kind in (Any, object):
    return value.as_dict() if isinstance(value, Config) else value
  if dataclasses.is_dataclass(kind):
    if isinstance(value, Config):
      return value.as_dataclass(kind)  # type: ignore[arg-type]
  elif isinstance(value, Config):
    if issubclass(kind, Mapping) or kind is dict:
      return value.as_dict()
  elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
    return float(value)
  elif kind is int and isinstance(value, (int, float)) and not isinstance(value, bool):
    if value == int(value):
      return int(value)
  elif kind is tuple and isinstance(value, (tuple, list)):
    return tuple(value)
  elif isinstance(kind, type) and isinstance(value, kind):
    return value
  expected = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    tuple: "a tuple",
  }.get(kind, "a group of fields, e.g. dict(...)")
  shown = value.resolved() if isinstance(value, Config) else value
  raise ConfigError(f"`{path}` is {shown!r}; {expected} was expected")


def set_field(config: ml_collections.ConfigDict, name: str, text: str) -> None:
  """`--config.data.batch_size=64` → the field, whether the file spells it or not.

  A field that nothing reads is found later, by `Config.assert_all_read`.

  Args:
    config: changed in place.
    name: the field's path, "data.batch_size".
    text: a Python literal; a text where it is none, or where the file has a text.

  Raises:
    ConfigError: the file has a value of another kind there, or no group where one is needed.
  """
  *groups, last = name.split(".")
  group: Any = config
  for position, part in enumerate(groups):
    if part not in group or group[part] is None:
      with group.unlocked():
        group[part] = ml_collections.ConfigDict()
    group = group[part]
    if not isinstance(group, ml_collections.ConfigDict):
      path = ".".join(("config", *groups[: position + 1]))
      raise ConfigError(f"`{path}` is {group!r}, which has no field {last!r}")
  old = group.get(last) if last in group else None
  is_text = last in group and group.get_type(last) is str
  value = text if is_text and text.lower() != "none" else literal(text)
  if isinstance(old, ml_collections.ConfigDict) and not isinstance(value, Mapping):
    raise ConfigError(f"`config.{name}` is a group of fields; give one of them, or a dict")
  if old is not None and value is not None:
    kind: Any = type(old)
    # A whole number in the file may stand for any number; the reader knows which it wants.
    if isinstance(old, int) and not isinstance(old, bool):
      kind = float | int
    if not isinstance(old, ml_collections.ConfigDict):
      value = _converted(value, kind, f"config.{name}")
      if isinstance(value, float) and isinstance(old, int) and value == int(value):
        value = int(value)
  with group.unlocked(), group.ignore_type():
    group[last] = value


def set_fields(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> None:
  """Fields by their paths, see `set_field`; values are those that a command line would give."""
  for name, value in values.items():
    set_field(config, name, value if isinstance(value, str) else repr(value))


def as_flags(values: Mapping[str, Any]) -> str:
  """The same as a command line has them, for people."""
  return " ".join(f"--config.{name}={value}" for name, value in values.items())


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
  argument: str | None,
  variants: Iterable[str],
  default: str,
  *,
  runlocal_keys: Iterable[str] = (),
  **fields: Any,
) -> tuple[str, dict[str, Any]]:
  """Splits the text after the colon of `--config=file.py:variant,key=value,…`.

  Args:
    argument: that text, or None.
    variants: the variants the file offers.
    default: the variant where none is named.
    runlocal_keys: those of the fields that the file's local tries read (variants that begin with
      "runlocal"); the others they set themselves.
    **fields: the keys the file offers and their defaults; a given value is read as a Python
      literal, and as text where it is none.

  Returns:
    The variant and all keys with their values.

  Raises:
    ConfigError: an unknown variant or key, naming the closest one; or a key that a local try would
      not read.
  """
  variants = list(variants)
  variant, values = default, dict(fields)
  given = []
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
    values[key] = literal(text)
    given.append(key)
  taken = list(runlocal_keys)
  unread = [key for key in given if key not in taken]
  if variant.startswith("runlocal") and unread:
    raise ConfigError(
      f"{variant} is a local try with {', '.join(unread)} of its own; after the colon it takes "
      f"{', '.join(taken) or 'no key'}, and any field as --config.FIELD=… behind it"
    )
  return variant, values


def load_config(path: str | Path, argument: str | None = None) -> ml_collections.ConfigDict:
  """Runs `get_config` of a file in `configs/`: for notebooks and tests; `main` takes flags.

  Raises:
    ConfigError: no such file, or its code fails; the message says in which line.
  """
  path, module = _load_file(path)
  return _called(path, module, "get_config", argument)


def load_sweep(
  path: str | Path, argument: str | None = None
) -> list[tuple[dict[str, Any], ml_collections.ConfigDict]]:
  """The configurations of a file's `sweep()`, which may take the argument that `get_config` takes.

  Returns:
    For each the fields that it sets ({} for a whole ConfigDict), and the configuration.

  Raises:
    ConfigError: no `sweep()`, an entry that is no dict, or a field of another kind than the file's;
      see `load_config`.
  """
  path, module = _load_file(path)
  if not hasattr(module, "sweep"):
    raise ConfigError(
      f"{path} has no `sweep()`: a function beside `get_config` that returns a list of dicts was "
      "expected, e.g. [{'optimizer.learning_rate': 1e-3}, {'optimizer.learning_rate': 1e-4}]"
    )
  with _errors_of(path):
    takes = inspect.signature(module.sweep).parameters
    entries = list(module.sweep(argument) if takes else module.sweep())
  found: list[tuple[dict[str, Any], ml_collections.ConfigDict]] = []
  for number, entry in enumerate(entries):
    if isinstance(entry, ml_collections.ConfigDict):
      found.append(({}, entry))
      continue
    if not isinstance(entry, Mapping) or not all(isinstance(name, str) for name in entry):
      raise ConfigError(
        f"`sweep()` of {path}: entry {number} is {entry!r}; a dict of fields was expected, or a "
        "ConfigDict"
      )
    config = _called(path, module, "get_config", argument)
    set_fields(config, entry)
    found.append((dict(entry), config))
  return found


def _called(
  path: Path, module: types.ModuleType, name: str, argument: str | None
) -> ml_collections.ConfigDict:
  """A configuration from a function of a file."""
  function = getattr(module, name, None)
  if not callable(function):
    raise ConfigError(f"{path} has no `{name}()`, which returns the configuration")
  with _errors_of(path):
    found = function(argument) if argument is not None else function()
  if not isinstance(found, ml_collections.ConfigDict):
    raise ConfigError(
      f"`{name}()` of {path} returns {type(found).__name__}; a ConfigDict was expected"
    )
  return found


def _load_file(path: str | Path) -> tuple[Path, types.ModuleType]:
  # Looked for where `main` looks, so that one file can load another from anywhere.
  from hybrid_vit.config_files import find_config

  path = find_config(str(path))
  spec = importlib.util.spec_from_file_location(f"hybrid_vit_config_{path.stem}", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  with _errors_of(path):
    spec.loader.exec_module(module)
  return path, module


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
  """Errors of a file's own code as one line that says where.

  What is wrong with a field or a file says that itself, and stays.
  """
  try:
    yield
  except (ConfigError, OSError):
    raise
  except SyntaxError as error:
    place = f", line {error.lineno}" if error.lineno else ""
    raise ConfigError(f"{error.filename or path}{place}: no Python: {error.msg}") from error
  except Exception as error:
    lines = [
      frame.lineno
      for frame in traceback.extract_tb(error.__traceback__)
      if frame.filename == str(path)
    ]
    # Without a line of its own it is the file's bytes that Python does not take.
    place = f"{path}, line {lines[-1]}" if lines else str(path)
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    raise ConfigError(f"{place}: {kind}{error}") from error
