"""`config.curriculum = "efficienttrain++"` → the phases of a training.

The pictures come from the loader at the full size, with RandAugment of the phase's magnitude; the
step shrinks them, then erases and mixes. Sizes, network and warm-up follow the published tables
(`hybrid_vit.efficienttrain`).
"""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_vit import efficienttrain
from hybrid_vit.config import Config, ConfigError, closest
from hybrid_vit.curriculum import Phase
from hybrid_vit.models.registry import create_model, model_entry
from hybrid_vit.tasks.registry import task_names, task_settings

# How a task's setting `shrink` makes the pictures of each curriculum smaller.
METHODS = {"efficienttrain": "low_frequency", "efficienttrain++": "lanczos"}
# Families by the module of the network; all others are "usual".
_FAMILIES = {"convnext": "convnext", "vit": "deit"}
# So many multiples of a stride in the full size tell the published sizes apart (sevenths of it).
_RESOLUTION = 7


@dataclasses.dataclass(frozen=True)
class CurriculumSettings:
  """`config.curriculum`; its name alone stands for the rest.

  Attributes:
    name: "efficienttrain" or "efficienttrain++".
    epochs: the budget, see `efficienttrain.stages`; None for `config.total_epochs`, of which "++"
      takes two thirds.
    family: whose sizes; None for what the network is.
    sizes: the distinct ones, rising, the last one the full size; None for the published fractions
      of it, to the nearest multiples that the network takes.
    early_batch: see `efficienttrain.stages`.
    replay: see `efficienttrain.stages`: for hosts that cannot decode as many small pictures.
    replay_examples: from how many loaded pictures the replayed ones are drawn, all processes
      together; they are kept at the full size, 3 GB for 20,000 of 224 px. (Published: 1920 batches
      at the smallest size, 256 at the next, of pictures that are small already.)
  """

  name: str
  epochs: float | None = None
  family: str | None = None
  sizes: tuple[int, ...] | None = None
  early_batch: int = 1
  replay: int = 1
  replay_examples: int = 20_000


def curriculum_phases(
  config: Config, transform: str, num_examples: int, full_size: int, *, known: bool = True
) -> list[Phase]:
  """The phases that `config.curriculum` asks for.

  Args:
    config: all of it.
    transform: of training pictures, filled in.
    num_examples: of the training data.
    full_size: side of the loader's pictures.
    known: whether the number of examples is the data's, or stands in for it.

  Raises:
    ConfigError: `config.phases` besides, a budget that is not positive or too small for its stages,
      a task that does not shrink pictures, or a size that the network does not take.
  """
  if config.groups("phases"):
    raise ConfigError(
      "`config.curriculum` and `config.phases` are both given, and each says all the phases of the "
      "training: leave one of them out"
    )
  settings = _settings(config)
  batch_size = config.data.batch_size
  baseline = _baseline(config, num_examples, batch_size)
  budget = _budget(settings, baseline)
  network = _Network(config, full_size)
  family = settings.family or _FAMILIES.get(network.module, "usual")
  sizes = settings.sizes
  if sizes is None:
    # An unknown family is the table's to refuse.
    known_family = family if family in efficienttrain.FAMILIES else "usual"
    sizes = network.fitted(settings.name, known_family)
  elif sizes[-1:] != (full_size,):
    raise ConfigError(
      f"`config.curriculum.sizes` is {sizes}; the last one must be the full size, {full_size} "
      "(config.data.image_size)"
    )
  transform, erasing = without_erasing(transform)
  try:
    table = efficienttrain.stages(
      settings.name,
      budget,
      family=family,
      sizes=sizes,
      magnitude=magnitude_of(transform) or 0.0,
      warmup_epochs=_warmup_epochs(config, num_examples, batch_size),
      early_batch=settings.early_batch,
      replay=settings.replay,
    )
  except ValueError as error:
    raise ConfigError(f"`config.curriculum`: {error}") from error
  for size in dict.fromkeys(sizes):
    network.check(size)
  _check_task(config, erasing)
  if settings.early_batch > 1 and "learning_rate_batch_size" not in config.optimizer:
    raise ConfigError(
      f"`config.curriculum.early_batch` is {settings.early_batch}, and the learning rate does not "
      "follow the batch: set config.optimizer.learning_rate_batch_size to the batch that "
      "config.optimizer.learning_rate is for"
    )
  shared = network.scaled_drop_path(settings.name, budget, baseline)
  phases = []
  for number, stage in enumerate(table, start=1):
    batch = batch_size * stage.batch_factor
    if known and batch > num_examples:
      raise ConfigError(
        f"a batch of {batch} is larger than the training data, which has {num_examples} examples: "
        "choose a smaller config.data.batch_size or config.curriculum.early_batch"
      )
    steps = round(stage.epochs * stage.replay * num_examples / batch)
    if steps < 1:
      raise ConfigError(
        f"`config.curriculum`: a budget of {budget:g} epochs of {num_examples} examples leaves no "
        f"step of {batch} to stage {number} of the {len(table)} of {settings.name}: give a larger "
        "budget (config.curriculum.epochs, config.total_epochs) or a smaller batch"
      )
    small = stage.size < full_size
    shrink = {"shrink": {"size": stage.size, "method": METHODS[settings.name]}} if small else {}
    phases.append(
      Phase(
        steps=steps,
        batch_size=batch,
        transform=with_magnitude(transform, stage.magnitude),
        image_size=full_size,
        share=stage.end - stage.begin,
        task={**shrink, **({"erasing": erasing} if erasing else {})},
        arguments={**shared, **(network.arguments_at(stage.size) if small else {})},
        warmup=stage.warmup,
        shown_size=stage.size if small else None,
        replay=stage.replay,
        replay_steps=_replay_steps(settings, stage, batch, steps),
      )
    )
  return phases


