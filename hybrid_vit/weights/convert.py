"""Authors' weights to ours and back: strict, by one key map for each family of models.

A key map is a function from the path of one of our variables ("params/stem/conv_0/kernel") to the
`OfficialKey` that holds the same numbers in the authors' checkpoint.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

# How many differences an error spells out: those of a wrong network are hundreds.
_SHOWN = 10


def _same(x: np.ndarray) -> np.ndarray:
  return x


@dataclasses.dataclass(frozen=True)
class OfficialKey:
  """A tensor of the authors' checkpoint, and its layout.

  Attributes:
    name: in the checkpoint.
    to_ours: changes the authors' layout to ours.
    to_theirs: the inverse of `to_ours`.
    further: names of tensors of the same shape that follow the first on axis 0, where one of our
      leaves holds what lies apart there (query, key and value of a fused projection).
    aliases: names under which the checkpoint may repeat the first tensor; they are written, and
      where they are there, have to hold the same numbers.
  """

  name: str
  to_ours: Callable[[np.ndarray], np.ndarray] = _same
  to_theirs: Callable[[np.ndarray], np.ndarray] = _same
  further: tuple[str, ...] = ()
  aliases: tuple[str, ...] = ()

  @property
  def names(self) -> tuple[str, ...]:
    """All tensors that the leaf holds."""
    return (self.name, *self.further)

  def renamed(self, rename: Callable[[str], str]) -> OfficialKey:
    """The same tensor under another name, and so all that goes with it."""
    further, aliases = (tuple(map(rename, names)) for names in (self.further, self.aliases))
    return dataclasses.replace(self, name=rename(self.name), further=further, aliases=aliases)

  def below(self, prefix: str) -> OfficialKey:
    """The same tensor behind a prefix."""
    return self.renamed(prefix.__add__)

  def read(self, weights: Mapping[str, np.ndarray]) -> np.ndarray:
    """Our leaf from a checkpoint that has all of `names`."""
    tensors = [np.asarray(weights[name]) for name in self.names]
    return self.to_ours(np.concatenate(tensors) if self.further else tensors[0])

  def write(self, leaf: np.ndarray) -> dict[str, np.ndarray]:
    """The checkpoint's tensors from our leaf."""
    if not self.further:
      return dict.fromkeys((self.name, *self.aliases), self.to_theirs(leaf))
    return dict(zip(self.names, np.split(self.to_theirs(leaf), len(self.names))))


KeyMap = Callable[[str], OfficialKey]


@dataclasses.dataclass(frozen=True)
class Layout:
  """A way in which checkpoints of a family are written.

  `hybrid_vit.weights.keymap_<file>` holds `LAYOUTS: dict[str, Layout]` for the networks of
  `hybrid_vit/models/<file>.py`: "official" first, then where there are "timm" and "transformers".

  Attributes:
    key_map: from a network (`nn.Module`) to its key map; names may depend on its arguments.
    not_weights: pattern (`re.search`) of names that hold nothing trained, such as index tables;
      they are ignored on import.
    rename: other spellings of the same layout to the one that the key map knows, applied to all
      names at once before anything else.
    constants: from a network to the tensors that a strict loader of the authors' code asks for and
      that are no weights; written on export.
    arguments: from a network and a checkpoint's names to the network's attributes that have to be
      others for this checkpoint, such as a depth that published files do not agree in.
  """

  key_map: Callable[[Any], KeyMap]
  not_weights: str = r"(?!)"
  rename: Callable[[str], str] = str
  constants: Callable[[Any], dict[str, np.ndarray]] = lambda _: {}
  arguments: Callable[[Any, Iterable[str]], dict[str, Any]] = lambda model, names: {}


@dataclasses.dataclass
class ImportReport:
  """What became of the tensors.

  Attributes:
    loaded: paths of our variables that took the checkpoint's numbers.
    initialised: paths that kept the template's numbers, each with the reason.
    unused: names in the checkpoint that no variable asked for.
  """

  loaded: list[str] = dataclasses.field(default_factory=list)
  initialised: dict[str, str] = dataclasses.field(default_factory=dict)
  unused: list[str] = dataclasses.field(default_factory=list)

  def __str__(self) -> str:
    lines = [f"loaded: {len(self.loaded)} variables"]
    lines.append(f"initialised anew: {len(self.initialised)}")
    lines += [f"  {path}: {reason}" for path, reason in self.initialised.items()]
    lines.append(f"unused in the checkpoint: {len(self.unused)}")
    lines += [f"  {name}" for name in self.unused]
    return "\n".join(lines)


