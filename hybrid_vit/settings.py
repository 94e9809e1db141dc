"""The settings of the loop itself, and their reader."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from hybrid_vit.config import Config, ConfigError
from hybrid_vit.data.pipeline import EvaluationSettings
from hybrid_vit.early_stop import EarlyStop
from hybrid_vit.sinks import SINKS
from hybrid_vit.tasks.base import Task, evaluation_kind

# XLA's levels of optimisation, by the number that its options have: compilers of TPUs are done
# three to eight times sooner with the program of "O0", which takes four to seven times as long.
XLA_OPTIMIZATION_LEVELS: Mapping[str, int] = {"O0": 9, "O1": 19, "O2": 29, "O3": 39}


@dataclasses.dataclass(frozen=True)
class Settings:
  """What the loop itself goes by; see docs/architecture.md.

  Attributes:
    seed: of the parameters, the order of the data and every draw.
    log_every: steps between lines of metrics.jsonl.
    evaluate_every_steps: steps between evaluations; None: by epochs.
    evaluate_every_epochs: epochs between evaluations; 0: at the end only.
    ema_decay: of the averaged weights; None for none.
    accumulation: parts of a batch that are computed one after the other.
    skip_bad_steps: how many steps in a row may be skipped for a loss that is not finite.
    init_from: weights to begin with.
    resume_from: another run, whose whole state is gone on with.
    reinitialize_head: whether the head begins anew all the same.
    keep: how many states are kept.
    save_every_steps: see `Checkpointer`.
    save_every_minutes: see `Checkpointer`.
    best_metric: "set/measure" by which the best weights are kept; None: they are not.
    best_is_max: its direction.
    sinks: where figures go besides metrics.jsonl.
    smoke: whether the run was shortened to a few steps.
    early_stop: when the training ends before its last step; None: never.
    carry_head: which rows of the weights' head are taken over, see `weights.head_rows`; None: all,
      or none where the head begins anew.
    xla_optimization_level: of `XLA_OPTIMIZATION_LEVELS`, of the training step; None: XLA's own.
  """

  seed: int
  log_every: int
  evaluate_every_steps: int | None
  evaluate_every_epochs: float
  ema_decay: float | None
  accumulation: int
  skip_bad_steps: int
  init_from: str | None
  resume_from: str | None
  reinitialize_head: bool
  keep: int
  save_every_steps: int | None
  save_every_minutes: float | None
  best_metric: str | None
  best_is_max: bool
  sinks: tuple[str, ...]
  smoke: bool
  early_stop: EarlyStop | None = None
  carry_head: str | None = None
  xla_optimization_level: str | None = None


def read_settings(config: Config, task: Task, evaluation: Sequence[EvaluationSettings]) -> Settings:
  """The fields of the loop.

  Raises:
    ConfigError: a best metric that no evaluation set measures.
  """
  checkpoint = config.group("checkpoint")
  known = {
    f"{item.name}/{measure}": way
    for item in evaluation
    for measure, way in evaluation_kind(task, item.kind).measures.items()
  }
  default = next(iter(known), None)
  best = checkpoint.text("best_metric", default)
  if not checkpoint.flag("keep_best", True):
    best = None
  if best is not None and best not in known:
    raise ConfigError(
      f"`config.checkpoint.best_metric` is {best!r}; there are: {', '.join(known) or 'none'}"
    )
  early_stop = None
  if "early_stop" in config:
    early_stop = config.group("early_stop").as_dataclass(EarlyStop)
    if best is None:
      raise ConfigError(
        "`config.early_stop` needs a best measure: set config.checkpoint.best_metric, and "
        "keep_best to True"
      )
  smoke = config.integer("smoke_steps", None, minimum=1) is not None
  accumulation = config.integer("accumulation_steps", 1, minimum=1)
  if accumulation > 1 and not task.separable and not hasattr(task, "embed"):
    raise ConfigError(
      f"`config.accumulation_steps` is {accumulation}, and this task's loss looks at a whole "
      "batch: 1 was expected"
    )
  log_every = config.integer("log_every_steps", 50, minimum=1)
  sinks = tuple(config.get("sinks", ("tensorboard",)))
  for sink in sinks:
    if sink not in SINKS:
      raise ConfigError(f"`config.sinks` names {sink!r}; there are: {', '.join(SINKS)}")
  level = config.get("xla_optimization_level")
  if level is not None:
    level = config.choice("xla_optimization_level", XLA_OPTIMIZATION_LEVELS)
  return Settings(
    seed=config.integer("seed", 0, minimum=0),
    log_every=1 if smoke else log_every,
    evaluate_every_steps=config.integer("evaluate_every_steps", None, minimum=1),
    evaluate_every_epochs=config.number("evaluate_every_epochs", 1.0, minimum=0.0),
    ema_decay=config.number("ema_decay", None, minimum=0.0),
    accumulation=accumulation,
    skip_bad_steps=config.integer("skip_bad_steps", 0, minimum=0),
    init_from=config.text("init_from", None),
    resume_from=config.text("resume_from", None),
    reinitialize_head=config.flag("reinitialize_head", False),
    keep=checkpoint.integer("keep", 2, minimum=1),
    save_every_steps=checkpoint.integer("every_steps", None, minimum=1),
    save_every_minutes=checkpoint.number("every_minutes", 15.0, above=0.0),
    best_metric=best,
    best_is_max=best is None or known[best] == "max",
    sinks=sinks,
    smoke=smoke,
    early_stop=early_stop,
    carry_head=config.text("carry_head", None),
    xla_optimization_level=level,
  )
