"""Swin, ConvNeXt and DeiT with UPerNet on ADE20K, which the others are compared with.

    --config=configs/swin_ade20k.py --config.init_from=WORKDIR           swin_tiny
    --config=configs/swin_ade20k.py:convnext_base,multi_scale=True
    --config=configs/swin_ade20k.py:swin_small,steps=80_000
    --config=configs/swin_ade20k.py:runlocal                             two minutes on a laptop

Figures: SwinTransformer/Swin-Transformer-Semantic-Segmentation and facebookresearch/ConvNeXt,
`semantic_segmentation` (its grouping of the layers recalled). Published, single-scale mIoU: Swin
44.5, 47.6, 48.1; ConvNeXt 46.0, 48.7, 49.1 (tiny, small, base). With weights pretrained by
EfficientTrain (arXiv:2405.08768, table 18; plain ones in brackets), 80,000 steps: DeiT-S 43.8
(43.0), Swin-T 44.1 (43.3), Swin-S 47.8 (47.5); 160,000: DeiT-S 44.2 (43.1), Swin-T 44.8 (44.4),
Swin-S 48.2 (47.7), Swin-B 48.5 (48.0). DeiT's figures and its pyramid ("feature2pyramid") are ours.
"""

from typing import Any

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes, tiny_networks
from hybrid_vit.config import parse_argument

SWIN = tuple(f"swin_{size}" for size in ("tiny", "small", "base"))
CONVNEXT = tuple(f"convnext_{size}" for size in ("tiny", "small", "base"))
DEIT = "deit_small_patch16_224"
VARIANTS = (*SWIN, *CONVNEXT, DEIT, "runlocal")
# The stem and what leads into a stage, the four stages, the rest: 0.9 from each to the next.
_STAGES = (
  (r"^backbone/(stem|stage\d_downsample)/", 0),
  *((rf"^backbone/stage{i}_(block|norm)", i) for i in range(1, 5)),
  ("", 5),
)


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Keys: `batch_size`, `steps`, `multi_scale`, of the test."""
  variant, keys = parse_argument(
    argument, VARIANTS, "swin_tiny", batch_size=16, steps=160_000, multi_scale=False
  )
  name = "swin_tiny" if variant == "runlocal" else variant
  own: dict[str, Any]
  if name in SWIN:
    own = dict(learning_rate=6e-5, weight_decay=0.01, drop_path_rate=0.3)
    own["weight_decay_rules"] = dense_recipes.NORMS_AND_TABLES_SPARED
  elif name == DEIT:
    own = dict(learning_rate=6e-5, weight_decay=0.01, drop_path_rate=0.1, weight_decay_rules=())
  else:
    # Its optimizer spares biases and norms, which is what the default rules do.
    own = dict(learning_rate=1e-4, weight_decay=0.05, drop_path_rate=0.4, slide=341)
    own["weight_decay_rules"] = ()
  config = dense_recipes.ade20k(
    name,
    dense_recipes.UPERNET,
    batch_size=keys["batch_size"],
    total_steps=keys["steps"],
    multi_scale=keys["multi_scale"],
    **own,
  )
  if name in CONVNEXT:
    config.optimizer.layer_decay = dict(rate=0.9, layers=_STAGES)
    config.model.arguments.layer_scale_init = 1.0
  if variant == "runlocal":
    dense_recipes.run_locally(
      config,
      tiny_networks.SWIN,
      head=dict(channels=32),
      auxiliary=dict(channels=32),
    )
  return config
