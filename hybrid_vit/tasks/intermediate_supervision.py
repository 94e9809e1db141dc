"""Classification with heads and reconstructions inside the network, RevCol's compound loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from hybrid_vit.tasks.base import Batch, Variables
from hybrid_vit.tasks.classification import (
  Classification,
  ClassificationSettings,
  classification_arguments,
  count_correct,
)
from hybrid_vit.tasks.registry import Context, register_task

# Intensities that a reconstruction is held to stay this far from 0 and 1.
_INTENSITY_MARGIN = 0.01


@dataclasses.dataclass(frozen=True)
class IntermediateSupervisionSettings(ClassificationSettings):
  """`config.task`; see `IntermediateSupervision`."""

  reconstruction_weight: float = 3.0
  auxiliary_weight: float = 0.7


@register_task("intermediate_supervision", IntermediateSupervisionSettings)
def build_intermediate_supervision(
  settings: IntermediateSupervisionSettings, context: Context
) -> IntermediateSupervision:
  """The task of `config.task.name = "intermediate_supervision"`."""
  return IntermediateSupervision(
    **classification_arguments(settings, context),
    reconstruction_weight=settings.reconstruction_weight,
    auxiliary_weight=settings.auxiliary_weight,
  )


@dataclasses.dataclass(frozen=True)
class IntermediateSupervision(Classification):
  """Trains by RevCol's compound loss (arXiv:2212.11696, section 3.3); evaluates by the last head.

  The network's endpoints must hold "auxiliary_logits0" … and "reconstruction0" …, as many.

  Attributes:
    reconstruction_weight: of the first reconstruction; the further ones fall linearly.
    auxiliary_weight: of an auxiliary head, were it the last one; they rise linearly.
  """

  reconstruction_weight: float = 3.0
  auxiliary_weight: float = 0.7

  def loss(
    self, variables: Variables, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """See `Task`. "loss" is the compound one, "head_loss" and "top1" are the last head's.

    Raises:
      ValueError: a network without intermediate supervision.
    """
    (logits, endpoints), updated = self._apply(variables, batch, rng)
    target = batch["target"]
    intensities = batch["image"] * jnp.asarray(self.std) + jnp.asarray(self.mean)
    auxiliary = _numbered(endpoints, "auxiliary_logits")
    reconstructions = _numbered(endpoints, "reconstruction")
    if not auxiliary or len(auxiliary) != len(reconstructions):
      raise ValueError(
        "intermediate supervision needs a network with auxiliary heads and reconstructions; "
        "set config.model.arguments.intermediate_supervision = True"
      )
    head_loss = self.mean_loss(self._losses(logits, target), target)
    total = head_loss + sum(
      compound_terms(
        [self.mean_loss(self._losses(x, target), target) for x in auxiliary],
        reconstructions,
        intensities,
        reconstruction_weight=self.reconstruction_weight,
        auxiliary_weight=self.auxiliary_weight,
      )
    )
    weight = jnp.asarray(logits.shape[0], jnp.float32)
    metrics = {
      "loss": (total * weight, weight),
      "head_loss": (head_loss * weight, weight),
      "top1": (count_correct(logits, target), weight),
    }
    return total, {"metrics": metrics, "batch_stats": updated.get("batch_stats", {})}


def compound_terms(
  auxiliary_losses: Sequence[jax.Array],
  reconstructions: Sequence[jax.Array],
  intensities: jax.Array,
  *,
  reconstruction_weight: float,
  auxiliary_weight: float,
) -> list[jax.Array]:
  """What each intermediate place adds to the loss of the last head.

  Place i of n adds (1 - i/n) * reconstruction_weight * BCE + (i+1)/(n+1) * auxiliary_weight * CE:
  early maps shall keep the picture, late ones the class.

  Args:
    auxiliary_losses: the classification loss of each auxiliary head, in order.
    reconstructions: `[B, H, W, 3]`, logits of intensities, in order.
    intensities: `[B, H, W, 3]`, the network's input in units of [0, 1]; cut to [0.01, 0.99].
    reconstruction_weight: see `IntermediateSupervision`.
    auxiliary_weight: see `IntermediateSupervision`.
  """
  target = jnp.clip(intensities, _INTENSITY_MARGIN, 1.0 - _INTENSITY_MARGIN)
  n = len(reconstructions)
  terms = []
  for i, (loss, reconstruction) in enumerate(zip(auxiliary_losses, reconstructions)):
    entropy = jnp.mean(optax.sigmoid_binary_cross_entropy(reconstruction, target))
    falling, rising = 1.0 - i / n, (i + 1) / (n + 1)
    terms.append(falling * reconstruction_weight * entropy + rising * auxiliary_weight * loss)
  return terms


def _numbered(endpoints: Mapping[str, jax.Array], name: str) -> list[jax.Array]:
  found: list[jax.Array] = []
  while f"{name}{len(found)}" in endpoints:
    found.append(endpoints[f"{name}{len(found)}"])
  return found
