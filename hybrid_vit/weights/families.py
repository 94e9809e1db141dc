"""From a named architecture to the layouts of its checkpoints, and from a checkpoint to its names.

The networks of `hybrid_vit/models/<file>.py` have their layouts in
`hybrid_vit/weights/keymap_<file>.py`. The CLIPs of `models/clip_systems.py` are architectures, too.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from hybrid_vit.models.initialization import initial_variables
from hybrid_vit.weights import architectures
from hybrid_vit.weights.convert import (
  ImportReport,
  Layout,
  OfficialKey,
  export_weights,
  import_weights,
)

Weights = Mapping[str, np.ndarray]
Shapes = dict[str, jax.ShapeDtypeStruct]

# A family whose names cover less of a checkpoint than this is not spoken of.
_LEAST_LIKENESS = 0.5
# How many variants of a family are held to a checkpoint, the nearest in size first.
_MOST_VARIANTS = 8


@dataclasses.dataclass(frozen=True)
class Imported:
  """A checkpoint's numbers in one of our networks.

  Attributes:
    variables: {"params", "batch_stats"}, NumPy arrays.
    layout: name of the layout that the checkpoint was read by.
    num_classes: of the network that was built.
    arguments: of the network, where they replace the registry's.
    report: what became of each tensor.
  """

  variables: dict[str, Any]
  layout: str
  num_classes: int
  arguments: dict[str, Any]
  report: ImportReport


def layouts(architecture: str) -> dict[str, Layout]:
  """Layouts of an architecture's checkpoints, "official" first.

  Raises:
    ValueError: for an unknown name, or a family without a key map.
  """
  return _layouts_in(_key_map_module(architecture), architecture)


def _layouts_in(module: str, architecture: str) -> dict[str, Layout]:
  if importlib.util.find_spec(module) is None:
    raise ValueError(f"{architecture} has no key map yet: {module} does not exist")
  return importlib.import_module(module).LAYOUTS


def families() -> dict[str, list[str]]:
  """Module of a family's networks → its architectures; only families that have a key map."""
  found: dict[str, list[str]] = {}
  for name, module in architectures.all_architectures().items():
    if importlib.util.find_spec(_key_map_module(name)) is not None:
      found.setdefault(module, []).append(name)
  return found


def import_checkpoint(
  weights: Weights,
  architecture: str,
  *,
  num_classes: int | None = None,
  layout: str | None = None,
  arguments: Mapping[str, Any] | None = None,
) -> Imported:
  """Puts a checkpoint's tensors into an architecture, each name used exactly once.

  Args:
    weights: name to array, as `readers.read_checkpoint` gives them.
    architecture: name in the registry, or of a CLIP.
    num_classes: None for that of the checkpoint's head (0 where it has none). Another number begins
      the head anew; 0 leaves it out. The embedding of a CLIP is as wide as the checkpoint's.
    layout: None for the one whose names fit best.
    arguments: attributes of the network that replace the registry's and what the checkpoint's
      names say of them.

  Raises:
    ValueError: the checkpoint is of another network; the message gives every difference, and says
      which registered architecture it is of where that can be found.
  """
  arguments = dict(arguments or {})
  name, found = _detect(weights, architecture, layout, arguments)
  arguments = (
    layouts(architecture)[name].arguments(architectures.build(architecture), found) | arguments
  )
  in_file = _classes_in(weights, architecture, layouts(architecture)[name], arguments)
  if architectures.is_clip(architecture) and num_classes not in (None, in_file):
    raise ValueError(
      f"{architecture} has an embedding ({in_file} wide), not {num_classes} classes: a classifier "
      f"begins from its image tower, {architectures.image_tower(architecture)}"
    )
  classes = in_file if num_classes is None else num_classes
  chosen, anew = layouts(architecture)[name], in_file != classes
  model = architectures.build(architecture, num_classes=classes, **arguments)
  found = _without_constants(found, chosen, model)
  shapes = _shapes(architecture, classes, _frozen(arguments))
  template: dict[str, Any] = traverse_util.unflatten_dict(shapes, sep="/")
  head: set[str] = set()
  if anew and classes:
    head = set(shapes) - set(_shapes(architecture, 0, _frozen(arguments)))
    key_map = chosen.key_map(model)
    head -= {path for path in head if _shape_in(found, key_map(path)) == shapes[path].shape}
    size = architectures.preprocessing_of(architecture).image_size
    template = with_new_leaves(template, model, head, size)
  elif anew:
    # The head's names stay in the report as unused.
    whole = architectures.build(architecture, num_classes=in_file, **arguments)
    head = set(_shapes(architecture, in_file, _frozen(arguments))) - set(shapes)
    head = {name for path in head for name in chosen.key_map(whole)(path).names}
  pattern = "|".join(f"^{re.escape(path)}$" for path in head) or r"(?!)"
  try:
    variables, report = import_weights(
      found, template, chosen.key_map(model), may_initialise=pattern, may_ignore=pattern
    )
  except ValueError as error:
    raise ValueError(f"{architecture}, layout {name!r}: {error}{_whose(weights)}") from error
  variables.setdefault("batch_stats", {})
  return Imported(variables, name, classes, arguments, report)


