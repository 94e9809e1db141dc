"""ViT and DeiT on ImageNet-1K, by DeiT's recipe (facebookresearch/deit, arXiv:2012.12877, table 9).

    --config=configs/vit.py:deit_small_patch16_224          also tiny, base
    --config=configs/vit.py:vit_base_patch16_224            and vit_base_patch16_gap_224, alike
    --config=configs/vit.py:deit_base_patch16_384 --config.init_from=WORKDIR     from 224
    --config=configs/vit.py:deit_small_distilled_patch16_224 --config.task.teacher=DIRECTORY
                                        also tiny, base and, with init_from, base at 384
    --config=configs/vit.py:runlocal                        a minute on a laptop

A teacher is any network with weights of the same classes: an export, an import or a work directory.
DeiT's was RegNetY-16GF; the pictures are the student's, augmented and mixed.

Each picture comes three times in a row, as in DeiT ("repeated augmentation"). By the authors'
ablation (table 8, recalled) DeiT-B falls from 81.8 to 76.5 without it.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from hybrid_vit import recipes
from hybrid_vit.config import parse_argument

SCRATCH = (
  "deit_tiny_patch16_224",
  "deit_small_patch16_224",
  "deit_base_patch16_224",
  "vit_base_patch16_224",
  "vit_base_patch16_gap_224",
)
DISTILLED = tuple(f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base"))
LARGER = ("deit_base_patch16_384", "deit_base_distilled_patch16_384")
VARIANTS = (*SCRATCH, *DISTILLED, *LARGER, "runlocal")


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`; the rate follows it."""
  variant, keys = parse_argument(argument, VARIANTS, "deit_small_patch16_224", batch_size=None)
  if variant == "runlocal":
    return recipes.run_locally(
      from_scratch("deit_tiny_patch16_224", 1024),
      dict(width=64, depth=3, num_heads=2, patch_size=8, position_size=4, drop_path_rate=0.0),
      epochs=6,
    )
  if variant in LARGER:
    config = fine_tuning(variant, keys["batch_size"] or 512)
  else:
    config = from_scratch(variant, keys["batch_size"] or 1024)
  if "distilled" in variant:
    config.task.update(dict(name="distillation", teacher=placeholder(str), kind="hard", alpha=0.5))
  return config


def from_scratch(name: str, batch_size: int) -> ConfigDict:
  """300 epochs."""
  config = recipes.deit(
    name,
    batch_size=batch_size,  # the paper's 1024
    learning_rate=5e-4,
    learning_rate_batch_size=512,
    warmup_epochs=5,
    repeats=3,
  )
  config.model.arguments.drop_path_rate = 0.1
  return config


def fine_tuning(name: str, batch_size: int) -> ConfigDict:
  """30 epochs at 384 from `--config.init_from`; the positions are resized."""
  config = recipes.deit(
    name,
    batch_size=batch_size,  # the readme's 512
    learning_rate=5e-6,  # the readme's, for 512
    learning_rate_batch_size=512,
    warmup_epochs=5,
    weight_decay=1e-8,  # the readme's
    end_learning_rate=5e-6,  # the readme's: constant after the warm-up
    epochs=30,
    repeats=3,
  )
  config.model.arguments.drop_path_rate = 0.1
  return config
