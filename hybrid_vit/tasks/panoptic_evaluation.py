"""Panoptic quality of a set, with the mean IoU and COCO's AP of the same answers.

Mask2Former reports the three of one model: classes of all pixels come of its semantic rule, objects
of its rule for instances, of things alone. True objects are the segments of things. (The authors
measure AP against COCO's instance annotations, whose outlines and crowds are others.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from hybrid_vit.data import segments
from hybrid_vit.data.classes import names_or_numbers
from hybrid_vit.data.map_reading import IGNORE
from hybrid_vit.data.mask_encoding import encode_mask
from hybrid_vit.mask_inference import MaskAnswer, MaskInference, PanopticPicture, boxes_around
from hybrid_vit.metrics.coco_ap import coco_metrics, evaluate_coco
from hybrid_vit.metrics.panoptic_quality import Segments, panoptic_metrics, panoptic_sums
from hybrid_vit.metrics.segmentation import confusion, segmentation_metrics
from hybrid_vit.panoptic_plots import plot_panoptic
from hybrid_vit.tasks.base import EvaluationData, Variables
from hybrid_vit.tasks.dense import DRAWN
from hybrid_vit.tasks.detection import Picture, as_rows, local_rows
from hybrid_vit.tasks.mask2former_inference import Segment
from hybrid_vit.tasks.processes import (
  gathered_over_processes,
  local_variables,
  summed_over_processes,
)
from hybrid_vit.tasks.segmentation import ClassesOfMaps


class PanopticClasses(ClassesOfMaps, Protocol):
  """Of a task also the classes that are countable; () where the data has to say it."""

  @property
  def thing_classes(self) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True)
class Counts:
  """What adds up over pictures, and the pictures whose objects are compared at the end.

  Attributes:
    sums: see `panoptic_sums`.
    matrix: see `confusion`.
    pictures: of things alone.
  """

  sums: np.ndarray
  matrix: np.ndarray
  pictures: list[Picture]


class PanopticEvaluator:
  """See the head of this file."""

  def __init__(self, task: PanopticClasses, data: EvaluationData, inference: MaskInference):
    self.name = data.name
    self._task, self._data, self._inference = task, data, inference
    names, things = data.info.get("map_class_names"), data.info.get("thing_classes", ())
    if names and len(names) != task.num_classes:
      raise ValueError(
        f"the segments of evaluation set {data.name!r} have {len(names)} classes and the head "
        f"{task.num_classes}: evaluate on a set of the same classes, or train a head for these"
      )
    if not things and not task.thing_classes:
      raise ValueError(
        f"evaluation set {data.name!r} does not say which classes are things, nor do the weights; "
        "coco_panoptic: and scenes do"
      )
    self._things = task.thing_classes or tuple(int(c) for c in things)

  def run(self, variables: Variables) -> dict[str, float]:
    """See `Evaluator`; "examples" is the number of pictures that counted.

    Qualities of things or of stuff are left out where the set has none, and nothing of them was
    found.

    Raises:
      ValueError: nothing is annotated in the whole set, or a segment is of a class that the head
        has not, with the example's number.
    """
    counts = self.counts(variables)
    classes = self._task.num_classes
    if not counts.matrix.sum():
      raise ValueError(f"no pixel of evaluation set {self.name!r} has a segment")
    is_thing = np.isin(np.arange(classes), self._things)
    found = panoptic_metrics(counts.sums, is_thing)
    found["mean_iou"] = segmentation_metrics(counts.matrix)["mean_iou"]
    truth, detected = as_rows(counts.pictures)
    precision = coco_metrics(evaluate_coco(truth, detected, self._things, kind="masks"))
    found |= {f"mask_{name.lower()}": value for name, value in precision.items()}
    found = {name: value for name, value in found.items() if not np.isnan(value)}
    return {**found, "examples": float(len(counts.pictures))}

  def counts(self, variables: Variables) -> Counts:
    """Of all pictures of the set, the same on every process."""
    own, classes = local_variables(variables), self._task.num_classes
    sums = np.zeros((classes, 4), np.float64)
    matrix = np.zeros((classes, classes), np.int64)
    pictures = []
    for batch, host in self._data.batches():
      indices = local_rows(batch["index"])
      for row, image in enumerate(host["image"]):
        if image is None:
          continue
        index, example = int(indices[row]), {key: values[row] for key, values in host.items()}
        answer = self._inference.answer(own, image)
        try:
          part = counted(answer, example, index, classes, self._things)
        except ValueError as error:
          raise ValueError(f"evaluation set {self.name!r}, example {index}: {error}") from error
        sums, matrix = sums + part.sums, matrix + part.matrix
        pictures += part.pictures
    added = summed_over_processes({"sums": sums, "matrix": matrix}, self._data.part)
    pictures = gathered_over_processes(pictures, self._data.part)
    pictures.sort(key=lambda picture: picture.index)
    return Counts(added["sums"], added["matrix"], pictures)

  def draw(self, variables: Variables, path: Path) -> bool:
    """Photos with the segments that were found and those that are there."""
    own, examples = local_variables(variables), self._data.examples(DRAWN)
    if jax.process_index() or not examples:
      return bool(examples)
    task = self._task
    names = task.map_class_names or self._data.info.get("map_class_names", ())
    plot_panoptic(
      [example["image"] for example in examples],
      [self._inference.panoptic(own, example["image"], self._things) for example in examples],
      names_or_numbers(names, task.num_classes),
      np.array(task.palette, np.uint8),
      path,
      truths=[true_picture(example, self._things) for example in examples],
    )
    return True


def counted(
  answer: MaskAnswer,
  example: Mapping[str, Any],
  index: int,
  num_classes: int,
  things: tuple[int, ...],
) -> Counts:
  """One picture's counts.

  Args:
    answer: of the network.
    example: with the keys of `data.segments`.
    index: of the example.
    num_classes: of things and stuff.
    things: classes that are countable.

  Raises:
    ValueError: a class that there is not, or a segment of which nothing is known.
  """
  found = answer.panoptic(things)
  numbers, labels, crowd = segments.numbered_segments(example)
  true = Segments(np.arange(1, len(labels) + 1), labels.astype(np.int64), crowd)
  sums = panoptic_sums(found.map, _listed(found), numbers, true, num_classes)
  table = np.concatenate([[IGNORE], true.classes])
  matrix = confusion(answer.classes(), table[numbers], num_classes, IGNORE)
  objects = np.flatnonzero(np.isin(labels, things))
  masks = np.array([numbers == row + 1 for row in objects], bool).reshape(-1, *numbers.shape)
  picture = Picture(
    index=index,
    found=answer.objects(things),
    boxes=boxes_around(masks),
    labels=true.classes[objects],
    crowd=crowd[objects],
    masks=tuple(encode_mask(mask) for mask in masks),
  )
  return Counts(sums, matrix, [picture])


def true_picture(example: Mapping[str, Any], things: tuple[int, ...]) -> PanopticPicture:
  """The segments of an example, see `segments.numbered_segments`."""
  numbers, labels, _ = segments.numbered_segments(example)
  found = [
    Segment(number, label, label in things) for number, label in enumerate(labels.tolist(), 1)
  ]
  return PanopticPicture(numbers, tuple(found))


def _listed(picture: PanopticPicture) -> Segments:
  ids = np.array([s.id for s in picture.segments], np.int64)
  return Segments(ids, np.array([s.category for s in picture.segments], np.int64))
