"""Segmentation by queries of a class and a mask each: panoptic, of instances, and semantic.

Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", CVPR 2022,
arXiv:2112.01527. One network and one loss; the three tasks differ in what the segments of a picture
are and in what is measured:

    panoptic_segmentation   things and stuff, none overlapping: PQ, and mean IoU and AP beside it
    instance_segmentation   objects, which may overlap: COCO's AP
    mask_segmentation       classes of pixels (semantic segmentation): mean IoU

kMaX-DeepLab (arXiv:2207.04044) is another head of the same tasks, with losses and rules of its own:
`mask_methods`.

Segments are in a batch in the least bytes (`ops.mask_forms`): one map of numbers, or of objects a
bit a pixel. Deviations from the authors' code are listed in `mask2former_losses`,
`mask2former_inference`, `kmax_losses`, `kmax_inference` and `data.segment_operations`; further:
pictures of the semantic task are not padded to multiples of 32, and kMaX's class scores, not its
mask logits, are brought to their size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_vit.data import arguments as check
from hybrid_vit.data import segments
from hybrid_vit.data.map_reading import IGNORE
from hybrid_vit.data.spec import Field, Spec
from hybrid_vit.heads.mask_model import create_mask_model
from hybrid_vit.map_inference import InferenceSettings, MapInference
from hybrid_vit.mask_inference import MaskInference
from hybrid_vit.ops.mask_forms import LabelMasks, PackedMasks
from hybrid_vit.ops.resize import resize_bilinear
from hybrid_vit.tasks.base import Batch, EvaluationData, Evaluator, Variables
from hybrid_vit.tasks.detection import DetectionEvaluator
from hybrid_vit.tasks.mask2former_losses import SegmentTargets, semantic_targets
from hybrid_vit.tasks.mask_methods import MaskMethod, method_of, read_settings
from hybrid_vit.tasks.panoptic_evaluation import PanopticEvaluator
from hybrid_vit.tasks.pictures import PictureTask
from hybrid_vit.tasks.registry import Context, count_classes, register_task
from hybrid_vit.tasks.segmentation import (
  SegmentationEvaluator,
  as_colors,
  map_fields,
  map_info,
  map_measures,
)


@dataclasses.dataclass(frozen=True)
class MaskSettings:
  """`config.task`; see `MaskTask`.

  Attributes:
    head: {"name": "mask2former", attributes of `heads.mask2former.Mask2Former`}, or "kmax" and
      those of `heads.kmax.KMaX`. It decides the losses and what becomes of the answers.
    neck: {"name": as registered in `heads.registry`, further attributes}; None for none, or for
      what a plain transformer needs.
    loss: its weights and numbers of points: fields of `mask2former_losses.Mask2FormerLoss`, or of
      `kmax_losses.KMaXLoss`.
    max_objects: segments of a training picture; of more the first ones are kept.
  """

  head: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "mask2former"})
  neck: dict[str, Any] | None = None
  loss: dict[str, Any] = dataclasses.field(default_factory=dict)
  max_objects: int = 100

  def __post_init__(self) -> None:
    for name in ("head", "neck"):
      given = getattr(self, name)
      if given is not None and "name" not in given:
        raise ValueError(f"config.task.{name} is {given}; a 'name' among its fields was expected")
    check.whole("config.task.max_objects", self.max_objects)
    if self.max_objects > segments.MOST:
      raise ValueError(
        f"config.task.max_objects is {self.max_objects}; at most {segments.MOST} was expected"
      )


@dataclasses.dataclass(frozen=True)
class SegmentSettings(MaskSettings):
  """Further, of panoptic segments and of instances:

  Attributes:
    inference: how pictures of any size are seen, in evaluation and prediction, and what becomes of
      the head's answers: fields of the head's settings in `mask_rules`.
  """

  inference: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class SemanticSettings(MaskSettings):
  """Further, `inference`: how pictures of any size are seen, in evaluation and prediction."""

  inference: InferenceSettings = dataclasses.field(default_factory=InferenceSettings)


@register_task("panoptic_segmentation", SegmentSettings)
def build_panoptic(settings: SegmentSettings, context: Context) -> PanopticSegmentation:
  """The task of `config.task.name = "panoptic_segmentation"`.

  Raises:
    ValueError: no number of classes, or one that is not the data's.
  """
  names = tuple(context.info.get("map_class_names", ()))
  things = tuple(int(c) for c in context.info.get("thing_classes", ()))
  classes = count_classes(context, names, "the segments of the training data have")
  return PanopticSegmentation(
    **_shared(settings, context, classes),
    inference=_inference(settings, method_of(settings.head["name"]).rules.panoptic_settings),
    map_class_names=names,
    palette=as_colors(context.info.get("palette"), classes),
    thing_classes=things,
  )


@register_task("instance_segmentation", SegmentSettings)
def build_instances(settings: SegmentSettings, context: Context) -> InstanceSegmentation:
  """The task of `config.task.name = "instance_segmentation"`.

  Raises:
    ValueError: no number of classes, or one that is not the data's.
  """
  names = tuple(context.info.get("object_class_names", ()))
  classes = count_classes(context, names, "the objects of the training data have")
  return InstanceSegmentation(
    **_shared(settings, context, classes),
    inference=_inference(settings, method_of(settings.head["name"]).rules.instance_settings),
    object_class_names=names,
    category_ids=tuple(context.info.get("category_ids", ())),
  )


@register_task("mask_segmentation", SemanticSettings)
def build_semantic(settings: SemanticSettings, context: Context) -> MaskSegmentation:
  """The task of `config.task.name = "mask_segmentation"`.

  Raises:
    ValueError: no number of classes, or one that is not the data's.
  """
  names = tuple(context.info.get("map_class_names", ()))
  classes = count_classes(context, names, "the maps of the training data have")
  return MaskSegmentation(
    **_shared(settings, context, classes),
    inference=settings.inference,
    map_class_names=names,
    palette=as_colors(context.info.get("palette"), classes),
  )


def _shared(settings: MaskSettings, context: Context, classes: int) -> dict[str, Any]:
  try:
    method = method_of(settings.head["name"])
    model = create_mask_model(
      context.make_network(0),
      classes,
      head=settings.head,
      neck=settings.neck,
      batch_norm_groups=context.batch_norm_groups,
    )
  except (TypeError, ValueError) as error:
    raise ValueError(f"config.task: {error}") from error
  return {
    "model": model,
    "num_classes": classes,
    "mean": tuple(context.preprocessing.mean),
    "std": tuple(context.preprocessing.std),
    "method": method,
    "loss_settings": read_settings(settings.loss, method.loss_settings, "config.task.loss"),
    "max_objects": settings.max_objects,
    "separable": method.separable,
  }


def _inference(settings: SegmentSettings, kind: type) -> Any:
  return read_settings(settings.inference, kind, "config.task.inference")


@dataclasses.dataclass(frozen=True)
class MaskTask(PictureTask):
  """Images `[B, H, W, 3]` and up to G segments of each; the three tasks add fields and measures.

  Attributes:
    num_classes: without "no object".
    method: losses and rules of the head.
    loss_settings: weights and numbers of points.
    max_objects: G.
    inference: how pictures of any size are seen.
    separable: see `Task`; the method's.
  """

  num_classes: int
  method: MaskMethod
  loss_settings: Any
  max_objects: int
  inference: Any
  separable: bool

  def targets(self, batch: Batch) -> SegmentTargets:
    """The segments of a batch."""
    raise NotImplementedError

  def augment(self, batch: Batch, rng: jax.Array, step: jax.Array) -> dict[str, jax.Array]:
    """Normalises the pictures."""
    del rng, step
    return {**batch, "image": self.normalize(batch["image"])}

  def loss(
    self, variables: Variables, batch: Batch, rng: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """See `Task`: the sum over all predictions; metrics beside it are of the last one."""
    points, dropout = jax.random.split(rng)
    (answer, _), updated = self._apply(variables, batch, dropout)
    found = self.method.losses(answer, self.targets(batch), self.loss_settings, points)
    weight = jnp.asarray(batch["image"].shape[0], jnp.float32)
    total = sum((x.sum() for x in found.values()), start=jnp.zeros((), jnp.float32))
    metrics = {f"{name}_loss": (x[-1] * weight, weight) for name, x in found.items()}
    metrics["loss"] = (total * weight, weight)
    return total, {"metrics": metrics, "batch_stats": updated.get("batch_stats", {})}

  def _apply(self, variables: Variables, batch: Batch, rng: jax.Array) -> Any:
    return self.model.apply(
      variables, batch["image"], train=True, rngs={"dropout": rng}, mutable=["batch_stats"]
    )

  def answers(self, variables: Variables, images: jax.Array) -> dict[str, jax.Array]:
    """uint8 `[B, H, W, 3]` → "class_logits" `[B, Q, K + 1]` and "mask_logits" `[B, Q, h, w]`."""
    answer, _ = self.model.apply(variables, self.normalize(images), train=False)
    return {name: answer[name] for name in ("class_logits", "mask_logits")}

  def predict(self, variables: Variables, batch: Batch) -> dict[str, jax.Array]:
    """ "image" uint8 or normalised float32 `[B, H, W, 3]` → see `answers`."""
    return self.answers(variables, batch["image"])

  def activations(self, variables: Variables, batch: Batch, rng: jax.Array) -> dict[str, jax.Array]:
    """Image, the backbone's endpoints and every prediction in forward order."""
    _, dropout = jax.random.split(rng)
    (answer, found), _ = self._apply(variables, batch, dropout)
    named = {name: value for name, value in found.items() if name != "answer"}
    for i, prediction in enumerate([*answer["auxiliary"], answer]):
      for name in ("class_logits", "mask_logits"):
        named[f"{name}{i}"] = prediction[name]
    return {"image": batch["image"], **named}


