"""Masked autoencoding on ImageNet-1K (facebookresearch/mae, arXiv:2111.06377), then fine-tuning.

    --config=configs/mae.py:vit_base                        400 epochs; epochs=1600 for the longest
    --config=configs/mae.py:vit_base_hog                    HOG in place of pixels
    --config=configs/mae.py:vit_base_finetune --config.init_from=WORKDIR
    --config=configs/mae.py:dense,model=convnext_tiny       any network, as SimMIM does
    --config=configs/mae.py:runlocal                        a minute on a laptop
    --config=configs/mae.py:runlocal_dense                  the same with a tiny MOAT

The network's weights go on under its own names, without a head; the decoder is left behind. Another
network's fine-tuning is that of its own recipe with `init_from` and `reinitialize_head`. Published
for ViT-B: 83.6 after 1600 epochs; 83.0 after 400, 83.2 with HOG (EfficientTrain++, table 15).
"""

from ml_collections import ConfigDict

from hybrid_vit import recipes
from hybrid_vit.config import parse_argument
from hybrid_vit.models.registry import Preprocessing

VARIANTS = (
  "vit_base",
  "vit_base_hog",
  "vit_base_finetune",
  "dense",
  "runlocal",
  "runlocal_dense",
)
BASE, DEPTH = "vit_base_patch16_224", 12
PREPROCESSING = Preprocessing(224, 0.875, "bicubic", recipes.IMAGENET_MEAN, recipes.IMAGENET_STD)


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Keys: `epochs`, `batch_size`; `model` for the dense form."""
  variant, keys = parse_argument(
    argument,
    VARIANTS,
    "vit_base",
    runlocal_keys=("epochs",),
    epochs=None,
    batch_size=None,
    model="convnext_tiny",
  )
  epochs, batch_size = keys["epochs"], keys["batch_size"]
  if variant == "vit_base_finetune":
    return fine_tuning(epochs or 100, batch_size or 1024)
  if variant == "dense":
    return dense(keys["model"], epochs or 800, batch_size or 2048)
  if variant == "runlocal_dense":
    local = dense("tiny_moat_0", 800, 2048)
    return as_local(recipes.run_locally(local, recipes.TINY_MOAT, epochs=epochs or 8))
  config = pretraining(BASE, epochs or 400, batch_size or 4096)
  if variant == "vit_base_hog":
    config.task.target = "hog"
  if variant == "runlocal":
    tiny = dict(width=64, depth=3, num_heads=2, patch_size=8, position_size=4)
    config.task.decoder = dict(width=32, depth=2, num_heads=2)
    as_local(recipes.run_locally(config, tiny, epochs=epochs or 8))
  return config


def pretraining(model: str, epochs: int, batch_size: int) -> ConfigDict:
  """Three quarters of the patches hidden; cropping and flipping is all the augmentation."""
  config = recipes.imagenet(
    model,
    batch_size=batch_size,
    preprocessing=PREPROCESSING,
    num_classes=None,
    scale=(0.2, 1.0),
  )
  config.total_epochs = epochs
  config.evaluate_every_epochs = 10
  config.task = dict(name="masked_autoencoding", mask_ratio=0.75, target="normalized_pixels")
  config.optimizer = dict(
    name="adamw",
    learning_rate=1.5e-4,
    learning_rate_batch_size=256,
    b1=0.9,
    b2=0.95,
    weight_decay=0.05,
    schedule=dict(name="cosine", warmup_epochs=40, end_learning_rate=0.0),
  )
  config.checkpoint.best_metric = "validation/loss"
  return config


def dense(model: str, epochs: int, batch_size: int) -> ConfigDict:
  """SimMIM's length, batch and masked part; its rate (1e-4 for 512) and clipping are recalled.

  Its loss is the absolute error of pixels and its patches are of 32; here they are of the network's
  last stride and rebuilt as MAE rebuilds them.
  """
  config = pretraining(model, epochs, batch_size)
  config.task.masking, config.task.mask_ratio = "dense", 0.6
  config.optimizer.update(
    dict(learning_rate=1e-4, learning_rate_batch_size=512, b2=0.999, gradient_clip_norm=5.0)
  )
  config.optimizer.schedule.warmup_epochs = 10
  return config


def as_local(config: ConfigDict) -> ConfigDict:
  """No number of classes: nobody counts them."""
  config.model.num_classes = None
  config.optimizer.schedule.end_learning_rate = 0.0
  return config


def fine_tuning(epochs: int, batch_size: int) -> ConfigDict:
  """From `--config.init_from`, by the paper's table 9; the mean of the patches goes to a new head.

  The readme of the code has for ViT-B a rate of 5e-4 and a layer decay of 0.65.
  """
  config = recipes.deit(
    BASE,
    batch_size=batch_size,
    learning_rate=1e-3,
    learning_rate_batch_size=256,
    warmup_epochs=5,
    end_learning_rate=1e-6,
    start_factor=0.0,
    epochs=epochs,
  )
  config.data.update(
    dict(crop_ratio=PREPROCESSING.crop_ratio, mean=PREPROCESSING.mean, std=PREPROCESSING.std)
  )
  config.reinitialize_head = True
  config.model.arguments = dict(pool="mean", pool_before_norm=True, drop_path_rate=0.1)
  config.optimizer.layer_decay = dict(
    rate=0.75,
    layers=(
      ("^(stem/|class_token$|position_embedding$)", 0),
      *((f"^stage1_block{i}/", i + 1) for i in range(DEPTH)),
      ("^head", DEPTH + 1),
    ),
  )
  return config
