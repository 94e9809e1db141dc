"""The operations of detection at the sizes of a real detector, in all their forms.

For `benchmark_operations`: each case gives our forms and, where the library is installed, what
torchvision, PyTorch or scipy do for the same numbers. Pictures are 800 x 1333.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.ops import anchors, assignment, matching, top_places
from hybrid_vit.ops import deformable_attention as attention
from hybrid_vit.ops import nms as suppression
from hybrid_vit.ops import roi_align as pooling


@dataclasses.dataclass(frozen=True)
class OperationCase:
  """One call.

  Attributes:
    operation: its name.
    label: the sizes, for people.
    forms: each of our forms as a function of `arguments`.
    arguments: arrays of NumPy.
    default: the form that the CPU takes unless told; ratios are to it where nobody else's is here.
    theirs: another library's answer, by its name: from the same arguments, the call to time. Empty
      where it is not installed.
    gradients: of which arguments; () for forward alone.
    typed: arguments that a network has in the type of its computation; others stay float32.
  """

  operation: str
  label: str
  forms: Mapping[str, Callable[..., Any]]
  arguments: tuple[np.ndarray, ...]
  default: str
  theirs: Mapping[str, Callable[..., Callable[[], Any]]] = dataclasses.field(default_factory=dict)
  gradients: tuple[int, ...] = ()
  typed: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Of all cases; `SMALL` is for a try."""

  picture: tuple[int, int] = (800, 1333)
  of_level: int = 1000
  last_level: int = 800
  boxes: int = 512
  classes: int = 80
  channels: int = 256
  heads: int = 8
  points: int = 4
  queries: int = 900
  targets: int = 100
  top: int = 1000


FULL = Sizes()
SMALL = Sizes((64, 96), 12, 8, 6, 3, 8, 2, 2, 5, 4, 10)


def all_cases(sizes: Sizes) -> Iterator[OperationCase]:
  """Every operation's cases, made when they are asked for."""
  for cases in (
    _suppression, _multiclass, _pooling, _attention, _matching, _assignment, _top_places,
  ):  # fmt: skip
    yield from cases(sizes)


def here(library: str) -> bool:
  """Whether a library is installed."""
  return importlib.util.find_spec(library) is not None


