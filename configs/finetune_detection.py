"""Any registered network as a detector of objects in your own pictures, with their masks.

    python -m hybrid_vit.main --workdir=runs/detector --config=configs/finetune_detection.py:\
arch=convnext_tiny,data=coco:/path/to/coco,detector=mask_rcnn,init=WEIGHTS

    --config=configs/finetune_detection.py:runlocal        drawn scenes, minutes

`data` is any source of objects (docs/data.md): coco:, yolo: (boxes alone: masks=False), scenes.
`detector` is mask_rcnn or cascade_mask_rcnn; with masks=False retinanet, atss, dino or sparse_rcnn,
too. Under the first two and the last one a ViT has ViTDet's windows, pyramid and heads.
Pictures are resized by mmdetection's 1x recipe onto a square canvas. `arch=same` is the network of
the weights that `init` names, with its arguments. Own figures, no paper's.
"""

from ml_collections import ConfigDict

from hybrid_vit import detection_recipes, recipes, tiny_networks
from hybrid_vit.config import parse_argument
from hybrid_vit.initial_network import initial_network, take_over

VARIANTS = ("pictures", "runlocal")


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file.

  Keys: `arch`, `data`, `detector`, `init`, `res` (side of the canvas), `masks`, `batch_size`,
  `epochs`, `lr`.
  """
  variant, keys = parse_argument(
    argument,
    VARIANTS,
    "pictures",
    runlocal_keys=("detector", "init"),
    arch="convnext_tiny",
    data="coco:data/coco",
    detector="mask_rcnn",
    init=None,
    res=1024,
    masks=True,
    batch_size=16,
    epochs=12,
    lr=1e-4,
  )
  local = variant == "runlocal"
  network = initial_network("tiny_moat_0" if local else keys["arch"], keys["init"])
  name, size = network.name, keys["res"]
  config = recipes.imagenet(
    name, batch_size=keys["batch_size"], source=keys["data"], num_classes=None
  )
  config.total_epochs = keys["epochs"]
  config.evaluate_every_epochs = 1
  config.init_from = keys["init"]
  config.reinitialize_head = True
  config.precision = "float32"
  form, detector = detection_recipes.parts_for(name, keys["detector"], size, network.arguments)
  take_over(config, network, form)
  config.data.image_size = size
  config.data.interpolation = "bilinear"
  config.data.transform = "|".join(
    (
      "decode",
      f"resize_short_side({size * 3 // 5}, {size})",
      "flip_lr",
      "drop_crowd",
      "filter_boxes",
      "keep_largest(100)",
      "pad_to({image_size})",
      *(["crop_masks(56)"] if keys["masks"] else []),
    )
  )
  config.task = dict(
    name="detection",
    detector=dict(name=keys["detector"], **detector),
    mask_size=56 if keys["masks"] else 0,
    inference=dict(scale=(size, size * 3 // 5)),
  )
  config.checkpoint.best_metric = "validation/box_ap"
  config.optimizer = dict(
    name="adamw",
    learning_rate=keys["lr"],
    weight_decay=0.05,
    schedule=dict(name="cosine", warmup_epochs=0.1, end_learning_rate=0.0),
  )
  if local:
    detection_recipes.run_locally(config, tiny_networks.MOAT)
  return config
