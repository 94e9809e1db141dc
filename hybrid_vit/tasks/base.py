"""What the engine asks of a task. A task knows networks and losses, and nothing of files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from hybrid_vit.data.spec import Fields, Spec

Variables = Mapping[str, Any]
# Arrays, or their shapes where only those matter.
Batch = Mapping[str, Any]

# Directions of a measure.
BETTER = ("max", "min")

# Under this name `Task.loss` finds its constants in the variables.
CONSTANTS = "constants"


class Evaluator(Protocol):
  """Measures variables on one data set.

  One that can write what it found, beside its measures, is a `WritingEvaluator`.
  """

  name: str

  def run(self, variables: Variables) -> dict[str, float]:
    """One pass over the whole data set: name of the measure → value, the same on every process."""
    ...

  def draw(self, variables: Variables, path: Path) -> bool:
    """Writes a picture of some results, for people, as a PNG; False where there is none to draw.

    Every process calls it; the first one writes.
    """
    ...


@runtime_checkable
class WritingEvaluator(Evaluator, Protocol):
  """An evaluator whose answers to a whole set are worth files."""

  def answers(self, variables: Variables) -> Any:
    """One pass over the whole data set, the same on every process."""
    ...

  def measure(self, answers: Any) -> dict[str, float]:
    """What `run` gives, of these answers."""
    ...

  def write(self, answers: Any, directory: Any) -> list[str]:
    """Writes files, whose names it gives; the first process alone calls it.

    Raises:
      OSError: they cannot be written.
    """
    ...


class EvaluationData(Protocol):
  """A data set to evaluate on, ready for the devices."""

  name: str
  info: Mapping[str, Any]
  settings: Any
  # Which part of the rows this process reads; several processes may read the same.
  part: int

  def __len__(self) -> int: ...

  def batches(self) -> Iterable[tuple[dict[str, jax.Array], dict[str, list[Any]]]]:
    """One pass: global arrays, and the host-only fields of this process's rows.

    The arrays hold what the task's spec declares, "index", and "mask": 0 for rows that do not
    count.
    """
    ...

  def sample(self, count: int) -> Mapping[str, np.ndarray]:
    """Rows of `count` examples spread evenly over the set, the same on every process."""
    ...

  def examples(self, count: int) -> list[dict[str, Any]]:
    """As `sample`, but as the transform leaves them, with what stays on the host."""
    ...

  def example(self, index: int) -> dict[str, Any]:
    """The one of that number ("index" of a batch), as the transform leaves it."""
    ...

  def describe(self, index: int) -> str:
    """Its name, for people."""
    ...


@dataclasses.dataclass(frozen=True)
class EvaluationKind:
  """One of the things that a task can measure on a data set.

  Attributes:
    fields: of an example.
    measures: each with its direction, as `Task.measures`.
    transform: operations where the set has no transform of its own. What begins with "|" follows
      those that the weights expect on the picture, e.g. "|all_captions(5)|tokenize(77)"; anything
      else stands in their place, e.g. "decode"; "" for none.
  """

  fields: Fields
  measures: Mapping[str, str]
  transform: str = ""


class Task(Protocol):
  """From variables and a batch to a loss. Every method but `evaluators` is pure.

  A batch is a flat dict of arrays whose leading axis is the global batch. A task is a frozen
  dataclass, so that what differs in a phase can be replaced.

  A task may have a further method, `constants() → tree of NumPy arrays`: what its loss reads and no
  step changes, such as a teacher's weights. They are put on the devices once, are no part of the
  state or of a checkpoint, and stand in the variables of `loss` and `activations` as "constants".

  A task whose loss looks at a whole batch (`separable` is False) may have `embed(variables, batch,
  rng) → (embeddings, batch statistics)`, rows by themselves, and `embedded_loss(variables,
  embeddings, batch) → (loss, metrics)`: then `config.accumulation_steps` works for it too.

  A task whose evaluation pictures are not prepared as a classifier's has `evaluation_transform`,
  see `EvaluationKind.transform`.

  A task that can measure several things has `evaluation_kinds`: the `kind` of an evaluation set →
  an `EvaluationKind`. Its `spec` and `measures` are those of a set that names none.

  Attributes:
    model: the network, as the registry made it.
    spec: the keys of a training and of an evaluation example.
    separable: whether the loss of a batch is the mean of the losses of its parts, so that it may be
      split for accumulation.
    measures: what its evaluators measure, each with its direction, "max" or "min"; by the first one
      the best state is chosen where the configuration names none.
  """

  model: Any

  @property
  def spec(self) -> Spec: ...

  @property
  def separable(self) -> bool: ...

  @property
  def measures(self) -> Mapping[str, str]: ...

  def init(self, rng: jax.Array, batch: Batch) -> dict[str, Any]:
    """New variables: {"params", "batch_stats"}; only the shapes of the batch matter."""
    ...

  def augment(self, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
    """What is done to a training batch on the device: normalising, mixing, targets.

    Args:
      batch: as loaded.
      rng: a key of this step.
      step: int32, finished steps.
    """
    ...

  def loss(
    self, variables: Variables, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """Loss (float32 scalar) of an augmented batch, and {"metrics", "batch_stats"}.

    Metrics are pairs (sum, weight), so that uneven batches and many hosts add up exactly.
    """
    ...

  def predict(self, variables: Variables, batch: Batch) -> Any:
    """The network's answers to an evaluation batch."""
    ...

  def activations(self, variables: Variables, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
    """Named intermediates of a training step in forward order: to find where a NaN began."""
    ...

  def evaluators(self, data: Sequence[EvaluationData]) -> list[Evaluator]:
    """One evaluator for each data set."""
    ...

  def stored_info(self) -> dict[str, Any]:
    """What goes with the weights beside the network and its preprocessing, e.g. class names."""
    ...


def evaluation_kind(task: Task, kind: str) -> EvaluationKind:
  """What a set of some kind needs and gives.

  Raises:
    ValueError: a kind that the task does not know; the message gives those that it does.
  """
  known = getattr(task, "evaluation_kinds", {})
  if not kind:
    own = getattr(task, "evaluation_transform", "")
    return EvaluationKind(task.spec.evaluation, task.measures, own)
  if kind not in known:
    there = f"there are: {', '.join(known)}" if known else "this task has one alone: leave it out"
    raise ValueError(f"an evaluation set's kind is {kind!r}; {there}")
  return known[kind]


def constants_of(task: Task) -> Any:
  """A task's constants, a tree of NumPy arrays; {} where it has none."""
  made = getattr(task, "constants", None)
  return {} if made is None else made()


def with_constants(variables: Variables, constants: Any) -> Variables:
  """The variables as `Task.loss` takes them."""
  return {**variables, CONSTANTS: constants} if constants else variables


def summed(
  data: EvaluationData, evaluate_batch: Any, variables: Variables
) -> dict[str, tuple[float, float]]:
  """Sums and weights of a whole data set, in float64.

  One batch ahead of the host, so that the devices do not wait for the sums.

  Args:
    data: the set.
    evaluate_batch: compiled, `(variables, batch) → {measure: (sum, weight)}`.
    variables: of the network.
  """
  totals: dict[str, np.ndarray] = {}

  def add(result: Any) -> None:
    for key, pair in jax.device_get(result).items():
      totals[key] = totals.get(key, np.zeros(2)) + np.asarray(pair, np.float64)

  previous = None
  for batch, _ in data.batches():
    current = evaluate_batch(variables, batch)
    if previous is not None:
      add(previous)
    previous = current
  if previous is not None:
    add(previous)
  return {key: (float(total[0]), float(total[1])) for key, total in totals.items()}
