"""Any registered network as a judge of depth in your own pictures.

    python -m hybrid_vit.main --workdir=runs/depth --config=configs/finetune_depth.py:\
arch=swin_tiny,data=depth:/path/to/pictures,head=glpn,max_depth=10,init=WEIGHTS

    --config=configs/finetune_depth.py:runlocal            drawn scenes, two minutes

`data` is any source of depth (docs/data.md): depth:, nyu_depth:, kitti_depth:, scenes. `head` is
mim_depth, glpn, dpt_depth or adabins; `init` a work directory, an export or the authors' file;
`arch=same` is the network of those weights, with its arguments. Own figures, no paper's.
"""

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes, tiny_networks
from hybrid_vit.config import ConfigError, parse_argument
from hybrid_vit.initial_network import initial_network, take_over
from hybrid_vit.models.dense import dense_arguments

VARIANTS = ("pictures", "runlocal")
HEADS = ("mim_depth", "glpn", "dpt_depth", "adabins")


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file.

  Keys: `arch`, `data`, `head`, `init`, `res`, `max_depth` (metres),
  `batch_size`, `epochs`, `lr`, `decay` (of the rates, for each layer down; 1 for none).
  """
  variant, keys = parse_argument(
    argument,
    VARIANTS,
    "pictures",
    runlocal_keys=("head", "init", "max_depth"),
    arch="swin_tiny",
    data="depth:data/pictures",
    head="glpn",
    init=None,
    res=480,
    max_depth=10.0,
    batch_size=16,
    epochs=25,
    lr=2e-4,
    decay=0.9,
  )
  if keys["head"] not in HEADS:
    raise ConfigError(f"key `head` is {keys['head']!r}; one of {', '.join(HEADS)} was expected")
  local = variant == "runlocal"
  network = initial_network("tiny_moat_0" if local else keys["arch"], keys["init"])
  name = network.name
  config = dense_recipes.nyu_depth(
    name,
    dict(head=dict(name=keys["head"])),
    batch_size=keys["batch_size"],
    learning_rate=keys["lr"],
    weight_decay=0.05,
    layer_decay=None if keys["decay"] == 1 else keys["decay"],
    drop_path_rate=None,
    epochs=keys["epochs"],
    image_size=keys["res"],
  )
  config.data.source = keys["data"]
  size = keys["res"]
  # Pictures of any size, the short side a little larger than the crop.
  config.data.transform = (
    f"decode|resize_range(({4 * size}, {size}), (1.0, 1.3))|random_crop({{image_size}})|flip_lr"
    "|brightness_contrast|random_gamma|hue_saturation_value"
  )
  config.init_from = keys["init"]
  config.precision = "float32"
  config.task.protocol = dict(min_depth=1e-3, max_depth=float(keys["max_depth"]))
  config.task.inference = dict(mode="whole", scale=(4 * size, size))
  if keys["head"] == "adabins":
    config.task.loss = "sig_loss"
    config.task.chamfer_weight = 0.1
  take_over(config, network, dense_arguments(name, keys["res"], network.arguments))
  if local:
    dense_recipes.run_locally(config, tiny_networks.MOAT)
    config.task.head = dict(name="glpn", channels=32)
  return config
