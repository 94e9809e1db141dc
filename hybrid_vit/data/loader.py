"""Batches: the position in the data is the step, so there is nothing else to save.

The global batch of step s depends on the source, the transform, the seed and s alone, never on the
number of processes or threads: process p takes the contiguous rows [p B/n, (p+1) B/n) of it. Each
row draws its chance from the seed and its position, counted in rows since the start.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
from collections.abc import Iterator
from typing import Any

import absl.flags
import grain.python as grain
import numpy as np

from hybrid_vit.data.sources import Source
from hybrid_vit.data.transforms import CorruptPictureError, parse_transform

Batch = dict[str, np.ndarray]

# A run of unreadable pictures longer than this is no accident.
_MAX_REPLACEMENTS = 100


class CorruptDataError(ValueError):
  """More of the data is unreadable than the configuration allows."""


class Corrupt:
  """The unreadable pictures this process has met, each named once."""

  def __init__(self, source: Source, max_fraction: float):
    self._source, self._max_fraction = source, max_fraction
    self._indices: dict[int, str] = {}
    self._lock = threading.Lock()

  @property
  def count(self) -> int:
    """How many different ones."""
    return len(self._indices)

  @property
  def names(self) -> list[str]:
    """Their names, in the order in which they were met."""
    return list(self._indices.values())

  def add(self, index: int, error: Exception) -> None:
    """Notes one.

    Raises:
      CorruptDataError: that is too many.
    """
    with self._lock:
      if index in self._indices:
        return
      name = self._indices[index] = self._source.describe(index)
    logging.warning("skipped a picture that cannot be read: %s (%s)", name, error)
    if self.count > self._max_fraction * len(self._source):
      raise CorruptDataError(
        f"{self.count} of {len(self._source)} pictures cannot be read, more than "
        f"config.data.max_corrupt_fraction = {self._max_fraction:g} allows; among them: "
        f"{', '.join(self.names[:5])}"
      )


class TrainBatches:
  """Endless iterator over this process's rows; see `train_batches`."""

  def __init__(
    self, rows: Iterator[dict[str, Any]], rows_per_batch: int, corrupt: Corrupt, spe: int
  ):
    self._rows, self._rows_per_batch = rows, rows_per_batch
    self.corrupt, self.steps_per_epoch = corrupt, spe

  def __iter__(self) -> TrainBatches:
    return self

  def __next__(self) -> Batch:
    return _stack([next(self._rows) for _ in range(self._rows_per_batch)])


def train_batches(
  source: Source,
  transform: str,
  *,
  batch_size: int,
  seed: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int | None = None,
  prefetch: int = 2,
  repeats: int = 1,
  max_corrupt_fraction: float = 0.1,
  decoder: str = "opencv",
) -> TrainBatches:
  """Shuffled batches from `start_step` on, without end; every epoch in a new order.

  Args:
    source: labelled pictures.
    transform: see `hybrid_vit.data.transforms`.
    batch_size: of all processes together. The rest of an epoch that fills no batch is dropped.
    seed: of the order and of every row's chance.
    start_step: the step that the first batch is for.
    process_index: which part.
    process_count: of how many.
    num_threads: that read and transform; the number of cores where None.
    prefetch: batches kept ready.
    repeats: each drawn picture comes so many times in a row, under other draws (repeated
      augmentation, Hoffer et al., 2019); an epoch keeps its length, as in timm.
    max_corrupt_fraction: more unreadable pictures than that stop the run.
    decoder: "opencv" or "pil".

  Returns:
    An iterator of {"image", "label", "index"}, with `.corrupt` and `.steps_per_epoch`. Unreadable
    pictures are replaced by the next readable one in the epoch's order.

  Raises:
    ValueError: a batch that processes do not divide, or larger than the data.
  """
  rows = _rows_per_process(batch_size, process_count)
  length = len(source)
  steps_per_epoch = length // batch_size
  if not steps_per_epoch:
    raise ValueError(f"a batch of {batch_size} is larger than the data ({length} pictures)")
  apply = parse_transform(transform, decoder)
  corrupt = Corrupt(source, max_corrupt_fraction)

  @functools.lru_cache(maxsize=3)
  def order(epoch: int) -> np.ndarray:
    drawn = np.random.default_rng((seed, 0, epoch)).permutation(length)
    return np.repeat(drawn, repeats)[:length]

  def load(local: int) -> dict[str, Any]:
    step, row = start_step + local // rows, process_index * rows + local % rows
    epoch, offset = step // steps_per_epoch, (step % steps_per_epoch) * batch_size + row
    position = step * batch_size + row
    for further in range(_MAX_REPLACEMENTS):
      index = int(order(epoch)[(offset + further) % length])
      rng = np.random.default_rng((seed, 1, position, further))
      try:
        example = apply(source[index], rng)
      except (CorruptPictureError, OSError) as error:
        corrupt.add(index, error)
        continue
      return {"image": example["image"], "label": example["label"], "index": index}
    raise CorruptDataError(
      f"{_MAX_REPLACEMENTS} pictures in a row cannot be read: {corrupt.names[-1]}"
    )

  return TrainBatches(
    _threaded(load, 2**40, num_threads, prefetch * rows), rows, corrupt, steps_per_epoch
  )


