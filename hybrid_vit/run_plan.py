"""What a run would be, on shapes alone: the first half of the dry run.

`examine` does all that a run does before its first step, without an accelerator and without data,
and collects everything that is wrong with the configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType

from hybrid_vit import build, programs, sharding
from hybrid_vit.build import DataFacts, Run
from hybrid_vit.config import Config, ConfigError
from hybrid_vit.data.errors import MissingDataError
from hybrid_vit.data.pipeline import TrainingSettings, open_source, readable_example, source_info
from hybrid_vit.data.spec import batch_shapes, on_device
from hybrid_vit.example_reading import read_transform
from hybrid_vit.hub import is_address
from hybrid_vit.models.registry import model_entry
from hybrid_vit.paths import as_path
from hybrid_vit.tasks.base import constants_of, with_constants
from hybrid_vit.tools.summarize import count_multiply_adds
from hybrid_vit.train_state import TrainState

DEFAULT_DEVICES = 8

# Examples and classes of data that is seldom at hand where one plans a run.
_KNOWN_DATA = {"tfds:imagenet2012": (1_281_167, 1000)}
# Opened in no time; a folder would have to be listed.
_QUICK_SOURCES = ("digits", "scenes", "tfds", "fashion_mnist")


@dataclasses.dataclass
class Plan:
  """What was found; fields are None (or empty) where a problem stood in the way.

  Attributes:
    config: as given.
    devices: number of devices planned for.
    problems: everything wrong, in the order in which a run would meet it.
    notes: what was taken instead of something that is not at hand.
    mesh: sizes by axis.
    run: the training, whose parts may be None, too.
    state: shapes of the training state.
    layout: its shardings, on an abstract mesh.
    state_bytes: of one device, by branch of the state; and of the task's constants.
    multiply_adds: of one picture's forward pass, at the size of evaluation.
    evaluation_shapes: of the example that it was counted for, by key.
    activation_bytes: of what one device keeps for the backward pass of its rows, in the phase that
      keeps most.
    rows: of one device in one forward pass of that phase.
    stand_in_classes: number of classes in the place of the data's; None where it is known.
  """

  config: Config
  devices: int
  problems: list[str] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)
  mesh: Any = None
  run: Run | None = None
  state: TrainState | None = None
  layout: Any = None
  state_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
  multiply_adds: int | None = None
  evaluation_shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  activation_bytes: int | None = None
  rows: int | None = None
  stand_in_classes: int | None = None

  @contextlib.contextmanager
  def checking(self, what: str) -> Iterator[None]:
    """Notes an error as a problem of `what`, and goes on."""
    try:
      yield
    except (ValueError, TypeError, AttributeError, KeyError, OSError) as error:
      self.problems.append(f"{what}: {error}")


def examine(config: Config, devices: int | None = None) -> Plan:
  """Everything that needs no compilation: shapes are traced and rules are matched."""
  plan = Plan(config, devices or 0)
  with plan.checking("config.mesh"):
    axes = build.mesh_axes(config)
    fixed = math.prod(size for size in axes.values() if size != -1)
    default = fixed if -1 not in axes.values() else fixed * math.ceil(DEFAULT_DEVICES / fixed)
    plan.devices = devices or default
    plan.mesh = _abstract_mesh(sharding.mesh_shape(axes, plan.devices))
  with plan.checking("config"):
    facts = _data(plan)
    plan.run = build.build(config, facts, checking=plan.checking)
  if (
    plan.stand_in_classes and plan.run is not None and (plan.run.metadata or {}).get("num_classes")
  ):
    # A task without classes asks nobody for their number.
    plan.notes.append(f"number of classes: {plan.stand_in_classes} stand in, the data would tell")
  if plan.run is not None and plan.run.curriculum is not None:
    state_of = _state_shapes(plan.run)
    _examine_batches(plan, plan.run)
    _examine_state(plan, plan.run, state_of)
    _examine_evaluation(plan, plan.run, state_of)
  if not plan.problems:
    # A part that could not be built has not read its fields.
    with plan.checking("config"):
      config.assert_all_read()
  return plan


def _abstract_mesh(shape: tuple[int, int, int]) -> AbstractMesh:
  return AbstractMesh(shape, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


def _data(plan: Plan) -> DataFacts:
  """What is known of the training data without reading much of it."""
  config = plan.config
  said = config.model.get("num_classes")
  examples, classes = _KNOWN_DATA.get(str(config.data.get("source")), (None, None))
  with plan.checking("config.data"):
    data = config.data.as_dataclass(TrainingSettings)
    if said is None or data.source.partition(":")[0] in _QUICK_SOURCES:
      try:
        source = open_source(data)
        return DataFacts(source_info(source), len(source), example=lambda: readable_example(source))
      except MissingDataError:
        plan.notes.append(f"the data ({data.source}) is not here; a dry run does without")
  if said is None and classes is None:
    with plan.checking("config.model.name"):
      classes = int(dict(model_entry(config.model.name).arguments).get("num_classes", 1000))
      plan.stand_in_classes = classes
  if examples is None and config.get("total_steps") is None:
    plan.notes.append(
      f"number of examples unknown: {build.STAND_IN_STEPS:,} steps an epoch stand in"
    )
  return DataFacts({}, examples, classes)


def _examine_batches(plan: Plan, run: Run) -> None:
  """Whether each phase's batch falls on the devices and into the parts of accumulation."""
  parts = run.settings.accumulation if run.settings is not None else 1
  sizes = {phase.batch_size for phase in run.curriculum.phases}
  if run.settings is not None:
    for name in (run.settings.init_from, run.settings.resume_from):
      if name is not None and not is_address(name) and not as_path(name).exists():
        plan.notes.append(f"{name} is not on this machine")
  for size in sorted(sizes):
    if size % parts:
      plan.problems.append(
        f"config.data.batch_size {size} does not fall into config.accumulation_steps {parts} parts"
      )
    if plan.mesh is None:
      continue
    ways = sharding.batch_ways(plan.mesh)
    if size % ways:
      plan.problems.append(
        f"config.data.batch_size {size} does not fall on the {ways} devices of the mesh's axes "
        f"data and fsdp: choose a multiple of {ways}, e.g. {max(1, round(size / ways)) * ways}"
      )


