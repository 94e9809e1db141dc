"""CLIP's image encoders on ADE20K: ViT-B/16 with UPerNet, MCi with Semantic FPN.

    --config=configs/clip_ade20k.py --config.init_from=WORKDIR           vit_b16, UPerNet
    --config=configs/clip_ade20k.py:mci2 --config.init_from=WORKDIR      Semantic FPN
    --config=configs/clip_ade20k.py:runlocal                             two minutes on a laptop

`init_from` takes the work directory of a contrastive training as it stands (its image tower is
taken), an export, or the authors' file. The paper (arXiv:2405.08911) was not at hand: its protocol
is recalled to be MAE's for ViT-B (UPerNet of 768 channels on blocks 3, 5, 7, 11) and PoolFormer's
for the others (40,000 steps of 32). Derived from its claims: about 53.9 mIoU of ViT-B (MAE: 48.1)
and 52 of MCi2, whose 39.4 million parameters are 6.1 times fewer than Swin-L's.
"""

from typing import Any

from ml_collections import ConfigDict

from hybrid_vit import dense_recipes, tiny_networks
from hybrid_vit.config import parse_argument

VITS = ("vit_b16", "vit_base_patch16_clip_224", "vit_base_patch16_224")
MCIS = ("mci0", "mci1", "mci2")
VARIANTS = (*VITS, *MCIS, "runlocal", "runlocal_mci")
_TINY_VIT = dict(
  width=64, depth=4, num_heads=2, patch_size=8, position_size=8, stem="patch", class_token=True,
  positions="grid", pad_maps=True, output_blocks=(0, 1, 2, 3),
)  # fmt: skip


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Keys: `batch_size`; `layer_decay` of a ViT."""
  variant, keys = parse_argument(argument, VARIANTS, "vit_b16", batch_size=None, layer_decay=0.65)
  if variant.startswith("mci") or variant == "runlocal_mci":
    config = semantic_fpn("mci2" if variant == "runlocal_mci" else variant, keys["batch_size"])
    if variant == "runlocal_mci":
      tiny = tiny_networks.MCI
      dense_recipes.run_locally(config, tiny, head=dict(channels=32), neck=dict(channels=32))
    return config
  name = "vit_base_patch16_224" if variant == "runlocal" else variant
  config = upernet(name, keys["batch_size"], keys["layer_decay"])
  if variant == "runlocal":
    dense_recipes.run_locally(
      config, _TINY_VIT, head=dict(channels=32), auxiliary=dict(channels=32)
    )
  return config


def upernet(name: str, batch_size: int | None, layer_decay: float) -> ConfigDict:
  """MAE's: 160,000 steps of 16 crops, windows of 512 in the test (recalled)."""
  decoder: dict[str, Any] = dict(dense_recipes.UPERNET)
  decoder["head"] = dict(name="upernet", channels=768)
  return dense_recipes.ade20k(
    name,
    decoder,
    batch_size=batch_size or 16,
    learning_rate=1e-4,
    weight_decay=0.05,
    weight_decay_rules=(),
    drop_path_rate=0.1,
    layer_decay=layer_decay,
    slide=341,
  )


def semantic_fpn(name: str, batch_size: int | None) -> ConfigDict:
  """PoolFormer's and FastViT's: 40,000 steps of 32 crops, sides of the test multiples of 32."""
  config = dense_recipes.ade20k(
    name,
    dense_recipes.SEMANTIC_FPN,
    batch_size=batch_size or 32,
    total_steps=40_000,
    warmup_steps=0,
    power=0.9,
    learning_rate=2e-4,
    weight_decay=1e-4,
    weight_decay_rules=dense_recipes.NOTHING_SPARED,
    drop_path_rate=None,
  )
  config.task.inference.size_divisor = 32
  return config
