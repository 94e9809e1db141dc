"""ConvNeXt on ImageNet: training from scratch, pretraining on 22K, fine-tuning.

    --config=configs/convnext.py:convnext_tiny            also convnext_small, _base, _large
    --config=configs/convnext.py:convnext_base_384 --config.init_from=WORKDIR       from 1K weights
    --config=configs/convnext.py:convnext_base_22k        22K (every size), then
    --config=configs/convnext.py:convnext_base_22kto1k --config.init_from=WORKDIR
    --config=configs/convnext.py:convnext_base_384_22kto1k --config.init_from=WORKDIR
    --config=configs/convnext.py:runlocal                 a minute on a laptop

All figures are of the authors' code (facebookresearch/ConvNeXt, TRAINING.md and main.py). Drop path
stands in the registry's entries: the code's, but for tiny and small on 22K and after it, which
TRAINING.md does not name (recalled).
"""

from ml_collections import ConfigDict

from hybrid_vit import recipes
from hybrid_vit.config import parse_argument
from hybrid_vit.models.registry import list_models, model_entry

SCRATCH = tuple(f"convnext_{size}" for size in ("tiny", "small", "base", "large"))
PRETRAINING = tuple(list_models("convnext_*_22k"))
FINE_TUNING = (
  "convnext_base_384",
  "convnext_large_384",
  *list_models("convnext_*_22kto1k"),
)
VARIANTS = (*SCRATCH, *PRETRAINING, *FINE_TUNING, "runlocal")

# Every scale of a channel is a vector, and has no decay.
_WEIGHT_DECAY_RULES = ((r"(^|/)(bias|scale|gamma)$", 0.0), (r".*", 1.0))


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`; the rate follows it."""
  variant, keys = parse_argument(argument, VARIANTS, "convnext_tiny", batch_size=None)
  batch_size = keys["batch_size"]
  if variant in PRETRAINING:
    return pretraining(variant, batch_size or 4096)
  if variant in FINE_TUNING:
    return fine_tuning(variant, batch_size or 512)
  if variant == "runlocal":
    config = recipes.run_locally(
      from_scratch("convnext_tiny", 4096),
      dict(depths=(1, 2), widths=(32, 64), layer_scale_init=1.0, drop_path_rate=0.0),
    )
    # 88 steps are too few for an average over 10,000.
    del config.ema_decay
    return config
  return from_scratch(variant, batch_size or 4096)


def from_scratch(name: str, batch_size: int) -> ConfigDict:
  """ImageNet-1K, 300 epochs (paper, table 5)."""
  config = recipes.deit(
    name,
    batch_size=batch_size,
    learning_rate=4e-3,
    learning_rate_batch_size=4096,
    warmup_epochs=20,
    end_learning_rate=1e-6,
    ema_decay=0.9999,
  )
  config.optimizer.schedule.warmup_start_learning_rate = 0.0
  config.optimizer.weight_decay_rules = _WEIGHT_DECAY_RULES
  return config


def pretraining(name: str, batch_size: int) -> ConfigDict:
  """ImageNet-22K (21,841 classes), 90 epochs, from a folder: see `recipes.pretrain_on_22k`."""
  config = from_scratch(name, batch_size)
  recipes.pretrain_on_22k(config)
  config.total_epochs = 90
  config.optimizer.schedule.warmup_epochs = 5
  del config.ema_decay
  return config


def fine_tuning(name: str, batch_size: int) -> ConfigDict:
  """ImageNet-1K, 30 epochs at the entry's size, from `--config.init_from`.

  The layer decay is 0.7 from 1K weights, 0.8 from 22K; mixing is off.
  """
  from_22k = name.endswith("_22kto1k")
  config = recipes.deit(
    name,
    batch_size=batch_size,
    learning_rate=5e-5,
    learning_rate_batch_size=512,
    warmup_epochs=0,
    weight_decay=1e-8,
    end_learning_rate=1e-6,
    epochs=30,
  )
  del config.task["mixing"]
  config.optimizer.weight_decay_rules = _WEIGHT_DECAY_RULES
  depths = model_entry(name).arguments["depths"]
  config.optimizer.layer_decay = dict(rate=0.8 if from_22k else 0.7, layers=layer_ids(depths))
  if from_22k:
    config.reinitialize_head = True
    config.model.arguments.head_init_scale = 0.001
  if name.startswith("convnext_xlarge"):
    config.ema_decay = 0.9999
  return config


def layer_ids(depths: tuple[int, ...]) -> tuple[tuple[str, int], ...]:
  """The code's groups for the decay of rates by layer: three blocks of stage 3 are one.

  They are made for 27 blocks there; with fewer, the numbers between are left out all the same.
  """
  return (
    (r"^stem/", 0),
    (r"^stage1_", 1),
    (r"^stage2_", 2),
    (r"^stage3_downsample/", 3),
    *((rf"^stage3_block{i}/", 3 + i // 3) for i in range(depths[2])),
    (r"^stage4_", 12),
    (r"^head", 13),
  )
