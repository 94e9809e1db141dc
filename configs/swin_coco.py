"""Swin and ConvNeXt as detectors on COCO, which the others are compared with.

    --config=configs/swin_coco.py --config.init_from=WORKDIR             mask_rcnn_swin_tiny_1x
    --config=configs/swin_coco.py:cascade_mask_rcnn_swin_base_3x         tiny, small, base; 1x, 3x
    --config=configs/swin_coco.py:retinanet_swin_tiny_1x
    --config=configs/swin_coco.py:cascade_mask_rcnn_convnext_large_22k_3x
    --config=configs/swin_coco.py:runlocal                               minutes on a laptop

Figures: SwinTransformer/Swin-Transformer-Object-Detection and facebookresearch/ConvNeXt,
`object_detection`. Published AP stands in docs/detection_models.md. With weights pretrained by
EfficientTrain (arXiv:2405.08768, table 17; plain ones in brackets), 1x: RetinaNet Swin-T 41.8
(41.7); Cascade Mask R-CNN, boxes / masks, Swin-T 48.2 / 41.8 (48.1 / 41.5), Swin-S 50.7 / 43.7
(50.0 / 43.1), Swin-B 51.3 / 44.3 (50.9 / 44.0), and by EfficientTrain++ Swin-T 48.4 / 41.9. Swin's
code has no 1x of Cascade's larger ones (here with their drop path of 3x) nor RetinaNet (Mask
R-CNN's figures).
"""

from typing import Any

from ml_collections import ConfigDict

from hybrid_vit import detection_recipes, tiny_networks
from hybrid_vit.config import parse_argument

SWIN_DROP_PATH = {"tiny": 0.2, "small": 0.2, "base": 0.3}
SWIN = {
  "mask_rcnn_swin_tiny_1x": 0.1,
  "mask_rcnn_swin_tiny_3x": 0.2,
  "mask_rcnn_swin_small_3x": 0.2,
  "retinanet_swin_tiny_1x": 0.1,
  "cascade_mask_rcnn_swin_tiny_1x": 0.0,
  "cascade_mask_rcnn_swin_small_1x": SWIN_DROP_PATH["small"],
  "cascade_mask_rcnn_swin_base_1x": SWIN_DROP_PATH["base"],
  **{f"cascade_mask_rcnn_swin_{size}_3x": rate for size, rate in SWIN_DROP_PATH.items()},
}
# Learning rate, drop path, factor of the rate from layer to layer.
CONVNEXT = {
  "mask_rcnn_convnext_tiny_3x": (1e-4, 0.4, 0.95),
  "cascade_mask_rcnn_convnext_tiny_3x": (2e-4, 0.4, 0.7),
  "cascade_mask_rcnn_convnext_small_3x": (2e-4, 0.6, 0.7),
  "cascade_mask_rcnn_convnext_base_3x": (2e-4, 0.7, 0.8),
  "cascade_mask_rcnn_convnext_base_22k_3x": (1e-4, 0.6, 0.8),
  "cascade_mask_rcnn_convnext_large_22k_3x": (1e-4, 0.7, 0.7),
  "cascade_mask_rcnn_convnext_xlarge_22k_3x": (1e-4, 0.8, 0.7),
}
VARIANTS = (*SWIN, *CONVNEXT, "runlocal")


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`."""
  variant, keys = parse_argument(argument, VARIANTS, "mask_rcnn_swin_tiny_1x", batch_size=16)
  name = "mask_rcnn_swin_tiny_1x" if variant == "runlocal" else variant
  if name in CONVNEXT:
    return convnext(name, keys["batch_size"])
  detector, _, rest = name.partition("_swin_")
  size, _, schedule = rest.partition("_")
  arguments: dict[str, Any] = {}
  if detector == "retinanet":
    arguments["output_norms"] = (2, 3, 4)  # the pyramid begins at stride 8
  config = detection_recipes.coco(
    f"swin_{size}",
    dict(name=detector),
    schedule=schedule,
    batch_size=keys["batch_size"],
    drop_path_rate=SWIN[name],
    arguments=arguments,
  )
  if variant == "runlocal":
    detection_recipes.run_locally(
      config,
      tiny_networks.SWIN,
    )
  return config


def convnext(name: str, batch_size: int) -> ConfigDict:
  """ConvNeXt's rows: biases and norms are not decayed, rates fall towards the stem."""
  detector, _, rest = name.partition("_convnext_")
  size, _, schedule = rest.rpartition("_")
  rate, drop_path, factor = CONVNEXT[name]
  config = detection_recipes.coco(
    f"convnext_{size}",
    dict(name=detector),
    schedule=schedule,
    batch_size=batch_size,
    learning_rate=rate,
    weight_decay_rules=(),
    drop_path_rate=drop_path,
    arguments=dict(layer_scale_init=1.0),
  )
  config.optimizer.layer_decay = dict(rate=factor, layers=layers(9 if size == "tiny" else 27))
  return config


def layers(depth: int) -> tuple[tuple[str, int], ...]:
  """The authors' groups: of the third stage, whose depth is given, three blocks are one."""
  last = 3 + depth // 3
  return (
    (r"^backbone/stem/", 0),
    (r"^backbone/stage1_block", 1),
    (r"^backbone/stage2_(block|downsample)", 2),
    (r"^backbone/stage3_downsample", 3),
    *(
      (rf"^backbone/stage3_block({'|'.join(str(3 * i + j) for j in range(3))})/", 3 + i)
      for i in range(depth // 3)
    ),
    (r"^backbone/stage4_(block|downsample)", last),
    ("", last + 1),
  )
