"""What the files in `configs/` share: transform strings, and the frame of an ImageNet recipe.

A configuration says what its paper says: epochs, batch, optimizer, regularisation, augmentation.
What is the same for every system comes from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from hybrid_vit.models.registry import Preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# timm's "rand-m9-mstd0.5-inc1", and erasing in pixels. The noise lies in the range of the pictures;
# timm's, drawn after normalising, goes beyond it ("…|normalize(…)|random_erasing(0.25)" does, too).
DEIT_AUGMENTATION = (
  "randaugment(2, 9, magnitude_std=0.5, increasing=True)",
  "random_erasing(0.25)",
)

# Pictures of ImageNet-22K that no training sees: as many as ImageNet-1K's validation part has.
HELD_OUT_OF_22K = 50_000

# Side of the pictures in a local try, and what they are cropped from.
_LOCAL_SIZE, _LOCAL_SHORT_SIDE = 32, 36

# MOAT at a tenth of its width: `arguments` of `run_locally` for MOAT and for general recipes.
TINY_MOAT = dict(
  stem_widths=(16, 16),
  depths=(1, 1, 1),
  widths=(32, 48, 64),
  block_types=("mbconv", "mbconv", "moat"),
  strides=(1, 2, 2),
  window_sizes=(None, None, None),
  position_sizes=(None, None, 4),
  head_size=16,
  batch_norm_momentum=0.9,
)


def eval_transform(preprocessing: Preprocessing) -> str:
  """The evaluation that belongs to some weights, as a transform string; normalising excluded."""
  size, filter_name = preprocessing.image_size, preprocessing.interpolation
  if preprocessing.resize == "squash":
    return f"decode|resize({size}, {filter_name!r})"
  return f"decode|resize_center_crop({size}, {preprocessing.crop_ratio!r}, {filter_name!r})"


def train_transform(*augmentations: str, scale: tuple[float, float] = (0.08, 1.0)) -> str:
  """Random resized crop, flip, then `augmentations`, as a transform string.

  Its size and interpolation stand in braces, which the run fills in
  (`example_reading.fill_transform`), so that `--config.data.image_size=…` and
  `--config.model.name=…` change them.

  Args:
    *augmentations: further operations, e.g. "randaugment(2, 9, magnitude_std=0.5)".
    scale: of the random crop's area.
  """
  crop = f"random_resized_crop({{image_size}}, {tuple(scale)!r}, interpolation={{interpolation!r}})"
  return "|".join(("decode", crop, "flip_lr", *augmentations))


def imagenet(
  model: str,
  *augmentations: str,
  batch_size: int,
  preprocessing: Preprocessing | None = None,
  source: str = "tfds:imagenet2012",
  num_classes: int | None = 1000,
  scale: tuple[float, float] = (0.08, 1.0),
) -> ConfigDict:
  """The frame of an ImageNet recipe; optimizer, task and length are the caller's.

  Args:
    model: name in the registry.
    *augmentations: see `train_transform`.
    batch_size: of all devices together.
    preprocessing: what the weights that come out will expect, the size of training included; None
      for that of the registry's entry.
    source: of the data, see `hybrid_vit.data.sources`.
    num_classes: of the data; None to count them when it is opened.
    scale: of the random crop's area.

  Returns:
    A configuration in bfloat16, its parameters fully sharded over the axis `fsdp` of the mesh.
  """
  config = ConfigDict()
  config.seed = 0
  config.log_every_steps = 50
  config.evaluate_every_epochs = 1
  config.precision = "bfloat16"
  config.remat = False
  config.scan_blocks = False
  config.accumulation_steps = 1
  config.mesh = dict(data=-1, fsdp=1, tensor=1)
  config.sharding_rules = ((".*", "fsdp"),)
  config.init_from = placeholder(str)
  config.reinitialize_head = False
  config.model = dict(name=model, arguments=dict())
  config.model.num_classes = placeholder(int) if num_classes is None else num_classes
  config.data = dict(
    source=source,
    data_dir=placeholder(str),
    split="train",
    batch_size=batch_size,
    transform=train_transform(*augmentations, scale=scale),
    **_preprocessing_fields(preprocessing),
  )
  config.evaluation = dict(sets=dict(validation=dict(split="validation")))
  config.checkpoint = dict(keep=2, every_minutes=15, best_metric="validation/top1")
  return config


def pretrain_on_22k(config: ConfigDict, *, num_classes: int = 21_841) -> ConfigDict:
  """The same recipe on ImageNet-22K: a folder of classes, of which nothing is set apart.

  What figures are measured on during pretraining is held out here: 50,000 pictures, of all classes
  in proportion, rather than every tenth of 14 million.

  Args:
    config: a recipe; changed in place. Its length is the caller's.
    num_classes: of the folder.
  """
  config.data.source = "folder:data/imagenet22k"
  config.data.split = f"all[{HELD_OUT_OF_22K}:]"
  config.evaluation.sets.validation.split = f"all[:{HELD_OUT_OF_22K}]"
  config.model.num_classes = num_classes
  return config


def deit(
  model: str,
  *,
  batch_size: int,
  learning_rate: float,
  learning_rate_batch_size: int,
  warmup_epochs: float,
  weight_decay: float = 0.05,
  gradient_clip_norm: float | None = None,
  end_learning_rate: float = 1e-5,
  start_factor: float | None = None,
  end_factor: float | None = None,
  ema_decay: float | None = None,
  epochs: int = 300,
  repeats: int = 1,
) -> ConfigDict:
  """The recipe of DeiT on ImageNet-1K, which most systems took over with few figures changed.

  AdamW with a cosine after a warm-up from 1e-6; RandAugment 9 (deviation 0.5, "inc1"), mixup 0.8
  and cutmix 1.0 alternating, erasing 0.25 in pixels, label smoothing 0.1; 300 epochs
  (arXiv:2012.12877, table 9). Drop path is the entry's.

  Args:
    model: name in the registry.
    batch_size: of all devices together.
    learning_rate: peak, for a batch of `learning_rate_batch_size`; linear in the batch.
    learning_rate_batch_size: see there.
    warmup_epochs: of the 300.
    weight_decay: decoupled; biases, norms and tables have none.
    gradient_clip_norm: None for no clipping.
    end_learning_rate: where the cosine ends, whatever the batch.
    start_factor: where the warm-up begins, as a part of the peak, in place of 1e-6: for recipes
      whose first rate follows the batch.
    end_factor: the same in place of `end_learning_rate`.
    ema_decay: of the averaged weights; None for none.
    epochs: all of them.
    repeats: how many times a picture comes in a row, each time augmented anew. An epoch stays as
      many pictures as the data has, of so many times fewer different ones.
  """
  config = imagenet(model, *DEIT_AUGMENTATION, batch_size=batch_size)
  config.total_epochs = epochs
  if repeats > 1:
    config.data.repeats = repeats
  config.task = dict(
    name="classification",
    loss="softmax",
    label_smoothing=0.1,
    mixing=dict(mixup_alpha=0.8, cutmix_alpha=1.0, probability=1.0, switch_probability=0.5),
  )
  config.optimizer = dict(
    name="adamw",
    learning_rate=learning_rate,
    learning_rate_batch_size=learning_rate_batch_size,
    weight_decay=weight_decay,
    schedule=dict(name="cosine", warmup_epochs=warmup_epochs),
  )
  schedule = config.optimizer.schedule
  if end_factor is None:
    schedule.end_learning_rate = end_learning_rate
  else:
    schedule.end_learning_rate_factor = end_factor
  if start_factor is not None:
    schedule.warmup_start_factor = start_factor
  elif warmup_epochs:
    schedule.warmup_start_learning_rate = 1e-6
  if gradient_clip_norm is not None:
    config.optimizer.gradient_clip_norm = gradient_clip_norm
  if ema_decay is not None:
    config.ema_decay = ema_decay
  return config


def caption_schedule(
  config: ConfigDict, start: Mapping[str, float], end: Mapping[str, float], phases: int
) -> ConfigDict:
  """A mixture of caption sources that changes over the training, in equal phases.

  Args:
    config: a recipe whose `config.data.transform` has an operation `captions`; changed in place.
    start: weights of the first phase, e.g. {"alt": 1.0}.
    end: of the last one; the phases between lie on a straight line between the two.
    phases: how many, at least 2.

  Raises:
    ValueError: a single phase, or no one operation `captions` in the transform.
  """
  operations = config.data.transform.split("|")
  places = [i for i, o in enumerate(operations) if o.partition("(")[0].strip() == "captions"]
  if phases < 2 or len(places) != 1:
    raise ValueError(
      f"{phases} phases of the transform {config.data.transform!r}: at least 2, and one operation "
      "`captions` in it, were expected"
    )
  rows = []
  for k in range(phases):
    part = k / (phases - 1)
    weights = {
      name: round((1 - part) * start.get(name, 0.0) + part * end.get(name, 0.0), 6)
      for name in dict.fromkeys((*start, *end))
    }
    operations[places[0]] = f"captions({weights!r})"
    rows.append(dict(transform="|".join(operations)))
  config.phases = tuple(rows)
  return config


def _preprocessing_fields(preprocessing: Preprocessing | None) -> dict[str, Any]:
  """Fields of `config.data`; empty ones can be given on the command line."""
  if preprocessing is not None:
    return dataclasses.asdict(preprocessing)
  kinds = dict(image_size=int, crop_ratio=float, interpolation=str, resize=str)
  kinds |= dict(mean=tuple, std=tuple)
  return {name: placeholder(kind) for name, kind in kinds.items()}


def run_locally(config: ConfigDict, arguments: Mapping[str, Any], *, epochs: int = 4) -> ConfigDict:
  """The same recipe as a local try: a tiny network on the embedded digits, about a minute.

  Args:
    config: a recipe; changed in place. Loss, mixing and kind of optimizer stay.
    arguments: of the network, to make it tiny; pictures are 32 x 32.
    epochs: of 22 steps.
  """
  size, short = _LOCAL_SIZE, _LOCAL_SHORT_SIDE
  config.precision = "float32"
  config.total_epochs = epochs
  config.log_every_steps = 10
  config.evaluate_every_epochs = 2
  config.model.num_classes = 10
  config.model.arguments = dict(arguments)
  config.data.update(
    dict(
      source="digits",
      batch_size=64,
      transform=f"decode|resize({short}, 'bilinear')|random_crop({{image_size}})",
      image_size=size,
      crop_ratio=size / short,
      interpolation="bilinear",
      resize="crop",
    )
  )
  if "repeats" in config.data:
    del config.data.repeats
  config.optimizer.learning_rate = 4e-3
  if "learning_rate_batch_size" in config.optimizer:
    del config.optimizer["learning_rate_batch_size"]
  config.optimizer.schedule = dict(name="cosine", warmup_epochs=1, end_learning_rate=1e-5)
  config.checkpoint.every_minutes = 1
  return config
