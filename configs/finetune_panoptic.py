"""Any registered network with Mask2Former's head on your own pictures: things, stuff and classes.

    python -m hybrid_vit.main --workdir=runs/panoptic --config=configs/finetune_panoptic.py:\
arch=swin_tiny,data=coco_panoptic:/path/to/coco,init=WEIGHTS

    --config=configs/finetune_panoptic.py:runlocal                  drawn scenes, minutes
    --config=configs/finetune_panoptic.py:runlocal,kind=instance    the same, objects alone

`kind` is panoptic (data: coco_panoptic:, scenes), instance (coco:, scenes) or semantic (maps:,
ade20k:, scenes); see docs/data.md. Pictures are jittered in scale onto a square canvas, and tested
as large as fits into it. `arch=same` is the network of the weights that `init` names, with its
arguments. Own figures, no paper's.
"""

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes, mask_recipes, recipes, tiny_networks
from hybrid_vit.config import ConfigError, parse_argument
from hybrid_vit.initial_network import initial_network, take_over
from hybrid_vit.models.dense import dense_arguments

VARIANTS = ("pictures", "runlocal")


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file.

  Keys: `arch`, `data`, `kind`, `init`, `res` (side of the canvas), `queries`, `batch_size`,
  `epochs`, `lr`.
  """
  variant, keys = parse_argument(
    argument,
    VARIANTS,
    "pictures",
    runlocal_keys=("kind", "init"),
    arch="swin_tiny",
    data="coco_panoptic:data/coco",
    kind="panoptic",
    init=None,
    res=640,
    queries=100,
    batch_size=16,
    epochs=50,
    lr=1e-4,
  )
  kind, size = keys["kind"], keys["res"]
  if kind not in mask_recipes.TASKS:
    raise ConfigError(f"kind={kind!r}; one of {', '.join(mask_recipes.TASKS)} was expected")
  network = initial_network("tiny_moat_0" if variant == "runlocal" else keys["arch"], keys["init"])
  name = network.name
  config = recipes.imagenet(
    name, batch_size=keys["batch_size"], source=keys["data"], num_classes=None
  )
  config.total_epochs = keys["epochs"]
  config.init_from = keys["init"]
  config.reinitialize_head = True
  take_over(config, network, dense_arguments(name, size, network.arguments))
  config.data.image_size = size
  config.data.interpolation = "bilinear"
  config.data.transform = mask_recipes.jittered(kind)
  config.task = mask_recipes.task(kind, queries=keys["queries"])
  config.task.inference = dict(scale=(size, size))
  config.optimizer = mask_recipes.optimizer(
    keys["lr"], dict(name="cosine", warmup_steps=100, end_learning_rate=0.0)
  )
  config.checkpoint.best_metric = f"validation/{dense_recipes.BEST[mask_recipes.TASKS[kind]]}"
  if variant == "runlocal":
    mask_recipes.run_locally(config, tiny_networks.MOAT)
  return config
