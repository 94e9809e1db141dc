"""Image classification: softmax or sigmoid cross-entropy, mixing, exact top-1 and top-5."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from hybrid_vit.data import arguments as check
from hybrid_vit.data.balance import class_weights
from hybrid_vit.data.erasing import random_erase
from hybrid_vit.data.imagenet_variants import padded_sets
from hybrid_vit.data.mixing import mix_batch, smooth_one_hot
from hybrid_vit.data.spec import INDEX, MASK, Field, Spec
from hybrid_vit.plots import plot_predictions
from hybrid_vit.tasks.base import Batch, EvaluationData, Evaluator, Variables, summed
from hybrid_vit.tasks.pictures import (
  Shrinking,
  displayable,
  initial_variables,
  normalized,
  shrunk_and_normalized,
)
from hybrid_vit.tasks.registry import Context, count_classes, register_task

LOSSES = ("softmax", "sigmoid")
BALANCED = "balanced"
# Instead of the logit of a class that does not compete.
_LOWEST = -1e30
# Pictures in a drawing of predictions.
_DRAWN = 24
# Pictures by which the error of a reversible network's inverse is measured.
_INVERTED = 8


@dataclasses.dataclass(frozen=True)
class Mixing:
  """Mixup and cutmix on the device, by timm's rules; see `hybrid_vit.data.mixing`."""

  mixup_alpha: float = 0.0
  cutmix_alpha: float = 0.0
  probability: float = 1.0
  switch_probability: float = 0.5
  mode: str = "batch"


@dataclasses.dataclass(frozen=True)
class Erasing:
  """Random erasing on the device; see `hybrid_vit.data.erasing`."""

  probability: float = 0.25
  area: tuple[float, float] = (0.02, 1 / 3)
  aspect: tuple[float, float] = (0.3, 10 / 3)

  def __post_init__(self) -> None:
    check.number("config.task.erasing.probability", self.probability, 0, 1)
    check.rising("config.task.erasing.area", self.area, 1)
    check.rising("config.task.erasing.aspect", self.aspect)


@dataclasses.dataclass(frozen=True)
class ClassificationSettings:
  """`config.task`; see `Classification`.

  `class_weights` is "balanced" (by inverse frequency, `data.balance.class_weights`) or a number for
  each class.
  """

  loss: str = "softmax"
  label_smoothing: float = 0.0
  mixing: Mixing | None = None
  shrink: Shrinking | None = None
  erasing: Erasing | None = None
  class_weights: tuple[float, ...] | str | None = None

  def __post_init__(self) -> None:
    if self.loss not in LOSSES:
      raise ValueError(f"config.task.loss {self.loss!r} is not one of {', '.join(LOSSES)}")
    if not 0.0 <= self.label_smoothing < 1.0:
      raise ValueError(
        f"config.task.label_smoothing is {self.label_smoothing}; a number in [0, 1) was expected"
      )
    if isinstance(self.class_weights, str) and self.class_weights != BALANCED:
      raise ValueError(
        f"config.task.class_weights is {self.class_weights!r}; {BALANCED!r} was expected, or a "
        "number for each class"
      )


@register_task("classification", ClassificationSettings)
def build_classification(settings: ClassificationSettings, context: Context) -> Classification:
  """The task of `config.task.name = "classification"`."""
  return Classification(**classification_arguments(settings, context))


def classification_arguments(settings: Any, context: Context) -> dict[str, Any]:
  """What `Classification` and its kinds are made of.

  Raises:
    ValueError: no number of classes, or one that is not the data's.
  """
  names = tuple(context.info.get("class_names", ()))
  classes = count_classes(context, names, "the training data has")
  return {
    "model": context.make_network(classes),
    "num_classes": classes,
    "mean": tuple(context.preprocessing.mean),
    "std": tuple(context.preprocessing.std),
    "loss_name": settings.loss,
    "label_smoothing": settings.label_smoothing,
    "mixing": settings.mixing,
    "shrink": settings.shrink,
    "erasing": settings.erasing,
    "class_names": names,
    "class_weights": _class_weights(settings.class_weights, context.info, classes),
  }


