"""What the recipes of detection share: the frame for COCO, its pipelines, and local tries.

Pictures and schedules are mmdetection's, as Swin Transformer's detection and its followers have
them; large-scale jitter is detectron2's. Pictures are padded to one of two canvases, by which
batches are grouped, so that two steps are compiled. Deviations: a whole batch is of one canvas,
where the authors' pictures are padded to the largest of one device's (`data.canvases`); of a lying
picture a crop that stands is resized to what the canvas holds; and those of `data.box_operations`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes
from hybrid_vit.heads.rcnn import VITDET
from hybrid_vit.models.dense import dense_arguments, vitdet_arguments
from hybrid_vit.models.registry import model_entry
from hybrid_vit.models.vit import VisionTransformer

COCO_CLASSES = 80
# (height, width): (1333, 800) of a picture, rounded up to multiples of 32, lying or standing.
CANVASES = ((800, 1344), (1344, 800))

# Fields of `config.task.detector`.
MASK_RCNN: Mapping[str, Any] = dict(name="mask_rcnn")
CASCADE: Mapping[str, Any] = dict(name="cascade_mask_rcnn")
RETINANET: Mapping[str, Any] = dict(name="retinanet")
ATSS: Mapping[str, Any] = dict(name="atss")
SPARSE_RCNN: Mapping[str, Any] = dict(name="sparse_rcnn", head=dict(num_proposals=300))
# The authors' code; detrex's has other positions, a head for each layer and stronger noise.
DINO: Mapping[str, Any] = dict(name="dino", num_levels=4)
DINO_DETREX: Mapping[str, Any] = dict(
  name="dino",
  num_levels=4,
  head=dict(
    shared_heads=False, position_temperature=10000.0, position_offset=-0.5, num_labels=COCO_CLASSES
  ),
  settings=dict(box_noise=1.0),
)
WITH_MASKS = ("mask_rcnn", "cascade_mask_rcnn")
# Each mask of a batch is kept in the frame of its box, at this side.
_MASK_SIZE = 56

# Epochs, and those after which the rate falls to a tenth.
SCHEDULES: Mapping[str, tuple[int, tuple[int, ...]]] = {"1x": (12, (8, 11)), "3x": (36, (27, 33))}

# Operations on the picture; what follows them is the same in all pipelines.
SINGLE_SCALE = ("resize_short_side(800, 1333, within={canvas})", "flip_lr")
MULTI_SCALE = ("flip_lr", "detr_augmentation(within={canvas})")
LARGE_SCALE_JITTER = ("flip_lr", "large_scale_jitter({canvas})", "boxes_from_masks")


def coco(
  model: str,
  detector: Mapping[str, Any],
  *,
  schedule: str = "1x",
  pictures: Sequence[str] = MULTI_SCALE,
  learning_rate: float = 1e-4,
  weight_decay: float = 0.05,
  weight_decay_rules: Sequence[tuple[str, float]] = dense_recipes.NORMS_AND_TABLES_SPARED,
  drop_path_rate: float | None,
  drops: tuple[int, ...] | None = None,
  warmup_steps: int = 500,
  batch_size: int = 16,
  layer_decay: float | None = None,
  gradient_clip_norm: float | None = None,
  backbone_rate: float | None = None,
  canvases: Sequence[tuple[int, int]] = CANVASES,
  scale: tuple[int, int] = (1333, 800),
  arguments: Mapping[str, Any] | None = None,
) -> ConfigDict:
  """COCO's objects as mmdetection trains them, of which systems differ in the figures asked for.

  12 or 36 epochs of batches of 16; AdamW, a warm-up of 500 steps from a thousandth of the rate,
  which then falls to a tenth twice. Pictures without objects or with a side below 32 pixels are
  left out of training; pictures are tested as large as fits into (1333, 800).

  Args:
    model: name in the registry; its dense form is `models.dense.dense_arguments`.
    detector: the fields of `config.task.detector`, e.g. `MASK_RCNN`.
    schedule: "1x" or "3x".
    pictures: operations on a training picture, e.g. `SINGLE_SCALE`; {canvas} stands for its canvas.
    learning_rate: peak.
    weight_decay: decoupled.
    weight_decay_rules: which parameters have it, see `dense_recipes`.
    drop_path_rate: of the backbone; None for its entry's.
    drops: the epochs after which the rate falls; None for the schedule's.
    warmup_steps: from a thousandth of the rate; 0 for none.
    batch_size: of all devices together.
    layer_decay: factor of the learning rate from layer to layer, or None.
    gradient_clip_norm: of all gradients, or None.
    backbone_rate: factor of the backbone's learning rate, or None.
    canvases: (height, width) of each shape of a batch.
    scale: (long, short) into which a picture of the test fits.
    arguments: of the network, further ones.

  Raises:
    ValueError: an unknown schedule.
  """
  if schedule not in SCHEDULES:
    raise ValueError(f"schedule {schedule!r} is not one of {', '.join(SCHEDULES)}")
  epochs, usual = SCHEDULES[schedule]
  masks = detector["name"] in WITH_MASKS
  canvases = tuple(canvases)
  config = dense_recipes.dense_frame(
    model,
    dict(
      detector=detector,
      mask_size=_MASK_SIZE if masks else 0,
      inference=dict(scale=scale, canvases=canvases),
    ),
    image_size=max(max(canvas) for canvas in canvases),
    batch_size=batch_size,
    source="coco:data/coco?empty=false,min_size=32",
    task="detection",
    optimizer=dict(
      name="adamw",
      learning_rate=learning_rate,
      weight_decay=weight_decay,
      weight_decay_rules=tuple(weight_decay_rules),
      schedule=dict(
        name="steps",
        warmup_steps=warmup_steps,
        **({"warmup_start_factor": 1e-3} if warmup_steps else {}),
        drop_epochs=usual if drops is None else drops,
      ),
    ),
    layer_decay=layer_decay,
    drop_path_rate=drop_path_rate,
    arguments=arguments,
  )
  config.model.num_classes = COCO_CLASSES
  config.total_epochs = epochs
  config.evaluate_every_epochs = 1
  config.data.canvases = canvases
  config.data.transform = "|".join(
    (
      "decode",
      *pictures,
      "drop_crowd",
      "filter_boxes",
      "keep_largest(100)",
      "pad_to({canvas})",
      *([f"crop_masks({_MASK_SIZE})"] if masks else []),
    )
  )
  config.evaluation.sets.validation.source = "coco:data/coco"
  if gradient_clip_norm is not None:
    config.optimizer.gradient_clip_norm = gradient_clip_norm
  if backbone_rate is not None:
    config.optimizer.learning_rate_rules = (("^backbone/", backbone_rate), (".*", 1.0))
  return config


def dino(model: str, detector: Mapping[str, Any] = DINO, **figures: Any) -> ConfigDict:
  """`coco` with DINO's optimizer: 1e-4, of the backbone a tenth; decay 1e-4 on all; clipped at 0.1.

  No warm-up; 12 epochs, the rate falling once after 11, or 36, after 33 (arXiv:2203.03605 and
  detrex, whose epochs are of 7,500 steps: ours have 7,329).

  Args:
    model: name in the registry.
    detector: `DINO` or `DINO_DETREX`, or with further fields.
    **figures: of `coco`, which replace these.
  """
  epochs = SCHEDULES[figures.get("schedule", "1x")][0]
  own: dict[str, Any] = dict(
    weight_decay=1e-4,
    weight_decay_rules=dense_recipes.NOTHING_SPARED,
    gradient_clip_norm=0.1,
    backbone_rate=0.1,
    warmup_steps=0,
    drops=(epochs - 1 if epochs == 12 else epochs - 3,),
  )
  return coco(model, detector, **{**own, **figures})


def sparse_rcnn(model: str, **figures: Any) -> ConfigDict:
  """`coco` with Sparse R-CNN's optimizer: 2.5e-5, decay 1e-4 on all, clipped at 1; 36 epochs.

  Args:
    model: name in the registry.
    **figures: of `coco`, which replace these.
  """
  own: dict[str, Any] = dict(
    schedule="3x",
    learning_rate=2.5e-5,
    weight_decay=1e-4,
    weight_decay_rules=dense_recipes.NOTHING_SPARED,
    gradient_clip_norm=1.0,
  )
  return coco(model, SPARSE_RCNN, **{**own, **figures})


# A ViT's own form under a detector, and the parts of it that belong to that.
_OF_VITS: Mapping[str, Mapping[str, Any]] = {
  "mask_rcnn": VITDET,
  "cascade_mask_rcnn": VITDET,
  "sparse_rcnn": {"neck": {"name": "simple_pyramid"}},
}


def parts_for(
  model: str, detector: str, image_size: int, own: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], Mapping[str, Any]]:
  """Arguments of a network under a detector, and what the detector's parts have otherwise.

  Under some a ViT has ViTDet's windows, pyramid and heads.

  Args:
    model: name in the registry.
    detector: name of the detector.
    image_size: side of the pictures.
    own: further arguments of the network, under those that are returned.
  """
  if detector in _OF_VITS and issubclass(model_entry(model).module_class, VisionTransformer):
    return vitdet_arguments(model, image_size, own), _OF_VITS[detector]
  return dense_arguments(model, image_size, own), {}


def vitdet(model: str, detector: Mapping[str, Any], *, batch_size: int = 64) -> ConfigDict:
  """ViTDet's recipe of a plain transformer of base size: 184,375 steps of 64 of 1024 x 1024.

  Large-scale jitter; AdamW 1e-4, decay 0.1, 0.7 of the rate from layer to layer; the rate falls
  after 8/9 and 26/27 of the steps (arXiv:2203.16527, appendix A.2, and detectron2's
  projects/ViTDet).

  Args:
    model: name in the registry, of a ViT.
    detector: `MASK_RCNN` or `CASCADE`.
    batch_size: of all devices together.
  """
  side = 1024
  parts: dict[str, Any] = {**detector, **{k: dict(v) for k, v in VITDET.items()}}
  parts["implementation"] = "detectron2"
  if detector["name"] == "cascade_mask_rcnn":
    parts["mask_head_per_stage"] = False
    parts["box_head"]["class_agnostic"] = True
  config = coco(
    model,
    parts,
    pictures=LARGE_SCALE_JITTER,
    weight_decay=0.1,
    weight_decay_rules=(),
    layer_decay=0.7,
    drop_path_rate=0.1,
    batch_size=batch_size,
    warmup_steps=250,
    canvases=((side, side),),
    scale=(side, side),
  )
  config.model.arguments = dict(vitdet_arguments(model, side), drop_path_rate=0.1)
  del config["total_epochs"]
  config.total_steps = 184_375
  del config.optimizer.schedule["drop_epochs"]
  config.optimizer.schedule.drop_steps = (163_889, 177_546)
  return config


def run_locally(config: ConfigDict, arguments: Mapping[str, Any]) -> ConfigDict:
  """The same recipe as a local try on drawn scenes of 64 x 64, with tiny heads.

  Args:
    config: a recipe of R-CNN; changed in place.
    arguments: of the network, to make it tiny.

  Raises:
    ValueError: a recipe of another detector.
  """
  name = config.task.detector.name
  if name not in WITH_MASKS:
    raise ValueError(f"a local try of {name!r}; one of {', '.join(WITH_MASKS)} was expected")
  dense_recipes.on_scenes(
    config,
    arguments,
    transform=(
      "decode|random_crop({image_size})|flip_lr|keep_largest(8)|pad_to({image_size})|crop_masks(28)"
    ),
    total_steps=600,
    learning_rate=2e-3,
    gradient_clip_norm=5.0,
  )
  for group, field in ((config.data, "canvases"), (config.optimizer, "learning_rate_rules")):
    if field in group:
      del group[field]
  config.task.detector = dict(
    name=name,
    neck=dict(name="fpn", channels=64, extra="none", num_extra=0),
    box_head=dict(fc_channels=128),
    mask_head=dict(channels=32, num_convs=2),
    settings=dict(
      anchor_scales=(4.0,),
      rpn_samples=64,
      rpn_before=(100, 100),
      rpn_after=(64, 32),
      roi_samples=32,
      num_roi_levels=3,
      finest_scale=16.0,
      sampling_ratio=2,
      detections=10,
      candidates=100,
      rpn_size_divisor=0,
    ),
  )
  if name == "cascade_mask_rcnn":
    config.task.detector.box_head.update(dict(conv_channels=32, num_convs=1))
  config.task.max_objects = 8
  config.task.mask_size = 28
  config.task.inference = dict(scale=None)
  return config
