"""What the recipes of dense tasks share: frames for ADE20K and NYU Depth v2, and local tries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from hybrid_vit import recipes
from hybrid_vit.models.dense import dense_arguments

ADE20K_CLASSES = 150
# mmsegmentation's, for pictures averaged over scales and mirrored.
MULTI_SCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
# What mmsegmentation's `custom_keys` of Swin's line spare: norms of the backbone and tables of
# positions. Biases, and batch norms of the decoder, which it calls "bn", are decayed.
_NORMS = (r"^backbone/(.*/)?\w*norm\w*/(scale|bias)$", 0.0)
_TABLES = (r"^backbone/.*position_\w+$", 0.0)
_ALL = (".*", 1.0)
NORMS_SPARED: tuple[tuple[str, float], ...] = (_NORMS, _ALL)
NORMS_AND_TABLES_SPARED: tuple[tuple[str, float], ...] = (_NORMS, _TABLES, _ALL)
NOTHING_SPARED: tuple[tuple[str, float], ...] = (_ALL,)

# The depth of NYU Depth v2 in metres, and the part of its pictures that is compared.
NYU_PROTOCOL: Mapping[str, Any] = dict(
  min_depth=1e-3, max_depth=10.0, crop="nyu_eigen", silog_weight=0.5, silog_scale=1.0
)

UPERNET: Mapping[str, Any] = dict(
  head=dict(name="upernet", channels=512),
  auxiliary=dict(name="fcn", channels=256),
  auxiliary_weight=0.4,
)
SEMANTIC_FPN: Mapping[str, Any] = dict(
  neck=dict(name="fpn", channels=256), head=dict(name="semantic_fpn", channels=128)
)
# What the best weights of a task are chosen by.
BEST = {
  "segmentation": "mean_iou",
  "depth": "rmse",
  "detection": "box_ap",
  "panoptic_segmentation": "pq",
  "instance_segmentation": "mask_ap",
  "mask_segmentation": "mean_iou",
}
# Of pictures of 64 x 64, two minutes on two cores.
_LOCAL_SIZE = 64


def ade20k(
  model: str,
  decoder: Mapping[str, Any],
  *,
  learning_rate: float,
  weight_decay: float,
  weight_decay_rules: Sequence[tuple[str, float]],
  drop_path_rate: float | None,
  image_size: int = 512,
  batch_size: int = 16,
  total_steps: int = 160_000,
  warmup_steps: int = 1500,
  power: float = 1.0,
  layer_decay: float | None = None,
  slide: int | None = None,
  multi_scale: bool = False,
  arguments: Mapping[str, Any] | None = None,
) -> ConfigDict:
  """mmsegmentation's recipe of ADE20K, of which systems differ in the figures that are asked for.

  160,000 steps of 16 crops of 512 x 512 out of pictures resized so that they fit into
  (2048, 512) times 0.5 to 2.0; AdamW, a warm-up from a millionth of the rate, then a polynomial
  down to 0. A picture is tested as large as fits into (2048, 512), whole or by windows.

  Args:
    model: name in the registry; its dense form is `models.dense.dense_arguments`.
    decoder: the fields of `config.task` that say the decoder, e.g. `UPERNET`.
    learning_rate: peak.
    weight_decay: decoupled.
    weight_decay_rules: which parameters have it: `NORMS_SPARED` and the like.
    drop_path_rate: of the backbone; None for its entry's.
    image_size: side of the crop and short side of the scale.
    batch_size: of all devices together.
    total_steps: of the training.
    warmup_steps: of these.
    power: of the polynomial.
    layer_decay: factor of the learning rate from layer to layer, or None.
    slide: stride of windows of the crop's size in the test; None for whole pictures.
    multi_scale: whether the test averages over `MULTI_SCALE` and mirror images.
    arguments: of the network, further ones.
  """
  config = dense_frame(
    model,
    decoder,
    image_size=image_size,
    batch_size=batch_size,
    source="ade20k:data/ade20k",
    optimizer=dict(
      name="adamw",
      learning_rate=learning_rate,
      weight_decay=weight_decay,
      weight_decay_rules=tuple(weight_decay_rules),
      schedule=dict(
        name="polynomial", power=power, warmup_steps=warmup_steps, end_learning_rate=0.0
      ),
    ),
    layer_decay=layer_decay,
    drop_path_rate=drop_path_rate,
    arguments=arguments,
  )
  config.model.num_classes = ADE20K_CLASSES
  config.total_steps = total_steps
  config.data.transform = "|".join(
    (
      "decode",
      f"resize_range(({4 * image_size}, {image_size}), (0.5, 2.0))",
      "random_crop_map({image_size}, 0.75)",
      "flip_lr",
      "photometric_distortion",
      "pad({image_size})",
    )
  )
  config.task.inference = dict(
    mode="whole" if slide is None else "slide",
    scale=(4 * image_size, image_size),
    **({} if slide is None else {"crop": (image_size,) * 2, "stride": (slide,) * 2}),
    **({"ratios": MULTI_SCALE, "flip": True} if multi_scale else {}),
  )
  if warmup_steps:
    config.optimizer.schedule.warmup_start_factor = 1e-6
  return config


def dense_frame(
  model: str,
  decoder: Mapping[str, Any],
  *,
  image_size: int,
  batch_size: int,
  source: str,
  task: str = "segmentation",
  optimizer: Mapping[str, Any] | None = None,
  layer_decay: float | None = None,
  drop_path_rate: float | None = None,
  arguments: Mapping[str, Any] | None = None,
) -> ConfigDict:
  """The frame of a recipe: network in its dense form, decoder, data; the rest is the caller's.

  Args:
    model: name in the registry.
    decoder: the fields of `config.task` that say the decoder or detector.
    image_size: side of the pictures, the long one where they are not square.
    batch_size: of all devices together.
    source: of the data.
    task: its name.
    optimizer: `config.optimizer`; None for none.
    layer_decay: factor of its learning rate from layer to layer, or None.
    drop_path_rate: of the backbone; None for its entry's.
    arguments: of the network, beside those of its dense form.
  """
  config = recipes.imagenet(model, batch_size=batch_size, source=source, num_classes=None)
  config.evaluate_every_epochs = 10
  config.data.image_size = image_size
  config.data.interpolation = "bilinear"
  config.model.arguments = {**dense_arguments(model, image_size), **(arguments or {})}
  if drop_path_rate is not None:
    config.model.arguments.drop_path_rate = drop_path_rate
  config.task = dict(name=task, **{name: _copied(value) for name, value in decoder.items()})
  config.evaluation.sets.validation.batch_size = batch_size
  config.checkpoint.best_metric = f"validation/{BEST[task]}"
  if optimizer is not None:
    config.optimizer = dict(optimizer)
    if layer_decay is not None:
      config.optimizer.layer_decay = dict(rate=layer_decay)
  return config


def nyu_depth(
  model: str,
  decoder: Mapping[str, Any],
  *,
  learning_rate: float,
  weight_decay: float,
  layer_decay: float | None,
  drop_path_rate: float | None,
  batch_size: int = 24,
  epochs: int = 25,
  image_size: int = 480,
  arguments: Mapping[str, Any] | None = None,
) -> ConfigDict:
  """NYU Depth v2 as MIM-Depth-Estimation trains it: 25 epochs of 24 crops of 480 x 480, SILog.

  The rate rises over the first half and falls over the second, each by the power 0.9 of the part
  done; pictures are tested by two windows of 480 x 480 and their mirror images.

  Args:
    model: name in the registry.
    decoder: the fields of `config.task` that say the decoder.
    learning_rate: peak; the training begins and ends at 3e-5.
    weight_decay: decoupled; vectors and tables have none.
    layer_decay: factor of the learning rate from layer to layer, or None.
    drop_path_rate: of the backbone; None for its entry's.
    batch_size: of all devices together.
    epochs: of 24,231 pairs.
    image_size: side of the crop.
    arguments: of the network, further ones.
  """
  config = dense_frame(
    model,
    decoder,
    image_size=image_size,
    batch_size=batch_size,
    source="nyu_depth:data/nyu_depth_v2",
    task="depth",
    optimizer=dict(
      name="adamw",
      learning_rate=learning_rate,
      weight_decay=weight_decay,
      schedule=dict(
        name="power",
        power=0.9,
        warmup_power=0.9,
        warmup_epochs=epochs / 2,
        warmup_start_learning_rate=3e-5,
        end_learning_rate=3e-5,
      ),
    ),
    layer_decay=layer_decay,
    drop_path_rate=drop_path_rate,
    arguments=arguments,
  )
  config.evaluate_every_epochs = 1
  config.total_epochs = epochs
  config.data.transform = "|".join(
    (
      "decode",
      "flip_lr",
      "brightness_contrast",
      "random_gamma",
      "hue_saturation_value",
      "cut_depth(0.25)",
      "random_crop({image_size})",
    )
  )
  config.task.loss = "silog"
  config.task.silog_weight = 0.5
  config.task.protocol = dict(NYU_PROTOCOL)
  # 640 is 480 and 160: two windows, at the left and at the right.
  config.task.inference = dict(mode="slide", crop=(480, 480), stride=(480, 160), flip=True)
  return config


def run_locally(
  config: ConfigDict,
  arguments: Mapping[str, Any],
  *,
  head: Mapping[str, Any] | None = None,
  neck: Mapping[str, Any] | None = None,
  auxiliary: Mapping[str, Any] | None = None,
  total_steps: int = 800,
) -> ConfigDict:
  """The same recipe as a local try on drawn scenes of 64 x 64: two minutes on two cores.

  Args:
    config: a recipe of segmentation or depth; changed in place. Its losses stay.
    arguments: of the network, to make it tiny.
    head: attributes of the head, to make it tiny.
    neck: likewise, where the recipe has one.
    auxiliary: likewise.
    total_steps: of 32 scenes.
  """
  on_scenes(
    config,
    arguments,
    transform="decode|random_crop({image_size})|flip_lr",
    total_steps=total_steps,
    batch_size=32,
    learning_rate=4e-3,
    warmup_steps=25,
    gradient_clip_norm=1.0,
  )
  for name, own in (("head", head), ("neck", neck), ("auxiliary", auxiliary)):
    if own and config.task.get(name) is not None:
      config.task[name].update(dict(own))
  config.task.inference = dict(mode="whole")
  if config.task.name == "depth":
    config.task.protocol.crop = "none"
  return config


def on_scenes(
  config: ConfigDict,
  arguments: Mapping[str, Any],
  *,
  transform: str,
  total_steps: int,
  learning_rate: float,
  gradient_clip_norm: float,
  batch_size: int = 16,
  warmup_steps: int = 50,
  validation: int = 200,
) -> None:
  """Makes a recipe one of a tiny network on drawn scenes of 64 x 64, evaluated twice.

  Args:
    config: a recipe of a dense task, of whose optimizer kind, decay and rules of the rate stay, but
      no decay from layer to layer; changed in place.
    arguments: of the network, to make it tiny.
    transform: of a training scene.
    total_steps: of the training.
    learning_rate: peak.
    gradient_clip_norm: of all gradients.
    batch_size: scenes of a step.
    warmup_steps: of the rate, which then falls to 0 as a polynomial.
    validation: scenes held out.
  """
  config.precision = "float32"
  for name in ("total_epochs", "evaluate_every_epochs"):
    if name in config:
      del config[name]
  config.total_steps = total_steps
  config.evaluate_every_steps = total_steps // 2
  config.log_every_steps = 50
  config.model.num_classes = None
  config.model.arguments = dict(arguments)
  config.data.update(
    dict(
      source=f"scenes:size={_LOCAL_SIZE}",
      batch_size=batch_size,
      image_size=_LOCAL_SIZE,
      transform=transform,
    )
  )
  config.evaluation.sets.validation = dict(split=f"validation[:{validation}]", batch_size=40)
  config.optimizer.learning_rate = learning_rate
  config.optimizer.gradient_clip_norm = gradient_clip_norm
  if "layer_decay" in config.optimizer:
    del config.optimizer["layer_decay"]
  config.optimizer.schedule = dict(
    name="polynomial", power=0.9, warmup_steps=warmup_steps, end_learning_rate=0.0
  )
  config.checkpoint.every_minutes = 1


def _copied(value: Any) -> Any:
  return dict(value) if isinstance(value, Mapping) else value