def import_weights(
  weights: Mapping[str, np.ndarray],
  template: Mapping[str, Any],
  key_map: KeyMap,
  *,
  may_initialise: str = r"(?!)",
  may_ignore: str = r"(?!)",
) -> tuple[dict[str, Any], ImportReport]:
  """Fills variables with the authors' numbers.

  Args:
    weights: name in the checkpoint to array, in the authors' layout.
    template: the model's variables, as `init` or `jax.eval_shape` of it gives them.
    key_map: of the model's family.
    may_initialise: pattern (`re.search`) of the paths of ours that may keep the template's numbers
      where the checkpoint has none, or has another shape; none by default.
    may_ignore: pattern of the checkpoint's names that may stay unused; none by default.

  Returns:
    (variables with the template's tree, shapes and dtypes, the report).

  Raises:
    ValueError: with the differences and the lengths of the three lists, where something is missing,
      misshapen or left over and the patterns do not allow it, or where a number is NaN or
      infinite.
  """
  report = ImportReport()
  filled: dict[str, Any] = {}
  asked: set[str] = set()
  wrong: list[str] = []
  for path, leaf in traverse_util.flatten_dict(dict(template), sep="/").items():
    key = key_map(path)
    asked.update(key.names, key.aliases)
    value, reason = None, ""
    absent = [name for name in key.names if name not in weights]
    if absent:
      reason = f"the checkpoint has no {absent[0]}"
    else:
      try:
        value = key.read(weights)
      except (ValueError, IndexError):  # Another rank than the layout has.
        shape = np.shape(weights[key.name])
        reason = f"{key.name} has shape {shape}, which is none of {tuple(leaf.shape)} there"
      if value is not None and value.shape != tuple(leaf.shape):
        reason = f"{key.name} has shape {value.shape}, the model {tuple(leaf.shape)}"
    wrong += [
      f"{name} is another tensor than {key.name}, which it repeats"
      for name in key.aliases
      if not absent and name in weights and not np.array_equal(weights[name], weights[key.name])
    ]
    if not reason and value is not None:
      strange = _not_finite(value.astype(leaf.dtype))
      if strange:
        wrong.append(f"{path}: {' and '.join(key.names)} holds {strange}")
      report.loaded.append(path)
      filled[path] = value.astype(leaf.dtype)
    else:
      report.initialised[path] = reason
      filled[path] = leaf
      if not re.search(may_initialise, path):
        wrong.append(f"{path}: {reason}")
  report.unused = [name for name in weights if name not in asked]
  wrong += [
    f"{name}: no variable takes it" for name in report.unused if not _allowed(may_ignore, name)
  ]
  if wrong:
    raise ValueError(
      f"the checkpoint does not fit the model: {len(wrong)} differences\n  "
      + "\n  ".join([*wrong[:_SHOWN], *(["…"] if len(wrong) > _SHOWN else [])])
      + f"\nloaded: {len(report.loaded)}, without numbers: {len(report.initialised)}, unused: "
      f"{len(report.unused)}"
    )
  return traverse_util.unflatten_dict(filled, sep="/"), report


def export_weights(variables: Mapping[str, Any], key_map: KeyMap) -> dict[str, np.ndarray]:
  """The authors' names and layouts for our variables: the inverse of `import_weights`."""
  weights = {}
  for path, leaf in traverse_util.flatten_dict(dict(variables), sep="/").items():
    weights.update(key_map(path).write(np.asarray(leaf)))
  return weights


def _not_finite(value: np.ndarray) -> str:
  """ "3 NaN and 1 infinite of 12 numbers", or "" where all are finite."""
  if not np.issubdtype(value.dtype, np.floating):
    return ""
  counts = {"NaN": int(np.isnan(value).sum()), "infinite": int(np.isinf(value).sum())}
  found = " and ".join(f"{count} {name}" for name, count in counts.items() if count)
  return f"{found} of {value.size} numbers" if found else ""


def _allowed(pattern: str, name: str) -> bool:
  return re.search(pattern, name) is not None
