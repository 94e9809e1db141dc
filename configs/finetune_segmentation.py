"""Any registered network as a segmenter of your own pictures.

    python -m hybrid_vit.main --workdir=runs/segmenter --config=configs/finetune_segmentation.py:\
arch=convnext_tiny,data=maps:/path/to/pictures,head=upernet,res=512,init=WEIGHTS

    --config=configs/finetune_segmentation.py:runlocal     drawn scenes, two minutes

`data` is any source of maps (docs/data.md): maps:, ade20k:, cityscapes:, coco_panoptic:, scenes.
`head` is upernet, semantic_fpn, segformer, deeplabv3plus, fcn or dpt_segmentation; `init` a work
directory, an export (of a classifier, whose weights become the backbone, or of a segmenter) or the
authors' file; `arch=same` is the network of those weights, with its arguments. Own figures, no
paper's.
"""

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes, tiny_networks
from hybrid_vit.config import ConfigError, parse_argument
from hybrid_vit.initial_network import initial_network, take_over
from hybrid_vit.models.dense import dense_arguments

VARIANTS = ("pictures", "runlocal")
DECODERS = {
  "upernet": dense_recipes.UPERNET,
  "semantic_fpn": dense_recipes.SEMANTIC_FPN,
  "segformer": dict(head=dict(name="segformer")),
  "deeplabv3plus": dict(head=dict(name="deeplabv3plus")),
  "fcn": dict(head=dict(name="fcn", level=-1, num_convs=2)),
  "dpt_segmentation": dict(head=dict(name="dpt_segmentation")),
}


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file.

  Keys: `arch`, `data`, `head`, `init`, `res`, `batch_size`, `epochs`, `lr`,
  `decay` (of the rates, for each layer down; 1 for none), `slide` (whether windows are tested).
  """
  variant, keys = parse_argument(
    argument,
    VARIANTS,
    "pictures",
    runlocal_keys=("head", "init"),
    arch="convnext_tiny",
    data="maps:data/pictures",
    head="upernet",
    init=None,
    res=512,
    batch_size=16,
    epochs=50,
    lr=1e-4,
    decay=0.9,
    slide=False,
  )
  if keys["head"] not in DECODERS:
    raise ConfigError(f"key `head` is {keys['head']!r}; one of {', '.join(DECODERS)} was expected")
  local = variant == "runlocal"
  network = initial_network("tiny_moat_0" if local else keys["arch"], keys["init"])
  name = network.name
  size = keys["res"]
  config = dense_recipes.ade20k(
    name,
    DECODERS[keys["head"]],
    image_size=size,
    batch_size=keys["batch_size"],
    learning_rate=keys["lr"],
    weight_decay=0.05,
    weight_decay_rules=(),
    drop_path_rate=None,
    layer_decay=None if keys["decay"] == 1 else keys["decay"],
    slide=size * 2 // 3 if keys["slide"] else None,
  )
  config.data.source = keys["data"]
  config.model.num_classes = None
  config.init_from = keys["init"]
  # A segmenter of other classes keeps its decoder but for the classifiers.
  config.reinitialize_head = True
  config.precision = "float32"
  del config["total_steps"]
  config.total_epochs = keys["epochs"]
  config.evaluate_every_epochs = 5
  schedule = config.optimizer.schedule
  del schedule["warmup_steps"]
  schedule.warmup_epochs = keys["epochs"] / 50
  take_over(config, network, dense_arguments(name, keys["res"], network.arguments))
  if local:
    dense_recipes.run_locally(config, tiny_networks.MOAT)
    config.task.head = dict(name="segformer", channels=64)
    config.task.auxiliary = None
  return config
