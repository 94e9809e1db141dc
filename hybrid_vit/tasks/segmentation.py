"""Semantic segmentation: any backbone with any head, mmsegmentation's losses, exact mean IoU.

The loss is that of mmsegmentation's recipes unless told otherwise: logits are resized to the map
first, and the sum over pixels with a class is divided by the number of all pixels, those without a
class included (`average="all"`; PyTorch and transformers divide by the others: "valid").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.data import arguments as check
from hybrid_vit.data.classes import names_or_numbers
from hybrid_vit.data.map_reading import IGNORE
from hybrid_vit.data.palettes import spread_palette
from hybrid_vit.data.spec import Field, Spec
from hybrid_vit.dense_plots import plot_segmentations
from hybrid_vit.map_inference import MapInference
from hybrid_vit.metrics.segmentation import confusion, segmentation_metrics
from hybrid_vit.ops.resize import resize_bilinear
from hybrid_vit.tasks.base import Batch, EvaluationData, Evaluator, Variables
from hybrid_vit.tasks.dense import DRAWN, DecoderSettings, DenseTask, build_model
from hybrid_vit.tasks.map_losses import cross_entropy, dice_loss, ohem_cross_entropy
from hybrid_vit.tasks.processes import local_variables, summed_over_processes
from hybrid_vit.tasks.registry import Context, count_classes, register_task

AVERAGES = ("all", "valid")


@dataclasses.dataclass(frozen=True)
class Ohem:
  """Online hard example mining: the loss is that of the pixels that are least certain.

  Attributes:
    threshold: pixels whose class has a probability below it count.
    min_kept: of each picture's pixels at least so many count.
  """

  threshold: float = 0.7
  min_kept: int = 100_000

  def __post_init__(self) -> None:
    check.number("config.task.ohem.threshold", self.threshold, 0, 1)
    check.whole("config.task.ohem.min_kept", self.min_kept)


@dataclasses.dataclass(frozen=True)
class SegmentationSettings(DecoderSettings):
  """`config.task`; see `DecoderSettings` and `Segmentation`.

  Attributes:
    average: the divisor of the cross entropy: "all" pixels or the "valid" ones.
    class_weights: of each class in the cross entropy, or None.
    ohem: mining of hard pixels, or None.
    dice_weight: of a dice loss beside the cross entropy.
  """

  average: str = "all"
  class_weights: tuple[float, ...] | None = None
  ohem: Ohem | None = None
  dice_weight: float = 0.0

  def __post_init__(self) -> None:
    super().__post_init__()
    check.choice("config.task.average", self.average, AVERAGES)
    check.number("config.task.dice_weight", self.dice_weight, 0)


@register_task("segmentation", SegmentationSettings)
def build_segmentation(settings: SegmentationSettings, context: Context) -> Segmentation:
  """The task of `config.task.name = "segmentation"`.

  Raises:
    ValueError: no number of classes, or one that is not the data's.
  """
  names = tuple(context.info.get("map_class_names", ()))
  classes = count_classes(context, names, "the maps of the training data have")
  if settings.class_weights is not None and len(settings.class_weights) != classes:
    raise ValueError(
      f"config.task.class_weights has {len(settings.class_weights)} numbers; {classes} were "
      "expected"
    )
  palette = context.info.get("palette")
  return Segmentation(
    model=build_model(settings, context.make_network(0), classes, context.batch_norm_groups),
    mean=tuple(context.preprocessing.mean),
    std=tuple(context.preprocessing.std),
    auxiliary_weight=settings.auxiliary_weight,
    inference=settings.inference,
    num_classes=classes,
    map_class_names=names,
    palette=as_colors(palette, classes),
    average=settings.average,
    class_weights=settings.class_weights,
    ohem=settings.ohem,
    dice_weight=settings.dice_weight,
  )


@dataclasses.dataclass(frozen=True)
class Segmentation(DenseTask):
  """Images `[B, H, W, 3]` and maps of classes, int32 `[B, H, W]`, 255 for none.

  Attributes:
    num_classes: of the maps.
    map_class_names: in the order of the classes; () where they are not known.
    palette: a colour of each class.
    average: see `SegmentationSettings`; so are the others.
  """

  num_classes: int = 0
  map_class_names: tuple[str, ...] = ()
  palette: tuple[tuple[int, int, int], ...] = ()
  average: str = "all"
  class_weights: tuple[float, ...] | None = None
  ohem: Ohem | None = None
  dice_weight: float = 0.0

  @property
  def separable(self) -> bool:
    """Not where pixels of one picture count by those of others."""
    return self.average == "all" and self.ohem is None

  @property
  def spec(self) -> Spec:
    """A picture and its map; in evaluation each of its own size."""
    return map_fields(self.num_classes)

  @property
  def measures(self) -> dict[str, str]:
    """See `Task`."""
    return map_measures()

  def stored_info(self) -> dict[str, Any]:
    """See `Task`."""
    return map_info(self)

  def augment(self, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
    """Normalises the pictures."""
    del rng, step
    return {"image": self.normalize(batch["image"]), "map": batch["map"]}

  def loss(
    self, variables: Variables, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """See `Task`."""
    (answer, found), updated = self.apply_in_training(variables, batch, rng)
    labels = batch["map"]
    logits = self._at_map(answer, labels)
    main = total = self._loss(logits, labels)
    weight = jnp.asarray(labels.shape[0], jnp.float32)
    metrics = {}
    if "auxiliary" in found:
      auxiliary = self._loss(self._at_map(found["auxiliary"], labels), labels)
      total = main + self.auxiliary_weight * auxiliary
      metrics["auxiliary_loss"] = (auxiliary * weight, weight)
    valid = labels != IGNORE
    right = valid & (jnp.argmax(logits, axis=-1) == labels)
    metrics |= {
      "loss": (total * weight, weight),
      "main_loss": (main * weight, weight),
      "pixel_accuracy": (
        jnp.sum(right, dtype=jnp.float32),
        jnp.sum(valid, dtype=jnp.float32),
      ),
    }
    return total, {"metrics": metrics, "batch_stats": updated.get("batch_stats", {})}

  def _at_map(self, answer: jax.Array, labels: jax.Array) -> jax.Array:
    corners = self.inference.align_corners
    return resize_bilinear(answer, labels.shape[1:3], align_corners=corners)

  def _loss(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
    weights = self.class_weights
    if self.ohem is not None:
      loss = ohem_cross_entropy(
        logits,
        labels,
        ignore=IGNORE,
        threshold=self.ohem.threshold,
        min_kept=self.ohem.min_kept,
        class_weights=weights,
        average=self.average,
      )
    else:
      loss = cross_entropy(
        logits, labels, ignore=IGNORE, class_weights=weights, average=self.average
      )
    if self.dice_weight:
      loss = loss + self.dice_weight * dice_loss(logits, labels, ignore=IGNORE)
    return loss

  def picture_inference(self) -> MapInference:
    """What makes maps of pictures: `classes(variables, photo)`."""
    return MapInference(self.answers, self.inference, softmax=True)

  def evaluators(self, data: Sequence[EvaluationData]) -> list[Evaluator]:
    """See `Task`."""
    inference = self.picture_inference()
    return [SegmentationEvaluator(self, item, inference) for item in data]


def map_fields(num_classes: int) -> Spec:
  """A picture and its map of classes; in evaluation each of its own size."""
  limits: dict[str, Any] = {"minimum": 0, "maximum": num_classes - 1, "besides": IGNORE}
  return Spec(
    {
      "image": Field("image", shape=(None, None, 3)),
      "map": Field("map", "int32", (None, None), pad=IGNORE, **limits),
    },
    {
      "image": Field("image", shape=(None, None, 3), on_host=True),
      "map": Field("map", "int32", (None, None), on_host=True),
    },
  )


def map_measures() -> dict[str, str]:
  """What `SegmentationEvaluator` measures."""
  return dict.fromkeys(("mean_iou", "mean_accuracy", "pixel_accuracy"), "max")


class ClassesOfMaps(Protocol):
  """What is known of the classes of maps, of a task or beside one."""

  @property
  def num_classes(self) -> int: ...

  @property
  def map_class_names(self) -> tuple[str, ...]: ...

  @property
  def palette(self) -> tuple[tuple[int, int, int], ...]: ...


def map_info(task: ClassesOfMaps) -> dict[str, Any]:
  """What goes with the weights, as `Task.stored_info`."""
  return {
    "num_classes": task.num_classes,
    "map_class_names": list(task.map_class_names),
    "palette": [list(color) for color in task.palette],
  }


class SegmentationEvaluator:
  """Mean IoU and accuracies over a set, from one confusion matrix."""

  def __init__(self, task: ClassesOfMaps, data: EvaluationData, inference: MapInference):
    self.name = data.name
    self._task, self._data, self._inference = task, data, inference
    names = data.info.get("map_class_names")
    if names and len(names) != task.num_classes:
      raise ValueError(
        f"the maps of evaluation set {data.name!r} have {len(names)} classes and the head "
        f"{task.num_classes}: evaluate on a set of the same classes, or train a head for these"
      )

  def run(self, variables: Variables) -> dict[str, float]:
    """See `Evaluator`; "examples" is the number of pictures that counted.

    Raises:
      ValueError: no pixel counted, or a label that is no class of the head, with the example's
        number.
    """
    matrix, examples = self.confusion(variables)
    if not matrix.sum():
      raise ValueError(f"no pixel of evaluation set {self.name!r} has a class")
    return {**segmentation_metrics(matrix), "examples": float(examples)}

  def confusion(self, variables: Variables) -> tuple[np.ndarray, int]:
    """Counts of the whole set, int64 `[K, K]`, true by predicted class, and of its pictures."""
    own, classes = local_variables(variables), self._task.num_classes
    matrix, examples = np.zeros((classes, classes), np.int64), 0
    for batch, host in self._data.batches():
      for row, (image, labels) in enumerate(zip(host["image"], host["map"])):
        if image is None:
          continue
        predicted = self._inference.classes(own, image)
        try:
          matrix += confusion(predicted, np.asarray(labels), classes, IGNORE)
        except ValueError as error:
          raise ValueError(
            f"evaluation set {self.name!r}, row {row} of a batch of {len(host['image'])}: {error}"
          ) from error
        examples += 1
      del batch
    summed = summed_over_processes(
      {"matrix": matrix, "examples": np.asarray(examples, np.int64)}, self._data.part
    )
    return summed["matrix"], int(summed["examples"])

  def draw(self, variables: Variables, path: Path) -> bool:
    """Photos with predicted and true classes over them and where the two differ."""
    own = local_variables(variables)
    examples = self._data.examples(DRAWN)
    if jax.process_index() or not examples:
      return bool(examples)
    task = self._task
    names = task.map_class_names or self._data.info.get("map_class_names", ())
    plot_segmentations(
      [example["image"] for example in examples],
      [self._inference.classes(own, example["image"]) for example in examples],
      names_or_numbers(names, task.num_classes),
      np.array(task.palette, np.uint8),
      path,
      truths=[example["map"] for example in examples],
    )
    return True


def as_colors(palette: Any, classes: int) -> tuple[tuple[int, int, int], ...]:
  """The palette that the data has, else one of our own, as plain numbers."""
  colors = spread_palette(classes) if palette is None else np.asarray(palette)
  return tuple((int(r), int(g), int(b)) for r, g, b in colors)
