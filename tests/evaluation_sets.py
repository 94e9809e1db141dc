"""An evaluation set as evaluators are given it, of a few scenes."""

import numpy as np

from hybrid_vit.data.spec import on_device


class SceneSet:
  """In the place of `EvaluationData`: of each example what its task asks for, and one empty row.

  Attributes:
    name: of the set.
    part: of the processes.
    info: of the scenes; ids of the classes of objects are 100 and on.
  """

  name, part = "held_out", 0

  def __init__(self, source, count, task):
    """
    Args:
      source: of scenes.
      count: how many of them.
      task: its evaluation's fields, as far as they are kept on the host, are what examples have.
    """
    self.info = {**source.info, "category_ids": tuple(range(100, 108))}
    self._source, self._count = source, count
    fields = task.spec.evaluation
    self._names = [n for n, f in fields.items() if f.on_host or n not in on_device(fields)]

  def batches(self):
    rows = [*self.examples(self._count), None]
    host = {name: [None if e is None else e.get(name) for e in rows] for name in self._names}
    yield {"index": np.arange(len(rows))}, host

  def examples(self, count):
    return [self.example(i) for i in range(count)]

  def example(self, index):
    """One scene; they are numbered 10, 20, 30 by their data."""
    return {**self._source[index], "image_id": np.int64(10 * index + 10)}

  def describe(self, index):
    return f"scene {index}"
