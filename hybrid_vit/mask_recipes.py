"""What the recipes of Mask2Former and kMaX-DeepLab share: frames, pipelines, and local tries.

Cheng et al., arXiv:2112.01527, section 4.1 and appendix, and the authors' configurations:
COCO in 50 epochs (Swin-L: 100) of 16 crops of 1024 x 1024 by large-scale jitter; ADE20K in 160,000
steps of 16 crops. Yu et al., arXiv:2207.04044, by deeplab2's configurations: COCO in 150,000 steps
of 64 crops of 1281 x 1281. Deviations are listed in `tasks.mask_classification`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes

# By what is segmented: the task.
TASKS: Mapping[str, str] = {
  "panoptic": "panoptic_segmentation",
  "instance": "instance_segmentation",
  "semantic": "mask_segmentation",
}
COCO_CLASSES: Mapping[str, int] = {"panoptic": 133, "instance": 80}

# Segments of a training picture at most.
_SEGMENTS, _LOCAL_SEGMENTS = 100, 8
_SOURCES: Mapping[str, str] = {
  "panoptic": "coco_panoptic:data/coco",
  "instance": "coco:data/coco?empty=false",
}
# The authors decay neither norms, of the head either, nor tables of positions and embeddings; the
# pixel decoder's embedding of levels is no embedding in their code.
_SPARED = (
  (r"(^|/)\w*norm\w*/(scale|bias)$|^backbone/.*position_\w+$", 0.0),
  (r"^head/(query_\w+|level_embedding)$", 0.0),
  (".*", 1.0),
)
_BACKBONE_RATE = 0.1
# Of 50 epochs, 368,750 steps.
_COCO_DROPS = (327_778, 355_092)
_CLIP_NORM = 0.01
# By the head: what makes it tiny, and fewer points for its losses.
_LOCAL_HEADS: Mapping[str, Mapping[str, Any]] = {
  "mask2former": dict(
    channels=64,
    mask_channels=64,
    num_queries=16,
    num_heads=4,
    encoder_layers=2,
    encoder_hidden=128,
    decoder_layers=3,
    decoder_hidden=128,
    norm_groups=8,
  ),
  "kmax": dict(
    channels=64,
    mask_channels=32,
    num_queries=16,
    num_heads=4,
    pixel_channels=(32, 32, 16, 16),
    pixel_depths=(1, 1, 1, 1),
    decoder_layers=(1, 1, 1),
    decoder_hidden=128,
    drop_path_rate=0.0,
    batch_norm_momentum=0.9,
  ),
}
_LOCAL_LOSSES: Mapping[str, Mapping[str, Any]] = {
  "mask2former": dict(num_points=512),
  "kmax": dict(contrast_pixels=128, semantic_pixels=128),
}


def jittered(kind: str, scales: tuple[float, float] = (0.1, 2.0)) -> str:
  """Large-scale jitter of training pictures onto a square canvas, as a transform string."""
  return "|".join(
    (
      "decode",
      "flip_lr",
      f"large_scale_jitter({{image_size}}, {scales})",
      "pad_to({image_size})",
      *_chosen(kind, _SEGMENTS),
    )
  )


def task(kind: str, *, queries: int = 100, **fields: Any) -> ConfigDict:
  """`config.task`: Mask2Former as published, with so many queries, and further fields."""
  head = dict(name="mask2former", num_queries=queries)
  return ConfigDict(dict(name=TASKS[kind], head=head, max_objects=_SEGMENTS, **fields))


def optimizer(learning_rate: float, schedule: Mapping[str, Any]) -> ConfigDict:
  """`config.optimizer`: AdamW, of the backbone a tenth of the rate; all gradients clipped at 0.01.

  Args:
    learning_rate: peak.
    schedule: `config.optimizer.schedule`.
  """
  return ConfigDict(
    dict(
      name="adamw",
      learning_rate=learning_rate,
      weight_decay=0.05,
      weight_decay_rules=_SPARED,
      learning_rate_rules=((r"^backbone/", _BACKBONE_RATE), (".*", 1.0)),
      gradient_clip_norm=_CLIP_NORM,
      schedule=dict(schedule),
    )
  )


def coco(
  model: str,
  kind: str,
  *,
  epochs: int = 50,
  queries: int = 100,
  batch_size: int = 16,
  drop_path_rate: float | None = None,
  arguments: Mapping[str, Any] | None = None,
) -> ConfigDict:
  """COCO by Mask2Former's recipe: 1024 x 1024, rate 1e-4, which falls to a tenth twice.

  There is no warm-up, whose factor in the authors' files is 1. Pictures are tested as large as fits
  into (1333, 800).

  Args:
    model: name in the registry; its dense form is `models.dense.dense_arguments`.
    kind: "panoptic" or "instance".
    epochs: 50, of Swin-L 100; each of 7,375 steps.
    queries: 100, of Swin-L 200.
    batch_size: of all devices together.
    drop_path_rate: of the backbone; None for its entry's.
    arguments: of the network, beside those of its dense form.
  """
  total = 7375 * epochs
  drops = tuple(round(step * epochs / 50) for step in _COCO_DROPS)
  config = dense_recipes.dense_frame(
    model,
    {},
    image_size=1024,
    batch_size=batch_size,
    source=_SOURCES[kind],
    task=TASKS[kind],
    optimizer=optimizer(
      1e-4,
      dict(name="steps", drop_steps=drops),
    ),
    drop_path_rate=drop_path_rate,
    arguments=arguments,
  )
  config.task = task(kind, queries=queries)
  config.model.num_classes = COCO_CLASSES[kind]
  config.total_steps = total
  config.data.transform = jittered(kind)
  config.evaluation.sets.validation.source = _SOURCES[kind].partition("?")[0]
  return config


def kmax_coco(
  model: str,
  *,
  image_size: int = 1281,
  batch_size: int = 64,
  drop_path_rate: float | None = None,
  arguments: Mapping[str, Any] | None = None,
) -> ConfigDict:
  """COCO panoptic by kMaX-DeepLab's recipe, of the authors' ConvNeXt in deeplab2.

  150,000 steps, a warm-up of 5,000, polynomial 0.9, of the backbone a tenth of the rate; scales 0.3
  to 1.7. Pictures are tested on the same square canvas, as large as fits.

  Deviation: there is no copy-paste of segments, which the authors do with a probability of 0.5.
  (What of the parameters they decay is not known: here vectors are spared.)

  Args:
    model: name in the registry; its dense form is `models.dense.dense_arguments`.
    image_size: side of the canvas; odd, so that corners of all maps are aligned.
    batch_size: of all devices together.
    drop_path_rate: of the backbone; None for its entry's.
    arguments: of the network, beside those of its dense form.
  """
  config = dense_recipes.dense_frame(
    model,
    {},
    image_size=image_size,
    batch_size=batch_size,
    source=_SOURCES["panoptic"],
    task=TASKS["panoptic"],
    optimizer=dict(
      name="adamw",
      learning_rate=5e-4,
      weight_decay=0.05,
      learning_rate_rules=((r"^backbone/", _BACKBONE_RATE), (".*", 1.0)),
      schedule=dict(name="polynomial", power=0.9, warmup_steps=5000, end_learning_rate=0.0),
    ),
    drop_path_rate=drop_path_rate,
    arguments=arguments,
  )
  config.task.head = dict(name="kmax", drop_path_rate=0.2)
  config.task.max_objects = _SEGMENTS
  config.task.inference = dict(scale=(image_size, image_size), canvases=((image_size, image_size),))
  config.model.num_classes = COCO_CLASSES["panoptic"]
  config.total_steps = 150_000
  config.data.transform = jittered("panoptic", (0.3, 1.7))
  return config


def ade20k(
  model: str,
  *,
  image_size: int = 640,
  queries: int = 100,
  batch_size: int = 16,
  drop_path_rate: float | None = None,
  multi_scale: bool = False,
  arguments: Mapping[str, Any] | None = None,
) -> ConfigDict:
  """ADE20K's classes of pixels by Mask2Former's recipe: 160,000 steps, polynomial 0.9, no warm-up.

  The short side becomes one of 0.5 to 2.0 times the crop's in steps of a tenth, the long one at
  most four times the crop's; no class of a crop is too large (the authors' limit is 1.0).

  Args:
    model: name in the registry; its dense form is `models.dense.dense_arguments`.
    image_size: side of the crop and short side of the test: 512, of large backbones 640.
    queries: 100.
    batch_size: of all devices together.
    drop_path_rate: of the backbone; None for its entry's.
    multi_scale: whether the test averages over `dense_recipes.MULTI_SCALE` and mirror images.
    arguments: of the network, beside those of its dense form.
  """
  config = dense_recipes.dense_frame(
    model,
    {},
    image_size=image_size,
    batch_size=batch_size,
    source="ade20k:data/ade20k",
    task=TASKS["semantic"],
    optimizer=optimizer(1e-4, dict(name="polynomial", power=0.9, end_learning_rate=0.0)),
    drop_path_rate=drop_path_rate,
    arguments=arguments,
  )
  config.task = task("semantic", queries=queries)
  config.task.inference = dict(
    scale=(4 * image_size, image_size),
    **({"ratios": dense_recipes.MULTI_SCALE, "flip": True} if multi_scale else {}),
  )
  config.model.num_classes = dense_recipes.ADE20K_CLASSES
  config.total_steps = 160_000
  shorts = tuple(int(tenths * image_size / 10) for tenths in range(5, 21))
  config.data.transform = "|".join(
    (
      "decode",
      f"resize_short_side({shorts}, {4 * image_size})",
      "random_crop_map({image_size}, 1.0)",
      "photometric_distortion",
      "flip_lr",
      "pad({image_size})",
    )
  )
  return config


def run_locally(
  config: ConfigDict, arguments: Mapping[str, Any], *, total_steps: int = 2000
) -> ConfigDict:
  """The same recipe as a local try on drawn scenes of 64 x 64: ten minutes on two cores.

  Args:
    config: a recipe; changed in place. Losses stay, at fewer points.
    arguments: of the network, to make it tiny.
    total_steps: of 16 scenes.
  """
  kind = {name: kind for kind, name in TASKS.items()}[config.task.name]
  crop = "random_crop_map({image_size}, 1.0)" if kind == "semantic" else "random_crop({image_size})"
  dense_recipes.on_scenes(
    config,
    arguments,
    transform="|".join(("decode", crop, "flip_lr", *_chosen(kind, _LOCAL_SEGMENTS))),
    total_steps=total_steps,
    learning_rate=1e-3,
    gradient_clip_norm=1.0,
    validation=100,
  )
  head = config.task.head.name
  config.task.head.update(dict(_LOCAL_HEADS[head]))
  config.task.loss = dict(_LOCAL_LOSSES[head])
  config.task.max_objects = _LOCAL_SEGMENTS
  config.task.inference = {} if kind == "semantic" else dict(scale=None)
  if kind == "panoptic" and head == "mask2former":
    # Masks are right long before their classes are sure.
    config.task.inference.object_threshold = 0.5
  config.optimizer.learning_rate_rules = ((".*", 1.0),)
  return config


def _chosen(kind: str, count: int) -> tuple[str, ...]:
  """What becomes of the segments behind a crop and `pad_to`."""
  return {
    "panoptic": (f"keep_segments({count})",),
    "instance": ("drop_crowd", f"pack_masks({count})"),
    "semantic": (),
  }[kind]
