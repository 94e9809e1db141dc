"""Image classification: softmax or sigmoid cross-entropy, mixing, exact top-1 and top-5."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_vit.data.mixing import mix_batch, smooth_one_hot
from hybrid_vit.reporting import plot_predictions
from hybrid_vit.tasks.base import Batch, EvaluationData, Evaluator, Variables

LOSSES = ("softmax", "sigmoid")


@dataclasses.dataclass(frozen=True)
class Mixing:
  """Mixup and cutmix on the device, by timm's rules; see `hybrid_vit.data.mixing`."""

  mixup_alpha: float = 0.0
  cutmix_alpha: float = 0.0
  probability: float = 1.0
  switch_probability: float = 0.5
  mode: str = "batch"


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
  """

  model: nn.Module
  num_classes: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  loss_name: str = "softmax"
  label_smoothing: float = 0.0
  mixing: Mixing | None = None
  primary_metric: str = "top1"

  def __post_init__(self) -> None:
    if self.loss_name not in LOSSES:
      raise ValueError(f"loss {self.loss_name!r} is not one of {', '.join(LOSSES)}")

  def init(self, rng: jax.Array, batch: Batch) -> dict[str, Any]:
    """See `Task`; the parameters do not depend on the batch's values or its size."""
    image = batch["image"]
    variables = self.model.init(rng, jnp.zeros((1, *image.shape[1:]), jnp.float32), train=False)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}

  def normalize(self, images: jax.Array) -> jax.Array:
    """uint8 `[B, H, W, 3]` → float32 with the network's mean and standard deviation."""
    if images.dtype != jnp.uint8:
      return images
    mean = jnp.asarray(self.mean, jnp.float32) * 255.0
    scale = 1.0 / (jnp.asarray(self.std, jnp.float32) * 255.0)
    return (images.astype(jnp.float32) - mean) * scale

  def augment(self, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
    """Adds "target" float32 `[B, K]`; mixes images and targets."""
    images = self.normalize(batch["image"])
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
    correct = jnp.argmax(logits, -1) == jnp.argmax(batch["target"], -1)
    weight = jnp.asarray(losses.shape[0], jnp.float32)
    metrics = {
      "loss": (jnp.sum(losses), weight),
      "top1": (jnp.sum(correct.astype(jnp.float32)), weight),
    }
    aux = {"metrics": metrics, "batch_stats": updated.get("batch_stats", {})}
    return jnp.mean(losses), aux

  def activations(self, variables: Variables, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
    """Image, the network's endpoints in forward order, logits."""
    (logits, endpoints), _ = self._apply(variables, batch, rng)
    return {"image": batch["image"], **endpoints, "logits": logits}

  def predict(self, variables: Variables, images: jax.Array) -> jax.Array:
    """uint8 or normalised float32 `[B, H, W, 3]` → logits float32 `[B, K]`."""
    logits, _ = self.model.apply(variables, self.normalize(images), train=False)
    return logits

  def probabilities(self, logits: jax.Array) -> jax.Array:
    """Logits `[B, K]` → probabilities: over the classes (softmax) or of each class (sigmoid)."""
    return nn.softmax(logits) if self.loss_name == "softmax" else nn.sigmoid(logits)

  def displayable(self, images: np.ndarray) -> np.ndarray:
    """Batch images as uint8, the normalisation undone."""
    if images.dtype == np.uint8:
      return images
    return np.clip((images * np.asarray(self.std) + np.asarray(self.mean)) * 255.0, 0, 255).astype(
      np.uint8
    )

  def evaluate_batch(self, variables: Variables, batch: Batch) -> dict[str, Any]:
    """Sums and weights over the rows whose "mask" is 1; no smoothing."""
    logits = self.predict(variables, batch["image"])
    mask, labels = batch["mask"], batch["label"]
    one_hot = smooth_one_hot(labels, self.num_classes, 0.0)
    # Rows that do not count may hold anything: a NaN times 0 would still be one.
    losses = jnp.where(mask > 0, self._losses(logits, one_hot), 0.0)
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    # Ties count against the network: a constant one must not look right.
    rank = jnp.sum(logits >= own, axis=-1) - 1
    weight = jnp.sum(mask)
    sums = {"loss": (jnp.sum(losses), weight), "top1": (jnp.sum(mask * (rank < 1)), weight)}
    if self.num_classes > 5:
      sums["top5"] = (jnp.sum(mask * (rank < 5)), weight)
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


class ClassificationEvaluator:
  """Loss, top-1 and top-5 over a data set, every picture counted once."""

  def __init__(self, task: Classification, data: EvaluationData, evaluate_batch: Any, predict: Any):
    self.name = data.name
    self._task = task
    self._data = data
    self._evaluate_batch = evaluate_batch
    self._predict = predict

  def run(self, variables: Variables) -> dict[str, float]:
    """See `Evaluator`; "examples" is the number of pictures that counted.

    Raises:
      ValueError: no picture counted.
    """
    totals: dict[str, np.ndarray] = {}
    for result in self._results(variables):
      for key, pair in jax.device_get(result).items():
        totals[key] = totals.get(key, np.zeros(2)) + np.asarray(pair, np.float64)
    if not totals or not totals["loss"][1]:
      raise ValueError(f"evaluation set {self.name!r} holds no readable picture")
    examples = totals["loss"][1]
    return {**{key: float(t[0] / t[1]) for key, t in totals.items()}, "examples": float(examples)}

  def _results(self, variables: Variables) -> Iterable[dict[str, Any]]:
    """One batch ahead of the host, so that the device does not wait for the sums."""
    previous = None
    for batch in self._data.batches():
      current = self._evaluate_batch(variables, batch)
      if previous is not None:
        yield previous
      previous = current
    if previous is not None:
      yield previous

  def draw(self, variables: Variables, path: Path) -> None:
    """A grid of pictures with true and predicted names and the probability of the prediction."""
    batch = next(iter(self._data.batches()))
    probabilities = np.asarray(self._task.probabilities(self._predict(variables, batch["image"])))
    shown = np.flatnonzero(np.asarray(batch["mask"]) > 0)[:24]
    predicted = probabilities.argmax(-1)
    names = list(self._data.class_names)
    plot_predictions(
      self._task.displayable(np.asarray(batch["image"])[shown]),
      [names[i] for i in np.asarray(batch["label"])[shown]],
      [names[i] for i in predicted[shown]],
      probabilities.max(-1)[shown],
      path,
    )