def _state_shapes(run: Run) -> Callable[[int], TrainState]:
  """`(phase) → shapes of its state`; phases with one network and one batch are traced once."""
  traced = functools.cache(functools.partial(programs.state_shapes, run))

  def state_of(phase: int) -> TrainState:
    made_of = [(task.model, batch) for task, batch in zip(run.tasks, run.batches)]
    return traced(made_of.index(made_of[phase]))

  return state_of


def _examine_state(plan: Plan, run: Run, state_of: Callable[[int], TrainState]) -> None:
  """The state's shapes and shardings, and what the backward pass keeps."""
  if run.optimizer is None or run.settings is None:
    return
  with plan.checking("a training step"):
    plan.state = state_of(0)
  if plan.state is None or plan.mesh is None:
    return
  with plan.checking("config.sharding_rules"):
    plan.layout = sharding.state_shardings(plan.state, run.sharding_rules, plan.mesh)
    plan.state_bytes = programs.state_bytes(plan.state, plan.layout)
    if constants := programs.constants_bytes(run.task, plan.mesh):
      plan.state_bytes["constants"] = constants
  ways, looked_at = sharding.batch_ways(plan.mesh), set()
  for phase, canvas in programs.distinct_steps(run):
    task, batch = run.tasks[phase], run.canvas_batches(phase)[canvas]
    with plan.checking("activations"):
      variables = with_constants(state_of(phase).variables, constants_of(task))
      size = run.curriculum.phases[phase].batch_size
      # The network sees all devices' rows of one part together, and must be able to.
      together = max(1, size // run.settings.accumulation)
      _trace_loss(task, variables, batch, together)
      # A canvas on its side keeps as much.
      extents = (phase, tuple((k, *sorted(v.shape)) for k, v in sorted(batch.items())))
      if extents in looked_at:
        continue
      looked_at.add(extents)
      rows = max(1, together // ways)
      part = {k: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype) for k, v in batch.items()}
      kept = activation_bytes(with_groups(task, size), variables, part)
      if plan.activation_bytes is None or kept > plan.activation_bytes:
        plan.activation_bytes, plan.rows = kept, rows


def _trace_loss(task: Any, variables: Any, batch: Mapping[str, Any], rows: int) -> None:
  """Raises what the loss of so many rows would raise."""
  part = {k: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype) for k, v in batch.items()}
  key = jax.eval_shape(lambda: jax.random.key(0))
  augmented = jax.eval_shape(task.augment, part, key, jax.ShapeDtypeStruct((), np.int32))
  jax.eval_shape(task.loss, variables, augmented, key)