def _class_weights(
  given: tuple[float, ...] | str | None, info: Mapping[str, Any], classes: int
) -> tuple[float, ...] | str | None:
  """A number for each class; "balanced" where that is asked for and the data is not at hand."""
  if given == BALANCED and "class_counts" in info:
    return class_weights(info["class_counts"])
  if given is None or isinstance(given, str):
    return given
  if len(given) != classes or not all(w >= 0 for w in given):
    raise ValueError(
      f"config.task.class_weights has {len(given)} numbers ({given}); {classes} were expected, "
      "none of them negative"
    )
  return tuple(map(float, given))


@dataclasses.dataclass(frozen=True)
class Classification:
  """Classification of images `[B, H, W, 3]` into `num_classes`.

  uint8 images are normalised here by `mean` and `std` (units of [0, 1]); float32 images are taken
  as they come, their transform has normalised them.

  Attributes:
    model: backbone of the registry's contract.
    num_classes: width of the head.
    mean: per channel.
    std: per channel.
    loss_name: "softmax" (mean over the batch of the cross-entropy) or "sigmoid" (binary
      cross-entropy summed over the classes, mean over the batch, as CoAtNet's family pretrains).
    label_smoothing: timm's form: off = s/K, on = 1 - s + s/K.
    mixing: mixup and cutmix, or None.
    shrink: to what size training pictures are brought first, or None.
    erasing: random erasing on the device, between the two, or None.
    class_names: in the order of the head's outputs; () where they are not known.
    class_weights: of each class in the training loss: a row's loss is multiplied by its target's
      mean of them. None for none.
  """

  model: nn.Module
  num_classes: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  loss_name: str = "softmax"
  label_smoothing: float = 0.0
  mixing: Mixing | None = None
  shrink: Shrinking | None = None
  erasing: Erasing | None = None
  class_names: tuple[str, ...] = ()
  class_weights: tuple[float, ...] | str | None = None
  separable: bool = True

  @property
  def spec(self) -> Spec:
    """A picture of the transform's size and a class."""
    fields = {
      "image": Field("image", shape=(None, None, 3)),
      "label": Field("value", "int32", minimum=0, maximum=self.num_classes - 1),
    }
    return Spec(fields, fields)

  @property
  def measures(self) -> dict[str, str]:
    """See `Task`."""
    several = {"top5": "max"} if self.num_classes > 5 else {}
    inverse = {"inverse_error": "min"} if getattr(self.model, "reversible", False) else {}
    return {"top1": "max", **several, "loss": "min", **inverse}

  def inverse_error(self, variables: Variables, images: jax.Array) -> jax.Array:
    """Of a reversible network: the largest relative error of a map that its backward pass rebuilds.

    Gradients are about as exact; where it nears 1 they are noise (`ops/reversible.py`).
    """
    errors: Any = self.model.apply(variables, self.normalize(images), method="inverse_errors")
    return jnp.max(errors)

  def stored_info(self) -> dict[str, Any]:
    """See `Task`."""
    return {"num_classes": self.num_classes, "class_names": list(self.class_names)}

  def init(self, rng: jax.Array, batch: Batch) -> dict[str, Any]:
    """See `Task`; the parameters do not depend on the batch's values or its size."""
    return initial_variables(self.model, rng, batch)

  def normalize(self, images: jax.Array) -> jax.Array:
    """uint8 `[B, H, W, 3]` → float32 with the network's mean and standard deviation."""
    return normalized(images, self.mean, self.std)

  def augment(self, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
    """Shrinks, normalises, erases, adds "target" float32 `[B, K]`, mixes images and targets."""
    del step
    images = shrunk_and_normalized(batch["image"], self.mean, self.std, self.shrink)
    if self.erasing is not None:
      erase_rng = jax.random.fold_in(rng, 1)
      images = random_erase(erase_rng, images, **dataclasses.asdict(self.erasing))
    targets = smooth_one_hot(batch["label"], self.num_classes, self.label_smoothing)
    if self.mixing is not None:
      images, targets = mix_batch(rng, images, targets, **dataclasses.asdict(self.mixing))
    return {"image": images, "target": targets}

  def loss(
    self, variables: Variables, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """See `Task`. "top1" of a mixed picture counts against the larger part of its target."""
    (logits, _), updated = self._apply(variables, batch, rng)
    losses = self._losses(logits, batch["target"])
    weight = jnp.asarray(losses.shape[0], jnp.float32)
    metrics = {
      "loss": (jnp.sum(losses), weight),
      "top1": (count_correct(logits, batch["target"]), weight),
    }
    aux = {"metrics": metrics, "batch_stats": updated.get("batch_stats", {})}
    return self.mean_loss(losses, batch["target"]), aux

  def mean_loss(self, losses: jax.Array, targets: jax.Array) -> jax.Array:
    """Losses of rows `[B]` → their mean, by the weights of the classes where there are any."""
    return jnp.mean(losses * self.row_weights(targets))

  def row_weights(self, targets: jax.Array) -> jax.Array:
    """Targets `[B, K]` → weights of the rows in the loss, float32 `[B]` or 1.

    Raises:
      ValueError: the weights are to be those of the data, which does not say how many examples its
        classes have.
    """
    if self.class_weights is None:
      return jnp.ones((), jnp.float32)
    if isinstance(self.class_weights, str):
      raise ValueError(
        f"config.task.class_weights is {self.class_weights!r}, and how many examples each class "
        "has is not known without reading them (it is for folder:, zip:, digits, fashion_mnist): "
        "give a number for each class"
      )
    return targets @ jnp.asarray(self.class_weights, jnp.float32)

  def activations(self, variables: Variables, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
    """Image, the network's endpoints in forward order, logits."""
    (logits, endpoints), _ = self._apply(variables, batch, rng)
    return {"image": batch["image"], **endpoints, "logits": logits}

  def predict(self, variables: Variables, batch: Batch) -> jax.Array:
    """ "image" uint8 or normalised float32 `[B, H, W, 3]` → logits float32 `[B, K]`."""
    logits, _ = self.model.apply(variables, self.normalize(batch["image"]), train=False)
    return logits

  def probabilities(self, logits: jax.Array) -> jax.Array:
    """Logits `[B, K]` → probabilities: over the classes (softmax) or of each class (sigmoid)."""
    return nn.softmax(logits) if self.loss_name == "softmax" else nn.sigmoid(logits)

  def displayable(self, images: np.ndarray) -> np.ndarray:
    """Batch images as uint8, the normalisation undone."""
    return displayable(images, self.mean, self.std)

  def evaluate_batch(
    self,
    variables: Variables,
    batch: Batch,
    competing: np.ndarray | None = None,
    label_sets: np.ndarray | None = None,
  ) -> dict[str, Any]:
    """Sums and weights over the rows whose "mask" is 1; no smoothing.

    Args:
      variables: of the network.
      batch: a global one.
      competing: bool `[K]`, the classes of a set that has not all of them; the others' logits count
        for nothing. None for all.
      label_sets: int32 `[N, M]`, the right classes of each example of the set by its "index", -1
        for none; None where "label" is the only one. There is no "loss" then.
    """
    logits = competing_only(self.predict(variables, batch), competing)
    mask = batch[MASK]
    sums = ranked(logits, batch, label_sets)
    if label_sets is None:
      # Rows that do not count may hold anything: a NaN times 0 would still be one.
      one_hot = smooth_one_hot(batch["label"], self.num_classes, 0.0)
      losses = jnp.where(mask > 0, self._losses(logits, one_hot), 0.0)
      sums = {"loss": (jnp.sum(losses), jnp.sum(mask)), **sums}
    return sums

  def evaluators(self, data: Sequence[EvaluationData]) -> list[Evaluator]:
    """See `Task`."""
    evaluate_batch, predict = jax.jit(self.evaluate_batch), jax.jit(self.predict)
    return [ClassificationEvaluator(self, item, evaluate_batch, predict) for item in data]

  def _apply(self, variables: Variables, batch: Batch, rng: jax.Array) -> Any:
    return self.model.apply(
      variables, batch["image"], train=True, rngs={"dropout": rng}, mutable=["batch_stats"]
    )

  def _losses(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
    logits = logits.astype(jnp.float32)
    if self.loss_name == "softmax":
      return optax.softmax_cross_entropy(logits, targets)
    return jnp.sum(optax.sigmoid_binary_cross_entropy(logits, targets), axis=-1)


def competing_only(logits: jax.Array, competing: np.ndarray | None) -> jax.Array:
  """Logits `[B, K]` with those of classes that do not compete (bool `[K]`) below all others."""
  # Not -inf, which times a target of 0 is NaN.
  return logits if competing is None else jnp.where(competing, logits, _LOWEST)


def ranked(
  logits: jax.Array, batch: Batch, label_sets: np.ndarray | None = None
) -> dict[str, tuple[jax.Array, jax.Array]]:
  """ "top1", and with more than five classes "top5", as (sum, weight) over rows that count.

  Args:
    logits: `[B, K]`.
    batch: has "mask", "label" and, for `label_sets`, "index".
    label_sets: see `Classification.evaluate_batch`.
  """
  mask, classes = batch[MASK], jnp.arange(logits.shape[-1])
  right = batch["label"][:, None] == classes
  if label_sets is not None:
    sets = jnp.asarray(label_sets)[batch[INDEX]]
    right = jnp.any(sets[..., None] == classes, axis=1)
  # The best of the right ones; one that is NaN counts as none.
  own = jnp.max(jnp.where(right, logits, -jnp.inf), axis=-1, keepdims=True)
  # Ties count against the network, and so does what cannot be compared: neither a constant one nor
  # one whose logits are NaN may look right.
  rank = jnp.sum(~(logits < own) & ~right, axis=-1)
  weight = jnp.sum(mask)
  sums = {"top1": (jnp.sum(mask * (rank < 1)), weight)}
  if len(classes) > 5:
    sums["top5"] = (jnp.sum(mask * (rank < 5)), weight)
  return sums


def count_correct(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Rows of `[B, K]` whose largest logit is the target's largest; rows with a NaN are not right."""
  right = jnp.argmax(logits, -1) == jnp.argmax(targets, -1)
  return jnp.sum((right & ~jnp.any(jnp.isnan(logits), -1)).astype(jnp.float32))


class ClassificationEvaluator:
  """Loss, top-1 and top-5 over a data set, every picture counted once."""

  def __init__(self, task: Classification, data: EvaluationData, evaluate_batch: Any, predict: Any):
    self.name = data.name
    self._task = task
    self._data = data
    self._evaluate_batch = evaluate_batch
    self._predict = predict
    self._inverse_error = jax.jit(task.inverse_error)
    subset, sets = data.info.get("class_subset"), data.info.get("label_sets")
    self._competing = None if subset is None else np.isin(np.arange(task.num_classes), subset)
    self._label_sets = None if sets is None else padded_sets(sets)

  def run(self, variables: Variables) -> dict[str, float]:
    """See `Evaluator`; "examples" is the number of pictures that counted.

    Raises:
      ValueError: no picture counted.
    """
    totals = summed(
      self._data,
      lambda v, batch: self._evaluate_batch(v, batch, self._competing, self._label_sets),
      variables,
    )
    if not totals or not totals["top1"][1]:
      raise ValueError(f"evaluation set {self.name!r} holds no readable picture")
    means = {key: total / weight for key, (total, weight) in totals.items()}
    if "inverse_error" in self._task.measures:
      sample = self._data.sample(_INVERTED)["image"]
      means["inverse_error"] = float(self._inverse_error(variables, sample))
    return {**means, "examples": totals["top1"][1]}

  def draw(self, variables: Variables, path: Path) -> bool:
    """A grid of pictures with true and predicted names and the probability of the prediction."""
    sample = self._data.sample(_DRAWN)
    if not len(sample["label"]):
      return False
    logits = self._predict(variables, {"image": sample["image"]})
    if jax.process_count() > 1:
      logits = multihost_utils.process_allgather(logits, tiled=True)
    if jax.process_index():
      return True
    if self._competing is not None:
      logits = np.where(self._competing, logits, _LOWEST)
    probabilities = np.asarray(self._task.probabilities(jnp.asarray(logits)))
    names = self._data.info.get("class_names") or self._task.class_names
    name = functools.partial(_class_name, names)
    predicted = probabilities.argmax(-1)
    plot_predictions(
      self._task.displayable(np.asarray(sample["image"])),
      [name(int(i)) for i in sample["label"]],
      [name(int(i)) for i in predicted],
      [float(p) for p in probabilities.max(-1)],
      path,
    )
    return True


def _class_name(names: Sequence[str], index: int) -> str:
  return names[index] if index < len(names) else f"class {index}"
