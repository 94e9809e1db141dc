"""Any registered network on pictures of your own.

    python -m hybrid_vit.main --workdir=runs/flowers \
      --config=configs/finetune.py:arch=moat_1,data=folder:/path/to/flowers,res=384,init=runs/pretrained

    --config=configs/finetune.py:moat_1,…,probe=linear     the head alone, the network stands still
    --config=configs/finetune.py:moat_1,…,balance=1.0      small classes come as often as large ones
    --config=configs/finetune.py:arch=same,init=runs/own,… the network of those weights, as it is
    --config=configs/finetune.py:runlocal                  the embedded digits, a minute

`init` (`config.init_from`) is the work directory or the export of an earlier run, or the authors'
file of weights; left out, training starts from scratch, which wants a larger rate and no decay by
layer: lr=1e-3,decay=1.0. Windows and tables of positions follow `res`. Own figures, no paper's.
"""

from typing import Any

from ml_collections import ConfigDict

from hybrid_vit import recipes
from hybrid_vit.config import ConfigError, parse_argument
from hybrid_vit.initial_network import initial_network
from hybrid_vit.models.registry import list_models, model_arguments, model_entry
from hybrid_vit.models.sizes import arguments_for_size

VARIANTS = (*list_models(), "runlocal")
PROBES = (None, "linear")
# Rates for a batch of 64: of AdamW for all layers, of SGD for a head alone.
_RATE, _PROBE_RATE = 2e-4, 2.5e-2


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file.

  Keys: `arch` (or the variant itself; "same": what `init` holds, with its arguments, its size and
  what it expects of a picture), `data`, `init`, `res` (`image_size` is the same),
  `batch_size`, `epochs`, `lr`, `decay` (of the rates, for each layer down), `probe` ("linear"),
  `balance` (0 to 1, of the sampling), `weights` ("balanced", of the loss), `patience` (evaluations
  without a better one that end the training; 0: none), `carry` (see `weights.head_rows`: "names",
  or a file).
  """
  variant, keys = parse_argument(
    argument,
    VARIANTS,
    "tiny_moat_0",
    runlocal_keys=("arch", "init", "lr", "probe", "balance", "weights", "patience", "carry"),
    arch=None,
    data="folder:data/pictures",
    init=None,
    res=None,
    image_size=None,
    batch_size=64,
    epochs=30,
    lr=None,
    decay=0.85,
    probe=None,
    balance=0.0,
    weights=None,
    patience=0,
    carry=None,
  )
  if keys["probe"] not in PROBES:
    raise ConfigError(f"key `probe` is {keys['probe']!r}; 'linear' was expected, or nothing")
  local = variant == "runlocal"
  name = keys["arch"] or ("tiny_moat_0" if local else variant)
  size = keys["res"] or keys["image_size"]
  network = initial_network(name, keys["init"])
  name, preprocessing = network.name, network.preprocessing
  config = recipes.imagenet(
    name,
    *([] if keys["probe"] else ["randaugment(2, 9, magnitude_std=0.5)"]),
    batch_size=keys["batch_size"],
    preprocessing=preprocessing,
    source=keys["data"],
    num_classes=None,
    # Less of a picture is cut away than on ImageNet: small sets have few views of their objects.
    scale=(0.35, 1.0),
  )
  config.total_epochs = keys["epochs"]
  config.init_from = keys["init"]
  config.model.arguments = dict(network.arguments)
  if size is not None:
    # Else as the weights of `arch=same` or the network's entry say, as mean and deviation are.
    config.data.image_size = size
    trained_size = preprocessing.image_size if preprocessing else None
    config.model.arguments.update(
      arguments_for_size(name, size, trained=network.arguments, trained_size=trained_size)
    )
    if size > 224 >= model_entry(name).preprocessing.image_size:
      # The whole height of a picture, as is usual at larger sizes.
      config.data.crop_ratio = 1.0
  config.data.balance = float(keys["balance"])
  # float32 is right everywhere; --config.precision=bfloat16 is faster on an accelerator.
  config.precision = "float32"
  # Another data set has other classes; what `carry` names is taken over all the same.
  config.reinitialize_head = True
  if keys["carry"]:
    config.carry_head = keys["carry"]
  config.task = dict(name="classification", loss="softmax", label_smoothing=0.1)
  if keys["weights"]:
    config.task.class_weights = keys["weights"]
  if keys["patience"]:
    config.early_stop = dict(patience=keys["patience"])
  if keys["probe"]:
    _linear_probe(config, keys["lr"])
  else:
    config.optimizer = dict(
      name="adamw",
      learning_rate=keys["lr"] or _RATE,
      weight_decay=0.05,
      gradient_clip_norm=1.0,
      schedule=dict(name="cosine", warmup_epochs=2, end_learning_rate=1e-6),
    )
    if keys["decay"] != 1.0 and not local:
      config.optimizer.layer_decay = dict(rate=keys["decay"])
  if local:
    _run_locally(config, keys)
  return config


def _linear_probe(config: ConfigDict, rate: float | None) -> None:
  """The head alone is trained: the rest stands still, its batch norms and its drop path too."""
  config.optimizer = dict(
    name="sgd",
    momentum=0.9,
    learning_rate=rate or _PROBE_RATE,
    freeze=(r"^(?!head/)",),
    schedule=dict(name="cosine", warmup_epochs=0, end_learning_rate=0.0),
  )
  config.task.label_smoothing = 0.0
  if "drop_path_rate" in model_arguments(config.model.name):
    config.model.arguments.drop_path_rate = 0.0


def _run_locally(config: ConfigDict, keys: dict[str, Any]) -> None:
  drop_path = config.model.arguments.get("drop_path_rate")
  recipes.run_locally(config, recipes.TINY_MOAT)
  if drop_path is not None:
    config.model.arguments.drop_path_rate = drop_path
  if keys["probe"]:
    config.optimizer.learning_rate = keys["lr"] or _PROBE_RATE
    config.optimizer.schedule.warmup_epochs = 0
