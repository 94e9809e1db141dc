"""The table of detectors: a backbone and a number of classes → a network that gives its own losses.

A detector is called as `heads.rcnn.RCNN` is: `model(images, train, targets, key, sizes)` gives a
dict of losses where there are targets, else detections.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hybrid_vit.heads.registry import as_attribute, check_arguments, find_in, register_in

# The modules that register detectors when imported.
_MODULES = (
  "hybrid_vit.heads.rcnn",
  "hybrid_vit.heads.retinanet",
  "hybrid_vit.heads.atss",
  "hybrid_vit.heads.dino",
  "hybrid_vit.heads.sparse_rcnn",
)

_DETECTORS: dict[str, Callable[..., Any]] = {}
_FactoryT = TypeVar("_FactoryT", bound=Callable[..., Any])


def register_detector(name: str) -> Callable[[_FactoryT], _FactoryT]:
  """Adds a factory `(backbone, num_classes, *, masks, batch_norm_groups, **) → module` by `name`.

  Raises:
    ValueError: the name is taken.
  """
  return register_in(_DETECTORS, name, "detector")


def register_without_masks(
  name: str, factory: Callable[..., Any], settings_class: Callable[..., Any]
) -> None:
  """Adds a detector of boxes alone.

  Args:
    name: as a configuration gives it.
    factory: `(backbone, num_classes, *, settings, **) → module`.
    settings_class: of its settings, made of the plain values that are given.
  """
  takes_groups = "batch_norm_groups" in inspect.signature(factory).parameters

  def create(
    backbone: Any,
    num_classes: int,
    *,
    masks: bool = False,
    batch_norm_groups: int | None = None,
    settings: Mapping[str, Any] | None = None,
    **arguments: Any,
  ) -> Any:
    if masks:
      raise ValueError(f"{name} finds boxes alone: config.task.mask_size=0 was expected")
    groups = {"batch_norm_groups": batch_norm_groups} if takes_groups else {}
    made = settings_class(**(settings or {}))
    return factory(backbone, num_classes, settings=made, **groups, **arguments)

  create.__module__ = factory.__module__
  register_detector(name)(create)


def detector_names() -> list[str]:
  """Names of all detectors."""
  _load()
  return sorted(_DETECTORS)


def create_detector(name: str, backbone: Any, num_classes: int, **arguments: Any) -> Any:
  """A detector on a backbone.

  Args:
    name: as registered.
    backbone: with `features`; built with `num_classes=0`.
    num_classes: of the objects, without background.
    **arguments: of its factory; "settings" may be a mapping of the fields that replace its own.

  Raises:
    ValueError: an unknown name or argument; the message gives the closest.
  """
  _load()
  factory = find_in(_DETECTORS, name, "detector")
  parameters = inspect.signature(factory).parameters
  known = [p for p in parameters if p not in ("backbone", "num_classes")]
  open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
  if not open_ended:
    check_arguments(arguments, known, name, "detector")
  return factory(backbone, num_classes, **as_attribute(arguments))


def _load() -> None:
  for module in _MODULES:
    importlib.import_module(module)
