"""From a configuration to a `Run`: everything that a training is, before any data or device.

`build` is the one reader of a configuration's fields, for training, evaluation, the dry run and the
benchmark alike. What the data says of itself comes as `DataFacts`; no file is read but the weights
of a teacher, where a task has one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

from hybrid_vit import recipes, sharding
from hybrid_vit.config import Config, ConfigError
from hybrid_vit.curriculum import Curriculum, Phase
from hybrid_vit.curriculum_reading import curriculum_phases
from hybrid_vit.data.pipeline import EvaluationSettings, TrainingSettings
from hybrid_vit.data.spec import Field, batch_shapes
from hybrid_vit.example_reading import Reading, fill_canvases, fill_transform, read_transform
from hybrid_vit.models.registry import (
  Preprocessing,
  as_preprocessing,
  create_model,
  model_arguments,
  model_entry,
)
from hybrid_vit.optimizers import (
  Schedule,
  frozen_parameters,
  make_optimizer,
  schedule_from_config,
)
from hybrid_vit.settings import Settings, read_settings
from hybrid_vit.table_resizing import resize_tables
from hybrid_vit.tasks.base import Task, evaluation_kind
from hybrid_vit.tasks.registry import Context, create_task, task_names, task_settings
from hybrid_vit.weights.stored import StoredNetwork, load_network

PRECISIONS = ("float32", "bfloat16")
# Steps of an epoch where nothing is known of the data: for looking at a run before it can be had.
STAND_IN_STEPS = 1000


@dataclasses.dataclass(frozen=True)
class DataFacts:
  """What training data says of itself.

  Attributes:
    info: `source.info`, e.g. "class_names".
    num_examples: how many; None where no data is at hand.
    num_classes: how many classes, where their names are not known but their number is.
    example: gives a readable example, for shapes that a transform alone does not tell.
  """

  info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  num_examples: int | None = None
  num_classes: int | None = None
  example: Callable[[], Mapping[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Run:
  """A training, whole: what the loop, the dry run and the benchmark take.

  Attributes:
    network: the network's name.
    tasks: one for each phase; they differ in what the phases say.
    readings: how the examples of each phase become rows.
    batches: the arrays of a batch of each phase, of all devices together, as shapes.
    curriculum: the phases.
    examples_per_epoch: of the training data.
    params: shapes of the parameters.
    frozen: a tree of booleans like `params`, or None.
    optimizer: optax's.
    schedule: learning rate by step.
    settings: of the loop.
    data: where the training examples come from.
    evaluation: the evaluation sets.
    preprocessing: what the weights expect of a picture.
    metadata: what goes with the weights, so that using them needs nothing else.
    mesh_axes: sizes of the axes.
    sharding_rules: see `hybrid_vit.sharding`.
    config: the configuration as plain values, for the record.
  """

  network: str
  tasks: tuple[Task, ...]
  readings: tuple[Reading, ...]
  batches: tuple[dict[str, jax.ShapeDtypeStruct], ...]
  curriculum: Curriculum
  examples_per_epoch: int
  params: Any
  frozen: Any
  optimizer: optax.GradientTransformation
  schedule: Schedule
  settings: Settings
  data: TrainingSettings
  evaluation: tuple[EvaluationSettings, ...]
  preprocessing: Preprocessing
  metadata: dict[str, Any]
  mesh_axes: dict[str, int]
  sharding_rules: tuple[tuple[str, Any], ...]
  config: dict[str, Any]

  @property
  def task(self) -> Task:
    """The task of evaluation: without what phases change."""
    return self.tasks[-1]

  def canvas_batches(self, phase: int) -> tuple[dict[str, jax.ShapeDtypeStruct], ...]:
    """The batches of a phase, of which `batches` has the first canvas's."""
    size = self.curriculum.phases[phase].batch_size
    others = self.readings[phase].others
    return (
      self.batches[phase],
      *(batch_shapes(reading.fields, size, train=True) for reading in others),
    )

  def evaluation_fields(self, kind: str) -> Mapping[str, Field]:
    """The fields of an example of an evaluation set of some kind."""
    return evaluation_kind(self.task, kind).fields

  def evaluates_at(self, step: int) -> bool:
    """Whether an evaluation follows `step` finished steps."""
    if step == self.curriculum.total_steps:
      return True
    if self.settings.evaluate_every_steps is not None:
      return step % self.settings.evaluate_every_steps == 0
    period = self.settings.evaluate_every_epochs * self.examples_per_epoch
    if not period:
      return False
    before, now = (self.curriculum.examples_before(s) // period for s in (step - 1, step))
    return now > before


class _NoCheck:
  """Lets every error through; the dry run gives an object that notes them instead."""

  def __call__(self, what: str) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext()


def build(
  config: Config,
  data: DataFacts | None = None,
  *,
  preprocessing: Preprocessing | None = None,
  training: bool = True,
  checking: Callable[[str], contextlib.AbstractContextManager[Any]] | None = None,
) -> Run:
  """Everything that the configuration says, read and checked; nothing is opened.

  Args:
    config: all of it. Every field that a run has is asked for, so that `config.assert_all_read`
      names what is left.
    data: of the training data; None where it is not at hand: then the configuration must name the
      number of classes, and an epoch has `STAND_IN_STEPS` steps.
    preprocessing: what the weights expect; None for `preprocessing_of(config)`.
    training: whether the run shall train: then a teacher's weights must be there.
    checking: `(what) → context` that may swallow a part's error and go on; what could not be built
      then is None. The default raises.

  Raises:
    ValueError: something is wrong with the configuration; the message names the field.
  """
  data, check = data or DataFacts(), checking or _NoCheck()
  preprocessing = preprocessing or preprocessing_of(config)
  parts: dict[str, Any] = dict.fromkeys(f.name for f in dataclasses.fields(Run))
  parts |= {"preprocessing": preprocessing, "config": config.resolved()}
  with check("config.mesh"):
    parts["mesh_axes"] = mesh_axes(config)
    parts["sharding_rules"] = tuple(config.get("sharding_rules", sharding.DEFAULT_RULES))
  with check("config.data"):
    parts["data"] = config.data.as_dataclass(TrainingSettings)
  with check("length of the training"):
    batch_size = config.data.integer("batch_size", minimum=1)
    parts["examples_per_epoch"] = data.num_examples or batch_size * _stand_in_steps(config)
    full = read_curriculum(
      config,
      parts["examples_per_epoch"],
      preprocessing,
      known=data.num_examples is not None,
    )
    smoke = config.integer("smoke_steps", None, minimum=1)
    parts["curriculum"] = shortened(full, smoke) if smoke else full
  with check("network and task"):
    parts["network"] = config.model.text("name")
    # Phases have one teacher, read once.
    load = functools.cache(load_network) if training else None
    tasks, spec = build_tasks(config, data, preprocessing, parts["curriculum"], load)
    parts["tasks"], parts["metadata"] = tasks, spec
  if parts["tasks"] is not None:
    with check("evaluation"):
      parts["evaluation"] = read_evaluation(config, preprocessing, parts["tasks"][-1])
  if parts["evaluation"] is not None:
    with check("settings of the loop"):
      parts["settings"] = read_settings(config, parts["tasks"][-1], parts["evaluation"])
  known = all(parts[name] is not None for name in ("tasks", "data", "curriculum"))
  if known:
    with check("config.data.transform"):
      parts["readings"] = tuple(
        _read_phase(phase, parts["data"].decoder, task.spec.train, data.example)
        for phase, task in zip(parts["curriculum"].phases, parts["tasks"])
      )
      parts["batches"] = tuple(
        batch_shapes(reading.fields, phase.batch_size, train=True)
        for phase, reading in zip(parts["curriculum"].phases, parts["readings"])
      )
  if parts["batches"] is not None:
    with check(f"the network on {_shapes(parts['batches'][0])}"):
      task, batch = parts["tasks"][0], parts["batches"][0]
      parts["params"] = jax.eval_shape(task.init, jax.random.key(0), batch)["params"]
      _check_phases(parts["tasks"], parts["batches"], parts["params"])
  if parts["params"] is not None:
    with check("config.optimizer"):
      parts |= build_optimizer(
        config, parts["params"], full, parts["curriculum"], parts["examples_per_epoch"]
      )
  return Run(**parts)


def preprocessing_of(config: Config) -> Preprocessing:
  """What the network's weights shall expect of a picture: the registry's entry of the network.

  A field of `Preprocessing` that stands in `config.data` replaces the entry's.
  """
  entry = dataclasses.asdict(model_entry(config.model.name).preprocessing)
  hints = {"image_size": int, "crop_ratio": float, "interpolation": str, "resize": str}
  return as_preprocessing(
    {name: config.data.typed(name, hints.get(name, tuple), entry[name]) for name in entry}
  )


def _read_phase(
  phase: Phase,
  decoder: str,
  fields: Mapping[str, Field],
  example: Callable[[], Mapping[str, Any]] | None,
) -> Reading:
  first, *others = (
    read_transform(text, decoder, fields, example)
    for text in (phase.transform, *phase.other_transforms)
  )
  return dataclasses.replace(first, others=tuple(others))


def _stand_in_steps(config: Config) -> int:
  """Steps of an epoch of data that is not at hand; of few steps, a part that a warm-up fits in."""
  total_steps = config.integer("total_steps", None, minimum=1)
  return STAND_IN_STEPS if total_steps is None else max(1, total_steps // 100)


def read_curriculum(
  config: Config, num_examples: int, preprocessing: Preprocessing, *, known: bool = True
) -> Curriculum:
  """`config.curriculum`, `config.phases`, or one phase of `config.total_steps` or `total_epochs`.

  Args:
    config: all of it.
    num_examples: of the training data.
    preprocessing: fills in the transforms.
    known: whether that number is the data's, or stands in for it.

  Raises:
    ConfigError: a phase of no steps, or a batch larger than the data; see `curriculum_phases`.
  """
  if "curriculum" in config:
    size = preprocessing.image_size
    transform = fill_transform(config.data.transform, preprocessing)
    return Curriculum(curriculum_phases(config, transform, num_examples, size, known=known))
  given = config.groups("phases")
  total_steps = config.integer("total_steps", None, minimum=1)
  open_ended = not given or any("steps" not in g and "epochs" not in g for g in given)
  epochs = None
  if open_ended and total_steps is None:
    epochs = config.number("total_epochs", above=0.0)
  phases = []
  canvases = config.data.typed("canvases", tuple, ())
  for group in given or [config.nothing("phases")]:
    size = group.integer("image_size", preprocessing.image_size, minimum=1)
    batch_size = group.integer("batch_size", config.data.batch_size, minimum=1)
    if known and batch_size > num_examples:
      raise ConfigError(
        f"a batch of {batch_size} is larger than the training data, which has {num_examples} "
        "examples: choose a smaller config.data.batch_size"
      )
    # What has no length of its own takes an equal part of the whole.
    parts = len(given) or 1
    steps, own_epochs = group.integer("steps", None, minimum=1), group.number("epochs", None)
    if steps is None and own_epochs is None and total_steps is not None:
      steps = max(1, round(total_steps / parts))
    if steps is None:
      length = own_epochs if own_epochs is not None else (epochs or 0.0) / parts
      steps = round(length * num_examples / batch_size)
      if steps < 1:
        raise ConfigError(
          f"{length:g} epochs of {num_examples} examples are less than one step of {batch_size}: "
          "train for longer (config.total_epochs) or choose a smaller batch"
        )
    transform, *others = fill_canvases(
      group.text("transform", config.data.transform),
      dataclasses.replace(preprocessing, image_size=size),
      canvases,
    )
    phases.append(
      Phase(
        steps,
        batch_size,
        transform,
        size,
        group.number("share", None, above=0.0),
        group.typed("task", dict, {}),
        group.typed("arguments", dict, {}),
        other_transforms=tuple(others),
      )
    )
    group.assert_all_read()
  return Curriculum(phases)


def shortened(curriculum: Curriculum, steps: int) -> Curriculum:
  """The same phases with at most so many steps each: to see that a recipe runs."""
  return Curriculum(
    [dataclasses.replace(p, steps=min(p.steps, steps), share=None) for p in curriculum.phases]
  )


def build_tasks(
  config: Config,
  data: DataFacts,
  preprocessing: Preprocessing,
  curriculum: Curriculum | None,
  load: Callable[[str], StoredNetwork] | None = None,
) -> tuple[tuple[Task, ...], dict[str, Any]]:
  """`config.model` and `config.task` → a task for each phase, and the metadata of the weights."""
  fields = config.model
  name = fields.name
  own_arguments = fields.group("arguments").as_dict()
  run_arguments: dict[str, Any] = {
    "dtype": config.choice("precision", PRECISIONS, "float32"),
    "remat": config.flag("remat", False),
    "scan_blocks": config.flag("scan_blocks", False),
  }
  groups = config.integer("batch_norm_groups", 1, minimum=1)
  if "batch_norm_groups" in model_arguments(name):
    run_arguments["batch_norm_groups"] = groups

  def make_network(num_classes: int, arguments: Mapping[str, Any]) -> Any:
    return create_model(
      name, num_classes=num_classes, **{**own_arguments, **run_arguments, **arguments}
    )

  said = fields.integer("num_classes", None, minimum=1)
  classes = said if said is not None else data.num_classes
  group = config.group("task")
  task_name = group.choice("name", task_names(), "classification")
  settings_class = task_settings(task_name)
  settings: Any = group.as_dataclass(settings_class)
  tasks: list[Task] = []
  arguments: Mapping[str, Any] = {}
  for phase in curriculum.phases if curriculum is not None else [None]:
    own = settings
    if phase is not None and phase.task:
      merged = Config({**dataclasses.asdict(settings), **phase.task}, "config.phases.task")
      own = merged.as_dataclass(settings_class)
      merged.assert_all_read()
    arguments = phase.arguments if phase is not None else {}
    make = functools.partial(make_network, arguments=arguments)
    context = Context(data.info, classes, preprocessing, make, load, groups)
    tasks.append(create_task(task_name, own, context))
  # A decoder may have batch norms where the network has none.
  held = any(getattr(task.model, "batch_norm_groups", 1) == groups for task in tasks)
  if groups > 1 and not held and "batch_norm_groups" not in run_arguments:
    raise ConfigError(
      f"`config.batch_norm_groups` is {groups}, and neither {name} nor what the task "
      f"{task_name!r} puts on it has batch norm: 1 was expected"
    )
  metadata = {
    "name": name,
    # Of the last phase, as the weights are evaluated and exported.
    "arguments": {**own_arguments, **arguments},
    "preprocessing": dataclasses.asdict(preprocessing),
    "task": task_name,
    "task_settings": dataclasses.asdict(settings),
    **tasks[-1].stored_info(),
  }
  return tuple(tasks), metadata


def read_evaluation(
  config: Config, preprocessing: Preprocessing, task: Task | None = None
) -> tuple[EvaluationSettings, ...]:
  """`config.evaluation.sets`; what a set does not say is as in `config.data`.

  Its transform is that of `preprocessing` and what `task` adds for a set of its kind, and its
  decoder PIL, which published figures are measured with.

  Raises:
    ValueError: a kind that the task does not know.
  """
  data, sets = config.data, config.group("evaluation").group("sets")
  smoke = config.integer("smoke_steps", None, minimum=1)
  found = []
  for name in sets.names():
    fields = sets.group(name)
    processes = fields.integer("num_processes", None, minimum=1)
    # Where a set has processes, the training's threads are not asked for.
    threads = None if processes else data.get("num_threads")
    transform, kind = fields.text("transform", None), fields.text("kind", "")
    usual = recipes.eval_transform(preprocessing)
    if task is not None:
      own = evaluation_kind(task, kind).transform
      usual = own if own and not own.startswith("|") else usual + own
    found.append(
      fields.as_dataclass(
        EvaluationSettings,
        name=name,
        source=fields.text("source", data.source),
        data_dir=fields.text("data_dir", data.get("data_dir")),
        batch_size=fields.integer("batch_size", data.batch_size, minimum=1),
        num_threads=fields.integer("num_threads", threads, minimum=1),
        num_processes=processes,
        transform=fill_transform(transform or usual, preprocessing),
        own_transform=transform is not None,
        kind=kind,
        max_batches=smoke,
      )
    )
  return tuple(found)


def build_optimizer(
  config: Config,
  params: Any,
  full: Curriculum,
  curriculum: Curriculum,
  examples_per_epoch: int,
) -> dict[str, Any]:
  """`config.optimizer` → "optimizer", "schedule" and "frozen" of a `Run`.

  The schedule is made for the whole recipe, `full`, and laid over the steps of `curriculum`. Where
  the rate follows the batch, it follows that of each phase.
  """
  fields = config.optimizer
  batch_size = config.data.batch_size
  # Nearly always one; phases may count the warm-up each in its own way.
  warmups = [phase.warmup for phase in curriculum.phases]
  of_whole = {
    warmup: schedule_from_config(
      fields,
      batch_size=batch_size,
      total_steps=full.total_steps,
      steps_per_epoch=full.total_steps * examples_per_epoch / full.total_examples,
      warmup_share=warmup,
    )
    for warmup in dict.fromkeys(warmups)
  }
  stretch = full.total_steps / curriculum.total_steps
  follows = fields.get("learning_rate_batch_size") is not None
  factors = [phase.batch_size / batch_size if follows else 1.0 for phase in curriculum.phases]

  def schedule(step: Any) -> Any:
    position = curriculum.schedule_step(step)
    position = position if stretch == 1.0 else position * stretch
    rate = of_whole[warmups[0]](position)
    for first, warmup, previous in zip(curriculum.first_steps[1:], warmups[1:], warmups):
      if warmup != previous:
        rate = jax.numpy.where(step >= first, of_whole[warmup](position), rate)
    for first, factor, before in zip(curriculum.first_steps[1:], factors[1:], factors):
      rate = jax.numpy.where(step >= first, rate * (factor / before), rate)
    return rate if factors[0] == 1.0 else rate * factors[0]

  return {
    "optimizer": make_optimizer(fields, params, schedule),
    "schedule": schedule,
    "frozen": frozen_parameters(fields, params),
  }


def _check_phases(tasks: Sequence[Task], batches: Sequence[Any], params: Any) -> None:
  """Raises where the networks of the phases differ in more than their tables of positions."""
  # The parameters are those of the first.
  for k, (task, batch) in enumerate(zip(tasks, batches)):
    if k and task.model not in [earlier.model for earlier in tasks[:k]]:
      shapes = jax.eval_shape(task.init, jax.random.key(0), batch)["params"]
      jax.eval_shape(lambda tree, shapes=shapes: resize_tables(tree, shapes), params)


def mesh_axes(config: Config) -> dict[str, int]:
  """`config.mesh`; all devices on the data axis where it is absent."""
  mesh = config.group("mesh")
  return {name: mesh.integer(name) for name in mesh.names()} or {"data": -1}


def _shapes(batch: Mapping[str, jax.ShapeDtypeStruct]) -> str:
  """ "image 32x32x3", for people."""
  sized = {name: leaf.shape[1:] for name, leaf in batch.items() if len(leaf.shape) > 1}
  return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in sized.items())
