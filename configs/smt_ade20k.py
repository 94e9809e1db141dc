"""SMT with UPerNet on ADE20K: both published rows.

    --config=configs/smt_ade20k.py --config.init_from=WORKDIR            smt_s
    --config=configs/smt_ade20k.py:smt_b,multi_scale=True
    --config=configs/smt_ade20k.py:runlocal                              two minutes on a laptop

Figures: AFeng-x/SMT, `segmentation/configs`. Published, single and multi-scale mIoU: small 49.2 /
50.2, base 49.6 / 50.6. The range of the resizing is mmsegmentation's (not in the authors' file).
"""

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes, tiny_networks
from hybrid_vit.config import parse_argument

DROP_PATH = {"smt_s": 0.2, "smt_b": 0.3}
VARIANTS = (*DROP_PATH, "runlocal")


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Keys: `batch_size`, `multi_scale`, of the test."""
  variant, keys = parse_argument(argument, VARIANTS, "smt_s", batch_size=16, multi_scale=False)
  name = "smt_s" if variant == "runlocal" else variant
  config = dense_recipes.ade20k(
    name,
    dense_recipes.UPERNET,
    batch_size=keys["batch_size"],
    learning_rate=6e-5,
    weight_decay=0.01,
    weight_decay_rules=dense_recipes.NOTHING_SPARED,
    drop_path_rate=DROP_PATH[name],
    multi_scale=keys["multi_scale"],
  )
  if variant == "runlocal":
    dense_recipes.run_locally(
      config,
      tiny_networks.SMT,
      head=dict(channels=32),
      auxiliary=dict(channels=32),
    )
  return config
