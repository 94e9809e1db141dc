"""MOAT with Cascade Mask R-CNN on COCO, pictures of 1344 x 1344.

    --config=configs/moat_coco.py --config.init_from=WORKDIR             moat_0
    --config=configs/moat_coco.py:moat_3
    --config=configs/moat_coco.py:runlocal                               minutes on a laptop

Published (arXiv:2210.01820): windows of 14 x 14 that do not shift, position biases as pretrained,
one scale and hard suppression in the test; AP stands in docs/detection_models.md. The training is
not published: optimizer, length and jitter are ours, after the others here. So are the heads, by
their published parameters: two box heads (thresholds 0.6 and 0.7, as in arXiv:2107.00057), one mask
head, and a coarsest level by convolution give 65, 79, 110 and 227 million.
"""

from ml_collections import ConfigDict

from hybrid_vit import detection_recipes, tiny_networks
from hybrid_vit.config import parse_argument

SIZES = tuple(f"moat_{i}" for i in range(4))
VARIANTS = (*SIZES, "runlocal")
CASCADE = dict(
  detection_recipes.CASCADE,
  neck=dict(name="fpn", extra="on_output", num_extra=1),
  mask_head_per_stage=False,
  settings=dict(
    stage_ious=(0.6, 0.7),
    stage_weights=(1.0, 1.0),
    stage_stds=((0.1, 0.1, 0.2, 0.2), (0.05, 0.05, 0.1, 0.1)),
  ),
)
SIDE = 1344


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`."""
  variant, keys = parse_argument(argument, VARIANTS, "moat_0", batch_size=64)
  name = "moat_0" if variant == "runlocal" else variant
  config = detection_recipes.coco(
    name,
    CASCADE,
    schedule="3x",
    pictures=detection_recipes.LARGE_SCALE_JITTER,
    batch_size=keys["batch_size"],
    weight_decay_rules=(),
    drop_path_rate=None,
    canvases=((SIDE, SIDE),),
    scale=(SIDE, SIDE),
  )
  if variant == "runlocal":
    detection_recipes.run_locally(config, tiny_networks.MOAT)
  return config