def _examine_evaluation(plan: Plan, run: Run, state_of: Callable[[int], TrainState]) -> None:
  task = run.task if run.tasks is not None else None
  if task is None or run.evaluation is None:
    return
  example = None
  if run.data is not None and run.data.source.partition(":")[0] in _QUICK_SOURCES:
    example = lambda: readable_example(open_source(run.data))  # noqa: E731
  for item in run.evaluation:
    with plan.checking(f"evaluation set {item.name!r}"):
      fields = run.evaluation_fields(item.kind)
      reading = read_transform(item.transform, item.decoder, fields, example)
      ways = sharding.batch_ways(plan.mesh) if plan.mesh is not None else 1
      if item.batch_size % ways and item.batch_size != plan.config.data.batch_size:
        raise ConfigError(f"batch_size {item.batch_size} does not fall on {ways} devices")
      batch = batch_shapes(reading.fields, 1, train=False)
      if not on_device(reading.fields) and run.batches is not None:
        # Pictures of any size: looked at in that of the training.
        batch = {
          name: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)
          for name, leaf in run.batches[-1].items()
        }
      # Those of the last phase, as in a run; without an optimizer there is no state.
      variables = (
        state_of(len(run.tasks) - 1).evaluation_variables
        if plan.state is not None
        else jax.eval_shape(task.init, jax.random.key(0), batch)
      )
      if plan.multiply_adds is None:
        plan.multiply_adds = count_multiply_adds(task.predict, variables, batch)
        plan.evaluation_shapes = {k: v.shape[1:] for k, v in batch.items() if len(v.shape) > 1}
      else:
        jax.eval_shape(task.predict, variables, batch)


def with_groups(task: Any, times_fewer: int) -> Any:
  """The task with fewer groups of its batch norms, for fewer rows; 1 where none are left."""
  groups = getattr(task.model, "batch_norm_groups", 1)
  if groups == 1:
    return task
  fewer = max(1, groups // times_fewer)
  if hasattr(task.model, "with_batch_norm_groups"):
    return dataclasses.replace(task, model=task.model.with_batch_norm_groups(fewer))
  model = task.model.clone(batch_norm_groups=fewer)
  return dataclasses.replace(task, model=model)


def activation_bytes(task: Any, variables: Mapping[str, Any], batch: Mapping[str, Any]) -> int:
  """Bytes that the backward pass of a batch needs from its forward pass, parameters excluded.

  They are the residuals of `jax.vjp`, by shape: each counted once, recomputation (`remat`) taken
  into account. What a compiler then fuses or recomputes of itself is not.
  """

  def residuals(variables: Any, batch: Any, key: jax.Array) -> Any:
    augmented = task.augment(batch, key, jax.numpy.zeros((), np.int32))

    def loss_of(params: Any) -> Any:
      return task.loss({**variables, "params": params}, augmented, key)[0]

    return jax.vjp(loss_of, variables["params"])[1]

  jaxpr = jax.make_jaxpr(residuals)(variables, batch, jax.random.key(0)).jaxpr
  given = set(jaxpr.invars) | set(jaxpr.constvars)
  kept = {v for v in jaxpr.outvars if isinstance(v, core.Var) and v not in given}
  return sum(_bytes(v.aval) for v in kept)


def _bytes(aval: Any) -> int:
  if jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
    return 8 * math.prod(aval.shape)
  return math.prod(aval.shape) * np.dtype(aval.dtype).itemsize
