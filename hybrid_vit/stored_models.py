"""A directory of weights → what they are of: a network, an image and a text tower, a dense task."""

from __future__ import annotations

from pathlib import Path

from hybrid_vit import checkpoints
from hybrid_vit.stored_tasks import DENSE_TASKS, StoredTask, stored_task
from hybrid_vit.weights.stored import (
  StoredNetwork,
  check_finite,
  is_two_towers,
  network_of,
  task_of,
)
from hybrid_vit.weights.stored_clip import StoredClip, clip_of
from hybrid_vit.weights.transfer import without_text

StoredModel = StoredNetwork | StoredClip | StoredTask


def load_model(directory: str | Path, name: str | None = None) -> StoredModel:
  """Loads weights as what they say they are.

  Args:
    directory: see `checkpoints.load_weights`.
    name: of the network, where the weights do not say.

  Raises:
    ValueError: they are of no network, or hold what is no number.
    CheckpointError: no weights in `directory`.
  """
  weights, metadata = checkpoints.load_weights(directory)
  if task_of(metadata) in DENSE_TASKS:
    return stored_task(directory, weights, metadata)
  if is_two_towers(metadata):
    return clip_of(directory, weights, metadata, name)
  network = network_of(directory, without_text(weights), metadata, name)
  check_finite(network)
  return network


def image_network(stored: StoredModel) -> StoredNetwork:
  """The network that sees the picture: itself, the image tower, or the backbone under a decoder.

  An image tower's outputs are the embedding, before it is made of unit length; a backbone has none.
  """
  if isinstance(stored, StoredNetwork):
    return stored
  if isinstance(stored, StoredClip):
    name, model, part, outputs = stored.image, stored.model.image, "image", stored.embedding_size
  else:
    name, model, part, outputs = stored.network, stored.task.model.backbone, "backbone", 0
  variables = {n: stored.variables.get(n, {}).get(part, {}) for n in ("params", "batch_stats")}
  said_by = getattr(stored, "preprocessing_said_by", "as the weights say")
  return StoredNetwork(
    name=name,
    model=model,
    variables=variables,
    num_classes=outputs,
    preprocessing=stored.preprocessing,
    preprocessing_said_by=said_by,
    class_names=(),
    loss="",
    metadata=dict(stored.metadata),
  )


def described(stored: StoredModel) -> str:
  """Network and task in a few words."""
  if isinstance(stored, StoredTask):
    return f"{stored.network}, {stored.name}"
  if isinstance(stored, StoredClip):
    return f"{stored.name}, pictures and texts"
  return f"{stored.name}, {task_of(stored.metadata)}"
