"""A directory of weights → the network they are of, its variables, and what they expect.

Weights of two towers give the image tower here; both are `hybrid_vit.weights.stored_clip`.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from hybrid_vit import checkpoints
from hybrid_vit.data.classes import names_or_numbers
from hybrid_vit.fingerprints import first_nonfinite
from hybrid_vit.models.registry import Preprocessing, as_preprocessing, create_model, model_entry
from hybrid_vit.table_resizing import resize_tables
from hybrid_vit.weights.transfer import is_dense, without_text


@dataclasses.dataclass(frozen=True)
class StoredNetwork:
  """Weights with their network.

  Attributes:
    name: in the registry.
    model: the network, built as it was trained.
    variables: {"params", "batch_stats"}, NumPy arrays.
    num_classes: width of the head; 0 where there is none.
    preprocessing: what the weights expect of a picture.
    preprocessing_said_by: where that is from, for people.
    class_names: of the head's outputs; empty where the weights do not say.
    loss: of the training, which says what the outputs are: "softmax", "sigmoid" or a task's own; ""
      for a task that names none, "softmax" where the weights say nothing.
    metadata: everything else that lies beside the weights.
  """

  name: str
  model: nn.Module
  variables: dict[str, Any]
  num_classes: int
  preprocessing: Preprocessing
  preprocessing_said_by: str
  class_names: tuple[str, ...]
  loss: str
  metadata: dict[str, Any]


def load_network(
  directory: str | Path, name: str | None = None, *, raw: bool = False
) -> StoredNetwork:
  """Loads an export, an import, a checkpoint or a work directory; of a CLIP the image tower alone.

  Args:
    directory: see `checkpoints.load_weights`.
    name: of the network; None for what the metadata says.
    raw: see `checkpoints.load_weights`.

  Raises:
    ValueError: the metadata names no network, or another one than `name`.
    CheckpointError: no weights in `directory`.
  """
  weights, metadata = checkpoints.load_weights(directory, raw=raw)
  return network_of(directory, without_text(weights), metadata, name)


def network_of(
  directory: str | Path, weights: dict[str, Any], metadata: dict[str, Any], name: str | None = None
) -> StoredNetwork:
  """The one network that weights are of; see `load_network`."""
  said = described_network(metadata)
  if name is None and "name" not in said:
    raise ValueError(f"{directory} does not say which network its weights are of: give --arch")
  if name is not None and said.get("name", name) != name:
    raise ValueError(f"{directory} holds weights of {said['name']}, not of {name}")
  name = name or said["name"]
  if is_dense(weights):
    raise ValueError(
      f"{directory} holds a {name} under a decoder, which makes maps and no classes: "
      "hybrid_vit.load_task reads it"
    )
  kernel = weights["params"].get("head", {}).get("kernel")
  classes = 0 if kernel is None else int(kernel.shape[-1])
  model = create_model(name, num_classes=classes, **(said.get("arguments") or {}))
  fields = metadata.get("preprocessing")
  return StoredNetwork(
    name=name,
    model=model,
    variables=_at_full_size(model, weights, metadata, fields),
    num_classes=classes,
    preprocessing=as_preprocessing(fields) if fields else model_entry(name).preprocessing,
    preprocessing_said_by=(
      "as the weights say"
      if fields
      else f"by the registry's entry of {name}; the weights say nothing"
    ),
    class_names=tuple(metadata.get("class_names") or ()),
    loss=_loss(metadata),
    metadata=metadata,
  )


def check_finite(network: StoredNetwork) -> None:
  """Weights that are no numbers must not give figures.

  Raises:
    ValueError: they hold NaN or infinity; the message names the first such variable.
  """
  if (bad := first_nonfinite(network.variables)) is not None:
    raise ValueError(f"these weights of {network.name} hold NaN or infinity, first in {bad!r}")


def class_names(network: StoredNetwork) -> tuple[str, ...]:
  """Names of the head's outputs: the weights' own, ImageNet-1K's for 1,000, else numbers."""
  if len(network.class_names) == network.num_classes:
    return network.class_names
  if network.num_classes == 1000:
    return imagenet_class_names()
  return names_or_numbers((), network.num_classes)


def imagenet_class_names() -> tuple[str, ...]:
  """Names of the 1,000 classes of ImageNet-1K in the order of their WordNet numbers."""
  embedded = importlib.resources.files("hybrid_vit.data") / "embedded" / "imagenet1k_classes.txt"
  lemmas = [line.split("\t")[1] for line in embedded.read_text().splitlines()]
  short = [text.split(",")[0] for text in lemmas]
  # Two classes may share their first word; the further ones tell them apart.
  return tuple(s if short.count(s) == 1 else text for s, text in zip(short, lemmas))


def is_two_towers(metadata: Mapping[str, Any]) -> bool:
  """Whether metadata is of an image and a text tower."""
  return bool(metadata.get("text_tower") or _configured_task(metadata).get("text_tower"))


def task_of(metadata: Mapping[str, Any]) -> str:
  """The task that metadata names, of an export or a state; "classification" where it says none."""
  # A state without `info` has its task in the configuration alone.
  return str(metadata.get("task") or _configured_task(metadata).get("name") or "classification")


def task_settings_of(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """The settings of the task that metadata names, as its configuration gives them."""
  configured = {k: v for k, v in _configured_task(metadata).items() if k != "name"}
  return dict(metadata.get("task_settings") or configured)


def described_network(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
  """What metadata says of the network: "name" and "arguments", where it does."""
  # An export says it at the top, a training's checkpoint in its configuration.
  return metadata if "name" in metadata else metadata.get("config", {}).get("model", {})


def _configured_task(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
  return metadata.get("config", {}).get("task") or {}


def _loss(metadata: dict[str, Any]) -> str:
  task = task_of(metadata)
  if is_two_towers(metadata):
    # The loss is between the towers; what the image tower answers are no classes.
    return task
  return str(
    task_settings_of(metadata).get("loss") or ("softmax" if task == "classification" else "")
  )


def _at_full_size(
  model: Any, weights: dict[str, Any], metadata: Mapping[str, Any], preprocessing: Any
) -> dict[str, Any]:
  """A state of a phase with other tables of positions than the last one's → the last one's."""
  run_config = metadata.get("config") or {}
  phases = run_config.get("phases") or ()
  differs = run_config.get("curriculum") or any(phase.get("arguments") for phase in phases)
  if not differs or not preprocessing:
    return weights
  size = preprocessing["image_size"]
  images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
  shapes = dict(jax.eval_shape(model.init, jax.random.key(0), images))
  shapes.setdefault("batch_stats", {})
  return jax.device_get(resize_tables(jax.tree.map(np.asarray, weights), shapes))
