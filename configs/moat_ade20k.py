"""MOAT and tiny-MOAT with a DeepLabV3+ decoder on ADE20K.

    --config=configs/moat_ade20k.py --config.init_from=WORKDIR           moat_2
    --config=configs/moat_ade20k.py:tiny_moat_3
    --config=configs/moat_ade20k.py:runlocal                             two minutes on a laptop

Published, single-scale mIoU: tiny-0 to 3 41.2, 43.1, 44.9, 47.5 (from 1K); moat_2, 3, 4 54.7, 56.5,
57.6 (from 22K). Known is the kind of the decoder, by its size (docs/dense_models.md); crops of 512
(tiny) and 641 are recalled. The training is not published: optimizer, length and atrous rates are
ours, after deeplab2's configurations of kMaX-DeepLab.
"""

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes, tiny_networks
from hybrid_vit.config import parse_argument

TINY = tuple(f"tiny_moat_{i}" for i in range(4))
SIZES = tuple(f"moat_{i}" for i in range(5))
VARIANTS = (*TINY, *SIZES, "runlocal")
DEEPLAB = dict(head=dict(name="deeplabv3plus"))


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Keys: `batch_size`, `multi_scale`, of the test."""
  variant, keys = parse_argument(argument, VARIANTS, "moat_2", batch_size=16, multi_scale=False)
  name = "tiny_moat_0" if variant == "runlocal" else variant
  size = 512 if name in TINY else 641  # recalled
  config = dense_recipes.ade20k(
    name,
    DEEPLAB,
    image_size=size,
    batch_size=keys["batch_size"],
    learning_rate=1e-4,  # ours
    weight_decay=0.05,  # kMaX-DeepLab's
    weight_decay_rules=(),
    drop_path_rate=None,
    power=0.9,  # deeplab2's
    layer_decay=None,
    multi_scale=keys["multi_scale"],
  )
  config.task.inference.align_corners = True
  config.model.arguments.output_activation = "gelu"  # deeplab2's decoders read res2 and res5
  # kMaX-DeepLab: the backbone learns at a tenth of the rate.
  config.optimizer.learning_rate_rules = (("^backbone/", 0.1), (".*", 1.0))
  if variant == "runlocal":
    dense_recipes.run_locally(
      config,
      dict(tiny_networks.MOAT, output_activation="gelu"),
      head=dict(
        aspp_channels=32,
        decoder_channels=32,
        low_level_channels=16,
        atrous_rates=(1, 2, 3),
        batch_norm_momentum=0.9,
      ),
    )
    del config.optimizer["learning_rate_rules"]
  return config
