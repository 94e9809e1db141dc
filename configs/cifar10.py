"""A small MOAT on CIFAR-10 from a folder or zip of pictures: half an hour on two CPU cores.

    python -m hybrid_vit.main --config=configs/cifar10.py --config.data.source=zip:cifar10.zip

The source holds train/<class>/* and test/<class>/*. Own figures, no paper's.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """No arguments: everything is on this page."""
  config = ConfigDict()
  config.seed = 0
  config.total_epochs = 12
  config.log_every_steps = 50
  config.evaluate_every_epochs = 2

  config.model = dict(
    name="tiny_moat_0",
    arguments=dict(
      stem_widths=(24, 24),
      depths=(2, 2, 2),
      widths=(48, 64, 96),
      block_types=("mbconv", "mbconv", "moat"),
      strides=(1, 2, 2),
      expansion=3,
      window_sizes=(None, None, None),
      position_sizes=(None, None, 4),
      se_ratio=None,
      batch_norm_momentum=0.95,
    ),
  )
  config.task = dict(name="classification", loss="softmax", label_smoothing=0.1)

  config.data = dict(
    source="folder:data/cifar10",
    batch_size=128,
    transform="decode|random_crop(32, 4, 'reflect')|flip_lr",
    image_size=32,
    crop_ratio=1.0,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.247, 0.2435, 0.2616),
  )
  config.evaluation = dict(sets=dict(test=dict(split="test", batch_size=200)))

  config.optimizer = dict(
    name="adamw",
    learning_rate=3e-3,
    weight_decay=0.05,
    gradient_clip_norm=1.0,
    schedule=dict(name="cosine", warmup_epochs=1, end_learning_rate=1e-5),
  )
  config.checkpoint = dict(keep=2, every_minutes=5, best_metric="test/top1")
  return config
