"""An authors' checkpoint of a dense task → the task of a recipe, with its weights.

The recipe says the network, the decoder and how pictures are seen; the checkpoint says how many
classes there are and, in OpenMMLab's files, what they are called.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from hybrid_vit.build import DataFacts, build_tasks, preprocessing_of
from hybrid_vit.config import Config, load_config
from hybrid_vit.config_files import find_config
from hybrid_vit.stored_tasks import DENSE_TASKS
from hybrid_vit.weights import dense_checkpoints
from hybrid_vit.weights.readers import CheckpointFile
from hybrid_vit.weights.torch_file import is_tensor, to_array

# How a task's classes are called; one that is not here has none.
_NAMES = {
  "segmentation": "map_class_names",
  "mask_segmentation": "map_class_names",
  "panoptic_segmentation": "map_class_names",
  "detection": "object_class_names",
  "instance_segmentation": "object_class_names",
}
# Checkpoints do not say which classes are things. COCO's panoptic classes begin with its things.
_COCO_PANOPTIC, _COCO_THINGS = 133, 80
# OpenMMLab's, before and since MMEngine.
_CLASSES, _PALETTE = ("CLASSES", "classes"), ("PALETTE", "palette")


def read_recipe(text: str) -> ConfigDict:
  """ "FILE" or "FILE:variant" → the configuration.

  Raises:
    ConfigError: no such file, or no such variant.
  """
  name, _, argument = text.partition(":")
  return load_config(find_config(name), argument or None)


def import_dense_task(
  file: CheckpointFile,
  recipe: ConfigDict,
  *,
  num_classes: int | None = None,
  layout: str | None = None,
) -> tuple[dense_checkpoints.ImportedDense, dict[str, Any]]:
  """Reads a checkpoint as the model of a recipe.

  Args:
    file: the checkpoint.
    recipe: of one of `DENSE_TASKS`.
    num_classes: None for those of the checkpoint; another number begins the classifiers anew.
    layout: None for the one whose names fit best.

  Returns:
    (the numbers, metadata that `stored_tasks.load_task` reads).

  Raises:
    ValueError: a recipe of another task, or a checkpoint that does not fit it; the message gives
      the differences.
  """
  name = recipe.get("task", {}).get("name", "classification")
  if name not in DENSE_TASKS:
    raise ValueError(
      f"--config is a recipe of the task {name!r}; {' or '.join(DENSE_TASKS)} was expected "
      "(networks alone are read without --config)"
    )
  network = recipe.model.name
  # The names do not depend on the number of classes.
  model = _task(recipe, num_classes or recipe.model.get("num_classes") or 2, {})[0].model
  layout = dense_checkpoints.find_layout(file.weights, model, network, layout)
  in_file = classes = None
  if name in _NAMES:
    in_file = dense_checkpoints.classes_in(file.weights, model, network, layout)
    classes = num_classes or in_file
    if classes is None:
      raise ValueError("the checkpoint has no classifier: give --num_classes to begin one")
  elif num_classes:
    raise ValueError(f"--num_classes={num_classes}: {name} has no classes")
  kept = classes == in_file
  info = _said_by(file.meta, classes, _NAMES[name]) if kept and classes else {}
  if name == "panoptic_segmentation":
    if classes != _COCO_PANOPTIC:
      raise ValueError(
        f"which of {classes} classes are things a checkpoint does not say; {_COCO_PANOPTIC}, "
        f"COCO's, of which the first {_COCO_THINGS} are, was expected. A training that begins "
        "with `init_from` reads it for other classes"
      )
    info["thing_classes"] = tuple(range(_COCO_THINGS))
  task, metadata = _task(recipe, classes, info)
  imported = dense_checkpoints.import_dense(
    file.weights,
    task.model,
    network,
    layout,
    image_size=metadata["preprocessing"]["image_size"],
    new_classifiers=not kept,
  )
  return imported, metadata


def _task(recipe: ConfigDict, classes: int | None, info: Mapping[str, Any]) -> tuple[Any, Any]:
  """(task, metadata) of a recipe with another number of classes."""
  recipe = copy.deepcopy(recipe)
  with recipe.unlocked():
    recipe.model.num_classes = classes
    weights = recipe.task.get("class_weights")
    # A loss's own, which are of no use to another number of classes.
    if weights is not None and len(weights) != classes:
      recipe.task.class_weights = None
  config = Config(recipe)
  tasks, metadata = build_tasks(config, DataFacts(info), preprocessing_of(config), None)
  return tasks[0], metadata


def _said_by(meta: Mapping[str, Any], classes: int, called: str) -> dict[str, Any]:
  """Names of the classes as `called`, and colours; nothing that is not one for each of them."""
  found: dict[str, Any] = {}
  inner = meta.get("dataset_meta")
  said = {**meta, **(inner if isinstance(inner, Mapping) else {})}
  names = _first(said, _CLASSES, classes)
  if names is not None:
    found[called] = tuple(map(str, names))
  colors = _first(said, _PALETTE, classes)
  if colors is not None and np.shape(colors) == (classes, 3):
    found["palette"] = [[int(c) for c in color] for color in colors]
  return found


def _first(said: Mapping[str, Any], keys: Sequence[str], length: int) -> Sequence[Any] | None:
  """The first list of that length."""
  for key in keys:
    value = said.get(key)
    value = to_array(value).tolist() if is_tensor(value) else value
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == length:
      return value
  return None
