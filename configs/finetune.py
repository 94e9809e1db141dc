"""Any registered network on pictures of your own.

    python -m hybrid_vit.main --config=configs/finetune.py --workdir=runs/flowers \
      --config.data.source=folder:/path/to/flowers --config.init_from=runs/pretrained

    --config=configs/finetune.py:moat_1,image_size=384     another network, larger pictures
    --config=configs/finetune.py:runlocal                  the embedded digits, a minute

`init_from` is the work directory or the export of an earlier run; left out, training starts from
scratch, which wants a larger rate: --config.optimizer.learning_rate=1e-3. Own figures, no paper's.
"""

from ml_collections import ConfigDict

from hybrid_vit import recipes
from hybrid_vit.config import parse_argument
from hybrid_vit.models.registry import list_models

VARIANTS = (*list_models(), "runlocal")


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Keys: `image_size`, `batch_size`, `epochs`."""
  variant, keys = parse_argument(
    argument, VARIANTS, "tiny_moat_0", image_size=None, batch_size=64, epochs=30
  )
  name = "tiny_moat_0" if variant == "runlocal" else variant
  config = recipes.imagenet(
    name,
    "randaugment(2, 9, magnitude_std=0.5)",
    batch_size=keys["batch_size"],
    source="folder:data/pictures",
    num_classes=None,
    # Less of a picture is cut away than on ImageNet: small sets have few views of their objects.
    scale=(0.35, 1.0),
  )
  config.total_epochs = keys["epochs"]
  # None: as the network's entry in the registry says, which goes for mean and deviation too.
  config.data.image_size = keys["image_size"]
  # float32 is right everywhere; --config.precision=bfloat16 is faster on an accelerator.
  config.precision = "float32"
  # Another data set has other classes.
  config.reinitialize_head = True
  config.task = dict(name="classification", loss="softmax", label_smoothing=0.1)
  config.optimizer = dict(
    name="adamw",
    learning_rate=2e-4,
    weight_decay=0.05,
    gradient_clip_norm=1.0,
    schedule=dict(name="cosine", warmup_epochs=2, end_learning_rate=1e-6),
  )
  if variant == "runlocal":
    recipes.run_locally(config, recipes.TINY_MOAT)
  return config