class EvalBatches:
  """One pass over a source; see `eval_batches`."""

  def __init__(self, load: Any, steps: int, rows: int, num_threads: int | None, corrupt: Corrupt):
    self._load, self._steps, self._rows = load, steps, rows
    self._num_threads, self.corrupt = num_threads, corrupt

  def __len__(self) -> int:
    return self._steps

  def __iter__(self) -> Iterator[Batch]:
    examples = _threaded(self._load, self._steps * self._rows, self._num_threads, 2 * self._rows)
    blank: np.ndarray | None = None
    for _ in range(self._steps):
      batch = [next(examples) for _ in range(self._rows)]
      shown = next((row["image"] for row in batch if row["image"] is not None), None)
      if shown is None and blank is None:
        # Every row of this process is padding: any readable picture gives the shape.
        shown = next(
          (image for k in range(self._rows) if (image := self._load(-1 - k)["image"]) is not None),
          None,
        )
        if shown is None:
          raise CorruptDataError("no picture of the evaluation set can be read")
      blank = np.zeros_like(shown) if shown is not None else blank
      for row in batch:
        if row["image"] is None:
          row["image"] = blank
      yield _stack(batch)


def eval_batches(
  source: Source,
  transform: str,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  num_threads: int | None = None,
  max_corrupt_fraction: float = 0.1,
  decoder: str = "opencv",
) -> EvalBatches:
  """One pass in order, again each time it is iterated; "mask" is 0 for rows that do not count.

  Every process gets the same number of batches; the last one is padded. An unreadable picture
  keeps its row, with mask 0.

  Raises:
    ValueError: a batch that processes do not divide.
  """
  rows = _rows_per_process(batch_size, process_count)
  length = len(source)
  apply = parse_transform(transform, decoder)
  corrupt = Corrupt(source, max_corrupt_fraction)

  def load(local: int) -> dict[str, Any]:
    if local < 0:
      position = (-1 - local) % length
    else:
      position = (local // rows) * batch_size + process_index * rows + local % rows
    empty = {"image": None, "label": 0, "index": position, "mask": 0.0}
    if position >= length:
      return empty
    try:
      example = apply(source[position], np.random.default_rng(position))
    except (CorruptPictureError, OSError) as error:
      corrupt.add(position, error)
      return empty
    return {"image": example["image"], "label": example["label"], "index": position, "mask": 1.0}

  return EvalBatches(load, math.ceil(length / batch_size), rows, num_threads, corrupt)


def _rows_per_process(batch_size: int, process_count: int) -> int:
  if batch_size % process_count:
    raise ValueError(f"a batch of {batch_size} does not fall into {process_count} processes' parts")
  return batch_size // process_count


def _threaded(load: Any, length: int, num_threads: int | None, ahead: int) -> Iterator[Any]:
  """`load(0), load(1), …`, in this order, computed by threads."""
  if not absl.flags.FLAGS.is_parsed():
    # Grain reads flags of its own, which a notebook or a test has never parsed.
    absl.flags.FLAGS.mark_as_parsed()
  threads = num_threads if num_threads is not None else os.cpu_count() or 1
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
  return iter(grain.MapDataset.range(length).map(load).to_iter_dataset(options))


def _stack(rows: list[dict[str, Any]]) -> Batch:
  batch = {
    "image": np.stack([row["image"] for row in rows]),
    "label": np.asarray([row["label"] for row in rows], np.int32),
    "index": np.asarray([row["index"] for row in rows], np.int32),
  }
  if "mask" in rows[0]:
    batch["mask"] = np.asarray([row["mask"] for row in rows], np.float32)
  return batch
