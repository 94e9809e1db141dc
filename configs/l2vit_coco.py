"""L2ViT's detectors on COCO: Mask R-CNN and RetinaNet, 1x and 3x.

    --config=configs/l2vit_coco.py --config.init_from=WORKDIR            mask_rcnn_l2vit_tiny_1x
    --config=configs/l2vit_coco.py:retinanet_l2vit_base_3x
    --config=configs/l2vit_coco.py:runlocal                              minutes on a laptop

Figures: ChuanyangZheng/L2ViT, `object_detection/configs`, whose batch norms have the statistics of
one device's two pictures. Results: the code prints none, and the paper's were not at hand.
"""

from typing import Any

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes, detection_recipes, tiny_networks
from hybrid_vit.config import parse_argument

SIZES = ("tiny", "small", "base")
DROP_PATH = {
  "1x": {"tiny": 0.1, "small": 0.1, "base": 0.2},
  "3x": {"tiny": 0.2, "small": 0.2, "base": 0.3},
}
VARIANTS = (
  *(
    f"{detector}_l2vit_{size}_{schedule}"
    for detector in ("mask_rcnn", "retinanet")
    for schedule in DROP_PATH
    for size in SIZES
  ),
  "runlocal",
)
_PICTURES_OF_A_DEVICE = 2


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`."""
  variant, keys = parse_argument(argument, VARIANTS, "mask_rcnn_l2vit_tiny_1x", batch_size=16)
  name = "mask_rcnn_l2vit_tiny_1x" if variant == "runlocal" else variant
  detector, _, rest = name.partition("_l2vit_")
  size, _, schedule = rest.partition("_")
  arguments: dict[str, Any] = {}
  if detector == "retinanet":
    arguments["output_norms"] = (2, 3, 4)  # code: out_indices (1, 2, 3)
  config = detection_recipes.coco(
    f"l2vit_{size}",
    dict(name=detector),
    schedule=schedule,
    batch_size=keys["batch_size"],
    drop_path_rate=DROP_PATH[schedule][size],
    weight_decay_rules=dense_recipes.NOTHING_SPARED,
    arguments=arguments,
  )
  config.batch_norm_groups = max(keys["batch_size"] // _PICTURES_OF_A_DEVICE, 1)
  if variant == "runlocal":
    detection_recipes.run_locally(
      config,
      tiny_networks.L2VIT,
    )
    config.batch_norm_groups = 1
  return config
