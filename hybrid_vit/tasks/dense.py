"""What segmentation and depth share: settings of the decoder, the model, the step around a loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from hybrid_vit.heads.dense_model import DenseModel, create_dense_model
from hybrid_vit.map_inference import InferenceSettings
from hybrid_vit.tasks.base import Batch, Variables
from hybrid_vit.tasks.pictures import PictureTask

# Examples in a drawing of predictions.
DRAWN = 6


@dataclasses.dataclass(frozen=True)
class DecoderSettings:
  """Parts of `config.task` that every dense task has.

  Attributes:
    head: {"name": as registered in `heads.registry`, further attributes}.
    neck: likewise; None for none, or for what a plain transformer needs.
    auxiliary: likewise a head that trains beside the main one, or None.
    auxiliary_weight: of its loss.
    inference: how pictures of any size are seen, in evaluation and prediction.
  """

  head: dict[str, Any] = dataclasses.field(default_factory=dict)
  neck: dict[str, Any] | None = None
  auxiliary: dict[str, Any] | None = None
  auxiliary_weight: float = 0.4
  inference: InferenceSettings = dataclasses.field(default_factory=InferenceSettings)

  def __post_init__(self) -> None:
    for name in ("head", "neck", "auxiliary"):
      given = getattr(self, name)
      if given is not None and "name" not in given:
        raise ValueError(f"config.task.{name} is {given}; a 'name' among its fields was expected")
    if self.auxiliary_weight < 0:
      raise ValueError(
        f"config.task.auxiliary_weight is {self.auxiliary_weight:g}; 0 or more was expected"
      )


def build_model(
  settings: DecoderSettings, backbone: Any, num_outputs: int, batch_norm_groups: int
) -> DenseModel:
  """The configured decoder on a backbone.

  Raises:
    ValueError: a network without a feature pyramid, or an unknown name or attribute.
  """
  if not hasattr(backbone, "features"):
    raise ValueError(f"{type(backbone).__name__} has no `features` for a decoder to read")
  try:
    return create_dense_model(
      backbone,
      num_outputs,
      head=settings.head,
      neck=settings.neck,
      auxiliary=settings.auxiliary or None,
      batch_norm_groups=batch_norm_groups,
    )
  except (TypeError, ValueError) as error:
    raise ValueError(f"config.task: {error}") from error


@dataclasses.dataclass(frozen=True)
class DenseTask(PictureTask):
  """A map for each picture; segmentation and depth add fields, losses and measures.

  Attributes:
    auxiliary_weight: of the auxiliary head's loss.
    inference: how pictures of any size are seen.
  """

  auxiliary_weight: float
  inference: InferenceSettings

  def answers(self, variables: Variables, images: jax.Array) -> jax.Array:
    """uint8 `[B, H, W, 3]` → the head's map, float32 `[B, h, w, K]`, as `map_inference` asks."""
    answer, _ = self.model.apply(variables, self.normalize(images), train=False)
    return answer

  def predict(self, variables: Variables, batch: Batch) -> jax.Array:
    """ "image" uint8 or normalised float32 `[B, H, W, 3]` → float32 `[B, h, w, K]`."""
    return self.answers(variables, batch["image"])

  def activations(self, variables: Variables, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
    """Image, the backbone's endpoints and the decoder's maps in forward order."""
    (_, found), _ = self.apply_in_training(variables, batch, rng)
    return {"image": batch["image"], **found}

  def apply_in_training(self, variables: Variables, batch: Batch, rng: jax.Array) -> Any:
    """((answer, endpoints), updated collections)."""
    return self.model.apply(
      variables, batch["image"], train=True, rngs={"dropout": rng}, mutable=["batch_stats"]
    )
