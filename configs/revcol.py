"""RevCol on ImageNet: training from scratch, pretraining on 22K, fine-tuning.

    --config=configs/revcol.py:revcol_tiny                also revcol_small, revcol_base
    --config=configs/revcol.py:revcol_base_22k            22K (large, xlarge too), then
    --config=configs/revcol.py:revcol_base_22kto1k --config.init_from=WORKDIR
    --config=configs/revcol.py:revcol_base_384_22kto1k --config.init_from=WORKDIR
    --config=configs/revcol.py:runlocal                   a minute on a laptop

All figures are of the authors' code (megvii-research/RevCol, configs/ and its defaults), but those
marked "ours". Training from scratch and on 22K has heads and decoders after each quarter of the
columns, fine-tuning has one head, begun anew. revcol_huge is fine-tuned from weights on private
pictures, by the same rules.
"""

from ml_collections import ConfigDict

from hybrid_vit import recipes
from hybrid_vit.config import parse_argument

SCRATCH = ("revcol_tiny", "revcol_small", "revcol_base")
PRETRAINING = ("revcol_base_22k", "revcol_large_22k", "revcol_xlarge_22k")
# Rate for a batch of 1,024, and decay of the rates by layer.
FINE_TUNING = {
  "revcol_base_22kto1k": (1e-4, 0.9),
  "revcol_base_384_22kto1k": (1e-4, 0.9),
  "revcol_large": (5e-5, 0.8),
  "revcol_large_384_22kto1k": (5e-5, 0.8),
  "revcol_xlarge": (2e-5, 0.8),
  "revcol_huge": (4e-5, 0.8),
}
VARIANTS = (*SCRATCH, *PRETRAINING, *FINE_TUNING, "runlocal")

# Vectors have no decay there. The gains alpha do: they are stored with four dimensions.
_WEIGHT_DECAY_RULES = ((r"(^|/)(bias|scale|gamma)$", 0.0), (r".*", 1.0))


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`; the rate follows it."""
  variant, keys = parse_argument(argument, VARIANTS, "revcol_tiny", batch_size=None)
  batch_size = keys["batch_size"] or 1024
  if variant in PRETRAINING:
    return pretraining(variant, batch_size)
  if variant in FINE_TUNING:
    return fine_tuning(variant, batch_size)
  if variant == "runlocal":
    config = recipes.run_locally(
      from_scratch("revcol_tiny", 1024),
      dict(
        widths=(16, 24, 32, 48),
        depths=(1, 1, 1, 1),
        layer_scale_init=1.0,
        drop_path_rate=0.0,
        intermediate_supervision=True,
        reversible=True,
      ),
    )
    # 88 steps are too few for an average over 10,000.
    del config.ema_decay
    return config
  return from_scratch(variant, batch_size)


def from_scratch(name: str, batch_size: int) -> ConfigDict:
  """ImageNet-1K, 300 epochs."""
  base = name == "revcol_base"
  config = _supervised(name, batch_size)
  config.total_epochs = 300
  # The code also jitters colours by 0.4 (tiny and small), which RandAugment switches off in timm.
  config.optimizer = dict(
    name="adamw",
    learning_rate=1e-3,
    learning_rate_batch_size=1024,
    weight_decay=0.05,
    weight_decay_rules=_WEIGHT_DECAY_RULES,
    schedule=dict(
      name="cosine",
      warmup_epochs=20,
      # 1e-5 and 1e-6 (base: 1e-8) at this batch; they follow it as the rate does.
      warmup_start_factor=1e-2,
      end_learning_rate_factor=1e-5 if base else 1e-3,
    ),
  )
  if base:
    config.optimizer.gradient_clip_norm = 5.0
  config.ema_decay = 0.9999
  return config


def pretraining(name: str, batch_size: int) -> ConfigDict:
  """ImageNet-22K (21,841 classes), 90 epochs, from a folder: see `recipes.pretrain_on_22k`."""
  config = _supervised(name, batch_size)
  recipes.pretrain_on_22k(config)
  config.total_epochs = 90
  config.optimizer = dict(
    name="adamw",
    # 5e-4 for a batch of 4,096, which the code does not state.
    learning_rate=1.25e-4,
    learning_rate_batch_size=1024,
    weight_decay=0.1,
    weight_decay_rules=_WEIGHT_DECAY_RULES,
    gradient_clip_norm=10.0,
    schedule=dict(
      name="cosine",
      warmup_epochs=5,
      warmup_start_factor=1e-5 / 1.25e-4,
      end_learning_rate_factor=1e-7 / 1.25e-4,
    ),
  )
  return config


def _supervised(name: str, batch_size: int) -> ConfigDict:
  config = recipes.imagenet(name, *recipes.DEIT_AUGMENTATION, batch_size=batch_size)
  config.model.arguments.intermediate_supervision = True
  config.model.arguments.reversible = True
  config.task = dict(
    name="intermediate_supervision",
    loss="softmax",
    label_smoothing=0.1,
    reconstruction_weight=3.0,
    auxiliary_weight=0.7,
    mixing=dict(mixup_alpha=0.8, cutmix_alpha=1.0, probability=1.0, switch_probability=0.5),
  )
  return config


def fine_tuning(name: str, batch_size: int) -> ConfigDict:
  """ImageNet-1K, 30 epochs at the entry's size, from `--config.init_from`."""
  huge = name == "revcol_huge"
  rate, layer_decay = FINE_TUNING[name]
  config = recipes.imagenet(name, *recipes.DEIT_AUGMENTATION, batch_size=batch_size)
  config.total_epochs = 20 if huge else 30
  config.task = dict(name="classification", loss="softmax", label_smoothing=0.1)
  config.model.arguments.head_init_scale = 0.001
  config.model.arguments.reversible = True
  config.reinitialize_head = True
  config.optimizer = dict(
    name="adamw",
    learning_rate=rate,
    learning_rate_batch_size=1024,
    weight_decay=1e-8,
    weight_decay_rules=_WEIGHT_DECAY_RULES,
    gradient_clip_norm=100.0 if huge else 10.0,
    # By the grid of `models.depth`. The code takes the last digit of a column alone, so that column
    # 12 counts as 2; not here.
    layer_decay=dict(rate=layer_decay),
    schedule=dict(
      name="cosine",
      warmup_epochs=0,
      end_learning_rate_factor=(2e-8 if huge else 2e-7) / rate,
    ),
  )
  if name in ("revcol_xlarge", "revcol_huge"):
    config.ema_decay = 0.9999
  return config
