"""Swin and ConvNeXt with UPerNet on ADE20K, which the others are compared with.

    --config=configs/swin_ade20k.py --config.init_from=WORKDIR           swin_tiny
    --config=configs/swin_ade20k.py:convnext_base,multi_scale=True
    --config=configs/swin_ade20k.py:runlocal                             two minutes on a laptop

Figures: SwinTransformer/Swin-Transformer-Semantic-Segmentation and facebookresearch/ConvNeXt,
`semantic_segmentation` (its grouping of the layers recalled). Published, single-scale mIoU: Swin
44.5, 47.6, 48.1; ConvNeXt 46.0, 48.7, 49.1 (tiny, small, base).
"""

from typing import Any

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes
from hybrid_vit.config import parse_argument

SWIN = tuple(f"swin_{size}" for size in ("tiny", "small", "base"))
CONVNEXT = tuple(f"convnext_{size}" for size in ("tiny", "small", "base"))
VARIANTS = (*SWIN, *CONVNEXT, "runlocal")
# The stem and what leads into a stage, the four stages, the rest: 0.9 from each to the next.
_STAGES = (
  (r"^backbone/(stem|stage\d_downsample)/", 0),
  *((rf"^backbone/stage{i}_(block|norm)", i) for i in range(1, 5)),
  ("", 5),
)


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Keys: `batch_size`, `multi_scale`, of the test."""
  variant, keys = parse_argument(argument, VARIANTS, "swin_tiny", batch_size=16, multi_scale=False)
  name = "swin_tiny" if variant == "runlocal" else variant
  own: dict[str, Any]
  if name in SWIN:
    own = dict(learning_rate=6e-5, weight_decay=0.01, drop_path_rate=0.3)
    own["weight_decay_rules"] = dense_recipes.NORMS_AND_TABLES_SPARED
  else:
    # Its optimizer spares biases and norms, which is what the default rules do.
    own = dict(learning_rate=1e-4, weight_decay=0.05, drop_path_rate=0.4, slide=341)
    own["weight_decay_rules"] = ()
  config = dense_recipes.ade20k(
    name,
    dense_recipes.UPERNET,
    batch_size=keys["batch_size"],
    multi_scale=keys["multi_scale"],
    **own,
  )
  if name in CONVNEXT:
    config.optimizer.layer_decay = dict(rate=0.9, layers=_STAGES)
    config.model.arguments.layer_scale_init = 1.0
  if variant == "runlocal":
    dense_recipes.run_locally(
      config,
      dict(
        width=24,
        depths=(1, 1, 2),
        num_heads=(1, 2, 4),
        patch_size=4,
        window_size=4,
        output_norms=(1, 2, 3),
        shrink_windows=False,
        drop_path_rate=0.0,
      ),
      head=dict(channels=32),
      auxiliary=dict(channels=32),
    )
  return config
