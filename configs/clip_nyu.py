"""CLIP's image encoders on NYU Depth v2, by the protocol of masked image modelling's depth line.

    --config=configs/clip_nyu.py --config.init_from=WORKDIR              vit_b16
    --config=configs/clip_nyu.py:swin_base_22k                           any network of a pyramid
    --config=configs/clip_nyu.py:runlocal                                two minutes on a laptop

Figures: SwinTransformer/MIM-Depth-Estimation (Swin-V2-B: RMSE 0.304, d1 0.935). That CLIP with
Quality Captions (arXiv:2405.08911) follows it is recalled; derived from its claims: RMSE about
0.339 of ViT-B (MAE: 0.383).

The authors divide pictures by 255 and do no more; weights that were trained on normalised pictures
get them normalised here, as their own `mean` and `std` say (--config.data.mean=(0,0,0)
--config.data.std=(1,1,1) for the authors' way).
"""

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes, tiny_networks
from hybrid_vit.config import parse_argument

VITS = ("vit_b16", "vit_base_patch16_clip_224", "vit_base_patch16_224")
PYRAMIDS = ("mci2", "swin_tiny", "swin_base_22k", "swin_large_22k")
# Rate from layer to layer and drop path; base and large are the authors', the others ours.
LAYER_DECAY = {"swin_large_22k": 0.85}
DROP_PATH = {"swin_base_22k": 0.3, "swin_large_22k": 0.5, "swin_tiny": 0.2, "mci2": None}
VARIANTS = (*VITS, *PYRAMIDS, "runlocal")


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`."""
  variant, keys = parse_argument(argument, VARIANTS, "vit_b16", batch_size=24)
  name = "swin_tiny" if variant == "runlocal" else variant
  config = dense_recipes.nyu_depth(
    name,
    dict(head=dict(name="mim_depth")),
    batch_size=keys["batch_size"],
    learning_rate=5e-4,
    weight_decay=0.05,
    layer_decay=LAYER_DECAY.get(name, 0.9),
    drop_path_rate=DROP_PATH.get(name, 0.3),
  )
  if variant == "runlocal":
    dense_recipes.run_locally(
      config,
      tiny_networks.SWIN,
      head=dict(channels=32),
    )
  return config