@dataclasses.dataclass(frozen=True)
class PanopticSegmentation(MaskTask):
  """Segments of things and stuff, one map of their numbers, see `data.segments`.

  Attributes:
    map_class_names: of all classes; () where they are not known.
    palette: a colour of each class.
    thing_classes: those that are countable; () where they are not known.
  """

  map_class_names: tuple[str, ...] = ()
  palette: tuple[tuple[int, int, int], ...] = ()
  thing_classes: tuple[int, ...] = ()

  @property
  def spec(self) -> Spec:
    """A picture and its segments; in evaluation at the picture's own size."""
    limits: dict[str, Any] = {"minimum": 0, "maximum": self.num_classes - 1}
    return Spec(
      {
        "image": Field("image", shape=(None, None, 3)),
        segments.MAP: Field("map", "int32", (None, None), pad=IGNORE, minimum=0),
        segments.LABELS: Field(
          "value", "int32", (self.max_objects,), ragged=True, pad=-1, **limits
        ),
      },
      {
        "image": Field("image", shape=(None, None, 3), on_host=True),
        segments.MAP: Field("map", "int32", (None, None), on_host=True),
        segments.LABELS: Field("host"),
        segments.CROWD: Field("host"),
      },
    )

  def targets(self, batch: Batch) -> SegmentTargets:
    """See `MaskTask`."""
    labels = batch[segments.LABELS]
    numbers = jnp.broadcast_to(jnp.arange(labels.shape[1], dtype=jnp.int32), labels.shape)
    return SegmentTargets(labels, LabelMasks(batch[segments.MAP], numbers), labels >= 0)

  @property
  def measures(self) -> dict[str, str]:
    """See `Task`: panoptic quality; mean IoU and COCO's AP of masks by the same weights."""
    qualities = [f"{q}{of}" for of in ("", "_things", "_stuff") for q in ("pq", "sq", "rq")]
    return dict.fromkeys((*qualities, "mean_iou", "mask_ap", "mask_ap50", "mask_ap75"), "max")

  def stored_info(self) -> dict[str, Any]:
    """See `Task`."""
    return {**map_info(self), "thing_classes": list(self.thing_classes)}

  def picture_inference(self) -> MaskInference:
    """What makes segments of pictures: `panoptic(variables, photo, thing_classes)`."""
    return MaskInference(self.answers, self.inference, self.fill(), self.method.rules)

  def evaluators(self, data: Sequence[EvaluationData]) -> list[Evaluator]:
    """See `Task`."""
    inference = self.picture_inference()
    return [PanopticEvaluator(self, item, inference) for item in data]


