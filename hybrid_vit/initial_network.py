"""`arch=same` of the configurations that fine-tune: the network of the weights they begin with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from hybrid_vit import checkpoints, hub
from hybrid_vit.config import ConfigError
from hybrid_vit.models.registry import Preprocessing, as_preprocessing
from hybrid_vit.paths import as_path
from hybrid_vit.weights.stored import described_network, load_network

SAME = "same"


@dataclasses.dataclass(frozen=True)
class InitialNetwork:
  """A network as a configuration names it.

  Attributes:
    name: in the registry.
    arguments: beyond its entry's.
    preprocessing: what its weights expect of a picture; None for its entry's.
  """

  name: str
  arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  preprocessing: Preprocessing | None = None


def initial_network(arch: str, init: str | None) -> InitialNetwork:
  """The network that the keys `arch` and `init` of a configuration name.

  Args:
    arch: name in the registry, or "same" for what `init` holds.
    init: weights, see `weights.stored.load_network`; of a dense network those of its backbone.

  Raises:
    ConfigError: "same" without weights, or weights that cannot be read or do not say what they are.
  """
  if arch != SAME:
    return InitialNetwork(arch)
  if not init:
    raise ConfigError("arch=same is the network that `init` holds, and no `init` is given")
  try:
    metadata = _metadata(init)
  except (ValueError, checkpoints.CheckpointError) as error:
    raise ConfigError(f"arch=same,init={init}: {error}") from error
  said = described_network(metadata)
  if "name" not in said:
    raise ConfigError(f"{init} does not say which network its weights are of: give arch=NAME")
  fields = metadata.get("preprocessing")
  return InitialNetwork(
    said["name"],
    dict(said.get("arguments") or {}),
    as_preprocessing(fields) if fields else None,
  )


def take_over(config: ConfigDict, network: InitialNetwork, dense_form: Mapping[str, Any]) -> None:
  """Makes the network a dense recipe's backbone: its arguments, its mean and deviation.

  Args:
    config: a recipe with the size of its own task; changed in place.
    network: whose weights it begins with.
    dense_form: arguments over the network's own, see `models.dense.dense_arguments`.
  """
  config.model.arguments = {**network.arguments, **dense_form}
  if network.preprocessing is not None:
    config.data.mean, config.data.std = network.preprocessing.mean, network.preprocessing.std


def _metadata(place: str) -> Mapping[str, Any]:
  if hub.is_address(place) or not as_path(place).is_file():
    return checkpoints.load_weights(place)[1]
  return load_network(place).metadata
