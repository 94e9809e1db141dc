"""Where the examples of a run come from: the settings, and the one place that opens data."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hybrid_vit.data import arguments as check
from hybrid_vit.data import loader
from hybrid_vit.data.balance import BalancedSource
from hybrid_vit.data.canvases import canvas_groups, photo_sizes
from hybrid_vit.data.errors import CorruptExampleError
from hybrid_vit.data.sources import Source, create_source

if TYPE_CHECKING:
  from hybrid_vit.build import Run

# How many examples are tried for one that can be read, where a shape must be looked up.
_TRIED = 100


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
  """`config.data`: how training examples are read. Batch and transform are the phases'.

  Attributes:
    source: see `hybrid_vit.data.sources`.
    split: see there.
    data_dir: where prepared TFDS data lies; None for TFDS's own default.
    num_threads: that read and transform; None for the cores that this process may use.
    num_processes: that do so instead, see `hybrid_vit.data.reading_processes`; None for none.
    repeats: how many times a drawn example comes in a row (repeated augmentation).
    max_corrupt_fraction: more unreadable examples than that of a process's part stop the run.
    decoder: "opencv" or "pil", see `hybrid_vit.data.transforms`.
    balance: how far small classes come more often, from 0 (as they are) to 1 (all alike), see
      `hybrid_vit.data.balance`.
    canvases: (height, width) of each shape of a batch, see `hybrid_vit.data.canvases`; {canvas} in
      the transform stands for the one of an example. () for one shape.
  """

  source: str
  split: str = "train"
  data_dir: str | None = None
  num_threads: int | None = None
  num_processes: int | None = None
  repeats: int = 1
  max_corrupt_fraction: float = 0.1
  decoder: str = "opencv"
  balance: float = 0.0
  canvases: tuple[tuple[int, int], ...] = ()

  def __post_init__(self) -> None:
    for canvas in self.canvases:
      check.sides("config.data.canvases", canvas)
    for name in ("num_threads", "num_processes", "repeats"):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f"`config.data.{name}` is {value}; at least 1 was expected")
    _check_workers("config.data", self.num_threads, self.num_processes)
    _check_fraction("config.data", self.max_corrupt_fraction)


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
  """One of `config.evaluation.sets`.

  Attributes:
    name: of the set.
    source: see `hybrid_vit.data.sources`.
    batch_size: of all devices together.
    transform: of its examples, filled in.
    own_transform: whether the set names it, rather than the weights' preprocessing.
    split: see `hybrid_vit.data.sources`.
    data_dir: as in `TrainingSettings`.
    num_threads: as in `TrainingSettings`.
    num_processes: as there, for each pass anew.
    max_corrupt_fraction: unreadable examples that are allowed; a figure without them is no longer
      that of the set, so none are unless told.
    decoder: "pil", which published figures are measured with, or "opencv".
    max_batches: where a pass ends early; None: at its end.
    kind: what is measured, of a task that can measure several things; "" for its usual one.
    options: what the task is told of the set; it refuses what it does not know.
  """

  name: str
  source: str
  batch_size: int
  transform: str
  own_transform: bool
  split: str = "validation"
  data_dir: str | None = None
  num_threads: int | None = None
  num_processes: int | None = None
  max_corrupt_fraction: float = 0.0
  decoder: str = "pil"
  max_batches: int | None = None
  kind: str = ""
  options: dict[str, Any] = dataclasses.field(default_factory=dict)

  def __post_init__(self) -> None:
    path = f"config.evaluation.sets.{self.name}"
    _check_fraction(path, self.max_corrupt_fraction)
    _check_workers(path, self.num_threads, self.num_processes)


def _check_workers(path: str, threads: int | None, processes: int | None) -> None:
  if threads is not None and processes is not None:
    raise ValueError(
      f"`{path}.num_threads` is {threads} and `{path}.num_processes` {processes}; one of them was "
      "expected: each process has a thread that waits for it"
    )


def _check_fraction(path: str, fraction: float) -> None:
  if not 0.0 <= fraction <= 1.0:
    raise ValueError(
      f"`{path}.max_corrupt_fraction` is {fraction}; a number in [0, 1] was expected"
    )


def open_source(settings: TrainingSettings | EvaluationSettings) -> Source:
  """Opens the data.

  Raises:
    MissingDataError: it is not there; the message says what prepares it.
  """
  source = create_source(settings.source, settings.split, settings.data_dir)
  balance = getattr(settings, "balance", 0.0)
  return BalancedSource(source, balance) if balance else source


def source_info(source: Source) -> dict[str, Any]:
  """`source.info` with "class_counts", examples of each class, where they are known beforehand."""
  labels, names = getattr(source, "labels", None), source.info.get("class_names", ())
  if labels is None:
    return dict(source.info)
  return {**source.info, "class_counts": np.bincount(labels, minlength=len(names))}


def readable_example(source: Source, transform: Any = None) -> Mapping[str, Any]:
  """An example that can be read (and transformed, where a transform is given).

  Raises:
    ValueError: none of the first ones can.
  """
  for index in itertools.islice(range(len(source)), _TRIED):
    try:
      example = source[index]
      if transform is not None:
        transform(dict(example), np.random.default_rng(0))
      return example
    except CorruptExampleError:
      continue
  raise ValueError(
    f"none of the first {min(_TRIED, len(source))} examples can be read, e.g. {source.describe(0)}"
  )


def training_batches(
  run: Run, source: Source, *, start_step: int, process_index: int, process_count: int
) -> loader.TrainBatches:
  """This process's part of each batch from `start_step` on, through all phases."""
  readings = [
    loader.Reading(
      phase.batch_size,
      reading.transform,
      reading.fields,
      phase.steps,
      phase.replay,
      phase.replay_steps,
      tuple(loader.Reading(phase.batch_size, r.transform, r.fields) for r in reading.others),
    )
    for phase, reading in zip(run.curriculum.phases, run.readings)
  ]
  groups = None
  if len(run.data.canvases) > 1:
    groups = canvas_groups(photo_sizes(source), run.data.canvases)
  return loader.train_batches(
    source,
    readings,
    seed=run.settings.seed,
    start_step=start_step,
    process_index=process_index,
    process_count=process_count,
    num_threads=run.data.num_threads,
    num_processes=run.data.num_processes,
    opens=functools.partial(open_source, run.data),
    repeats=run.data.repeats,
    max_corrupt_fraction=run.data.max_corrupt_fraction,
    groups=groups,
  )
