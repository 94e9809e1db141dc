"""Classification with a teacher: any network with weights, whose answers the student learns too.

Geoffrey Hinton et al., "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, and DeiT's
hard form with a token of its own (arXiv:2012.12877, section 4).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_vit.data.classes import check_same_classes
from hybrid_vit.fingerprints import digest
from hybrid_vit.tasks.base import CONSTANTS, Batch, Variables
from hybrid_vit.tasks.classification import (
  Classification,
  ClassificationSettings,
  classification_arguments,
  count_correct,
)
from hybrid_vit.tasks.registry import Context, register_task

KINDS = ("hard", "soft")


@dataclasses.dataclass(frozen=True)
class DistillationSettings(ClassificationSettings):
  """`config.task`; see `Distillation`. `teacher` is an export, an import or a work directory."""

  teacher: str | None = None
  kind: str = "hard"
  alpha: float = 0.5
  temperature: float = 3.0

  def __post_init__(self) -> None:
    super().__post_init__()
    if self.kind not in KINDS:
      raise ValueError(f"config.task.kind {self.kind!r} is not one of {', '.join(KINDS)}")
    if not 0.0 <= self.alpha <= 1.0:
      raise ValueError(f"config.task.alpha is {self.alpha}; a number in [0, 1] was expected")
    if self.temperature <= 0.0:
      raise ValueError(
        f"config.task.temperature is {self.temperature}; a number above 0 was expected"
      )
    if self.kind == "soft" and self.loss != "softmax":
      raise ValueError(
        f"config.task.kind is 'soft' and config.task.loss {self.loss!r}: a temperature is defined "
        "for 'softmax'; take kind 'hard', or that loss"
      )


@register_task("distillation", DistillationSettings)
def build_distillation(settings: DistillationSettings, context: Context) -> Distillation:
  """The task of `config.task.name = "distillation"`.

  Raises:
    ValueError: no teacher, or one of other classes (`ClassesError` where the names differ).
  """
  arguments = classification_arguments(settings, context)
  teacher = None
  if context.load_network is not None:
    teacher = _load_teacher(settings.teacher, context, arguments)
  return Distillation(
    **arguments,
    kind=settings.kind,
    alpha=settings.alpha,
    temperature=settings.temperature,
    teacher_path=settings.teacher,
    teacher=teacher,
  )


def _load_teacher(path: str | None, context: Context, arguments: dict[str, Any]) -> Any:
  if path is None:
    raise ValueError(
      "distillation needs a teacher: set config.task.teacher to an export, an import or the work "
      "directory of a run"
    )
  assert context.load_network is not None
  try:
    teacher = context.load_network(path)
  except RuntimeError as error:
    raise ValueError(f"config.task.teacher: {error}") from error
  names, width = arguments["class_names"], arguments["num_classes"]
  whose = f"the teacher {path} ({teacher.name})"
  if names and teacher.class_names:
    check_same_classes(names, teacher.class_names, f"config.task.teacher, {whose},")
  if teacher.num_classes != width:
    has = f"has {teacher.num_classes} classes" if teacher.num_classes else "has no classifier"
    raise ValueError(
      f"config.task.teacher: {whose} {has}, the training data has {width}: a teacher of the very "
      "same classes was expected"
    )
  return teacher


@dataclasses.dataclass(frozen=True)
class Distillation(Classification):
  """Trains by (1 - alpha) * the classification's loss + alpha * the loss against the teacher.

  The teacher sees the very picture that the student sees, augmented and mixed, normalised by its
  own mean and deviation, in the student's type of computation. A student with a distillation token
  (an endpoint "distillation_logits") learns the label by one head and the teacher by the other;
  else one head takes both losses. What answers in evaluation is the network's logits: with a token
  the mean of both heads.

  The teacher's variables are constants of the run (see `Task`): they are neither trained nor saved.

  Attributes:
    kind: "hard": cross-entropy with the teacher's likeliest class; "soft": temperature² times the
      Kullback-Leibler divergence of both softmaxes at that temperature, mean over the batch, as in
      the paper (DeiT's code divides by the number of classes besides).
    alpha: weight of the teacher, in [0, 1].
    temperature: of the soft form.
    teacher_path: where the teacher's weights lie.
    teacher: the network with its weights (`StoredNetwork`); None where nothing is trained.
  """

  kind: str = "hard"
  alpha: float = 0.5
  temperature: float = 3.0
  teacher_path: str | None = None
  teacher: Any = dataclasses.field(default=None, compare=False, repr=False)

  def constants(self) -> Any:
    """The teacher's variables, NumPy arrays."""
    return self.teacher.variables if self.teacher is not None else {}

  def stored_info(self) -> dict[str, Any]:
    """See `Task`; "teacher" has its path, network and a fingerprint of its weights."""
    info = super().stored_info()
    if self.teacher is None:
      return info
    mark = digest(self.teacher.variables)[:16]
    teacher = {"path": self.teacher_path, "name": self.teacher.name, "fingerprint": mark}
    return {**info, "teacher": teacher}

  def loss(
    self, variables: Variables, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """See `Task`. "loss" is the weighted sum, "agreement" how often both name one class."""
    of_teacher = self.teacher_logits(variables[CONSTANTS], batch["image"])
    (logits, endpoints), updated = self._apply(variables, batch, rng)
    by_label = endpoints.get("class_logits", logits)
    by_teacher = endpoints.get("distillation_logits", logits)
    label_losses = self._losses(by_label, batch["target"])
    teacher_losses = self.distillation_losses(by_teacher, of_teacher)
    losses = (1.0 - self.alpha) * label_losses + self.alpha * teacher_losses
    weight = jnp.asarray(losses.shape[0], jnp.float32)
    metrics = {
      "loss": (jnp.sum(losses), weight),
      "label_loss": (jnp.sum(label_losses), weight),
      "teacher_loss": (jnp.sum(teacher_losses), weight),
      "agreement": (count_correct(by_teacher, of_teacher), weight),
      "top1": (count_correct(logits, batch["target"]), weight),
    }
    return jnp.mean(losses), {"metrics": metrics, "batch_stats": updated.get("batch_stats", {})}

  def teacher_logits(self, constants: Variables, images: jax.Array) -> jax.Array:
    """The teacher's logits float32 `[B, K]` of images as the student takes them; no gradient."""
    expects = self.teacher.preprocessing
    # From the student's normalisation to the teacher's in one step.
    scale = jnp.asarray(self.std, jnp.float32) / jnp.asarray(expects.std, jnp.float32)
    shift = jnp.asarray(self.mean, jnp.float32) - jnp.asarray(expects.mean, jnp.float32)
    shift = shift / jnp.asarray(expects.std, jnp.float32)
    network = self.teacher.model.clone(dtype=getattr(self.model, "dtype", jnp.float32))
    logits, _ = network.apply(constants, images.astype(jnp.float32) * scale + shift, train=False)
    return jax.lax.stop_gradient(logits)

  def distillation_losses(self, logits: jax.Array, of_teacher: jax.Array) -> jax.Array:
    """`[B]`, of the student's logits `[B, K]` against the teacher's."""
    if self.kind == "hard":
      return self._losses(logits, jax.nn.one_hot(jnp.argmax(of_teacher, -1), self.num_classes))
    student = jax.nn.log_softmax(logits.astype(jnp.float32) / self.temperature)
    teacher = jax.nn.log_softmax(of_teacher.astype(jnp.float32) / self.temperature)
    divergence = jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)
    return self.temperature**2 * divergence

  def _apply(self, variables: Variables, batch: Batch, rng: jax.Array) -> Any:
    own = {name: value for name, value in variables.items() if name != CONSTANTS}
    return super()._apply(own, batch, rng)
