"""The table of tasks: each registers its name, the settings it reads, and what builds it.

A task of one's own needs no change here: a module that calls `register_task` and is imported by
the configuration file (which is Python) is enough.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from hybrid_vit.models.registry import Preprocessing
from hybrid_vit.tasks.base import BETTER, Task

# The modules that register tasks when imported.
_MODULES = (
  "hybrid_vit.tasks.classification",
  "hybrid_vit.tasks.contrastive",
  "hybrid_vit.tasks.depth",
  "hybrid_vit.tasks.detection",
  "hybrid_vit.tasks.distillation",
  "hybrid_vit.tasks.intermediate_supervision",
  "hybrid_vit.tasks.mask_classification",
  "hybrid_vit.tasks.masked_autoencoding",
  "hybrid_vit.tasks.segmentation",
)


@dataclasses.dataclass(frozen=True)
class Context:
  """What a task is built from, beside its own settings.

  Attributes:
    info: what the training data says of itself (`source.info`); {} where none is at hand.
    num_classes: as `config.model.num_classes` says; None where it says nothing.
    preprocessing: what the weights expect of a picture.
    make_network: `(num_classes) → module`: the configured network with a head of that width, 0 for
      none.
    load_network: `(directory) → StoredNetwork`, another network that a training needs, with its
      weights; None where nothing is trained.
    batch_norm_groups: of what the task adds to the network, as `config.batch_norm_groups` says.
  """

  info: Mapping[str, Any]
  num_classes: int | None
  preprocessing: Preprocessing
  make_network: Callable[[int], Any]
  load_network: Callable[[str], Any] | None = None
  batch_norm_groups: int = 1


def count_classes(context: Context, names: Sequence[str], whose: str) -> int:
  """How many classes a task has: as the configuration says, else as the data has names.

  Args:
    context: of the task.
    names: of the data's classes; none where they are not known.
    whose: for the error, e.g. "the training data has".

  Raises:
    ValueError: neither says it, or both and not the same.
  """
  said = context.num_classes
  if said is None and not names:
    raise ValueError(
      "`config.model.num_classes` is needed where the data is not at hand to count its classes"
    )
  if said is not None and names and said != len(names):
    raise ValueError(
      f"`config.model.num_classes` is {said} and {whose} {len(names)} classes: leave it out, or "
      "correct it"
    )
  return said or len(names)


@dataclasses.dataclass(frozen=True)
class _Entry:
  settings: type
  build: Callable[[Any, Context], Task]


_TASKS: dict[str, _Entry] = {}
_BuildT = TypeVar("_BuildT", bound=Callable[..., Any])


def register_task(name: str, settings: type) -> Callable[[_BuildT], _BuildT]:
  """Adds `build(settings, context) → task` under `name`.

  Args:
    name: as `config.task.name` gives it.
    settings: a dataclass; its fields are those of `config.task` beside the name.

  Raises:
    ValueError: the name is taken by another task.
  """

  def add(build: _BuildT) -> _BuildT:
    taken = _TASKS.get(name)
    # A notebook's cell, run again, defines its task anew.
    if taken is not None and taken.build.__module__ != build.__module__:
      raise ValueError(f"a task named {name!r} is already registered")
    _TASKS[name] = _Entry(settings, build)
    return build

  return add


def task_names() -> list[str]:
  """Names of all tasks."""
  return list(_entries())


def task_settings(name: str) -> type:
  """The dataclass of a task's settings.

  Raises:
    ValueError: an unknown name; the message gives the closest.
  """
  entries = _entries()
  if name not in entries:
    close = difflib.get_close_matches(name, list(entries), n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"no task is named {name!r}{hint}; there are: {', '.join(entries)}")
  return entries[name].settings


def create_task(name: str, settings: Any, context: Context) -> Task:
  """Builds a task and checks what it declares.

  Raises:
    ValueError: an unknown name, or a measure without a direction.
  """
  task_settings(name)
  task = _entries()[name].build(settings, context)
  for measure, better in task.measures.items():
    if better not in BETTER:
      raise ValueError(
        f"task {name!r}: the direction of {measure!r} is {better!r}; 'max' or 'min' was expected"
      )
  return task


def _entries() -> dict[str, _Entry]:
  for module in _MODULES:
    importlib.import_module(module)
  return _TASKS
