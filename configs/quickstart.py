"""A small MOAT on the 1,797 handwritten digits that come with the package: minutes on a laptop."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """No arguments: everything is on this page."""
  config = ConfigDict()
  config.seed = 0
  config.total_epochs = 20
  config.log_every_steps = 20
  config.evaluate_every_epochs = 4

  # The stages of MOAT at a tenth of its width; 32 x 32 pictures become 4 x 4 maps.
  config.model = dict(
    name="tiny_moat_0",
    arguments=dict(
      stem_widths=(16, 16),
      depths=(1, 1, 1),
      widths=(32, 48, 64),
      block_types=("mbconv", "mbconv", "moat"),
      stem_stride=2,
      strides=(1, 2, 2),
      window_sizes=(None, None, None),
      position_sizes=(None, None, 4),
      head_size=16,
      drop_path_rate=0.05,
      batch_norm_momentum=0.9,
    ),
  )
  config.task = dict(name="classification", loss="softmax", label_smoothing=0.1)

  config.data = dict(
    source="digits",
    batch_size=64,
    transform="decode|resize(36, 'bilinear')|random_crop(32)",
    # What the weights expect of a picture; evaluation follows it.
    image_size=32,
    crop_ratio=32 / 36,
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
  )
  config.evaluation = dict(sets=dict(validation=dict(split="validation")))

  config.optimizer = dict(
    name="adamw",
    learning_rate=4e-3,
    weight_decay=0.05,
    gradient_clip_norm=1.0,
    schedule=dict(name="cosine", warmup_epochs=2, end_learning_rate=1e-5),
  )
  config.checkpoint = dict(keep=2, every_minutes=1, best_metric="validation/top1")
  return config