@dataclasses.dataclass(frozen=True)
class InstanceSegmentation(MaskTask):
  """Objects, of which each has a mask of a bit a pixel.

  Attributes:
    object_class_names: in their order; () where they are not known.
    category_ids: of the classes, as their data numbers them; () where they have none.
  """

  object_class_names: tuple[str, ...] = ()
  category_ids: tuple[int, ...] = ()

  @property
  def spec(self) -> Spec:
    """A picture and its objects; in evaluation at the picture's own size."""
    count = self.max_objects
    limits: dict[str, Any] = {"minimum": 0, "maximum": self.num_classes - 1}
    return Spec(
      {
        "image": Field("image", shape=(None, None, 3)),
        "masks": Field("masks", "uint8", (count, None, None), ragged=True),
        "box_labels": Field("value", "int32", (count,), ragged=True, pad=-1, **limits),
      },
      {
        "image": Field("image", shape=(None, None, 3), on_host=True),
        "boxes": Field("boxes", "float32", (None, 4), ragged=True, on_host=True),
        "box_labels": Field("host"),
        "crowd": Field("host"),
        "image_id": Field("host"),
        "masks": Field("masks", shape=(None, None, None), ragged=True, on_host=True),
      },
    )

  def targets(self, batch: Batch) -> SegmentTargets:
    """See `MaskTask`.

    Raises:
      ValueError: masks that are not packed.
    """
    masks, labels = PackedMasks(batch["masks"]), batch["box_labels"]
    if masks.shape[2:] != batch["image"].shape[1:3]:
      raise ValueError(
        f"masks are {list(batch['masks'].shape[1:])} and pictures {batch['image'].shape[1]} x "
        f"{batch['image'].shape[2]}: end the transform with pack_masks"
      )
    return SegmentTargets(labels, masks, labels >= 0)

  @property
  def measures(self) -> dict[str, str]:
    """See `Task`: COCO's AP of masks, and of the boxes around them."""
    names = (f"{kind}_{name}" for kind in ("mask", "box") for name in ("ap", "ap50", "ap75"))
    return dict.fromkeys(names, "max")

  def stored_info(self) -> dict[str, Any]:
    """See `Task`."""
    return {
      "num_classes": self.num_classes,
      "object_class_names": list(self.object_class_names),
      "category_ids": list(self.category_ids),
    }

  def picture_inference(self) -> MaskInference:
    """What makes objects of pictures: `objects(variables, photo)`."""
    return MaskInference(self.answers, self.inference, self.fill(), self.method.rules)

  def evaluators(self, data: Sequence[EvaluationData]) -> list[Evaluator]:
    """See `Task`."""
    inference = self.picture_inference()
    return [DetectionEvaluator(self, item, inference) for item in data]


