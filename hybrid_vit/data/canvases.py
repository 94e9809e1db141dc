"""Batches of photos of few shapes: each batch on one canvas, lying or standing.

Photos of detection keep their aspect and are padded. Where a batch holds lying photos or standing
ones, it is padded to 800 x 1344 or 1344 x 800 instead of to 1344 x 1344, which is 1.68 times as
large; a step is compiled for each canvas. mmdetection groups a device's two pictures so, and pads
them to the larger one.

Which canvas a step has follows from its number alone: the canvases take turns in proportion to
their photos. Each canvas has a stream of its own photos, every epoch of it in a new order, and a
batch takes the next ones of its stream. So every photo comes once in an epoch of its canvas, and a
run that goes on takes the batches that would have come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

Size = tuple[int, int]  # (height, width)


class Turn(NamedTuple):
  """What a step reads: batch rows are `position`, `position` + 1 … of the stream of a canvas."""

  canvas: int
  position: int


def canvas_groups(sizes: np.ndarray, canvases: Sequence[Size]) -> np.ndarray:
  """The canvas on which each photo can be largest, the first of several: int8 `[N]`.

  Args:
    sizes: int `[N, 2]`, (height, width) of each photo.
    canvases: of the batches.

  Raises:
    ValueError: a canvas that no photo takes.
  """
  fits = np.stack(
    [np.min(np.array(canvas) / np.asarray(sizes, np.float64), axis=1) for canvas in canvases]
  )
  groups = np.argmax(fits, axis=0).astype(np.int8)
  for number, canvas in enumerate(canvases):
    if not (groups == number).any():
      raise ValueError(
        f"no photo fits the canvas {canvas[0]} x {canvas[1]} best: leave it out of "
        "config.data.canvases"
      )
  return groups


def turns(counts: Sequence[int], batch_sizes: Iterator[int]) -> Iterator[Turn]:
  """What each step reads, from the first one on.

  Args:
    counts: photos of each canvas.
    batch_sizes: of each step.
  """
  total, read = sum(counts), 0
  # Whole numbers: the same on every machine.
  taken, positions = [0] * len(counts), [0] * len(counts)
  for size in batch_sizes:
    read += size
    # Of all that is read, each canvas has its photos' part; the one that lacks most is next.
    lacks = [read * count - own * total for count, own in zip(counts, taken)]
    canvas = lacks.index(max(lacks))
    yield Turn(canvas, positions[canvas])
    taken[canvas] += size
    positions[canvas] += size


def photo_sizes(source: Any) -> np.ndarray:
  """(height, width) of all photos of a source, known without reading them: int `[N, 2]`.

  Raises:
    ValueError: the source does not know them.
  """
  sizes = getattr(source, "sizes", None)
  if sizes is None:
    raise ValueError(
      "config.data.canvases group photos by their sizes, which this source does not know "
      "beforehand; coco: does. Give one canvas instead, by which nothing is grouped"
    )
  return np.asarray(sizes)
