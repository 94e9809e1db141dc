"""CSWin on ImageNet, by the authors' commands (microsoft/CSWin-Transformer, README).

    --config=configs/cswin.py:cswin_tiny                    also cswin_small, cswin_base
    --config=configs/cswin.py:cswin_base_384 --config.init_from=WORKDIR      fine-tuning
    --config=configs/cswin.py:cswin_large --config.init_from=WORKDIR         from 22K weights
    --config=configs/cswin.py:runlocal                      a minute on a laptop

Pretraining on 22K was not released. Two things of fine-tuning are not rebuilt: the average starts
there from the weights as loaded by a switch of its own (here it always does), and ten epochs at the
last rate follow the cosine (here the cosine alone).
"""

from ml_collections import ConfigDict

from hybrid_vit import recipes
from hybrid_vit.config import parse_argument

# name: batch, learning rate, weight decay, decay of the averaged weights
SCRATCH = {
  "cswin_tiny": (2048, 2e-3, 0.05, 0.99984),
  "cswin_small": (2048, 2e-3, 0.05, 0.99984),
  "cswin_base": (1024, 1e-3, 0.1, 0.99992),
}
# name: batch, learning rate, epochs, mixup, cutmix, decay of the averaged weights, factor of the
# learning rate of everything but the head
FINE_TUNING = {
  "cswin_base_384": (256, 5e-6, 20, 0.1, 0.1, 0.9998, 1.0),
  "cswin_large": (512, 2.5e-4, 30, 0.01, 0.3, 0.9996, 0.05),
  "cswin_large_384": (512, 2.5e-4, 30, 0.01, 0.3, 0.9996, 0.05),  # the same by analogy, ours
}
VARIANTS = (*SCRATCH, *FINE_TUNING, "runlocal")


def get_config(argument: str | None = None) -> ConfigDict:
  """See the head of this file. Key: `batch_size`; the rate follows it."""
  variant, keys = parse_argument(argument, VARIANTS, "cswin_tiny", batch_size=None)
  if variant in FINE_TUNING:
    return fine_tuning(variant, keys["batch_size"])
  name = "cswin_tiny" if variant == "runlocal" else variant
  batch_size, learning_rate, weight_decay, ema_decay = SCRATCH[name]
  config = recipes.deit(
    name,
    batch_size=keys["batch_size"] or batch_size,
    learning_rate=learning_rate,
    learning_rate_batch_size=batch_size,
    warmup_epochs=20,
    weight_decay=weight_decay,
    ema_decay=ema_decay,
  )
  if variant == "runlocal":
    recipes.run_locally(
      config,
      dict(
        width=16,
        depths=(1, 1, 1, 1),
        num_heads=(2, 2, 4, 4),
        stripe_widths=(1, 2, 2, 1),
        drop_path_rate=0.0,
      ),
    )
    config.ema_decay = 0.9
  return config


def fine_tuning(name: str, batch_size: int | None) -> ConfigDict:
  """From `--config.init_from`: cswin_base at 384, or 22K weights of cswin_large."""
  batch, learning_rate, epochs, mixup, cutmix, ema_decay, factor = FINE_TUNING[name]
  config = recipes.deit(
    name,
    batch_size=batch_size or batch,
    learning_rate=learning_rate,
    learning_rate_batch_size=batch,
    warmup_epochs=0,
    weight_decay=1e-8,
    end_learning_rate=5e-7,
    ema_decay=ema_decay,
    epochs=epochs,
  )
  config.task.mixing.update(mixup_alpha=mixup, cutmix_alpha=cutmix)
  config.reinitialize_head = "large" in name
  if factor != 1.0:
    config.optimizer.learning_rate_rules = ((r"^head/", 1.0), (r".*", factor))
  return config
