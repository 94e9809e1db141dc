"""MOAT and tiny-MOAT with kMaX-DeepLab: COCO panoptic, pictures of 1281 x 1281.

    --config=configs/moat_panoptic.py --config.init_from=WORKDIR         moat_0
    --config=configs/moat_panoptic.py:tiny_moat_3
    --config=configs/moat_panoptic.py:runlocal                           minutes on a laptop

The paper (arXiv:2210.01820) reports COCO panoptic for the family; neither its numbers nor its
decoder nor its training are at hand, and no configuration of it was published, so that no PQ stands
here. Known is the wiring ("code": google-research/deeplab2): MOAT is an encoder of kMaX-DeepLab
alone, which reads the plain maps of stride 4 to 32; attention is global at any size, and shortcuts
pool over 3 x 3. All other figures are those of kMaX-DeepLab's ConvNeXt-L there
(`kmax_meta_convnext_large_os32`); drop path is each network's own, as its weights were trained.
That encoder normalises by (x - 127.5) / 127.5 whatever the weights expect; here it is what they do.
"""

from ml_collections import ConfigDict

from hybrid_vit import mask_recipes, recipes
from hybrid_vit.config import parse_argument

SIZES = (*(f"tiny_moat_{i}" for i in range(4)), *(f"moat_{i}" for i in range(5)))
VARIANTS = (*SIZES, "runlocal")
# Four maps, which the head needs.
_TINY = dict(
  recipes.TINY_MOAT,
  depths=(1, 1, 1, 1),
  widths=(32, 48, 64, 64),
  block_types=("mbconv", "mbconv", "moat", "moat"),
  strides=(2, 2, 2, 2),
  window_sizes=(None, None, None, None),
  position_sizes=(None, None, 4, 2),
  pool_size=3,
)


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Keys: `batch_size`, `res`, the side of the pictures."""
  variant, keys = parse_argument(argument, VARIANTS, "moat_0", batch_size=64, res=1281)
  config = mask_recipes.kmax_coco(
    "tiny_moat_0" if variant == "runlocal" else variant,
    image_size=keys["res"],
    batch_size=keys["batch_size"],
    arguments=dict(window_sizes=(None, None, None, None)),  # code
  )
  return mask_recipes.run_locally(config, _TINY) if variant == "runlocal" else config
