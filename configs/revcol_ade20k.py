"""RevCol with UPerNet on ADE20K: every published row of UPerNet.

    --config=configs/revcol_ade20k.py --config.init_from=WORKDIR         revcol_tiny
    --config=configs/revcol_ade20k.py:revcol_large_22k,multi_scale=True
    --config=configs/revcol_ade20k.py:runlocal                           two minutes on a laptop

Figures: megvii-research/RevCol, `Segmentation/configs` and its README. Published, single and
multi-scale mIoU: tiny 47.4 / 47.6, small 47.9 / 49.0, base 49.0 / 50.1; from 22K at 640: base
52.7 / 53.3, large 53.4 / 53.7; huge (private 168M pictures) 57.8 / 58.0. Gradients are plain, not
reversible, as in the authors' dense code.
"""

import dataclasses

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes, tiny_networks
from hybrid_vit.config import parse_argument


@dataclasses.dataclass(frozen=True)
class Row:
  """What differs between the rows."""

  learning_rate: float
  image_size: int
  slide: int
  layer_decay: float | None = None
  warmup_steps: int = 1500
  batch_size: int = 16
  channels: int = 512


ROWS = {
  "revcol_tiny": Row(6e-5, 512, 341),
  "revcol_small": Row(4e-5, 512, 341),
  "revcol_base": Row(4e-5, 512, 426),
  "revcol_base_22k": Row(4e-5, 640, 426, 0.9),
  "revcol_large_22k": Row(4e-5, 640, 426, 0.9, 3000),
  "revcol_huge": Row(4e-5, 640, 426, 0.9, 3000, 8, 1440),
}
VARIANTS = (*ROWS, "runlocal")


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Keys: `batch_size`, `multi_scale`, of the test."""
  variant, keys = parse_argument(
    argument, VARIANTS, "revcol_tiny", batch_size=None, multi_scale=False
  )
  name = "revcol_tiny" if variant == "runlocal" else variant
  row = ROWS[name]
  decoder = dict(dense_recipes.UPERNET)
  decoder["head"] = dict(name="upernet", channels=row.channels)
  config = dense_recipes.ade20k(
    name,
    decoder,
    batch_size=keys["batch_size"] or row.batch_size,
    image_size=row.image_size,
    learning_rate=row.learning_rate,
    weight_decay=0.01,
    weight_decay_rules=dense_recipes.NORMS_SPARED,
    drop_path_rate=0.3,
    layer_decay=row.layer_decay,
    warmup_steps=row.warmup_steps,
    slide=row.slide,
    multi_scale=keys["multi_scale"],
  )
  if variant == "runlocal":
    dense_recipes.run_locally(
      config,
      tiny_networks.REVCOL,
      head=dict(channels=32),
      auxiliary=dict(channels=32),
    )
  return config
