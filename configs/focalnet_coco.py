"""FocalNet's detectors on COCO: every row of the paper's tables 6, 8 and 11, and detrex's.

    --config=configs/focalnet_coco.py --config.init_from=WORKDIR         mask_rcnn_..._tiny_lrf_1x
    --config=configs/focalnet_coco.py:mask_rcnn_focalnet_base_srf_3x     nine networks, 1x and 3x
    --config=configs/focalnet_coco.py:cascade_mask_rcnn_focalnet_tiny_srf_3x      and atss_...,
                                                         sparse_rcnn_...
    --config=configs/focalnet_coco.py:dino_focalnet_large_fl3_1x         and _3x, fl4, dino_5scale_
    --config=configs/focalnet_coco.py:dino_5scale_focalnet_huge_fl4_objects365    then _finetune
    --config=configs/focalnet_coco.py:runlocal                           minutes on a laptop

"paper": arXiv:2203.11926, section 4.3, tables 20 and 21 and appendix A.4; "code":
microsoft/FocalNet, `detection/configs`; "detrex": IDEA-Research/detrex, `projects/dino`. Published
AP stands in docs/detection_models.md. Its 1x falls after epochs 9 and 11, and is multi-scale too.
Of the deep networks' 3x no code is there: drop path is that of their size.
"""

from typing import Any

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes, detection_recipes, tiny_networks
from hybrid_vit.config import parse_argument
from hybrid_vit.models.dense import enlarged_windows

SIZES, KERNELS = ("tiny", "small", "base"), ("srf", "lrf", "srf_deep")
DROP_PATH = {
  "1x": {"tiny": 0.1, "small": 0.2, "base": 0.3},
  "3x": {"tiny": 0.3, "small": 0.5, "base": 0.5},
}
# Stages' first kernels, of all detectors but Mask R-CNN, which has 9 in all stages.
WINDOWS = (11, 9, 9, 7)
DETREX: dict[str, dict[str, Any]] = {  # the backbone's output has norms of the levels that are read
  "dino_focalnet_large_fl3_1x": dict(drop_path_rate=0.3),
  "dino_focalnet_large_fl3_3x": dict(drop_path_rate=0.3, schedule="3x"),
  "dino_focalnet_large_fl4_1x": dict(drop_path_rate=0.3),
  "dino_5scale_focalnet_large_fl4_1x": dict(drop_path_rate=0.3),
}
# The paper's largest: Objects365 first, then COCO on larger pictures. The authors' code of DINO.
LARGEST = tuple(
  f"dino_5scale_focalnet_{size}_fl4_{part}"
  for size in ("large", "huge")
  for part in ("objects365", "finetune")
)
VARIANTS = (
  *(f"mask_rcnn_focalnet_{s}_{k}_{x}" for x in ("1x", "3x") for s in SIZES for k in KERNELS),
  *(
    f"{detector}_focalnet_tiny_{kernels}_3x"
    for detector in ("cascade_mask_rcnn", "atss", "sparse_rcnn")
    for kernels in ("srf", "lrf")
  ),
  *DETREX,
  *LARGEST,
  "runlocal",
)


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`."""
  variant, keys = parse_argument(
    argument, VARIANTS, "mask_rcnn_focalnet_tiny_lrf_1x", batch_size=16
  )
  name = "mask_rcnn_focalnet_tiny_lrf_1x" if variant == "runlocal" else variant
  detector, _, rest = name.partition("_focalnet_")
  network, _, last = rest.rpartition("_")
  if name in LARGEST:
    return largest(f"focalnet_{network}", last, keys["batch_size"])
  if name in DETREX:
    return detrex(f"focalnet_{network}", detector, keys["batch_size"], DETREX[name])
  config = mmdetection(f"focalnet_{network}", detector, last, keys["batch_size"])
  if variant == "runlocal":
    detection_recipes.run_locally(config, tiny_networks.FOCALNET)
  return config


def mmdetection(network: str, detector: str, schedule: str, batch_size: int) -> ConfigDict:
  """Mask R-CNN, Cascade Mask R-CNN, ATSS, Sparse R-CNN."""
  size, deep = network.split("_")[1], network.endswith("deep")
  first: Any = 9 if detector == "mask_rcnn" else WINDOWS
  arguments: dict[str, Any] = dict(focal_windows=enlarged_windows(network, first))
  if detector == "atss":
    arguments["output_norms"] = (2, 3, 4)  # code: out_indices (1, 2, 3)
  drop_path = DROP_PATH[schedule][size]
  if detector == "sparse_rcnn":
    return detection_recipes.sparse_rcnn(
      network, batch_size=batch_size, drop_path_rate=drop_path, arguments=arguments
    )
  return detection_recipes.coco(
    network,
    dict(name=detector),
    schedule=schedule,
    batch_size=batch_size,
    drop_path_rate=0.2 if deep and (size, schedule) == ("tiny", "1x") else drop_path,
    drops=(9, 11) if schedule == "1x" else None,
    weight_decay_rules=dense_recipes.NORMS_SPARED,
    arguments=arguments,
  )


def detrex(network: str, detector: str, batch_size: int, figures: dict[str, Any]) -> ConfigDict:
  """DINO on networks of ImageNet-22K at 384."""
  own = dict(detection_recipes.DINO_DETREX, num_levels=5 if "5scale" in detector else 4)
  norms = (1, 2, 3, 4) if own["num_levels"] == 5 else (2, 3, 4)
  return detection_recipes.dino(
    network, own, batch_size=batch_size, arguments=dict(output_norms=norms), **figures
  )


def largest(network: str, part: str, batch_size: int) -> ConfigDict:
  """The paper's appendix A.4; drop path and the scales of the larger pictures are recalled."""
  own = dict(detection_recipes.DINO, num_levels=5)  # recalled: the paper does not say
  if part == "finetune":
    shorts = tuple(range(720, 1201, 48))
    sizes = f"{shorts}, 2000, (600, 750, 900), (576, 900)"
    return detection_recipes.dino(
      network,
      own,
      batch_size=batch_size,
      learning_rate=6e-5,
      drop_path_rate=0.3,
      pictures=("flip_lr", f"detr_augmentation({sizes}, within={{canvas}})"),
      canvases=((1216, 2016), (2016, 1216)),
      scale=(2000, 1200),
    )
  config = detection_recipes.dino(
    network, own, batch_size=batch_size, drop_path_rate=0.3, drops=(24,)
  )
  config.total_epochs = 26
  config.model.num_classes = 365
  config.data.source = "coco:data/objects365?empty=false,min_size=32"
  config.evaluation.sets.validation.source = "coco:data/objects365"
  return config
