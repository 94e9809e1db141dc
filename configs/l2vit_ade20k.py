"""L2ViT with UPerNet on ADE20K.

    --config=configs/l2vit_ade20k.py --config.init_from=WORKDIR          l2vit_tiny
    --config=configs/l2vit_ade20k.py:l2vit_base,multi_scale=True
    --config=configs/l2vit_ade20k.py:runlocal                            two minutes on a laptop

Figures: ChuanyangZheng/L2ViT, `semantic_segmentation/configs`, whose batch norms have the
statistics of one device's two pictures: `config.batch_norm_groups` is how many such there are.
Results: the code prints none, and the paper's were not at hand.
"""

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes, tiny_networks
from hybrid_vit.config import parse_argument

VARIANTS = ("l2vit_tiny", "l2vit_small", "l2vit_base", "runlocal")
_PICTURES_OF_A_DEVICE = 2


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Keys: `batch_size`, `multi_scale`, of the test."""
  variant, keys = parse_argument(argument, VARIANTS, "l2vit_tiny", batch_size=16, multi_scale=False)
  name = "l2vit_tiny" if variant == "runlocal" else variant
  config = dense_recipes.ade20k(
    name,
    dense_recipes.UPERNET,
    batch_size=keys["batch_size"],
    learning_rate=6e-5,
    weight_decay=0.01,
    weight_decay_rules=dense_recipes.NOTHING_SPARED,
    drop_path_rate=0.3,
    multi_scale=keys["multi_scale"],
  )
  config.batch_norm_groups = max(keys["batch_size"] // _PICTURES_OF_A_DEVICE, 1)
  if variant == "runlocal":
    dense_recipes.run_locally(
      config,
      tiny_networks.L2VIT,
      head=dict(channels=32),
      auxiliary=dict(channels=32),
    )
    config.batch_norm_groups = 1
  return config
