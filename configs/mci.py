"""MobileCLIP's image encoders on ImageNet-1K, supervised; their own training is contrastive.

    --config=configs/mci.py:mci0                              also mci1, mci2
    --config=configs/mci.py:mci2_finetune --config.init_from=WORKDIR      from MobileCLIP's weights
    --config=configs/mci.py:runlocal                          a minute on a laptop

From scratch it is FastViT's recipe (arXiv:2303.14189, appendix), the network's own, at 256 x 256;
no such training of MCi is published. "recalled": from memory; "ours": a choice for want of a
source. The head is a classifier, with a bias.
"""

import dataclasses

from ml_collections import ConfigDict

from hybrid_vit import recipes
from hybrid_vit.config import parse_argument
from hybrid_vit.models.registry import model_entry

SIZES = ("mci0", "mci1", "mci2")
VARIANTS = (*SIZES, *(f"{name}_finetune" for name in SIZES), "runlocal")

# recalled, of the FastViT of about that size: SA12, SA24, SA36
DROP_PATH = {"mci0": 0.1, "mci1": 0.1, "mci2": 0.2}


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`; the rate follows it."""
  variant, keys = parse_argument(argument, VARIANTS, "mci0", batch_size=None)
  if variant == "runlocal":
    config = from_scratch("mci0", 1024)
    config.ema_decay = 0.9  # 88 steps: the recipe's average would still be the beginning
    return recipes.run_locally(
      config,
      dict(
        depths=(1, 1, 1),
        widths=(32, 64, 64),
        mlp_ratios=(3, 3, 3),
        mlp_kernel_size=3,
        token_mixers=("repmixer", "repmixer", "attention"),
        downsamples=(True, False, True),
        se_downsamples=(False, False, True),
        position_kernel_sizes=(None, None, 3),
        layer_scale=0.1,
        head_bias=True,
        drop_path_rate=0.0,
      ),
    )
  if variant.endswith("_finetune"):
    return fine_tuning(variant.removesuffix("_finetune"), keys["batch_size"] or 512)
  return from_scratch(variant, keys["batch_size"] or 1024)


def from_scratch(name: str, batch_size: int) -> ConfigDict:
  """300 epochs."""
  config = recipes.deit(
    name,
    batch_size=batch_size,  # recalled: 1024
    learning_rate=1e-3,  # recalled
    learning_rate_batch_size=1024,  # ours: linear in the batch
    warmup_epochs=5,  # recalled
    ema_decay=0.9995,  # recalled
  )
  # ImageNet's statistics and bicubic filter, as FastViT's; the crop is FastViT's of 0.9.
  preprocessing = dataclasses.replace(
    model_entry(name).preprocessing,
    crop_ratio=0.9,
    interpolation="bicubic",
    mean=recipes.IMAGENET_MEAN,
    std=recipes.IMAGENET_STD,
  )
  config.data.update(dataclasses.asdict(preprocessing))
  config.model.arguments = dict(head_bias=True, drop_path_rate=DROP_PATH[name])
  return config


def fine_tuning(name: str, batch_size: int) -> ConfigDict:
  """30 epochs from `--config.init_from`, with MobileCLIP's own pictures in [0, 1]."""
  config = recipes.deit(
    name,
    batch_size=batch_size,  # ours
    learning_rate=5e-5,  # ours
    learning_rate_batch_size=512,  # ours: linear in the batch
    warmup_epochs=3,  # ours
    weight_decay=1e-4,  # ours
    end_learning_rate=1e-6,  # ours
    epochs=30,  # ours
  )
  config.reinitialize_head = True
  config.model.arguments = dict(head_bias=True, drop_path_rate=0.1)  # ours
  return config