def export_checkpoint(
  variables: Mapping[str, Any], architecture: str, model: nn.Module, layout: str = "official"
) -> dict[str, np.ndarray]:
  """The authors' names and layouts, with what their strict loaders ask for beside the weights.

  Args:
    variables: {"params", "batch_stats"} of `model`.
    architecture: its name, for messages.
    model: the network, with its own arguments.
    layout: one of `layouts(architecture)`.

  Raises:
    ValueError: for an unknown layout, or variables that share a name in it.
  """
  known = _layouts_in(_key_map_of(type(model).__module__), architecture)
  if layout not in known:
    raise ValueError(f"{architecture} has no layout {layout!r}; it has: {', '.join(known)}")
  key_map = known[layout].key_map(model)
  collections = {c: variables.get(c) or {} for c in ("params", "batch_stats")}
  exported = export_weights(collections, key_map)
  paths = traverse_util.flatten_dict(collections, sep="/")
  if len(exported) != sum(len(key_map(path).names) for path in paths):
    raise ValueError(f"{architecture}: two variables share one name in the layout {layout!r}")
  return {**with_counters(exported), **known[layout].constants(model)}


def with_counters(weights: Weights) -> dict[str, np.ndarray]:
  """The same with PyTorch's counter beside each batch norm, which strict loaders ask for."""
  means = [name for name in weights if name.endswith(".running_mean")]
  counters = [name.removesuffix("running_mean") + "num_batches_tracked" for name in means]
  return {**weights, **{name: np.zeros((), np.int64) for name in counters}}


def with_new_leaves(
  variables: Mapping[str, Any], model: nn.Module, paths: Collection[str], image_size: int
) -> dict[str, Any]:
  """Variables of an image network with newly drawn numbers for some leaves, such as its head.

  Args:
    variables: {"params", "batch_stats"} of `model`, whatever stands in these places.
    model: whose `init` draws them, from key 0.
    paths: of the leaves, "params/head/kernel".
    image_size: of the pictures that `init` is traced with.
  """

  @jax.jit
  def draw(key: jax.Array) -> dict[str, jax.Array]:
    # Whatever these leaves do not need is not computed.
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    flat = traverse_util.flatten_dict(initial_variables(model, key, images), sep="/")
    return {path: flat[path] for path in paths}

  flat = traverse_util.flatten_dict(dict(variables), sep="/")
  drawn = jax.device_get(draw(jax.random.key(0)))
  return traverse_util.unflatten_dict({**flat, **drawn}, sep="/")


def identify(weights: Weights) -> tuple[list[str], str]:
  """Which registered architectures a checkpoint is of, by its names and shapes.

  Returns:
    (architectures, family): several where entries differ in nothing that a checkpoint shows, such
    as the input size; none where no variant of the likeliest family fits every shape. The family is
    "" where no family's names cover half of the checkpoint's.
  """
  best: tuple[float, str, str] = (0.0, "", "")
  for family, names in families().items():
    for layout_name, layout in layouts(names[0]).items():
      # The variant of nearly as many numbers has nearly the same names.
      nearest = _by_size(names, weights)[0]
      likeness = _likeness(weights, nearest, layout)
      if likeness > best[0]:
        best = (likeness, family, layout_name)
  likeness, family, layout_name = best
  if likeness < _LEAST_LIKENESS:
    return [], ""
  for architecture in _by_size(families()[family], weights)[:_MOST_VARIANTS]:
    layout = layouts(architecture)[layout_name]
    if _fits_whole(weights, architecture, layout):
      size = architectures.parameters_of(architecture)
      alike = [n for n in families()[family] if architectures.parameters_of(n) == size]
      return [n for n in alike if _fits_whole(weights, n, layout)], family
  return [], family


def _whose(weights: Weights) -> str:
  found, family = identify(weights)
  if found:
    return f"\nThese names and shapes are those of {' or '.join(found)}: --arch={found[0]}"
  if family:
    return f"\nThese names are of the family {family.rsplit('.', 1)[1]}, in no registered size"
  return "\nThese names are of no registered architecture"


def _key_map_module(architecture: str) -> str:
  return _key_map_of(architectures.module_of(architecture))


def _key_map_of(module: str) -> str:
  return f"hybrid_vit.weights.keymap_{module.rsplit('.', 1)[1]}"


