"""ResNet on ImageNet, a baseline.

    --config=configs/resnet.py:resnet50                   also resnet101
    --config=configs/resnet.py:runlocal                   a minute on a laptop

torchvision's first recipe (its references/classification): SGD, 90 epochs, a step every 30; the
steps are a cosine here (ours).
"""

from ml_collections import ConfigDict

from hybrid_vit import recipes
from hybrid_vit.config import parse_argument

VARIANTS = ("resnet50", "resnet101", "runlocal")


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`; the rate follows it."""
  variant, keys = parse_argument(argument, VARIANTS, "resnet50", batch_size=None)
  if variant == "runlocal":
    config = recipes.run_locally(
      from_scratch("resnet50", 256),
      dict(stem_width=16, widths=(32, 64, 96), depths=(1, 1, 1), batch_norm_momentum=0.9),
    )
    # Plain SGD wants more than the rate of the other local tries.
    config.optimizer.learning_rate = 0.05
    return config
  return from_scratch(variant, keys["batch_size"] or 256)


def from_scratch(name: str, batch_size: int) -> ConfigDict:
  """ImageNet-1K, 90 epochs; random crops and flips alone."""
  config = recipes.imagenet(name, batch_size=batch_size)
  config.total_epochs = 90
  config.task = dict(name="classification", loss="softmax", label_smoothing=0.0)
  config.optimizer = dict(
    name="sgd",
    momentum=0.9,
    learning_rate=0.1,
    learning_rate_batch_size=256,
    # On every parameter, the norms' too.
    weight_decay=1e-4,
    weight_decay_rules=((r".*", 1.0),),
    schedule=dict(name="cosine", end_learning_rate=0.0),
  )
  return config
