"""What the training loop asks of a task. A task knows networks and losses, and nothing of files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax

Variables = Mapping[str, Any]
# Arrays, or their shapes where only those matter.
Batch = Mapping[str, Any]


class Evaluator(Protocol):
  """Measures variables on one data set."""

  name: str

  def run(self, variables: Variables) -> dict[str, float]:
    """One pass over the whole data set: name of the measure → value, the same on every process."""
    ...

  def draw(self, variables: Variables, path: Path) -> None:
    """Writes a picture of some results, for people, as a PNG."""
    ...


class EvaluationData(Protocol):
  """A data set to evaluate on, ready for the devices."""

  name: str
  class_names: Sequence[str]

  def batches(self) -> Iterable[dict[str, jax.Array]]:
    """One pass: global arrays, with "mask" 0 for rows that do not count."""
    ...


class Task(Protocol):
  """From variables and a batch to a loss. Every method but `evaluators` is pure.

  A batch is a flat dict of arrays whose leading axis is the global batch.
  """

  @property
  def primary_metric(self) -> str:
    """The measure, higher is better, by which the best checkpoint is chosen."""
    ...

  def init(self, rng: jax.Array, batch: Batch) -> dict[str, Any]:
    """New variables: {"params", "batch_stats"}; only the shapes of the batch matter."""
    ...

  def augment(self, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
    """What is done to a training batch on the device: normalising, mixing, targets."""
    ...

  def loss(
    self, variables: Variables, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Loss (float32 scalar) of an augmented batch, and {"metrics", "batch_stats"}.

    Metrics are pairs (sum, weight), so that uneven batches and many hosts add up exactly.
    """
    ...

  def activations(self, variables: Variables, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
    """Named intermediates of a training step in forward order: to find where a NaN began."""
    ...

  def evaluators(self, data: Sequence[EvaluationData]) -> list[Evaluator]:
    """One evaluator for each data set."""
    ...