@dataclasses.dataclass(frozen=True)
class MaskSegmentation(MaskTask):
  """Maps of classes; each class that a picture has is one segment.

  Attributes:
    map_class_names: in the order of the classes; () where they are not known.
    palette: a colour of each class.
  """

  map_class_names: tuple[str, ...] = ()
  palette: tuple[tuple[int, int, int], ...] = ()

  @property
  def spec(self) -> Spec:
    """A picture and its map; in evaluation each of its own size."""
    return map_fields(self.num_classes)

  def targets(self, batch: Batch) -> SegmentTargets:
    """See `MaskTask`; of more classes than there is room for those of the most pixels are kept."""
    return semantic_targets(batch["map"], self.num_classes, self.max_objects)

  @property
  def measures(self) -> dict[str, str]:
    """See `Task`."""
    return map_measures()

  def stored_info(self) -> dict[str, Any]:
    """See `Task`."""
    return map_info(self)

  def scores(self, variables: Variables, images: jax.Array) -> jax.Array:
    """uint8 `[B, H, W, 3]` → scores of the classes in each pixel, float32 `[B, H, W, K]`."""
    answer = self.answers(variables, images)
    masks = answer["mask_logits"].transpose(0, 2, 3, 1)
    rules = self.method.rules
    aligned = rules.align_corners(images.shape[2])
    masks = resize_bilinear(masks, images.shape[1:3], align_corners=aligned)
    return rules.semantic_scores(answer["class_logits"], masks)

  def picture_inference(self) -> MapInference:
    """What makes maps of pictures: `classes(variables, photo)`."""
    return MapInference(self.scores, self.inference, softmax=False)

  def evaluators(self, data: Sequence[EvaluationData]) -> list[Evaluator]:
    """See `Task`."""
    inference = self.picture_inference()
    return [SegmentationEvaluator(self, item, inference) for item in data]
