"""What detectors of one stage share: towers over a pyramid, and detections from all their anchors.

As in RetinaNet (arXiv:1708.02002, section 4) and ATSS (arXiv:1912.02424), by mmdetection's files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.heads.batch_norm_groups import groups_of, with_groups
from hybrid_vit.heads.layers import check_levels
from hybrid_vit.heads.registry import create_neck, neck_arguments
from hybrid_vit.models.layers import Conv
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.anchors import pyramid_anchors, valid_anchors
from hybrid_vit.ops.boxes import decode_boxes
from hybrid_vit.ops.nms import (
  Detections,
  SoftNMS,
  multiclass_nms,
  select_top,
  soft_or_none,
  suppress,
)
from hybrid_vit.ops.top_places import top_places

SELECTIONS = ("anchors", "pairs")
# The bias at which a class begins with a probability of 0.01.
PRIOR_BIAS = -float(np.log((1 - 0.01) / 0.01))
NORMAL = nn.initializers.normal(0.01)


@dataclasses.dataclass(frozen=True)
class DenseSettings:
  """All that is not a layer and that these detectors have in common.

  Attributes:
    anchor_scales: sides of anchors in strides of their level.
    anchor_ratios: height over width.
    stds: of the offsets.
    two_sided_clamp: of `decode_boxes`.
    size_divisor: anchors of cells beyond the picture, padded to a multiple of this, are not trained
      on; 0 for all.
    alpha: of `sigmoid_focal`.
    gamma: likewise.
    box_weight: of the box loss.
    before: of each level, so many go into suppression.
    selection: what is counted there: "anchors", by their best class, all classes of which follow
      (mmdetection 2); "pairs" of an anchor and a class, above the threshold (mmdetection 3).
    score_threshold: of detections.
    nms: IoU of their suppression in each class.
    nms_method: "hard" drops the overlapping; "linear" and "gaussian" lower their scores, one box
      after the other (`ops.nms.soft_nms`).
    nms_sigma: of "gaussian".
    nms_min_score: of both, boxes are dropped once below.
    detections: D, so many of a picture.
    candidates: of `multiclass_nms`, for "anchors".
  """

  anchor_scales: tuple[float, ...] = (8.0,)
  anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
  stds: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
  two_sided_clamp: bool = True
  size_divisor: int = 32
  alpha: float = 0.25
  gamma: float = 2.0
  box_weight: float = 1.0
  before: int = 1000
  selection: str = "anchors"
  score_threshold: float = 0.05
  nms: float = 0.5
  nms_method: str = "hard"
  nms_sigma: float = 0.5
  nms_min_score: float = 1e-3
  detections: int = 100
  candidates: int = 2000

  def __post_init__(self) -> None:
    if self.selection not in SELECTIONS:
      raise ValueError(
        f"selection is {self.selection!r}; one of {', '.join(SELECTIONS)} was expected"
      )
    soft_or_none(self.nms_method, self.nms_sigma, self.nms_min_score)

  @property
  def soft_nms(self) -> SoftNMS | None:
    """How overlapping detections' scores are lowered; None where they are dropped."""
    return soft_or_none(self.nms_method, self.nms_sigma, self.nms_min_score)

  @property
  def num_anchors(self) -> int:
    """Anchors of a cell."""
    return len(self.anchor_scales) * len(self.anchor_ratios)


def towers(
  module: Any, maps: Mapping[str, jax.Array], norm_groups: int = 0
) -> list[tuple[jax.Array, jax.Array]]:
  """Of each level, features for classes and for boxes: convolutions that the levels share.

  Args:
    module: a head with `features`, `num_convs`, `channels` and `dtype`.
    maps: of its features.
    norm_groups: of a group norm behind each convolution, which then has no bias; 0 for none.
  """
  check_levels(type(module).__name__, module.features, 1)

  def layers(kind: str) -> list[Any]:
    found: list[Any] = []
    for i in range(module.num_convs):
      found.append(
        Conv(
          module.channels, (3, 3), padding=((1, 1), (1, 1)), use_bias=not norm_groups,
          kernel_init=NORMAL, dtype=module.dtype, name=f"{kind}_conv{i}",
        )
      )  # fmt: skip
      if norm_groups:
        found.append(
          nn.GroupNorm(
            norm_groups, epsilon=1e-5, use_fast_variance=False, dtype=module.dtype,
            name=f"{kind}_conv{i}_norm",
          )
        )  # fmt: skip
      found.append(nn.relu)
    return found

  both = [layers(kind) for kind in ("class", "box")]
  results = []
  for level in module.features:
    found = []
    for tower in both:
      x = maps[level.name].astype(module.dtype)
      for layer in tower:
        x = layer(x)
      found.append(x.astype(jnp.float32))
    results.append((found[0], found[1]))
  return results


