"""FocalNet-L with Mask2Former: COCO panoptic (the paper's table 10) and ADE20K (table 9).

    --config=configs/focalnet_mask2former.py --config.init_from=WEIGHTS         COCO panoptic
    --config=configs/focalnet_mask2former.py:ade20k,multi_scale=True            ADE20K semantic
    --config=configs/focalnet_mask2former.py:runlocal                           minutes on a laptop

The weights of ImageNet-22K at 384 x 384 come by `init_from`: an export or the authors' file.
"paper": arXiv:2203.11926, section 4.4 and tables 9 and 10. Published: PQ 57.9, AP 48.4, mIoU 67.3
with 200 queries; ADE20K 57.3 and 58.5 mIoU of one scale and of several. The paper says no more of
the training than that it is Mask2Former's: figures are those of the authors' Swin-L
("code": facebookresearch/Mask2Former). No row of COCO's instances was published.
"""

from ml_collections import ConfigDict

from hybrid_vit import mask_recipes, tiny_networks
from hybrid_vit.config import parse_argument

NETWORK = "focalnet_large_fl3"  # paper: three levels, of ImageNet-22K at 384 x 384
VARIANTS = ("coco_panoptic", "ade20k", "runlocal")
_TINY = dict(tiny_networks.FOCALNET, conv_embed=False)


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Keys: `batch_size`, `multi_scale`, of ADE20K's test."""
  variant, keys = parse_argument(
    argument, VARIANTS, "coco_panoptic", batch_size=16, multi_scale=False
  )
  if variant == "ade20k":
    return mask_recipes.ade20k(
      NETWORK,
      image_size=640,  # code: of large backbones
      batch_size=keys["batch_size"],
      drop_path_rate=0.3,  # code
      multi_scale=keys["multi_scale"],
    )
  config = mask_recipes.coco(
    NETWORK,
    "panoptic",
    epochs=100,  # code: of Swin-L
    queries=200,  # paper
    batch_size=keys["batch_size"],
    drop_path_rate=0.3,  # code
  )
  return mask_recipes.run_locally(config, _TINY) if variant == "runlocal" else config
