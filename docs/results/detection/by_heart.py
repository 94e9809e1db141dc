"""A few photos learnt by heart: whether a detector and its losses can say what they are shown.

    python -m hybrid_vit.main --workdir=runs/by_heart \
      --config=docs/results/detection/by_heart.py:mask_rcnn,data=coco:/path/to/coco

The first 16 photos of the training split, at most `size` (320) wide and high, evaluated on
themselves, by a network of a million parameters. DINO finds boxes alone, Mask2Former segments of
instances.
"""

from ml_collections import ConfigDict

from hybrid_vit import mask_recipes, recipes, tiny_networks
from hybrid_vit.config import parse_argument

VARIANTS = ("mask_rcnn", "dino", "mask2former")
PHOTOS, OBJECTS = 16, 20
MASK_RCNN = dict(
  name="mask_rcnn",
  neck=dict(name="fpn", channels=64, extra="max_pool", num_extra=2),
  box_head=dict(fc_channels=256),
  mask_head=dict(channels=64, num_convs=3),
  settings=dict(
    anchor_scales=(4.0,),
    rpn_samples=128,
    rpn_before=(200, 200),
    rpn_after=(128, 100),
    roi_samples=64,
    num_roi_levels=3,
    finest_scale=28.0,
    sampling_ratio=2,
    detections=50,
    candidates=400,
    rpn_size_divisor=0,
  ),
)
DINO = dict(
  name="dino",
  num_levels=3,
  head=dict(
    channels=96,
    num_queries=100,
    num_heads=6,
    encoder_layers=1,
    decoder_layers=2,
    hidden=192,
  ),
  settings=dict(denoising_number=20, detections=50),
)
MASK2FORMER = dict(
  channels=64,
  mask_channels=64,
  num_queries=40,
  num_heads=4,
  encoder_layers=2,
  encoder_hidden=128,
  decoder_layers=3,
  decoder_hidden=128,
  norm_groups=8,
)


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file."""
  variant, keys = parse_argument(
    argument, VARIANTS, "mask_rcnn", data="coco:data/coco", steps=1600, size=320
  )
  name, size = "tiny_moat_0", keys["size"]
  config = recipes.imagenet(name, batch_size=4, source=keys["data"], num_classes=None)
  config.precision = "float32"
  config.model.arguments = dict(tiny_networks.MOAT)
  config.data.split = f"train[:{PHOTOS}]"
  config.data.image_size = size
  config.data.interpolation = "bilinear"
  kept = {
    "mask_rcnn": (
      "filter_boxes",
      f"keep_largest({OBJECTS})",
      "pad_to({image_size})",
      "crop_masks(56)",
    ),
    "dino": ("filter_boxes", f"keep_largest({OBJECTS})", "pad_to({image_size})"),
    "mask2former": ("pad_to({image_size})", f"pack_masks({OBJECTS})"),
  }
  config.data.transform = "|".join(
    ("decode", f"resize_short_side({size}, {size})", "drop_crowd", *kept[variant])
  )
  if variant == "mask2former":
    config.task = mask_recipes.task("instance", loss=dict(num_points=1024))
    config.task.head.update(MASK2FORMER)
  else:
    config.task = dict(
      name="detection",
      detector=MASK_RCNN if variant == "mask_rcnn" else DINO,
      mask_size=56 if variant == "mask_rcnn" else 0,
    )
  config.task.max_objects = OBJECTS
  config.task.inference = dict(scale=(size, size), canvases=((size, size),))
  config.total_steps = keys["steps"]
  config.evaluate_every_steps = max(keys["steps"] // 4, 1)
  config.log_every_steps = 50
  config.evaluation.sets.validation = dict(split=f"train[:{PHOTOS}]", batch_size=8)
  config.checkpoint.best_metric = f"validation/{'mask' if variant == 'mask2former' else 'box'}_ap"
  config.optimizer = dict(
    name="adamw",
    learning_rate=2e-3 if variant == "mask_rcnn" else 1e-3,
    weight_decay=0.05,
    gradient_clip_norm={"mask_rcnn": 5.0, "dino": 0.1, "mask2former": 1.0}[variant],
    schedule=dict(name="polynomial", power=0.9, warmup_steps=50, end_learning_rate=0.0),
  )
  return config