_PARTS = ("backbone", "neck", "head")


class DenseDetector(nn.Module):
  """A detector of one stage; what it is trained on is its subclasses'.

  Its parameters lie under "backbone", "neck" and "head".

  Attributes:
    backbone: of the registry's contract, without a head.
    neck: between backbone and head.
    head: over the neck's levels: a dict of lists with "classes" `[B, h, w, A K]`, "deltas"
      `[B, h, w, 4 A]`, and "centerness" `[B, h, w, A]` where it has one, all logits.
    settings: all that is not a layer.
  """

  backbone: nn.Module
  neck: nn.Module
  head: nn.Module
  settings: Any

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The levels that the head reads."""
    neck: Any = self.neck
    return tuple(neck.outputs)

  @property
  def batch_norm_groups(self) -> int:
    """See `heads.batch_norm_groups`."""
    return groups_of(self, *_PARTS)

  def with_batch_norm_groups(self, groups: int) -> DenseDetector:
    """See `heads.batch_norm_groups`."""
    return with_groups(self, groups, *_PARTS)

  def __call__(
    self,
    images: jax.Array,
    train: bool = False,
    targets: Any = None,
    key: jax.Array | None = None,
    sizes: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    """Losses of a batch, or its detections.

    Args:
      images: `[B, H, W, 3]`, padded below and to the right.
      train: of dropped paths and batch norm.
      targets: `rcnn.Targets` without masks; without them, detections come out.
      key: not read: nothing is sampled.
      sizes: int `[B, 2]`, (height, width) of each picture without its padding; all of it by
        default.

    Returns:
      With targets float32 scalars, whose sum is to be minimised. Else float32 "boxes"
      `[B, D, 4]`, "scores" `[B, D]`, int32 "labels" `[B, D]`, bool "valid" `[B, D]` and
      "truncated" `[B]` of `Detections`.
    """
    del key
    _, endpoints = self.backbone(images, train=train)
    maps = self.neck(endpoints, train)
    if sizes is None:
      sizes = jnp.broadcast_to(jnp.array(images.shape[1:3]), (images.shape[0], 2))
    if targets is None:
      return self.detect(maps, sizes, train=train)
    return self.losses(maps, targets, sizes, train=train)

  def losses(
    self, maps: Mapping[str, jax.Array], targets: Any, sizes: jax.Array, *, train: bool = True
  ) -> dict[str, jax.Array]:
    """Losses on a pyramid: see `__call__`."""
    raise NotImplementedError

  def detect(
    self, maps: Mapping[str, jax.Array], sizes: jax.Array, *, train: bool = False
  ) -> dict[str, jax.Array]:
    """Detections on a pyramid: see `__call__`."""
    s, found = self.settings, self.head(maps, train)
    anchors = self.anchors(maps)

    def one(classes, deltas, factors, size):
      return _detections(s, classes, deltas, factors, anchors, size)

    batch = sizes.shape[0]
    classes = [
      jax.nn.sigmoid(x.reshape(batch, len(own), -1)) for x, own in zip(found["classes"], anchors)
    ]
    deltas = [x.reshape(batch, -1, 4) for x in found["deltas"]]
    factors = [jax.nn.sigmoid(x.reshape(batch, -1)) for x in found.get("centerness", ())]
    answer = jax.vmap(one)(classes, deltas, factors, sizes)
    names = ("boxes", "scores", "labels", "valid", "truncated")
    return {name: getattr(answer, name) for name in names}

  def anchors(self, maps: Mapping[str, jax.Array]) -> tuple[np.ndarray, ...]:
    """Anchors of each level, `[h w A, 4]`."""
    s = self.settings
    return pyramid_anchors(*self._grids(maps), s.anchor_scales, s.anchor_ratios)

  def usable(self, maps: Mapping[str, jax.Array], sizes: jax.Array) -> jax.Array:
    """Which anchors are trained on, bool `[B, N]`."""
    divisor = self.settings.size_divisor
    if not divisor:
      count = sum(map(len, self.anchors(maps)))
      return jnp.ones((sizes.shape[0], count), bool)
    padded = -(-sizes // divisor) * divisor
    return valid_anchors(*self._grids(maps), self.settings.num_anchors, padded)

  def _grids(self, maps) -> tuple[list[tuple[int, int]], list[int]]:
    levels = self.features
    return [maps[f.name].shape[1:3] for f in levels], [f.stride for f in levels]


def dense_parts(
  backbone: Any, neck: Mapping[str, Any] | None, extra: str, batch_norm_groups: int | None
) -> tuple[Any, dict[str, Any]]:
  """(the neck, what the heads take from the run).

  Args:
    backbone: with `features`; the default neck reads those of strides from 8 on.
    neck: {"name": as registered, further attributes}, over all features; or None for the default.
    extra: of the default FPN's two further levels.
    batch_norm_groups: None for what the backbone has.
  """
  groups = getattr(backbone, "batch_norm_groups", 1)
  groups = groups if batch_norm_groups is None else batch_norm_groups
  shared = {"dtype": getattr(backbone, "dtype", jnp.float32), "batch_norm_groups": groups}
  features = tuple(backbone.features)
  if neck is None:
    neck = {"name": "fpn", "extra": extra, "num_extra": 2}
    features = tuple(f for f in features if f.stride >= 8)
  own = dict(neck)
  name = own.pop("name")
  known = neck_arguments(name)
  own = {**{k: v for k, v in shared.items() if k in known}, **own}
  return create_neck(name, features, **own), {"dtype": shared["dtype"]}


def _detections(
  s: DenseSettings,
  classes: Sequence[jax.Array],
  deltas: Sequence[jax.Array],
  factors: Sequence[jax.Array],
  anchors: Sequence[np.ndarray],
  size: jax.Array,
) -> Detections:
  """One picture's: of each level probabilities `[n, K]`, offsets `[n, 4]`, factors `[n]`."""
  chosen, scores, labels, there = [], [], [], []
  for i, (own, offsets, base) in enumerate(zip(classes, deltas, anchors)):
    count, kinds = own.shape
    factor = factors[i] if factors else jnp.ones(count)
    # Factors come after the threshold.
    above = jnp.where(own > s.score_threshold, own * factor[:, None], 0)
    if s.selection == "anchors":
      best = jnp.max(own * factor[:, None], axis=-1)
      places = top_places(best, min(s.before, count))
      scores.append(above[places])
    else:
      flat = own.reshape(-1)
      pairs, found = select_top(flat, flat > s.score_threshold, min(s.before, count * kinds))
      places = pairs // kinds
      scores.append(above.reshape(-1)[pairs])
      labels.append(pairs % kinds)
      there.append(found)
    chosen.append(
      decode_boxes(
        jnp.asarray(base)[places], offsets[places], stds=s.stds, two_sided=s.two_sided_clamp,
        size=size,
      )
    )  # fmt: skip
  boxes, all_scores = jnp.concatenate(chosen), jnp.concatenate(scores)
  if s.selection == "anchors":
    return multiclass_nms(
      boxes, all_scores, score_threshold=0.0, iou_threshold=s.nms,
      max_candidates=min(s.candidates, all_scores.size), max_detections=s.detections,
      soft=s.soft_nms,
    )  # fmt: skip
  all_labels = jnp.concatenate(labels)
  lowered, kept = suppress(boxes, all_scores, s.nms, jnp.concatenate(there), all_labels, s.soft_nms)
  places, valid = select_top(lowered, kept, s.detections)
  return Detections(
    jnp.where(valid[:, None], boxes[places], 0),
    jnp.where(valid, lowered[places], 0),
    jnp.where(valid, all_labels[places], 0).astype(jnp.int32),
    jnp.where(valid, places, 0),
    valid,
    jnp.zeros((), bool),
  )