def _named(weights: Weights, layout: Layout) -> dict[str, np.ndarray]:
  """The tensors that are weights, under the names that the key map knows."""
  renamed = {layout.rename(name): value for name, value in weights.items()}
  return {k: v for k, v in renamed.items() if not re.search(layout.not_weights, k)}


def _without_constants(weights: Weights, layout: Layout, model: nn.Module) -> dict[str, np.ndarray]:
  """Leaves out the tensors that are the same in every checkpoint of this network."""
  constants = layout.constants(model)
  return {
    name: value
    for name, value in weights.items()
    if name not in constants or not np.array_equal(value, constants[name])
  }


def _detect(
  weights: Weights, architecture: str, layout: str | None, arguments: Mapping[str, Any]
) -> tuple[str, dict[str, np.ndarray]]:
  """The layout asked for, or the one with the most names in common; and the weights by it."""
  known = layouts(architecture)
  if layout is not None and layout not in known:
    raise ValueError(f"{architecture} has no layout {layout!r}; it has: {', '.join(known)}")
  counts: dict[str, int] = {}
  for name in [layout] if layout is not None else list(known):
    expected = _names(_keys(architecture, known[name], None, arguments))
    counts[name] = len(expected & set(_named(weights, known[name])))
  best = max(counts, key=lambda name: counts[name])
  if not counts[best]:
    raise ValueError(
      f"none of the checkpoint's names is one of {architecture} (layouts: {', '.join(known)}); it "
      f"has, e.g., {', '.join(list(weights)[:3])}{_whose(weights)}"
    )
  return best, _named(weights, known[best])


def _keys(
  architecture: str,
  layout: Layout,
  num_classes: int | None = None,
  arguments: Mapping[str, Any] | None = None,
) -> Iterator[tuple[str, OfficialKey]]:
  """Path and key of each variable; nothing where the layout does not know this network."""
  arguments = arguments or {}
  model = architectures.build(architecture, num_classes=num_classes, **arguments)
  try:
    key_map = layout.key_map(model)
    keys = [(p, key_map(p)) for p in _shapes(architecture, num_classes, _frozen(arguments))]
  except ValueError:
    return
  yield from keys


def _classes_in(
  weights: Weights, architecture: str, layout: Layout, arguments: Mapping[str, Any]
) -> int:
  """Width of the checkpoint's head; 0 where it has none."""
  named, prefix = _named(weights, layout), architectures.head_prefix(architecture)
  for path, key in _keys(architecture, layout, None, arguments):
    shape = _shape_in(named, key) if path.startswith(prefix) else None
    if shape:
      return shape[-1]
  return 0


def _likeness(weights: Weights, architecture: str, layout: Layout) -> float:
  """Part of the names that a checkpoint and an architecture have in common."""
  named = set(_named(weights, layout))
  expected = _names(_keys(architecture, layout))
  return len(named & expected) / max(len(named | expected), 1)


def _fits_whole(weights: Weights, architecture: str, layout: Layout) -> bool:
  named = _named(weights, layout)
  arguments = layout.arguments(architectures.build(architecture), named)
  classes = _classes_in(weights, architecture, layout, arguments)
  keys = list(_keys(architecture, layout, classes, arguments))
  model = architectures.build(architecture, num_classes=classes, **arguments)
  named = _without_constants(named, layout, model)
  shapes = _shapes(architecture, classes, _frozen(arguments))
  return _names(keys) == set(named) and all(
    _shape_in(named, key) == shapes[path].shape for path, key in keys
  )


def _names(keys: Iterable[tuple[str, OfficialKey]]) -> set[str]:
  return {name for _, key in keys for name in key.names}


def _shape_in(weights: Weights, key: OfficialKey) -> tuple[int, ...] | None:
  """Shape that our leaf takes from a checkpoint; None where it lacks it or has another rank."""
  if not all(name in weights for name in key.names):
    return None
  try:
    return key.read(weights).shape
  except (ValueError, IndexError):
    return None


def _by_size(names: list[str], weights: Weights) -> list[str]:
  """Architectures, the one whose published parameters are nearest to the checkpoint's first."""
  total = sum(value.size for value in weights.values())
  return sorted(names, key=lambda name: abs((architectures.parameters_of(name) or 0) - total))


@functools.lru_cache(maxsize=256)
def _shapes(
  architecture: str, num_classes: int | None, arguments: tuple[tuple[str, Any], ...]
) -> Shapes:
  """Path to shape and dtype of every variable, at the entry's own input size."""
  model = architectures.build(architecture, num_classes=num_classes, **dict(arguments))
  return traverse_util.flatten_dict(architectures.shapes_of(architecture, model), sep="/")


def _frozen(arguments: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
  def freeze(value: Any) -> Any:
    return tuple(map(freeze, value)) if isinstance(value, (list, tuple)) else value

  return tuple(sorted((name, freeze(value)) for name, value in arguments.items()))
