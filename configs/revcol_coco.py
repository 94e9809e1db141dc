"""RevCol with Cascade Mask R-CNN on COCO: every published row of it.

    --config=configs/revcol_coco.py --config.init_from=WORKDIR           revcol_tiny
    --config=configs/revcol_coco.py:revcol_large_22k
    --config=configs/revcol_coco.py:runlocal                             minutes on a laptop

Figures: megvii-research/RevCol, `Detection/configs` and its README: 36 epochs, multi-scale,
synchronised batch norm in the box heads, rates that fall from layer to layer; biases, norms and
gains are not decayed. Published AP stands in docs/detection_models.md; RevCol-H's 63.8 is DINO's on
Objects365, whose recipe is not published. Gradients are plain, not reversible, as in that code.
"""

from ml_collections import ConfigDict

from hybrid_vit import detection_recipes, tiny_networks
from hybrid_vit.config import parse_argument

# Learning rate, drop path, factor of the rate from layer to layer.
ROWS = {
  "revcol_tiny": (2e-4, 0.3, 0.85),
  "revcol_small": (2e-4, 0.4, 0.85),
  "revcol_base": (2e-4, 0.4, 0.9),
  "revcol_base_22k": (1e-4, 0.4, 0.9),
  "revcol_large_22k": (1e-4, 0.5, 0.85),
}
VARIANTS = (*ROWS, "runlocal")
# The code's `alpha` is spared beside biases and all of one dimension.
DECAY = ((r"(^|/)(bias|scale|gamma|alpha\d)$", 0.0), (".*", 1.0))


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`."""
  variant, keys = parse_argument(argument, VARIANTS, "revcol_tiny", batch_size=16)
  name = "revcol_tiny" if variant == "runlocal" else variant
  rate, drop_path, layer_decay = ROWS[name]
  config = detection_recipes.coco(
    name,
    detection_recipes.CASCADE,
    schedule="3x",
    batch_size=keys["batch_size"],
    learning_rate=rate,
    weight_decay_rules=DECAY,
    drop_path_rate=drop_path,
    layer_decay=layer_decay,
  )
  if variant == "runlocal":
    detection_recipes.run_locally(
      config,
      tiny_networks.REVCOL,
    )
  return config