def crowded_boxes(rng: np.random.Generator, count: int, picture: Sequence[int]) -> np.ndarray:
  """Boxes as proposals are: half of them scattered, half around some forty objects."""
  height, width = picture
  objects = max(1, min(40, count // 4))
  centres = rng.uniform(0, (width, height), (objects, 2))
  sides = np.exp(rng.uniform(math.log(0.03), math.log(0.5), (objects, 2))) * min(picture)
  own = rng.integers(0, objects, count)
  near = rng.random(count) < 0.5
  centre = np.where(
    near[:, None],
    centres[own] + rng.normal(0, 0.1, (count, 2)) * sides[own],
    rng.uniform(0, (width, height), (count, 2)),
  )
  side = np.where(
    near[:, None],
    sides[own] * np.exp(rng.normal(0, 0.15, (count, 2))),
    np.exp(rng.uniform(math.log(0.02), math.log(0.6), (count, 2))) * min(picture),
  )
  boxes = np.concatenate([centre - side / 2, centre + side / 2], axis=1)
  return np.clip(boxes, 0, (width, height, width, height)).astype(np.float32)


def _suppression(s: Sizes) -> Iterator[OperationCase]:
  rng = np.random.default_rng(0)
  counts = [s.of_level] * 4 + [s.last_level]
  total = sum(counts)
  boxes = crowded_boxes(rng, total, s.picture)
  scores = rng.permutation(total).astype(np.float32) / total
  levels = np.repeat(np.arange(5), counts).astype(np.int32)

  def by_level(boxes: jax.Array, scores: jax.Array, levels: jax.Array) -> jax.Array:
    del levels
    kept, start = [], 0
    for count in counts:
      end = start + count
      kept.append(suppression.nms(boxes[start:end], scores[start:end], 0.7))
      start = end
    return jnp.concatenate(kept)

  def at_once(form: Any) -> Any:
    return lambda boxes, scores, levels: form(boxes, scores, 0.7, None, levels)

  yield OperationCase(
    "nms",
    f"{total} boxes of five levels, IoU 0.7",
    {
      "level by level": by_level,
      "all levels at once": at_once(suppression.nms),
      "greedy loop": at_once(suppression.reference_nms),
    },
    (boxes, scores, levels),
    "level by level",
    _torchvision(lambda ops, b, s, k: lambda: ops.batched_nms(b, s, k, 0.7)),
  )


def _multiclass(s: Sizes) -> Iterator[OperationCase]:
  rng = np.random.default_rng(1)
  boxes = crowded_boxes(rng, s.of_level, s.picture)
  # A few likely classes of each box, as after a softmax.
  logits = rng.normal(0, 2.5, (s.of_level, s.classes + 1)).astype(np.float32)
  scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  scores = scores[:, : s.classes].astype(np.float32)
  candidates = min(2000, scores.size)

  def ours(boxes: jax.Array, scores: jax.Array) -> Any:
    return suppression.multiclass_nms(
      boxes, scores, score_threshold=0.05, iou_threshold=0.5, max_candidates=candidates,
      max_detections=100,
    )  # fmt: skip

  def theirs(ops: Any, boxes: Any, scores: Any) -> Callable[[], Any]:
    def run() -> Any:
      rows, classes = (scores > 0.05).nonzero(as_tuple=True)
      found, own = boxes[rows], scores[rows, classes]
      kept = ops.batched_nms(found, own, classes, 0.5)[:100]
      return found[kept], own[kept], classes[kept]

    return run

  yield OperationCase(
    "multiclass_nms",
    f"{s.of_level} boxes, {s.classes} classes, {(scores > 0.05).sum()} above 0.05",
    {"best candidates": ours},
    (boxes, scores),
    "best candidates",
    _torchvision(theirs),
  )


def _pooling(s: Sizes) -> Iterator[OperationCase]:
  rng = np.random.default_rng(2)
  strides = (4, 8, 16, 32)
  maps = [
    rng.standard_normal((1, *_grid(s.picture, k), s.channels)).astype(np.float32) for k in strides
  ]
  boxes = crowded_boxes(rng, s.boxes, s.picture)[None]
  for ratio, size in ((2, 7), (0, 7)):

    def ours(*arguments: jax.Array, form: str, ratio: int = ratio, size: int = size) -> Any:
      *maps, boxes = arguments
      return pooling.pyramid_roi_align(
        maps, boxes, output_size=size, strides=strides, sampling_ratio=ratio, aligned=True,
        form=form,
      )  # fmt: skip

    def theirs(
      ops: Any, *arguments: Any, backward: bool = False, ratio: int = ratio, size: int = size
    ) -> Any:
      import torch

      *given, boxes = arguments
      level = torch.from_numpy(np.array(pooling.roi_levels(boxes[0].numpy(), 4)))
      rows = [torch.nonzero(level == i)[:, 0] for i in range(4)]
      # As theirs lie in memory.
      maps = [m.permute(0, 3, 1, 2).contiguous().requires_grad_(backward) for m in given]

      def run() -> Any:
        found = torch.zeros(boxes.shape[1], maps[0].shape[1], size, size)
        for i, own in enumerate(rows):
          pooled = ops.roi_align(
            maps[i], [boxes[0][own]], size, 1 / strides[i], sampling_ratio=ratio or -1,
            aligned=True,
          )  # fmt: skip
          found = found.index_put((own,), pooled)
        return torch.autograd.grad(found.square().sum(), maps) if backward else found

      return run

    yield OperationCase(
      "roi_align",
      f"{s.boxes} boxes to {size}x{size}, four levels of {s.channels} channels, "
      + (f"{ratio} samples a bin and axis" if ratio else "adaptive samples"),
      {form: functools.partial(ours, form=form) for form in pooling.FORMS},
      (*maps, boxes),
      pooling.DEFAULT_FORM,
      _torchvision(theirs),
      gradients=tuple(range(len(maps))),
      typed=tuple(range(len(maps))),
    )


def _attention(s: Sizes) -> Iterator[OperationCase]:
  rng = np.random.default_rng(3)
  shapes = tuple(_grid(s.picture, k) for k in (8, 16, 32, 64))
  tokens, levels = sum(map(math.prod, shapes)), len(shapes)
  value = rng.standard_normal((1, tokens, s.heads, s.channels // s.heads)).astype(np.float32)
  for queries in (s.queries, tokens):
    # Around each query's own place, as learned offsets are.
    centre = rng.uniform(0, 1, (1, queries, 1, 1, 1, 2))
    if queries == tokens:
      grids = [np.meshgrid(np.arange(w), np.arange(h)) for h, w in shapes]
      centre = np.concatenate(
        [
          np.stack([(x + 0.5) / w, (y + 0.5) / h], -1).reshape(-1, 2)
          for (x, y), (h, w) in zip(grids, shapes)
        ]
      ).reshape(1, -1, 1, 1, 1, 2)
    shape = (1, queries, s.heads, levels, s.points)
    sizes = np.array([(w, h) for h, w in shapes])[:, None]
    places = (centre + rng.normal(0, 3, (*shape, 2)) / sizes).astype(np.float32)
    weights = rng.uniform(0, 1, shape).astype(np.float32)

    def ours(value: Any, places: Any, weights: Any, *, method: str) -> Any:
      return attention.deformable_attention(value, shapes, places, weights, method=method)

    yield OperationCase(
      "deformable_attention",
      f"{queries} queries, {tokens} cells of four levels, {s.channels} channels, {s.heads} heads, "
      f"{s.points} points",
      {method: functools.partial(ours, method=method) for method in attention.METHODS},
      (value, places, weights),
      "gather",
      {"PyTorch": functools.partial(_grid_samples, shapes)} if here("torch") else {},
      gradients=(0, 1, 2),
      typed=(0,),
    )


def _grid_samples(
  shapes: Sequence[tuple[int, int]],
  value: np.ndarray,
  places: np.ndarray,
  weights: np.ndarray,
  backward: bool = False,
) -> Callable[[], Any]:
  """Deformable attention as PyTorch has it without a kernel of its own."""
  import torch
  from torch.nn.functional import grid_sample

  given = [torch.from_numpy(x).requires_grad_(backward) for x in (value, places, weights)]
  batch, queries, heads = places.shape[:3]

  def run() -> Any:
    values, locations, factors = given
    parts = values.split([math.prod(shape) for shape in shapes], dim=1)
    sampled = []
    for i, (part, (height, width)) in enumerate(zip(parts, shapes)):
      image = part.permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width)
      grid = 2 * locations[:, :, :, i].transpose(1, 2).flatten(0, 1) - 1
      sampled.append(
        grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
      )
    own = factors.permute(0, 2, 1, 3, 4).reshape(batch * heads, 1, queries, -1)
    out = (torch.cat(sampled, dim=-1) * own).sum(-1)
    return torch.autograd.grad(out.square().sum(), given) if backward else out

  return run


def _matching(s: Sizes) -> Iterator[OperationCase]:
  rng = np.random.default_rng(4)
  cost = rng.normal(0, 1, (s.targets, s.queries)).astype(np.float32)
  theirs: dict[str, Any] = {}
  if here("scipy"):
    from scipy.optimize import linear_sum_assignment

    theirs["scipy"] = lambda cost: lambda: linear_sum_assignment(cost)
  yield OperationCase(
    "linear_assignment",
    f"{s.targets} targets, {s.queries} queries",
    {"augmenting paths": matching.linear_assignment},
    (cost,),
    "augmenting paths",
    theirs,
  )


def _assignment(s: Sizes) -> Iterator[OperationCase]:
  rng = np.random.default_rng(5)
  strides = (4, 8, 16, 32, 64)
  grids = [_grid(s.picture, k) for k in strides]
  of_levels = anchors.pyramid_anchors(grids, strides)
  boxes = np.concatenate(of_levels)
  truth = crowded_boxes(rng, s.targets, s.picture)
  valid = np.ones(s.targets, bool)

  def ours(boxes: jax.Array, truth: jax.Array, valid: jax.Array) -> Any:
    return assignment.max_iou_assign(
      boxes, truth, valid, positive_iou=0.7, negative_iou=0.3, min_positive_iou=0.3
    )

  def theirs(ops: Any, boxes: Any, truth: Any, valid: Any) -> Callable[[], Any]:
    from torchvision.models.detection._utils import Matcher

    del valid
    matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
    return lambda: matcher(ops.box_iou(truth, boxes))

  yield OperationCase(
    "max_iou_assign",
    f"{len(boxes)} anchors, {s.targets} boxes",
    {"table": ours},
    (boxes, truth, valid),
    "table",
    _torchvision(theirs),
  )
  counts = [len(level) for level in of_levels]
  yield OperationCase(
    "atss_assign",
    f"{len(boxes)} anchors, {s.targets} boxes",
    {"table": lambda b, t, v: assignment.atss_assign(b, counts, t, v)},
    (boxes, truth, valid),
    "table",
  )


def _top_places(s: Sizes) -> Iterator[OperationCase]:
  rows, columns = _grid(s.picture, 4)
  count = 3 * rows * columns
  scores = np.random.default_rng(6).normal(size=(1, count)).astype(np.float32)

  def theirs(scores: np.ndarray) -> Callable[[], Any]:
    import torch

    given = torch.from_numpy(scores)
    return lambda: torch.topk(given, s.top)[1]

  def by_sort(x: jax.Array) -> jax.Array:
    return jnp.argsort(-x, axis=-1, stable=True)[:, : s.top]

  yield OperationCase(
    "top_places",
    f"{s.top} of {count}",
    {
      "top_places": lambda x: top_places.top_places(x, s.top),
      "lax.top_k": lambda x: top_places.reference_top_places(x, s.top),
      "sort": by_sort,
    },
    (scores,),
    "top_places",
    {"PyTorch": theirs} if here("torch") else {},
  )


def _grid(picture: Sequence[int], stride: int) -> tuple[int, int]:
  return -(-picture[0] // stride), -(-picture[1] // stride)


def _torchvision(make: Callable[..., Any]) -> dict[str, Callable[..., Callable[[], Any]]]:
  """`make(torchvision.ops, *tensors)` as another library's answer, if it is installed."""
  if not here("torchvision"):
    return {}

  def from_arrays(*arrays: np.ndarray, **options: Any) -> Callable[[], Any]:
    import torch
    from torchvision import ops

    return make(ops, *map(torch.from_numpy, arrays), **options)

  return {"torchvision": from_arrays}
