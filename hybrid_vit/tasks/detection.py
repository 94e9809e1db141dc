"""Detection and instance segmentation: any backbone under a detector, COCO's AP of boxes and masks.

The detector gives its own losses, which are added; see `heads.rcnn` and the others of
`heads.detectors`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.box_inference import BoxInference, BoxInferenceSettings, Objects
from hybrid_vit.coco_results import coco_results
from hybrid_vit.data import arguments as check
from hybrid_vit.data.classes import names_or_numbers
from hybrid_vit.data.lazy_masks import as_lazy
from hybrid_vit.data.mask_encoding import decode_mask, mask_area
from hybrid_vit.data.palettes import spread_palette
from hybrid_vit.data.spec import Field, Spec
from hybrid_vit.detection_plots import Shown, plot_detections
from hybrid_vit.detection_report import write_report
from hybrid_vit.heads.detectors import create_detector
from hybrid_vit.metrics.coco_ap import CocoResult, Detected, Truth, coco_metrics, evaluate_coco
from hybrid_vit.tasks.base import Batch, EvaluationData, Evaluator, Variables
from hybrid_vit.tasks.pictures import PictureTask
from hybrid_vit.tasks.processes import gathered_over_processes, local_variables
from hybrid_vit.tasks.registry import Context, count_classes, register_task

# Pictures in a drawing, and the least score of what is drawn.
_DRAWN, _DRAWN_SCORE = 6, 0.5


@dataclasses.dataclass(frozen=True)
class DetectionSettings:
  """`config.task`; see `Detection`.

  Attributes:
    detector: {"name": as registered, further arguments}.
    max_objects: true objects of a training picture; of more the first ones are kept.
    mask_size: side of the masks in a batch, each in the frame of its box; 0 for no masks.
    inference: how pictures of any size are seen, in evaluation and prediction.
  """

  detector: dict[str, Any] = dataclasses.field(default_factory=dict)
  max_objects: int = 100
  mask_size: int = 56
  inference: BoxInferenceSettings = dataclasses.field(default_factory=BoxInferenceSettings)

  def __post_init__(self) -> None:
    if "name" not in self.detector:
      raise ValueError(
        f"config.task.detector is {self.detector}; a 'name' among its fields was expected"
      )
    check.whole("config.task.max_objects", self.max_objects)
    check.whole("config.task.mask_size", self.mask_size, 0)


@register_task("detection", DetectionSettings)
def build_detection(settings: DetectionSettings, context: Context) -> Detection:
  """The task of `config.task.name = "detection"`.

  Raises:
    ValueError: no number of classes, or one that is not the data's, or an unknown detector.
  """
  names = tuple(context.info.get("object_class_names", ()))
  classes = count_classes(context, names, "the objects of the training data have")
  parts = dict(settings.detector)
  try:
    model = create_detector(
      parts.pop("name"),
      context.make_network(0),
      classes,
      batch_norm_groups=context.batch_norm_groups,
      masks=settings.mask_size > 0,
      **parts,
    )
  except (TypeError, ValueError) as error:
    raise ValueError(f"config.task.detector: {error}") from error
  return Detection(
    model=model,
    num_classes=classes,
    object_class_names=names,
    category_ids=tuple(context.info.get("category_ids", ())),
    mean=tuple(context.preprocessing.mean),
    std=tuple(context.preprocessing.std),
    max_objects=settings.max_objects,
    mask_size=settings.mask_size,
    inference=settings.inference,
  )


@dataclasses.dataclass(frozen=True)
class Detection(PictureTask):
  """Images `[B, H, W, 3]` and up to G objects of each: boxes, classes, masks.

  Attributes:
    num_classes: of the objects.
    object_class_names: in their order; () where they are not known.
    max_objects: G.
    mask_size: side of the masks, each in the frame of its box; 0 for none.
    inference: how pictures of any size are seen.
    category_ids: of the classes, as their data numbers them; () where they have none.
    separable: a batch's losses are divided by its own numbers of samples.
  """

  num_classes: int
  object_class_names: tuple[str, ...]
  max_objects: int
  mask_size: int
  inference: BoxInferenceSettings
  category_ids: tuple[int, ...] = ()
  separable: bool = False

  @property
  def spec(self) -> Spec:
    """A picture and its objects; in evaluation all of it at the picture's own size."""
    count, size = self.max_objects, self.mask_size
    train = {
      "image": Field("image", shape=(None, None, 3)),
      "boxes": Field("boxes", "float32", (count, 4), ragged=True),
      "box_labels": Field(
        "value", "int32", (count,), ragged=True, pad=-1, minimum=0, maximum=self.num_classes - 1
      ),
      "true_size": Field("value", "float32", (2,)),
    }
    evaluation = {
      "image": Field("image", shape=(None, None, 3), on_host=True),
      "boxes": Field("boxes", "float32", (None, 4), ragged=True, on_host=True),
      "box_labels": Field("host"),
      "crowd": Field("host"),
      "image_id": Field("host"),
    }
    if size:
      train["masks"] = Field("masks", "uint8", (count, size, size), ragged=True)
      evaluation["masks"] = Field("masks", shape=(None, None, None), ragged=True, on_host=True)
    return Spec(train, evaluation)

  @property
  def measures(self) -> dict[str, str]:
    """See `Task`: COCO's AP of boxes, and of masks where there are some."""
    names = ["box_ap", "box_ap50", "box_ap75"]
    if self.mask_size:
      names += ["mask_ap", "mask_ap50", "mask_ap75"]
    return dict.fromkeys(names, "max")

  def stored_info(self) -> dict[str, Any]:
    """See `Task`."""
    return {
      "num_classes": self.num_classes,
      "object_class_names": list(self.object_class_names),
      "category_ids": list(self.category_ids),
    }

  def augment(self, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
    """Normalises the pictures."""
    del rng, step
    kept = ("boxes", "box_labels", "true_size", "masks")
    found = {name: batch[name] for name in kept if name in batch}
    return {"image": self.normalize(batch["image"]), **found}

  def loss(
    self, variables: Variables, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """See `Task`: the sum of the detector's losses; each is a metric, too."""
    losses, updated = self._apply(variables, batch, rng)
    weight = jnp.asarray(batch["image"].shape[0], jnp.float32)
    total = sum(losses.values(), start=jnp.zeros((), jnp.float32))
    metrics = {name: (value * weight, weight) for name, value in losses.items()}
    metrics["loss"] = (total * weight, weight)
    return total, {"metrics": metrics, "batch_stats": updated.get("batch_stats", {})}

  def _apply(self, variables: Variables, batch: Batch, rng: jax.Array) -> Any:
    sampling, dropout = jax.random.split(rng)
    targets = {
      "boxes": batch["boxes"],
      "labels": batch["box_labels"],
      "valid": batch["box_labels"] >= 0,
    }
    if self.mask_size:
      targets["box_masks"] = batch["masks"].astype(jnp.float32) / 255.0
    return self.model.apply(
      variables,
      batch["image"],
      train=True,
      targets=targets,
      key=sampling,
      sizes=batch["true_size"].astype(jnp.int32),
      rngs={"dropout": dropout},
      mutable=["batch_stats"],
    )

  def detect(self, variables: Variables, images: jax.Array, sizes: jax.Array) -> Any:
    """uint8 `[B, H, W, 3]` and true sizes `[B, 2]` → detections, as `box_inference` asks."""
    return self.model.apply(
      variables, self.normalize(images), train=False, sizes=sizes.astype(jnp.int32)
    )

  def predict(self, variables: Variables, batch: Batch) -> Any:
    """ "image" `[B, H, W, 3]` → detections."""
    size = jnp.asarray(batch["image"].shape[1:3], jnp.float32)
    sizes = jnp.broadcast_to(size, (batch["image"].shape[0], 2))
    return self.detect(variables, batch["image"], sizes)

  def activations(self, variables: Variables, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
    """Image, and the detector's losses."""
    losses, _ = self._apply(variables, batch, rng)
    return {"image": batch["image"], **losses}

  def picture_inference(self) -> BoxInference:
    """What makes objects of pictures: `objects(variables, photo)`."""
    return BoxInference(self.detect, self.inference, self.fill())

  def evaluators(self, data: Sequence[EvaluationData]) -> list[Evaluator]:
    """See `Task`."""
    inference = self.picture_inference()
    return [DetectionEvaluator(self, item, inference) for item in data]


@dataclasses.dataclass(frozen=True)
class Picture:
  """What one picture holds and what was found in it; `image_id` as its data numbers it, or None."""

  index: int
  found: Objects
  boxes: np.ndarray
  labels: np.ndarray
  crowd: np.ndarray
  masks: tuple[Any, ...] | None
  image_id: Any = None


@dataclasses.dataclass(frozen=True)
class Answers:
  """A whole set: its pictures, and COCO's evaluation of "box" and perhaps "mask"."""

  pictures: list[Picture]
  measures: dict[str, CocoResult]


class FindsObjects(Protocol):
  """What `DetectionEvaluator` asks of a task; see `Detection`."""

  @property
  def num_classes(self) -> int: ...
  @property
  def object_class_names(self) -> tuple[str, ...]: ...
  @property
  def category_ids(self) -> tuple[int, ...]: ...
  @property
  def measures(self) -> Mapping[str, str]: ...


class ObjectInference(Protocol):
  """What it asks for the objects of a picture."""

  def objects(self, variables: Any, image: np.ndarray) -> Objects: ...


class DetectionEvaluator:
  """COCO's AP over a set, of boxes, and of masks where the task has a measure of them."""

  def __init__(self, task: FindsObjects, data: EvaluationData, inference: ObjectInference):
    self.name = data.name
    self._with_masks = "mask_ap" in task.measures
    self._task, self._data, self._inference = task, data, inference
    names = data.info.get("object_class_names")
    if names and len(names) != task.num_classes:
      raise ValueError(
        f"the objects of evaluation set {data.name!r} have {len(names)} classes and the detector "
        f"{task.num_classes}: evaluate on a set of the same classes, or train for these"
      )

  def run(self, variables: Variables) -> dict[str, float]:
    """See `Evaluator`; "examples" is the number of pictures."""
    return self.measure(self.answers(variables))

  def answers(self, variables: Variables) -> Answers:
    """See `WritingEvaluator`."""
    pictures = self.pictures(variables)
    kinds = {"box": "boxes", **({"mask": "masks"} if self._with_masks else {})}
    truth, detected = as_rows(pictures)
    classes = range(self._task.num_classes)
    return Answers(
      pictures,
      {name: evaluate_coco(truth, detected, classes, kind=kind) for name, kind in kinds.items()},
    )

  def measure(self, answers: Answers) -> dict[str, float]:
    """See `WritingEvaluator`.

    What COCO gives as -1, sizes of which the set has no object, is left out.
    """
    results: dict[str, float] = {}
    for name, found in answers.measures.items():
      results |= {f"{name}_{key.lower()}": value for key, value in coco_metrics(found).items()}
    asked = self._task.measures
    results = {name: value for name, value in results.items() if value >= 0 or name in asked}
    return {**results, "examples": float(len(answers.pictures))}

  def write(self, answers: Answers, directory: Any) -> list[str]:
    """See `WritingEvaluator`; the files are those of `detection_report`."""
    task, data = self._task, self._data
    ids = data.info.get("category_ids") or task.category_ids
    truth, detected = as_rows(answers.pictures)
    return write_report(
      directory,
      self.name,
      results=[
        row
        for picture in answers.pictures
        for row in coco_results(
          picture.found, picture.index if picture.image_id is None else picture.image_id, ids
        )
      ],
      measures=answers.measures,
      truth=truth,
      detected=detected,
      names=names_or_numbers(task.object_class_names, task.num_classes),
      figures=self.measure(answers),
      picture=lambda index: (data.example(index)["image"], data.describe(index)),
    )

  def pictures(self, variables: Variables) -> list[Picture]:
    """All pictures of the set with what was found in them, the same on every process."""
    own, found = local_variables(variables), []
    for batch, host in self._data.batches():
      indices = local_rows(batch["index"])
      for row, image in enumerate(host["image"]):
        if image is not None:
          found.append(self._picture(own, int(indices[row]), {k: v[row] for k, v in host.items()}))
    pictures = gathered_over_processes(found, self._data.part)
    return sorted(pictures, key=lambda picture: picture.index)

  def _picture(self, own: Any, index: int, example: Mapping[str, Any]) -> Picture:
    boxes = np.asarray(example["boxes"], np.float32).reshape(-1, 4)
    crowd = example.get("crowd")
    masks = None
    if self._with_masks:
      lazy = as_lazy(example["masks"])
      masks = tuple(lazy.rle(row) for row in range(len(lazy)))
    return Picture(
      index=index,
      found=self._inference.objects(own, example["image"]),
      boxes=boxes,
      labels=np.asarray(example["box_labels"], np.int64),
      crowd=np.zeros(len(boxes), bool) if crowd is None else np.asarray(crowd, bool),
      masks=masks,
      image_id=example.get("image_id"),
    )

  def draw(self, variables: Variables, path: Path) -> bool:
    """Photos with what was found and what is there."""
    own, examples = local_variables(variables), self._data.examples(_DRAWN)
    if jax.process_index() or not examples:
      return bool(examples)
    names = names_or_numbers(self._task.object_class_names, self._task.num_classes)
    pictures = [self._picture(own, i, example) for i, example in enumerate(examples)]
    plot_detections(
      [example["image"] for example in examples],
      [as_shown(picture.found) for picture in pictures],
      names,
      spread_palette(len(names)),
      path,
      truths=[Shown(p.boxes, p.labels, None, _bitmaps(p.masks), p.crowd) for p in pictures],
      min_score=_DRAWN_SCORE,
    )
    return True


def as_shown(found: Objects) -> Shown:
  """What `detection_plots` draws."""
  return Shown(found.boxes, found.labels, found.scores, _bitmaps(found.masks))


def _bitmaps(masks: tuple[Any, ...] | None) -> np.ndarray | None:
  return np.stack([decode_mask(mask) for mask in masks]) if masks else None


def as_rows(pictures: Sequence[Picture]) -> tuple[Truth, Detected]:
  """What COCO's evaluation takes: true objects and detections, a row each."""

  def joined(arrays: Sequence[np.ndarray], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.concatenate([np.zeros(shape, dtype), *arrays]).astype(dtype)

  def sized(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)

  with_masks = bool(pictures) and pictures[0].masks is not None
  areas = [
    np.array([mask_area(mask) for mask in p.masks or ()], np.float64)
    if with_masks
    else np.prod(sized(p.boxes)[:, 2:], axis=1, dtype=np.float64)
    for p in pictures
  ]
  truth = Truth(
    images=np.array([p.index for p in pictures], np.int64),
    image=joined([np.full(len(p.boxes), p.index) for p in pictures], (0,), np.int64),
    category=joined([p.labels for p in pictures], (0,), np.int64),
    boxes=joined([sized(p.boxes) for p in pictures], (0, 4), np.float64),
    areas=joined(areas, (0,), np.float64),
    crowd=joined([p.crowd for p in pictures], (0,), bool),
    masks=[mask for p in pictures for mask in p.masks or ()] if with_masks else None,
  )
  detected = Detected(
    image=joined([np.full(len(p.found.boxes), p.index) for p in pictures], (0,), np.int64),
    category=joined([p.found.labels for p in pictures], (0,), np.int64),
    scores=joined([p.found.scores for p in pictures], (0,), np.float64),
    boxes=joined([sized(p.found.boxes) for p in pictures], (0, 4), np.float64),
    masks=[m for p in pictures for m in p.found.masks or ()] if with_masks else None,
  )
  return truth, detected


def local_rows(array: jax.Array) -> np.ndarray:
  """This process's rows of a global array, in order."""
  if jax.process_count() == 1:
    return np.asarray(array)
  shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
  return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])
