"""From a configuration to the parts of a run: network, task, data, optimizer. Opens no data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from hybrid_vit import recipes, sharding
from hybrid_vit.config import Config, ConfigError
from hybrid_vit.data.loader import eval_batches, train_batches
from hybrid_vit.data.sources import Source, create_source
from hybrid_vit.models.registry import (
  Preprocessing,
  create_model,
  model_arguments,
  model_entry,
)
from hybrid_vit.optimizers import Schedule, make_optimizer, schedule_from_config
from hybrid_vit.tasks.base import Task
from hybrid_vit.tasks.classification import LOSSES, Classification, Mixing
from hybrid_vit.tasks.intermediate_supervision import IntermediateSupervision

TASKS = ("classification", "intermediate_supervision")
PRECISIONS = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """What is known of the network beside its weights; it goes with every export."""

  name: str
  arguments: dict[str, Any]
  num_classes: int
  preprocessing: dict[str, Any]


def preprocessing_of(config: Config) -> Preprocessing:
  """What the network's weights shall expect of a picture: the registry's entry of the network.

  A field of `Preprocessing` that stands in `config.data` replaces the entry's.
  """
  entry = dataclasses.asdict(model_entry(config.model.name).preprocessing)
  return _preprocessing({name: config.data.get(name, value) for name, value in entry.items()})


def _preprocessing(fields: Mapping[str, Any]) -> Preprocessing:
  mean, std = tuple(fields["mean"]), tuple(fields["std"])
  return Preprocessing(**{**fields, "mean": mean, "std": std})


def weights_preprocessing(config: Config, metadata: Mapping[str, Any]) -> tuple[Preprocessing, str]:
  """What some weights expect of a picture, and who says so.

  Their own metadata (an export's) goes first; a checkpoint has none, and then it is
  `preprocessing_of(config)`.
  """
  said, own = preprocessing_of(config), metadata.get("preprocessing")
  if own:
    return _preprocessing(own), "as the weights' metadata says"
  return said, f"by the registry's entry of {config.model.name} and config.data"


def describe_preparation(
  preprocessing: Preprocessing, said_by: str, sets: Sequence[EvaluationSet]
) -> str:
  """How the pictures of each set are prepared and who says so, in lines for people."""
  lines = [f"mean {preprocessing.mean}, std {preprocessing.std}: {said_by}"]
  for item in sets:
    own = "by the configuration's own transform, whatever the weights say"
    lines.append(f"{item.name}: {item.transform}: {own if item.own_transform else said_by}")
  return "\n".join(lines)


def fill_transform(text: str, preprocessing: Preprocessing) -> str:
  """`{image_size}`, `{interpolation!r}` and so on in a transform string → the values.

  Raises:
    ConfigError: a name that is no field of `Preprocessing`.
  """
  fields = dataclasses.asdict(preprocessing)
  try:
    return text.format(**fields)
  except (KeyError, IndexError, ValueError) as error:
    raise ConfigError(
      f"transform {text!r} names {error} in braces; there are: {', '.join(fields)}"
    ) from error


def build_task(
  config: Config, num_classes: int | None, preprocessing: Preprocessing | None = None
) -> tuple[Task, ModelSpec]:
  """`config.model`, `config.task` → a task.

  Args:
    config: the whole configuration.
    num_classes: of the training data; None where there is none at hand.
    preprocessing: what the weights expect; None for `preprocessing_of(config)`.

  Raises:
    ConfigError: no number of classes, or one that is not the data's.
  """
  fields = config.model
  name = fields.name
  preprocessing = preprocessing or preprocessing_of(config)
  said = fields.get("num_classes")
  if said is None and num_classes is None:
    raise ConfigError(
      "`config.model.num_classes` is needed where the data is not at hand to count its classes"
    )
  if said is not None and num_classes is not None and said != num_classes:
    raise ConfigError(
      f"`config.model.num_classes` is {said} and the training data has {num_classes} classes: "
      "leave it out, or correct it"
    )
  classes = int(said or num_classes or 0)
  arguments = fields.get("arguments")
  own_arguments = arguments.as_dict() if arguments is not None else {}
  run_arguments: dict[str, Any] = {
    "dtype": config.choice("precision", PRECISIONS, "float32"),
    "remat": bool(config.get("remat", False)),
  }
  groups = int(config.get("batch_norm_groups", 1))
  if "batch_norm_groups" in model_arguments(name):
    run_arguments["batch_norm_groups"] = groups
  elif groups > 1:
    raise ConfigError(f"`config.batch_norm_groups` is {groups}, and {name} has no batch norm")
  model = create_model(name, num_classes=classes, **own_arguments, **run_arguments)
  fields = config.group("task")
  task_name = fields.choice("name", TASKS, "classification")
  mixing = fields.get("mixing")
  task_arguments: dict[str, Any] = {
    "model": model,
    "num_classes": classes,
    "mean": preprocessing.mean,
    "std": preprocessing.std,
    "loss_name": fields.choice("loss", LOSSES, "softmax"),
    "label_smoothing": float(fields.get("label_smoothing", 0.0)),
    "mixing": Mixing(**mixing.as_dict()) if mixing is not None else None,
  }
  task: Task
  if task_name == "intermediate_supervision":
    task = IntermediateSupervision(
      **task_arguments,
      reconstruction_weight=float(fields.get("reconstruction_weight", 3.0)),
      auxiliary_weight=float(fields.get("auxiliary_weight", 0.7)),
    )
  else:
    task = Classification(**task_arguments)
  return task, ModelSpec(name, own_arguments, classes, dataclasses.asdict(preprocessing))


@dataclasses.dataclass(frozen=True)
class DataSettings:
  """`config.data`: where training pictures come from and how they are read."""

  source: str
  split: str
  data_dir: str | None
  batch_size: int
  transform: str
  num_threads: int | None
  repeats: int
  max_corrupt_fraction: float
  decoder: str


def data_settings(config: Config) -> DataSettings:
  """Reads them; the braces of the transform are filled in."""
  data = config.data
  return DataSettings(
    source=data.source,
    split=data.get("split", "train"),
    data_dir=data.get("data_dir"),
    batch_size=data.batch_size,
    transform=fill_transform(data.transform, preprocessing_of(config)),
    num_threads=data.get("num_threads"),
    repeats=data.get("repeats", 1),
    max_corrupt_fraction=data.get("max_corrupt_fraction", 0.1),
    decoder=data.get("decoder", "opencv"),
  )


def open_training_source(config: Config) -> Source:
  """`config.data` → its training source.

  Raises:
    MissingDataError: it is not there; the message says what prepares it.
  """
  data = data_settings(config)
  return create_source(data.source, data.split, data.data_dir)


def training_batches(
  config: Config,
  source: Source,
  *,
  start_step: int,
  seed: int,
  process_index: int,
  process_count: int,
) -> Any:
  """This process's training batches from `start_step` on."""
  data = data_settings(config)
  return train_batches(
    source,
    data.transform,
    batch_size=data.batch_size,
    seed=seed,
    start_step=start_step,
    process_index=process_index,
    process_count=process_count,
    num_threads=data.num_threads,
    repeats=data.repeats,
    max_corrupt_fraction=data.max_corrupt_fraction,
    decoder=data.decoder,
  )


def evaluation_settings(
  name: str, config: Config, preprocessing: Preprocessing
) -> tuple[DataSettings, bool]:
  """One of `config.evaluation.sets`, and whether it has a transform of its own.

  What a set does not say is as in `config.data`; its transform, as `preprocessing` says.
  """
  data, fields = data_settings(config), config.evaluation.sets.get(name)
  transform = fields.get("transform")
  settings = dataclasses.replace(
    data,
    source=fields.get("source", data.source),
    split=fields.get("split", "validation"),
    data_dir=fields.get("data_dir", data.data_dir),
    batch_size=fields.get("batch_size", data.batch_size),
    transform=fill_transform(transform or recipes.eval_transform(preprocessing), preprocessing),
  )
  return settings, transform is not None


class EvaluationSet:
  """One of `config.evaluation.sets`, opened; see `EvaluationData`.

  Attributes:
    transform: the set's own, or that of the preprocessing where it has none.
    own_transform: whether it is its own.
  """

  def __init__(self, name: str, config: Config, mesh: Mesh, preprocessing: Preprocessing):
    data, self.own_transform = evaluation_settings(name, config, preprocessing)
    self.name, self.transform = name, data.transform
    self._source = create_source(data.source, data.split, data.data_dir)
    self.class_names: Sequence[str] = self._source.class_names
    self.num_classes = self._source.num_classes
    self._sharding = sharding.batch_sharding(mesh)
    part, parts = sharding.batch_part(self._sharding)
    self._batches = eval_batches(
      self._source,
      data.transform,
      batch_size=data.batch_size,
      process_index=part,
      process_count=parts,
      num_threads=data.num_threads,
      max_corrupt_fraction=data.max_corrupt_fraction,
      decoder=data.decoder,
    )

  def batches(self) -> Iterable[dict[str, jax.Array]]:
    """One pass, as global arrays."""
    for batch in self._batches:
      yield sharding.put_batch(batch, self._sharding)


def evaluation_sets(
  config: Config, mesh: Mesh, num_classes: int, preprocessing: Preprocessing | None = None
) -> list[EvaluationSet]:
  """All of `config.evaluation.sets`, by `preprocessing` where they have no transform of their own.

  Raises:
    ConfigError: one has another number of classes than the network.
  """
  expected = preprocessing or preprocessing_of(config)
  sets = [EvaluationSet(name, config, mesh, expected) for name in config.evaluation.sets.names()]
  for item in sets:
    if item.num_classes != num_classes:
      raise ConfigError(
        f"evaluation set {item.name!r} has {item.num_classes} classes, the network {num_classes}"
      )
  return sets


@dataclasses.dataclass(frozen=True)
class Length:
  """How long a training is."""

  steps_per_epoch: int
  total_steps: int

  @property
  def epochs(self) -> float:
    """Passes over the data."""
    return self.total_steps / self.steps_per_epoch


def training_length(config: Config, num_examples: int) -> Length:
  """`config.total_epochs`, or `config.total_steps`, which goes first.

  Raises:
    ConfigError: the batch is larger than the data.
  """
  batch_size = config.data.batch_size
  steps_per_epoch = num_examples // batch_size
  if not steps_per_epoch:
    raise ConfigError(
      f"`config.data.batch_size` is {batch_size} and the training data has {num_examples} "
      "examples: choose a smaller batch"
    )
  total_steps = config.get("total_steps")
  if total_steps is None:
    total_steps = math.ceil(config.total_epochs * steps_per_epoch)
  return Length(steps_per_epoch, int(total_steps))


def example_batch(config: Config, image_size: Sequence[int]) -> dict[str, jax.ShapeDtypeStruct]:
  """The shapes of a training batch of uint8 pictures of `image_size` (height, width)."""
  size = config.data.batch_size
  return {
    "image": jax.ShapeDtypeStruct((size, *image_size, 3), np.uint8),
    "label": jax.ShapeDtypeStruct((size,), np.int32),
    "index": jax.ShapeDtypeStruct((size,), np.int32),
  }


@dataclasses.dataclass(frozen=True)
class Settings:
  """The fields of a configuration that the training loop itself reads; see docs/architecture.md."""

  seed: int
  log_every: int
  evaluate_every: int
  ema_decay: float | None
  accumulation: int
  init_from: str | None
  reinitialize_head: bool
  keep: int
  save_every_steps: int | None
  save_every_minutes: float | None
  best_metric: str | None


def loop_settings(config: Config, steps_per_epoch: int, primary_metric: str) -> Settings:
  """Reads them; the best checkpoint is by `primary_metric` of the first evaluation set."""
  checkpoint, sets = config.group("checkpoint"), config.evaluation.sets.names()
  by_epochs = max(1, round(config.get("evaluate_every_epochs", 1) * steps_per_epoch))
  return Settings(
    seed=int(config.get("seed", 0)),
    log_every=int(config.get("log_every_steps", 50)),
    evaluate_every=int(config.get("evaluate_every_steps") or by_epochs),
    ema_decay=config.get("ema_decay"),
    accumulation=int(config.get("accumulation_steps", 1)),
    init_from=config.get("init_from"),
    reinitialize_head=bool(config.get("reinitialize_head", False)),
    keep=checkpoint.get("keep", 2),
    save_every_steps=checkpoint.get("every_steps"),
    save_every_minutes=checkpoint.get("every_minutes", 15),
    best_metric=checkpoint.get("best_metric", f"{sets[0]}/{primary_metric}" if sets else None),
  )


def build_optimizer(
  config: Config, params: Any, length: Length
) -> tuple[optax.GradientTransformation, Schedule]:
  """`config.optimizer` → the transformation and its schedule."""
  fields = config.optimizer
  schedule = schedule_from_config(
    fields,
    batch_size=config.data.batch_size,
    total_steps=length.total_steps,
    steps_per_epoch=length.steps_per_epoch,
  )
  return make_optimizer(fields, params, schedule), schedule


def sharding_rules(config: Config) -> tuple[tuple[str, Any], ...]:
  """`config.sharding_rules`, fully sharded where it is absent."""
  return tuple(config.get("sharding_rules", sharding.DEFAULT_RULES))


def mesh_axes(config: Config) -> dict[str, int]:
  """`config.mesh`; all devices on the data axis where it is absent."""
  mesh = config.get("mesh")
  return mesh.as_dict() if mesh is not None else {"data": -1}
