"""PVT on ImageNet-1K, by the authors' configurations (whai362/PVT, classification/configs/pvt).

--config=configs/pvt.py:pvt_small        also pvt_tiny, pvt_medium, pvt_large
--config=configs/pvt.py:runlocal         a minute on a laptop
"""

from ml_collections import ConfigDict

from hybrid_vit import recipes
from hybrid_vit.config import parse_argument

VARIANTS = ("pvt_tiny", "pvt_small", "pvt_medium", "pvt_large", "runlocal")


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`; the rate follows it."""
  variant, keys = parse_argument(argument, VARIANTS, "pvt_small", batch_size=1024)
  config = recipes.deit(
    "pvt_tiny" if variant == "runlocal" else variant,
    batch_size=keys["batch_size"],  # 8 x 128
    learning_rate=5e-4,
    learning_rate_batch_size=512,
    warmup_epochs=5,
    # Clipped in the two larger ones only.
    gradient_clip_norm=1.0 if variant in ("pvt_medium", "pvt_large") else None,
  )
  if variant == "runlocal":
    recipes.run_locally(
      config,
      dict(
        widths=(16, 32, 48, 64),
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 3, 4),
        mlp_ratios=(4, 4, 2, 2),
        reduction_ratios=(2, 2, 1, 1),
        image_size=32,
        drop_path_rate=0.0,
      ),
    )
  return config
