"""L2ViT on ImageNet, by the author's commands (ChuanyangZheng/L2ViT, readme and main.py).

    --config=configs/l2vit.py                                 l2vit_tiny; also _small, _base
    --config=configs/l2vit.py:l2vit_base_22k                  22K, then
    --config=configs/l2vit.py:l2vit_base_22kto1k --config.init_from=WORKDIR     224, or
    --config=configs/l2vit.py:l2vit_base_384_22kto1k --config.init_from=WORKDIR
    --config=configs/l2vit.py:runlocal                        a minute on a laptop

Everything here is in the author's commands and defaults but for the lines marked "ours".
"""

from ml_collections import ConfigDict

from hybrid_vit import recipes
from hybrid_vit.config import parse_argument

SCRATCH = ("l2vit_tiny", "l2vit_small", "l2vit_base")
PRETRAINING = ("l2vit_base_22k",)
FINE_TUNING = ("l2vit_base_22kto1k", "l2vit_base_384_22kto1k")
VARIANTS = (*SCRATCH, *PRETRAINING, *FINE_TUNING, "runlocal")


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`; the rate follows it."""
  variant, keys = parse_argument(argument, VARIANTS, "l2vit_tiny", batch_size=None)
  batch_size = keys["batch_size"]
  if variant in PRETRAINING:
    return pretraining(variant, batch_size or 1024)
  if variant in FINE_TUNING:
    return fine_tuning(variant, batch_size or 1024)
  if variant == "runlocal":
    config = recipes.run_locally(
      from_scratch("l2vit_tiny", 4096),
      dict(
        widths=(16, 32, 48),
        depths=(2, 2, 2),
        num_heads=(1, 2, 3),
        mlp_ratios=(2, 2, 2),
        window_size=4,
        drop_path_rate=0.0,
      ),
    )
    del config["ema_decay"]  # it averages over more steps than there are
    return config
  return from_scratch(variant, batch_size or 4096)


def from_scratch(name: str, batch_size: int) -> ConfigDict:
  """ImageNet-1K, 300 epochs; the averaged weights are evaluated.

  Drop path is the entry's: published for l2vit_base alone.
  """
  config = recipes.deit(
    name,
    batch_size=batch_size,  # 8 x 128 x 4
    learning_rate=4e-3,
    learning_rate_batch_size=4096,  # ours: linear in the batch; there it is absolute
    warmup_epochs=20,
    end_learning_rate=1e-6,
    weight_decay=0.05,  # the temperatures too, which are no vectors
    ema_decay=0.9999,
  )
  config.optimizer.schedule.warmup_start_learning_rate = 0.0
  config.precision = "float32"  # no mixed precision there
  return config


def pretraining(name: str, batch_size: int) -> ConfigDict:
  """ImageNet-22K (21,841 classes), 90 epochs, from a folder: see `recipes.pretrain_on_22k`."""
  config = recipes.deit(
    name,
    batch_size=batch_size,
    learning_rate=1e-3,
    learning_rate_batch_size=1024,  # ours: linear in the batch
    warmup_epochs=5,  # from 1e-6 to the peak, down to 1e-5
    epochs=90,
  )
  recipes.pretrain_on_22k(config)
  config.precision = "float32"
  return config


def fine_tuning(name: str, batch_size: int) -> ConfigDict:
  """ImageNet-1K, 30 epochs at the entry's size, from `--config.init_from`.

  The author's commands leave mixup, cutmix and erasing on. Their head takes its rows from the one
  of 22K by a list in the author's own order of classes; here it begins anew.
  """
  config = recipes.deit(
    name,
    batch_size=batch_size,  # 8 x 64 x 2
    learning_rate=4e-5,
    learning_rate_batch_size=1024,  # ours: linear in the batch
    warmup_epochs=5,
    end_learning_rate=4e-7,
    weight_decay=1e-8,
    ema_decay=0.9999,
    epochs=30,
  )
  config.optimizer.schedule.warmup_start_learning_rate = 4e-8
  config.reinitialize_head = True
  config.precision = "float32"
  return config