def _replay_steps(
  settings: CurriculumSettings, stage: efficienttrain.Stage, batch: int, steps: int
) -> int:
  if stage.replay == 1:
    return 1
  if batch % stage.replay:
    raise ConfigError(
      f"`config.curriculum.replay` is {settings.replay}, and a batch of {batch} does not fall into "
      f"groups of {stage.replay} rows, which show one loaded picture and replayed ones"
    )
  return max(1, min(steps, settings.replay_examples // (batch // stage.replay)))


def with_magnitude(transform: str, magnitude: float) -> str:
  """The same transform string with another magnitude of its RandAugment, where it has one."""
  parts = transform.split("|")
  for place, part in enumerate(parts):
    if (call := _call(part, "randaugment")) is None:
      continue
    value = ast.Constant(int(magnitude) if magnitude == int(magnitude) else magnitude)
    if len(call.args) > 1:
      call.args[1] = value
    else:
      rest = [k for k in call.keywords if k.arg != "magnitude"]
      call.keywords = [ast.keyword("magnitude", value), *rest]
    parts[place] = ast.unparse(call)
  return "|".join(parts)


def magnitude_of(transform: str) -> float | None:
  """Magnitude of a transform string's RandAugment; None where it has none."""
  for part in transform.split("|"):
    if (call := _call(part, "randaugment")) is not None:
      # The second argument, or by its name; 9 where it is left out.
      found = [call.args[1]] if len(call.args) > 1 else []
      found += [k.value for k in call.keywords if k.arg == "magnitude"]
      return float(ast.literal_eval(found[0])) if found else 9.0
  return None


def without_erasing(transform: str) -> tuple[str, dict[str, Any] | None]:
  """A transform string without its random erasing, and that one's arguments by name, or None."""
  kept, found = [], None
  for part in transform.split("|"):
    call = _call(part, "random_erasing")
    if call is None:
      kept.append(part)
      continue
    names = ("probability", "area", "aspect")
    values = {name: ast.literal_eval(value) for name, value in zip(names, call.args)}
    values |= {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    # A dict that is not empty, whatever the string left out.
    found = {"probability": 0.25, **values}
  return "|".join(kept), found


def _call(part: str, name: str) -> ast.Call | None:
  """The call of an operation in a transform string; None where it is another, or no call."""
  try:
    node = ast.parse(part.strip(), mode="eval").body
  except SyntaxError:
    return None  # the transform's own parser says what is wrong
  if isinstance(node, ast.Name):
    node = ast.Call(node, [], [])
  if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
    return node
  return None


def _settings(config: Config) -> CurriculumSettings:
  given = config.get("curriculum")
  if isinstance(given, str):
    given = Config({"name": given}, "config.curriculum")
  elif not isinstance(given, Config):
    raise ConfigError(
      f"`config.curriculum` is {given!r}; a name ({', '.join(efficienttrain.NAMES)}) or a group "
      "was expected, e.g. dict(name='efficienttrain++', epochs=200)"
    )
  settings = given.as_dataclass(CurriculumSettings)
  if settings.name not in efficienttrain.NAMES:
    near = closest(settings.name, efficienttrain.NAMES)
    hint = f"did you mean {near!r}?" if near else ""
    raise ConfigError(
      f"`config.curriculum` names {settings.name!r}; there are: "
      f"{', '.join(efficienttrain.NAMES)}{'; ' + hint if hint else ''}"
    )
  given.number("epochs", None, above=0.0)
  given.integer("early_batch", 1, minimum=1)
  given.integer("replay_examples", 20_000, minimum=1)
  return settings


def _baseline(config: Config, num_examples: int, batch_size: int) -> float | None:
  """Epochs of the training that the curriculum takes the place of; None where nothing says it."""
  total_steps = config.integer("total_steps", None, minimum=1)
  if total_steps is not None:
    return total_steps * batch_size / num_examples
  return config.number("total_epochs", None, above=0.0)


def _budget(settings: CurriculumSettings, baseline: float | None) -> float:
  if settings.epochs is not None:
    return settings.epochs
  if baseline is None:
    raise ConfigError(
      "`config.curriculum.epochs` is needed where neither `config.total_epochs` nor "
      "`config.total_steps` gives the baseline's length"
    )
  plus = settings.name == "efficienttrain++"
  return baseline / efficienttrain.PUBLISHED_SAVING if plus else baseline


def _warmup_epochs(config: Config, num_examples: int, batch_size: int) -> float:
  schedule = config.optimizer.group("schedule")
  steps = schedule.integer("warmup_steps", None, minimum=0)
  if steps is not None:
    return steps * batch_size / num_examples
  return schedule.number("warmup_epochs", 0.0, minimum=0.0)


def _check_task(config: Config, erasing: Mapping[str, Any] | None) -> None:
  name = config.group("task").choice("name", task_names(), "classification")
  fields = {field.name for field in dataclasses.fields(task_settings(name))}
  for needed in ("shrink", *(("erasing",) if erasing else ())):
    if needed not in fields:
      raise ConfigError(
        f"`config.curriculum` works within the step, and the task {name!r} has no setting "
        f"{needed!r} for it: give its settings one (see hybrid_vit.tasks.classification), or "
        "describe the phases in config.phases"
      )


class _Network:
  """The configured network at several sizes, as shapes alone."""

  def __init__(self, config: Config, full_size: int):
    fields = config.model
    self._name, self._full = fields.name, full_size
    self._own = fields.group("arguments").as_dict()
    entry = model_entry(self._name)
    self.module = entry.module_class.__module__.rpartition(".")[2]
    self._model = create_model(self._name, num_classes=10, **self._own)

  def arguments_at(self, size: int) -> dict[str, Any]:
    """What the network calls otherwise at another size."""
    if size == self._full or not hasattr(self._model, "at_size"):
      return {}
    return dict(self._model.at_size(size, self._full))

  def scaled_drop_path(self, name: str, budget: float, baseline: float | None) -> dict[str, Any]:
    """ "++" scales it by the budget over 200 epochs, two thirds of the recipe's 300."""
    rate = getattr(self._model, "drop_path_rate", None)
    if name != "efficienttrain++" or not rate or baseline is None:
      return {}
    scale = efficienttrain.PUBLISHED_SAVING * budget / baseline
    return {} if math.isclose(scale, 1.0) else {"drop_path_rate": rate * scale}

  def fitted(self, name: str, family: str) -> tuple[int, ...]:
    """The published fractions of the full size, to the nearest multiples that the network takes."""
    multiple = _first_multiple(self._model.features[-1].stride, self._full)
    while True:
      sizes = efficienttrain.fitted_sizes(name, self._full, family=family, multiple=multiple)
      refused = [size for size in dict.fromkeys(sizes) if self._refusal(size) is not None]
      if not refused:
        return sizes
      if 2 * multiple > self._full:
        self.check(refused[0])
      multiple *= 2

  def check(self, size: int) -> None:
    """Raises ConfigError where the network does not take pictures of that size."""
    refusal = self._refusal(size)
    if refusal is not None:
      raise ConfigError(
        f"`config.curriculum`: {self._name} does not take pictures of {size}x{size}: {refusal}. "
        f"Give sizes that it takes, up to {self._full} (config.curriculum.sizes)"
      )

  def _refusal(self, size: int) -> str | None:
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    answer: Callable[..., Any]
    try:
      model = create_model(self._name, num_classes=10, **{**self._own, **self.arguments_at(size)})
      answer = lambda key, x: model.init_with_output(key, x)[0]  # noqa: E731
      _, endpoints = jax.eval_shape(answer, jax.random.key(0), images)
    except (ValueError, TypeError, ZeroDivisionError, IndexError) as error:
      return str(error).strip().rstrip(".") or type(error).__name__
    empty = [name for name, map_ in endpoints.items() if 0 in map_.shape]
    return f"nothing is left of it at {empty[0]!r}" if empty else None


def _first_multiple(stride: int, full: int) -> int:
  """The largest even part of a stride, by halves, that divides the full size finely enough."""
  while stride > 2 and (stride % 2 or full % stride or full // stride < _RESOLUTION):
    if stride % 2:
      return 2 * stride if full % (2 * stride) == 0 else 2
    stride //= 2
  return max(stride, 2)
