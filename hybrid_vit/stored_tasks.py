"""A directory of weights → the dense task that they were trained for, ready to be asked.

stored = load_task("runs/segmenter")
classes = stored.classes(photo)               uint8 [H, W, 3] → int32 [H, W]
metres = load_task("runs/depth").depth(photo)   → float32 [H, W]
found = load_task("runs/detector").objects(photo)   → `box_inference.Objects`
segments = load_task("runs/panoptic").panoptic(photo)   → `mask_inference.PanopticPicture`
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hybrid_vit import checkpoints
from hybrid_vit.box_inference import Objects
from hybrid_vit.config import Config
from hybrid_vit.data.classes import class_facts
from hybrid_vit.fingerprints import first_nonfinite
from hybrid_vit.mask_inference import PanopticPicture
from hybrid_vit.models.registry import Preprocessing, as_preprocessing, create_model, model_entry
from hybrid_vit.tasks.registry import Context, create_task, task_settings
from hybrid_vit.weights.stored import described_network, task_of, task_settings_of

# Each has a `picture_inference`, what answers of its network become of a picture of any size.
DENSE_TASKS = (
  "segmentation", "depth", "detection",
  "mask_segmentation", "instance_segmentation", "panoptic_segmentation",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StoredTask:
  """A task with its weights.

  Attributes:
    name: one of `DENSE_TASKS`.
    network: name of the backbone in the registry.
    task: as it was trained; see `tasks.segmentation` and the others.
    variables: NumPy arrays.
    preprocessing: what the weights expect of a picture.
    metadata: everything that lies beside the weights.
  """

  name: str
  network: str
  task: Any
  variables: dict[str, Any]
  preprocessing: Preprocessing
  metadata: dict[str, Any]

  @functools.cached_property
  def inference(self) -> Any:
    """How pictures become maps or objects, with the programs compiled so far."""
    return self.task.picture_inference()

  @functools.cached_property
  def _on_device(self) -> Any:
    return jax.device_put(self.variables)

  def classes(self, photo: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, 3]` → the class of each pixel, int32 `[H, W]`."""
    self._check("segmentation", "mask_segmentation")
    return self.inference.classes(self._on_device, photo)

  def depth(self, photo: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, 3]` → metres, float32 `[H, W]`."""
    self._check("depth")
    return self.inference.values(self._on_device, photo)[..., 0]

  def objects(self, photo: np.ndarray) -> Objects:
    """uint8 `[H, W, 3]` → what was found in it, in its own pixels, the surest first."""
    self._check("detection", "instance_segmentation")
    return self.inference.objects(self._on_device, photo)

  def panoptic(self, photo: np.ndarray) -> PanopticPicture:
    """uint8 `[H, W, 3]` → its segments of things and stuff."""
    self._check("panoptic_segmentation")
    return self.inference.panoptic(self._on_device, photo, self.task.thing_classes)

  def _check(self, *names: str) -> None:
    if self.name not in names:
      wanted = " or ".join(map(repr, names))
      raise ValueError(f"these weights are of the task {self.name!r}, not of {wanted}")


def load_task(directory: str | Path, *, raw: bool = False) -> StoredTask:
  """Loads an export, a checkpoint or a work directory of a dense task.

  Args:
    directory: see `checkpoints.load_weights`.
    raw: see there.

  Raises:
    ValueError: weights of another task, or that hold what is no number.
    CheckpointError: no weights in `directory`.
  """
  weights, metadata = checkpoints.load_weights(directory, raw=raw)
  return stored_task(directory, weights, metadata)


def stored_task(
  directory: str | Path, weights: dict[str, Any], metadata: Mapping[str, Any]
) -> StoredTask:
  """The task that weights are of; see `load_task`."""
  name = task_of(metadata)
  if name not in DENSE_TASKS:
    raise ValueError(
      f"the weights in {directory} are of the task {name!r}; {' or '.join(DENSE_TASKS)} was "
      "expected"
    )
  if (bad := first_nonfinite(weights)) is not None:
    raise ValueError(f"the weights in {directory} hold NaN or infinity, first in {bad!r}")
  model = described_network(metadata)
  settings: Any = Config(task_settings_of(metadata), "task").as_dataclass(task_settings(name))
  fields = metadata.get("preprocessing")
  preprocessing = as_preprocessing(fields) if fields else model_entry(model["name"]).preprocessing
  arguments = dict(model.get("arguments") or {})
  context = Context(
    info=class_facts(metadata),
    num_classes=metadata.get("num_classes"),
    preprocessing=preprocessing,
    make_network=lambda classes: create_model(model["name"], num_classes=classes, **arguments),
  )
  return StoredTask(
    name=name,
    network=model["name"],
    task=create_task(name, settings, context),
    variables=weights,
    preprocessing=preprocessing,
    metadata=dict(metadata),
  )
