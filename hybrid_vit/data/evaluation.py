"""Evaluation sets: opened, read by every process in its part, put on devices as global arrays."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from hybrid_vit import sharding
from hybrid_vit.data import loader
from hybrid_vit.data.errors import CorruptExampleError
from hybrid_vit.data.pipeline import EvaluationSettings, open_source, readable_example
from hybrid_vit.data.sources import Source
from hybrid_vit.data.spec import Fields, kinds, on_device, resolve, row
from hybrid_vit.data.splits import sample_indices
from hybrid_vit.data.transforms import parse_transform


class EvaluationSet:
  """One of `config.evaluation.sets`; see `hybrid_vit.tasks.base.EvaluationData`.

  Attributes:
    name: of the set.
    settings: as configured.
    info: what its source says of itself.
    part: which part of its rows this process reads; others may read the same.
    interrupt: called before each batch; may raise, to end a pass early.
  """

  def __init__(
    self,
    settings: EvaluationSettings,
    fields: Fields,
    mesh: Mesh,
    interrupt: Callable[[], None] = lambda: None,
  ):
    self.name, self.settings, self.interrupt = settings.name, settings, interrupt
    self.source: Source = open_source(settings)
    self.info: Mapping[str, Any] = self.source.info
    self._transform = parse_transform(settings.transform, settings.decoder, kinds(fields))
    self._fields = resolve(fields, self._transform, lambda: readable_example(self.source))
    self._sharding = sharding.batch_sharding(mesh)
    self.part, parts = sharding.batch_part(self._sharding)
    self._batches = loader.eval_batches(
      self.source,
      loader.Reading(settings.batch_size, self._transform, self._fields),
      process_index=self.part,
      process_count=parts,
      num_threads=settings.num_threads,
      num_processes=settings.num_processes,
      opens=functools.partial(open_source, settings),
      max_corrupt_fraction=settings.max_corrupt_fraction,
    )

  def __len__(self) -> int:
    return len(self.source)

  def batches(self) -> Iterator[tuple[dict[str, jax.Array], dict[str, list[Any]]]]:
    """One pass, as global arrays, with this process's host-only fields."""
    for arrays, host in itertools.islice(self._batches, self.settings.max_batches):
      self.interrupt()
      yield sharding.put_batch(arrays, self._sharding), host

  def sample(self, count: int) -> dict[str, np.ndarray]:
    """Rows of at most `count` readable examples spread evenly over the set."""
    names = on_device(self._fields)
    rows = [
      {name: row(field, name, example[name]) for name, field in names.items()}
      for example in self.examples(count)
    ]
    return {name: np.stack([r[name] for r in rows]) if rows else np.zeros((0,)) for name in names}

  def examples(self, count: int) -> list[dict[str, Any]]:
    """At most `count` readable examples spread evenly over the set, transformed."""
    found = []
    for index in sample_indices(len(self), count):
      try:
        found.append(self.example(index))
      except CorruptExampleError:
        continue
    return found

  def example(self, index: int) -> dict[str, Any]:
    """The example of that number in the source, transformed.

    Raises:
      CorruptExampleError: it cannot be read.
    """
    return self._transform(dict(self.source[index]), np.random.default_rng(index))

  def describe(self, index: int) -> str:
    """The name of an example, for people."""
    return self.source.describe(index)


def open_evaluation(
  settings: Sequence[EvaluationSettings],
  fields: Callable[[str], Fields],
  mesh: Mesh,
  interrupt: Callable[[], None] = lambda: None,
) -> list[EvaluationSet]:
  """All sets; `fields` gives those of a set's kind."""
  return [EvaluationSet(item, fields(item.kind), mesh, interrupt) for item in settings]


def describe_preparation(
  preprocessing: Any, said_by: str, settings: Sequence[EvaluationSettings]
) -> str:
  """How the pictures of each set are prepared and who says so, in lines for people."""
  lines = [f"mean {preprocessing.mean}, std {preprocessing.std}: {said_by}"]
  for item in settings:
    own = "by the configuration's own transform, whatever the weights say"
    said = own if item.own_transform else said_by
    lines.append(f"{item.name}: {item.transform} ({item.decoder}): {said}")
  return "\n".join(lines)
