"""Swin on ImageNet, by the authors' configurations (microsoft/Swin-Transformer, configs/swin).

    --config=configs/swin.py:swin_tiny                    also swin_small, swin_base
    --config=configs/swin.py:swin_base_384 --config.init_from=WORKDIR           from 1K weights
    --config=configs/swin.py:swin_large_22k               22K (tiny, small, base too), then
    --config=configs/swin.py:swin_large_384_22kto1k --config.init_from=WORKDIR
    --config=configs/swin.py:runlocal                     a minute on a laptop

The rates there are for a batch of 512 and follow it, the first and last too. A larger window takes
the tables of relative positions resized. A head of 22K begins anew on 1K; the authors pick its rows
by a list.
"""

from ml_collections import ConfigDict

from hybrid_vit import recipes
from hybrid_vit.config import parse_argument

SCRATCH = ("swin_tiny", "swin_small", "swin_base")
PRETRAINING = ("swin_tiny_22k", "swin_small_22k", "swin_base_22k", "swin_large_22k")
FINE_TUNING = (
  "swin_base_384",
  "swin_tiny_22kto1k",
  "swin_small_22kto1k",
  "swin_base_22kto1k",
  "swin_base_384_22kto1k",
  "swin_large_22kto1k",
  "swin_large_384_22kto1k",
)
VARIANTS = (*SCRATCH, *PRETRAINING, *FINE_TUNING, "runlocal")


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`; the rate follows it."""
  variant, keys = parse_argument(argument, VARIANTS, "swin_tiny", batch_size=None)
  batch_size = keys["batch_size"]
  if variant in PRETRAINING:
    return pretraining(variant, batch_size or 4096)
  if variant in FINE_TUNING:
    return fine_tuning(variant, batch_size or 1024)
  if variant == "runlocal":
    return recipes.run_locally(
      from_scratch("swin_tiny", 1024),
      dict(
        width=16,
        depths=(2, 2, 2),
        num_heads=(1, 2, 4),
        window_size=4,
        patch_size=2,
        drop_path_rate=0.0,
      ),
      epochs=12,  # without convolutions it learns more slowly than the hybrids
    )
  return from_scratch(variant, batch_size or 1024)


def from_scratch(name: str, batch_size: int) -> ConfigDict:
  """ImageNet-1K, 300 epochs."""
  return recipes.deit(
    name,
    batch_size=batch_size,
    learning_rate=5e-4,
    learning_rate_batch_size=512,
    warmup_epochs=20,
    gradient_clip_norm=5.0,
    start_factor=1e-3,
    end_factor=1e-2,
  )


def pretraining(name: str, batch_size: int) -> ConfigDict:
  """ImageNet-22K (21,841 classes), 90 epochs, from a folder: see `recipes.pretrain_on_22k`."""
  config = recipes.deit(
    name,
    batch_size=batch_size,
    learning_rate=1.25e-4,
    learning_rate_batch_size=512,
    warmup_epochs=5,
    gradient_clip_norm=5.0,
    start_factor=1e-3,
    end_factor=1e-2,
    epochs=90,
  )
  return recipes.pretrain_on_22k(config)


def fine_tuning(name: str, batch_size: int) -> ConfigDict:
  """ImageNet-1K, 30 epochs at the entry's size, from `--config.init_from`.

  The paper has a constant rate of 1e-5 after 22K; the configurations have this cosine.
  """
  config = recipes.deit(
    name,
    batch_size=batch_size,
    learning_rate=2e-5,
    learning_rate_batch_size=512,
    warmup_epochs=5,
    weight_decay=1e-8,
    gradient_clip_norm=5.0,
    start_factor=1e-3,
    end_factor=1e-2,
    epochs=30,
  )
  config.reinitialize_head = name.endswith("_22kto1k")
  return config
