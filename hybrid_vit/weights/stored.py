"""A place of weights → the network they are of, its variables, and what they expect.

Weights of two towers give the image tower here; both are `hybrid_vit.weights.stored_clip`.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax
import flax.linen as nn
import jax
import numpy as np

from hybrid_vit import checkpoints, hub
from hybrid_vit.data.classes import names_or_numbers
from hybrid_vit.fingerprints import first_nonfinite
from hybrid_vit.models.initialization import variable_shapes
from hybrid_vit.models.registry import (
  Preprocessing,
  as_preprocessing,
  create_model,
  list_models,
  model_entry,
)
from hybrid_vit.paths import as_path
from hybrid_vit.table_resizing import resize_tables
from hybrid_vit.weights.families import with_new_leaves
from hybrid_vit.weights.importing import import_network
from hybrid_vit.weights.official_files import hub_copies
from hybrid_vit.weights.transfer import is_dense, transfer, without_text


class DenseWeightsError(ValueError):
  """The weights are of a network under a decoder, which `stored_tasks.load_task` reads."""


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
  place: str | Path,
  name: str | None = None,
  *,
  num_classes: int | None = None,
  raw: bool = False,
) -> StoredNetwork:
  """Loads weights with their network; of a CLIP the image tower alone.

  network = load_network("runs/flowers")
  logits, endpoints = network.model.apply(network.variables, images, train=False)

  Args:
    place: a directory (see `checkpoints.load_weights`), an authors' file (see
      `readers.read_checkpoint`), either of them in a repository of the hub ("hf:owner/name", see
      `hub.fetch`), or a name in the registry, of which the copy on the hub is taken that
      `weights/official_files.csv` names.
    name: of the network; None for what the weights say.
    num_classes: width of the head; another than the weights' begins it anew, 0 leaves it out.
    raw: see `checkpoints.load_weights`.

  Raises:
    ValueError: the weights are of no network, or of another one than `name`; a file that cannot be
      read; a repository that cannot be fetched; or a name of which no single copy is known.
    DenseWeightsError: they are of a network under a decoder; a ValueError.
    CheckpointError: no weights in `place`.
    ModuleNotFoundError: huggingface_hub, or a library that reads such files, is not installed.
  """
  if not hub.is_address(place) and str(place) in list_models() and not Path(place).exists():
    name, place = name or str(place), _copy_of(str(place))
  source = hub.fetch(place) if hub.is_address(place) else place
  path = source.path if isinstance(source, hub.Fetched) else as_path(source)
  if path.is_file():
    imported, metadata = import_network(source, name, num_classes=num_classes)
    return network_of(place, without_text(imported.variables), metadata)
  weights, metadata = checkpoints.load_weights(source, raw=raw)
  network = network_of(place, without_text(weights), metadata, name)
  return (
    network if num_classes in (None, network.num_classes) else _other_head(network, num_classes)
  )


def _copy_of(name: str) -> str:
  """The one address of a network's copy on the hub."""
  copies = hub_copies(name)
  if len(copies) == 1:
    return copies[0]
  if copies:
    raise ValueError(
      f"there are several copies of {name} on the hub, name one: {', '.join(copies)}"
    )
  raise ValueError(
    f"no copy of {name} on the hub is known: `python -m hybrid_vit.tools.list_weights {name}` says "
    "where its files are; a file, a directory or hf:owner/name was expected"
  )


def _other_head(network: StoredNetwork, num_classes: int) -> StoredNetwork:
  """The network with a head of another width, begun anew."""
  model, size = network.model.clone(num_classes=num_classes), network.preprocessing.image_size
  images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
  shapes = {"batch_stats": {}, **variable_shapes(model, images)}
  variables, _ = transfer(network.variables, shapes, reinitialize_head=True)
  flat = flax.traverse_util.flatten_dict(variables, sep="/")
  begun = {path for path, leaf in flat.items() if isinstance(leaf, jax.ShapeDtypeStruct)}
  return dataclasses.replace(
    network,
    model=model,
    variables={"batch_stats": {}, **with_new_leaves(variables, model, begun, size)},
    num_classes=num_classes,
    class_names=(),
  )


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
    raise DenseWeightsError(
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
  shapes = variable_shapes(model, images)
  shapes.setdefault("batch_stats", {})
  return jax.device_get(resize_tables(jax.tree.map(np.asarray, weights), shapes))
