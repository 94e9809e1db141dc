"""FocalNet with UPerNet on ADE20K: every row of the paper's table 8.

    --config=configs/focalnet_ade20k.py --config.init_from=WORKDIR       focalnet_tiny_lrf
    --config=configs/focalnet_ade20k.py:focalnet_base_srf                any of the nine
    --config=configs/focalnet_ade20k.py:focalnet_tiny_lrf,multi_scale=True
    --config=configs/focalnet_ade20k.py:runlocal                         two minutes on a laptop

The weights of ImageNet-1K come by `init_from`: a work directory, an export, or the authors' file.
"paper": arXiv:2203.11926, section 4.4 and tables 8 and 22; "code": microsoft/FocalNet,
`segmentation/configs`. Published, single and multi-scale mIoU: tiny 46.5 / 47.2 (SRF), 46.8 / 47.8
(LRF), small 49.3 / 50.1, 49.1 / 50.1, base 50.2 / 51.1, 50.5 / 51.4.
"""

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes, tiny_networks
from hybrid_vit.config import parse_argument
from hybrid_vit.models.dense import enlarged_windows

SIZES = ("tiny", "small", "base")
VARIANTS = (
  *(f"focalnet_{size}_{kernels}" for size in SIZES for kernels in ("srf", "lrf", "srf_deep")),
  "runlocal",
)


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Keys: `batch_size`, `multi_scale`, of the test."""
  variant, keys = parse_argument(
    argument, VARIANTS, "focalnet_tiny_lrf", batch_size=16, multi_scale=False
  )
  name = "focalnet_tiny_lrf" if variant == "runlocal" else variant
  config = dense_recipes.ade20k(
    name,
    dense_recipes.UPERNET,
    batch_size=keys["batch_size"],
    learning_rate=6e-5,
    weight_decay=0.01,
    weight_decay_rules=dense_recipes.NORMS_SPARED,
    drop_path_rate=0.3,  # paper and code, of all sizes
    multi_scale=keys["multi_scale"],
    arguments=dict(focal_windows=enlarged_windows(name)),  # paper: kernels begin at 9
  )
  if variant == "runlocal":
    dense_recipes.run_locally(
      config,
      tiny_networks.FOCALNET,
      head=dict(channels=32),
      auxiliary=dict(channels=32),
    )
  return config
