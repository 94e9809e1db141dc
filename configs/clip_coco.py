"""CLIP's image encoders on COCO: ViT-B/16 as ViTDet, MCi with Mask R-CNN.

    --config=configs/clip_coco.py --config.init_from=WORKDIR             vit_b16, Mask R-CNN
    --config=configs/clip_coco.py:vit_b16_cascade --config.init_from=WORKDIR
    --config=configs/clip_coco.py:mci2 --config.init_from=WORKDIR        Mask R-CNN, 1x
    --config=configs/clip_coco.py:runlocal                               minutes on a laptop

`init_from` takes the work directory of a contrastive training as it stands (its image tower is
taken), an export, or the authors' file. The paper (arXiv:2405.08911) was not at hand: that its
ViT-B/16 has ViTDet's recipe, and its hierarchical encoders PoolFormer's, Mask R-CNN 1x of one
scale, is recalled.
"""

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes, detection_recipes, tiny_networks
from hybrid_vit.config import parse_argument

MCIS = ("mci0", "mci1", "mci2")
VITS = {"vit_b16": detection_recipes.MASK_RCNN, "vit_b16_cascade": detection_recipes.CASCADE}
VARIANTS = (*VITS, *MCIS, "runlocal")


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`, by default 64 of a ViT and 16 of others."""
  variant, keys = parse_argument(argument, VARIANTS, "vit_b16", batch_size=None)
  if variant in VITS:
    return detection_recipes.vitdet("vit_b16", VITS[variant], batch_size=keys["batch_size"] or 64)
  config = detection_recipes.coco(
    "mci0" if variant == "runlocal" else variant,
    detection_recipes.MASK_RCNN,
    pictures=detection_recipes.SINGLE_SCALE,
    batch_size=keys["batch_size"] or 16,
    weight_decay_rules=dense_recipes.NOTHING_SPARED,
    drop_path_rate=None,
  )
  if variant == "runlocal":
    detection_recipes.run_locally(
      config,
      tiny_networks.MCI,
    )
  return config
