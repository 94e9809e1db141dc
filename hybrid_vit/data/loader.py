"""Batches: the position in the data follows from the step, so there is nothing else to save.

The global batch of step s depends on the source, the readings, the seed and s alone, never on the
number of processes or threads: process p takes the contiguous rows [p B/n, (p+1) B/n) of it. The
position counts examples since the start, through all phases of a training; the example at position
p is number p % N of epoch p // N's order. Every epoch holds every example once, and a batch may
begin in one and end in the next. Each row draws its chance from the seed and its position. Of
photos that are grouped by canvases, each group has such a stream of its own (`data.canvases`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from hybrid_vit.data import spec
from hybrid_vit.data.ahead import Ahead, available_cores
from hybrid_vit.data.batch_memory import BatchMemory
from hybrid_vit.data.canvases import Turn, turns
from hybrid_vit.data.corrupt import Corrupt
from hybrid_vit.data.errors import CorruptDataError, CorruptExampleError
from hybrid_vit.data.examples import Transform, read_row
from hybrid_vit.data.orders import Order, members_of
from hybrid_vit.data.reading_processes import ReadingProcesses
from hybrid_vit.data.replaying import KeptRows, replayed_step
from hybrid_vit.data.sources import Source

Batch = dict[str, np.ndarray]

# A run of corrupt examples longer than this is no accident.
_MAX_REPLACEMENTS = 100
# Rows that a thread does at once: few enough that all threads end together, enough that handing
# them out costs nothing.
_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class Reading:
  """How the examples of one phase of a training, or of an evaluation, are read.

  Attributes:
    batch_size: of all processes together.
    transform: `(example, generator) → example`.
    fields: what a batch is made of, every type and shape known (`spec.resolve`).
    steps: how long the phase is; None for without end, which only the last one may be.
    replay: how often a loaded example is shown, see `hybrid_vit.data.replaying`; 1 for once.
    replay_steps: from how many steps back at most.
    others: how the examples of the second group and of further ones are read, where there are some.
  """

  batch_size: int
  transform: Transform
  fields: Mapping[str, spec.Field]
  steps: int | None = None
  replay: int = 1
  replay_steps: int = 1
  others: tuple[Reading, ...] = ()

  def __post_init__(self) -> None:
    if self.batch_size < 1:
      raise ValueError(f"batch_size is {self.batch_size}; at least 1 was expected")
    if self.steps is not None and self.steps < 0:
      raise ValueError(f"a phase of {self.steps} steps; 0 or more were expected")
    if self.replay < 1 or self.replay_steps < 1:
      raise ValueError(
        f"replay is {self.replay} and replay_steps {self.replay_steps}; at least 1 was expected"
      )
    if self.batch_size % self.replay:
      raise ValueError(
        f"a batch of {self.batch_size} does not fall into groups of {self.replay} rows, which show "
        "one loaded example and replayed ones"
      )
    for name, field in self.fields.items():
      if name in (spec.INDEX, spec.MASK, spec.REPLACED):
        raise ValueError(f"a field is called {name!r}, which the loader makes itself")
      if not field.resolved:
        raise ValueError(
          f"the shape or type of {name!r} is not known ({field.shape}, {field.dtype}): "
          "`spec.resolve` asks the transform"
        )


def examples_before(readings: Sequence[Reading], step: int) -> int:
  """The position of a step's first example: examples loaded since the start, over all phases.

  Raises:
    ValueError: a step behind the end of the last phase.
  """
  position = 0
  for reading in readings:
    steps = step if reading.steps is None else min(step, reading.steps)
    position += steps * (reading.batch_size // reading.replay)
    step -= steps
  if step:
    raise ValueError(f"the phases end {step} steps before the one that was asked for")
  return position


class TrainBatches:
  """Iterator over this process's rows; see `train_batches`.

  Attributes:
    corrupt: what could not be decoded so far: `.count`, `.names`.
  """

  def __init__(self, batches: Ahead[Batch], corrupt: Corrupt):
    self._batches, self.corrupt = batches, corrupt

  def __iter__(self) -> TrainBatches:
    return self

  def __next__(self) -> Batch:
    return next(self._batches)

  def close(self) -> None:
    """Ends its threads; there are no more batches."""
    self._batches.close()


def train_batches(
  source: Source,
  readings: Sequence[Reading],
  *,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int | None = None,
  num_processes: int | None = None,
  opens: Callable[[], Source] | None = None,
  prefetch: int = 2,
  repeats: int = 1,
  max_corrupt_fraction: float = 0.1,
  groups: np.ndarray | None = None,
) -> TrainBatches:
  """Shuffled batches from `start_step` on, every epoch in a new order.

  Args:
    source: the data.
    readings: the phases of the training, in order.
    seed: of the order and of every row's chance; not negative.
    start_step: the step that the first batch is for, counted from the start of the first phase.
    process_index: which part.
    process_count: of how many.
    num_threads: that read and transform; the cores that this process may use where None.
    num_processes: that do so instead, see `reading_processes`; None for none. Rows are the same.
    opens: gives each of them the source; None where pickle can hand the source over.
    prefetch: batches kept ready.
    repeats: each drawn example comes so many times in a row, under other draws (repeated
      augmentation, Hoffer et al., 2019); an epoch keeps its length, as in timm.
    max_corrupt_fraction: the run stops when more of this process's share of an epoch is corrupt.
    groups: int `[N]`, the group of each example, from 0; a batch is of one of them. None for one.

  Returns:
    An iterator of the declared fields' arrays (those of kind "host" are left out), `index` int32
    `[rows]`, the example that stands in the row, and `replaced` float32 `[rows]`, 1 where that is
    not the one drawn, which was corrupt, but the next good one of the epoch's order.

  Raises:
    ValueError: settings out of range; a batch that processes do not divide. While iterating: an
      example that has another shape, or a value out of its field's range, with its name.
    CorruptDataError: while iterating: too much of the data is corrupt.
    DataReadError: while iterating: an example could not be read in several tries.
  """
  if not readings:
    raise ValueError("no phases to read")
  if any(reading.steps is None for reading in readings[:-1]):
    raise ValueError("a phase without end stands before others; only the last one may be")
  for name, value, least in (
    ("seed", seed, 0), ("start_step", start_step, 0), ("repeats", repeats, 1),
    ("prefetch", prefetch, 1),
  ):  # fmt: skip
    if value < least:
      raise ValueError(f"{name} is {value}; at least {least} was expected")
  for reading in readings:
    rows = _rows_per_process(reading.batch_size, process_index, process_count)
    if rows % reading.replay:
      raise ValueError(
        f"a process's {rows} rows of a batch do not fall into groups of {reading.replay}, which "
        "show one loaded example and replayed ones: choose another batch size, or fewer processes"
      )
  threads, stop = _threads(num_threads, num_processes), threading.Event()
  length = _length(source)
  corrupt = Corrupt(source, max_corrupt_fraction, length / process_count / repeats)
  members = members_of(groups, length)
  _check_groups(readings, len(members))
  orders = [Order(own, (seed, 0), repeats, (g,) * (g > 0)) for g, own in enumerate(members)]

  reader = _reader(source, readings, num_processes, opens, stop)

  def fill_row(
    batch: Batch, row: int, names: Iterable[str], reading: Reading, position: int, place: Turn
  ) -> None:
    """The example of a position, or another one in its place."""
    order, count = orders[place.canvas], len(members[place.canvas])
    epoch, offset = divmod(place.position, count)
    for further in range(_MAX_REPLACEMENTS):
      index = int(order(epoch)[(offset + further) % count])
      key = (seed, 1, position, further)
      try:
        with reader.row(reading, index, key) as values:
          for name in names:
            batch[name][row] = values[name]
      except CorruptExampleError as error:
        corrupt.add(index, error, epoch)
        continue
      batch[spec.INDEX][row], batch[spec.REPLACED][row] = index, further > 0
      return
    raise CorruptDataError(
      f"{_MAX_REPLACEMENTS} examples in a row are corrupt, the last of them "
      f"{source.describe(index)}"
    )

  def fill(batch: Batch, reading: Reading, first: int, turn: Turn, start: int, end: int) -> None:
    names = spec.on_device(reading.fields)
    for row in range(start, end):
      if stop.is_set():
        return
      place = Turn(turn.canvas, turn.position + row)
      fill_row(batch, row, names, reading, first + row, place)

  def replay(
    batch: Batch, reading: Reading, kept: KeptRows, begin: int, step: int, start: int, end: int
  ) -> None:
    """As `fill`, of loaded and replayed rows; `begin` is the phase's first position."""
    loads = reading.batch_size // reading.replay
    own = process_index * len(batch[spec.INDEX])
    for row in range(start, end):
      if stop.is_set():
        return
      group, place = divmod(own + row, reading.replay)
      draw = begin * reading.replay + step * reading.batch_size + own + row
      shown = replayed_step(seed, draw, place, step, reading.replay_steps, reading.replay)
      position = begin + shown * loads + group
      values = kept.get(position)
      if values is None:
        one = _empty(reading.fields, 1, BatchMemory())
        one[spec.REPLACED] = np.empty(1, np.float32)
        fill(one, reading, position, Turn(0, position), 0, 1)
        if stop.is_set():
          return
        values = {name: value[0].copy() for name, value in one.items()}
        kept.put(position, values)
      for name, value in values.items():
        batch[name][row] = value

  def jobs() -> Iterator[tuple[Batch, list[Callable[[], None]]]]:
    begun = 0  # steps of the phases before
    sizes = (r.batch_size for r in readings for _ in _steps_of(r))
    turn = itertools.islice(turns([len(own) for own in members], sizes), start_step, None)
    for phase, reading in enumerate(readings):
      rows = reading.batch_size // process_count
      phase_start = begun
      first_step, end = max(begun, start_step), None
      if reading.steps is not None:
        begun = end = begun + reading.steps
        if end <= first_step:
          continue
      begin = examples_before(readings[: phase + 1], phase_start)
      # Those of the steps that may be drawn, and of the ones read ahead.
      memory = BatchMemory()
      kept = KeptRows((reading.replay_steps + prefetch + 2) * (rows // reading.replay))
      for step in itertools.count(first_step) if end is None else range(first_step, end):
        done = step - phase_start
        first = begin + done * reading.batch_size
        # Of one group the stream is that of all examples, replayed ones apart.
        place = next(turn) if len(members) > 1 else Turn(0, first)
        own = reading.others[place.canvas - 1] if place.canvas else reading
        batch = _empty(own.fields, rows, memory)
        batch[spec.REPLACED] = np.empty(rows, np.float32)
        job: Callable[[int, int], None]
        if reading.replay > 1:
          job = functools.partial(replay, batch, reading, kept, begin, done)
        else:
          skipped = process_index * rows
          place = Turn(place.canvas, place.position + skipped)
          job = functools.partial(fill, batch, own, first + skipped, place)
        yield batch, _chunks(job, rows, threads)

  return TrainBatches(Ahead(jobs(), threads, prefetch, stop, reader.close), corrupt)


class EvalBatches:
  """One pass over a source each time it is iterated; see `eval_batches`.

  Attributes:
    corrupt: what could not be decoded so far: `.count`, `.names`.
  """

  def __init__(self, begin: Callable[[], Ahead[Any]], steps: int, corrupt: Corrupt):
    self._begin, self._steps, self.corrupt = begin, steps, corrupt

  def __len__(self) -> int:
    return self._steps

  def __iter__(self) -> Iterator[tuple[Batch, dict[str, list[Any]]]]:
    batches = self._begin()
    try:
      yield from batches
    finally:
      batches.close()


def eval_batches(
  source: Source,
  reading: Reading,
  *,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int | None = None,
  num_processes: int | None = None,
  opens: Callable[[], Source] | None = None,
  max_corrupt_fraction: float = 0.0,
) -> EvalBatches:
  """One pass in order; every process gets the same number of batches, the last one is padded.

  Args:
    source: the data.
    reading: its `steps` does not count: a pass is a pass.
    process_index: which part.
    process_count: of how many.
    num_threads: see `train_batches`.
    num_processes: see there; they begin and end with each pass.
    opens: see there.
    max_corrupt_fraction: of this process's part of the data; none by default, because a figure
      that leaves examples out is another figure.

  Returns:
    Pairs: the declared fields' arrays with `index` int32 `[rows]` and `mask` float32 `[rows]`, 0
    for padding and corrupt examples, whose rows are blank; and the fields of kind "host" as lists
    of `rows`, None in blank rows.

  Raises:
    ValueError, CorruptDataError, DataReadError: see `train_batches`.
  """
  rows = _rows_per_process(reading.batch_size, process_index, process_count)
  threads, length = _threads(num_threads, num_processes), _length(source)
  steps = math.ceil(length / reading.batch_size)
  starts = [step * reading.batch_size + process_index * rows for step in range(steps)]
  part = sum(min(max(length - start, 0), rows) for start in starts)
  corrupt = Corrupt(source, max_corrupt_fraction, part)
  fields = spec.on_device(reading.fields)
  host_names = [name for name in reading.fields if name not in fields]

  def fill(
    batch: Batch,
    host: dict[str, list[Any]],
    first: int,
    reader: _Here | ReadingProcesses,
    stop: threading.Event,
    start: int,
    end: int,
  ) -> None:
    for row in range(start, end):
      if stop.is_set():
        return
      index = first + row
      batch[spec.INDEX][row] = index
      if index < length:
        try:
          with reader.row(reading, index, index) as values:
            for name in fields:
              batch[name][row] = values[name]
            for name in host_names:
              host[name][row] = values[name]
          batch[spec.MASK][row] = 1
          continue
        except CorruptExampleError as error:
          corrupt.add(index, error)
      for name, field in fields.items():
        batch[name][row] = spec.blank(field)

  def begin() -> Ahead[tuple[Batch, dict[str, list[Any]]]]:
    stop = threading.Event()
    reader = _reader(source, [reading], num_processes, opens, stop)

    def jobs() -> Iterator[tuple[Any, list[Callable[[], None]]]]:
      memory = BatchMemory()
      for first in starts:
        batch = _empty(fields, rows, memory)
        batch[spec.MASK] = np.zeros(rows, np.float32)
        host: dict[str, list[Any]] = {name: [None] * rows for name in host_names}
        job = functools.partial(fill, batch, host, first, reader, stop)
        yield (batch, host), _chunks(job, rows, threads)

    return Ahead(jobs(), threads, 2, stop, reader.close)

  return EvalBatches(begin, steps, corrupt)


def _check_groups(readings: Sequence[Reading], groups: int) -> None:
  for reading in readings:
    if groups > 1 and (len(reading.others) + 1 != groups or reading.replay > 1):
      raise ValueError(
        f"{groups} groups of examples, read in {len(reading.others) + 1} ways and shown "
        f"{reading.replay} times; a way for each of them, and once, were expected"
      )


def _steps_of(reading: Reading) -> Iterator[int]:
  return iter(itertools.count()) if reading.steps is None else iter(range(reading.steps))


class _Here:
  """Reads in the thread that asks."""

  def __init__(self, source: Source, stop: threading.Event):
    self._source, self._stop = source, stop

  @contextlib.contextmanager
  def row(self, reading: Reading, index: int, key: Any) -> Iterator[dict[str, Any]]:
    """See `read_row`."""
    yield read_row(self._source, index, reading.transform, reading.fields, key, self._stop)

  def close(self) -> None:
    """Nothing to end."""


def _reader(
  source: Source,
  readings: Sequence[Reading],
  num_processes: int | None,
  opens: Callable[[], Source] | None,
  stop: threading.Event,
) -> _Here | ReadingProcesses:
  if num_processes is None:
    return _Here(source, stop)
  flat = [one for reading in readings for one in (reading, *reading.others)]
  return ReadingProcesses(num_processes, source, opens or functools.partial(_itself, source), flat)


def _itself(source: Source) -> Source:
  return source


def _empty(fields: Mapping[str, spec.Field], rows: int, memory: BatchMemory) -> Batch:
  batch = {
    name: memory.empty((rows, *[n or 0 for n in field.shape]), field.dtype)
    for name, field in spec.on_device(fields).items()
  }
  batch[spec.INDEX] = np.empty(rows, np.int32)
  return batch


def _chunks(part: Callable[[int, int], None], rows: int, threads: int) -> list[Callable[[], None]]:
  size = max(1, min(_CHUNK, math.ceil(rows / threads)))
  return [functools.partial(part, i, min(i + size, rows)) for i in range(0, rows, size)]


def _rows_per_process(batch_size: int, process_index: int, process_count: int) -> int:
  if not 0 <= process_index < process_count:
    raise ValueError(f"process {process_index} of {process_count}: 0 to {process_count - 1} exist")
  if batch_size % process_count:
    raise ValueError(f"a batch of {batch_size} does not fall into {process_count} processes' parts")
  return batch_size // process_count


def _threads(num_threads: int | None, num_processes: int | None) -> int:
  """A thread for each process, which waits for it; or those that read themselves."""
  if num_processes is not None and num_threads is not None:
    raise ValueError(
      f"num_threads is {num_threads} and num_processes {num_processes}; one of them was expected"
    )
  if num_processes is not None:
    if num_processes < 1:
      raise ValueError(f"num_processes is {num_processes}; at least 1 was expected")
    return num_processes
  if num_threads is not None and num_threads < 1:
    raise ValueError(f"num_threads is {num_threads}; at least 1 was expected")
  return available_cores() if num_threads is None else num_threads


def _length(source: Source) -> int:
  length = len(source)
  if not length:
    raise ValueError("the source is empty")
  return length
