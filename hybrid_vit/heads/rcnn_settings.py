"""The numbers of Faster, Mask and Cascade R-CNN, and the sets of them that are published.

The defaults are those of mmdetection 2's Mask R-CNN as Swin Transformer's detection and its
followers train it (configs/_base_/models/mask_rcnn_swin_fpn.py there); `cascade_settings` is their
Cascade R-CNN. `detectron2_settings` and `torchvision_settings` are what those do otherwise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.ops.anchors import (
  anchors_within,
  base_anchors,
  grid_anchors,
  pyramid_anchors,
  torchvision_anchors,
  valid_anchors,
)
from hybrid_vit.ops.nms import SoftNMS, soft_or_none

BOX_LOSSES = ("l1", "giou")
IMPLEMENTATIONS = ("mmdetection", "detectron2", "torchvision")
CASCADE_SCORES = ("logits", "probabilities")
_STAGE_STDS = (
  (0.1, 0.1, 0.2, 0.2),
  (0.05, 0.05, 0.1, 0.1),
  (0.033, 0.033, 0.067, 0.067),
)


@dataclasses.dataclass(frozen=True)
class RCNNSettings:
  """All that is not a layer.

  Attributes:
    anchor_scales: sides of anchors in strides of their level.
    anchor_sides: or, of each level, in pixels; None for `anchor_scales`.
    anchor_ratios: height over width.
    anchor_order: of `base_anchors`.
    rounded_anchors: torchvision's anchors, which need `anchor_sides`.
    two_sided_clamp: of `decode_boxes`.
    rpn_positive_iou: of `max_iou_assign` for anchors, and so are the next three.
    rpn_negative_iou: likewise.
    rpn_min_positive_iou: likewise.
    rpn_low_quality: likewise.
    rpn_samples: anchors of a picture that are trained on.
    rpn_positive_fraction: at most so much of them is positive.
    rpn_allowed_border: anchors that cross the picture's border by more are not trained on; below 0
      all are.
    rpn_size_divisor: anchors of cells beyond the picture, padded to a multiple of this, are not
      trained on; 0 for all.
    rpn_beta: of the smooth L1 on offsets; 0 is L1.
    rpn_normaliser: of `rpn_losses`.
    rpn_before: in training and test, boxes of a level before suppression.
    rpn_after: in training and test, proposals.
    rpn_nms: IoU of the suppression.
    rpn_min_size: proposals' sides are larger.
    stage_ious: of each stage, the IoU from which a proposal is positive.
    stage_weights: of each stage's losses.
    stage_stds: of each stage's offsets.
    roi_low_quality: of `max_iou_assign` for proposals, with the stage's IoU as the least.
    roi_samples: proposals of a picture that a stage is trained on.
    roi_positive_fraction: at most so much of them is positive.
    roi_add_gt: whether true boxes are proposals too.
    resample: whether a stage draws its own sample from the boxes of the stage before, true boxes
      taken out and added anew (mmdetection); else it takes them as they are, and matches them anew
      (detectron2).
    stage_gradient: what gradients of the box heads into the maps are multiplied by.
    box_loss: "l1", smooth L1 on offsets; "giou" on decoded boxes.
    box_beta: of the smooth L1; 0 is L1.
    box_weight: of the box loss.
    num_roi_levels: how many levels, from the finest on, boxes are pooled from.
    box_pool: side of a box's features for the box heads.
    mask_pool: for the mask heads.
    sampling_ratio: of `roi_align`; 0 is adaptive. 2 costs less and differs little.
    aligned: likewise.
    level_rule: of `roi_levels`.
    finest_scale: likewise.
    binary_masks: whether targets of masks are cut at 0.5.
    mask_weight: of the mask loss.
    score_threshold: of detections.
    nms: IoU of their suppression in each class.
    nms_method: "hard" drops the overlapping; "linear" and "gaussian" lower their scores, one box
      after the other (`ops.nms.soft_nms`).
    nms_sigma: of "gaussian".
    nms_min_score: of both, boxes are dropped once below.
    detections: D, so many of a picture.
    candidates: of `multiclass_nms`.
    min_detection_size: boxes with a side below are no detections; 0 for all.
    cascade_scores: stages' means are of "logits" (mmdetection) or "probabilities" (detectron2).
  """

  anchor_scales: tuple[float, ...] = (8.0,)
  anchor_sides: tuple[tuple[float, ...], ...] | None = None
  anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
  anchor_order: str = "ratios_first"
  rounded_anchors: bool = False
  two_sided_clamp: bool = True
  rpn_positive_iou: float = 0.7
  rpn_negative_iou: float = 0.3
  rpn_min_positive_iou: float = 0.3
  rpn_low_quality: str = "own"
  rpn_samples: int = 256
  rpn_positive_fraction: float = 0.5
  rpn_allowed_border: float = -1.0
  rpn_size_divisor: int = 32
  rpn_beta: float = 0.0
  rpn_normaliser: str = "sampled"
  rpn_before: tuple[int, int] = (2000, 1000)
  rpn_after: tuple[int, int] = (1000, 1000)
  rpn_nms: float = 0.7
  rpn_min_size: float = 0.0
  stage_ious: tuple[float, ...] = (0.5,)
  stage_weights: tuple[float, ...] = (1.0,)
  stage_stds: tuple[tuple[float, float, float, float], ...] = _STAGE_STDS[:1]
  roi_low_quality: str = "own"
  roi_samples: int = 512
  roi_positive_fraction: float = 0.25
  roi_add_gt: bool = True
  resample: bool = True
  stage_gradient: float = 1.0
  box_loss: str = "l1"
  box_beta: float = 0.0
  box_weight: float = 1.0
  num_roi_levels: int = 4
  box_pool: int = 7
  mask_pool: int = 14
  sampling_ratio: int = 0
  aligned: bool = True
  level_rule: str = "mmdetection"
  finest_scale: float = 56.0
  binary_masks: bool = True
  mask_weight: float = 1.0
  score_threshold: float = 0.05
  nms: float = 0.5
  nms_method: str = "hard"
  nms_sigma: float = 0.5
  nms_min_score: float = 1e-3
  detections: int = 100
  candidates: int = 2000
  min_detection_size: float = 0.0
  cascade_scores: str = "logits"

  def __post_init__(self) -> None:
    stages = len(self.stage_ious)
    if len(self.stage_weights) != stages or len(self.stage_stds) != stages:
      raise ValueError(
        f"RCNNSettings: {stages} stage_ious, {len(self.stage_weights)} stage_weights and "
        f"{len(self.stage_stds)} stage_stds; as many of each were expected"
      )
    for name, known in (("box_loss", BOX_LOSSES), ("cascade_scores", CASCADE_SCORES)):
      if getattr(self, name) not in known:
        raise ValueError(
          f"RCNNSettings: {name} is {getattr(self, name)!r}; one of {', '.join(known)} was expected"
        )
    soft_or_none(self.nms_method, self.nms_sigma, self.nms_min_score)
    if self.rounded_anchors and self.anchor_sides is None:
      raise ValueError("RCNNSettings: rounded_anchors need anchor_sides, in pixels; there are none")

  @property
  def num_anchors(self) -> int:
    """Anchors of a cell."""
    sides = self.anchor_scales if self.anchor_sides is None else self.anchor_sides[0]
    return len(sides) * len(self.anchor_ratios)

  @property
  def soft_nms(self) -> SoftNMS | None:
    """How overlapping detections' scores are lowered; None where they are dropped."""
    return soft_or_none(self.nms_method, self.nms_sigma, self.nms_min_score)

  @property
  def num_positives(self) -> int:
    """The most positives of a stage's sample; they come first in it."""
    return int(self.roi_samples * self.roi_positive_fraction)


def cascade_settings(**changes: Any) -> RCNNSettings:
  """Cascade R-CNN (arXiv:1712.00726) as Swin Transformer's detection trains it; `changes` replace.

  It belongs with box heads of four convolutions with batch norm and boxes for each class.
  """
  made = RCNNSettings(
    rpn_beta=1 / 9, rpn_allowed_border=0.0, rpn_after=(2000, 1000), stage_ious=(0.5, 0.6, 0.7),
    stage_weights=(1.0, 0.5, 0.25), stage_stds=_STAGE_STDS, roi_low_quality="none",
    box_loss="giou", box_weight=10.0,
  )  # fmt: skip
  return dataclasses.replace(made, **changes)


def detectron2_settings(stages: int = 1, **changes: Any) -> RCNNSettings:
  """detectron2's Mask R-CNN, or with three stages its Cascade R-CNN; `changes` replace."""
  weights = ((10.0, 5.0), (20.0, 10.0), (30.0, 15.0))[:stages]
  made = RCNNSettings(
    anchor_order="scales_first", two_sided_clamp=False, rpn_min_positive_iou=0.0,
    rpn_low_quality="best", rpn_size_divisor=0, rpn_normaliser="fixed",
    stage_ious=(0.5, 0.6, 0.7)[:stages], stage_weights=(1.0,) * stages,
    stage_stds=tuple((1 / a, 1 / a, 1 / b, 1 / b) for a, b in weights), roi_low_quality="none",
    resample=False, stage_gradient=1 / stages, level_rule="detectron2",
    cascade_scores="probabilities",
  )  # fmt: skip
  return dataclasses.replace(made, **changes)


def torchvision_settings(**changes: Any) -> RCNNSettings:
  """torchvision's Mask R-CNN of its first version; `changes` replace."""
  made = RCNNSettings(
    anchor_sides=((32.0,), (64.0,), (128.0,), (256.0,), (512.0,)), rounded_anchors=True,
    two_sided_clamp=False, rpn_min_positive_iou=0.0, rpn_low_quality="best",
    rpn_size_divisor=0, rpn_beta=1 / 9, rpn_before=(2000, 1000), rpn_after=(2000, 1000),
    rpn_min_size=1e-3, roi_low_quality="none", box_beta=1 / 9, sampling_ratio=2, aligned=False,
    level_rule="torchvision", binary_masks=False, min_detection_size=1e-2,
  )  # fmt: skip
  return dataclasses.replace(made, **changes)


def settings_of(implementation: str, stages: int, **changes: Any) -> RCNNSettings:
  """An implementation's numbers; `changes` replace.

  Args:
    implementation: of `IMPLEMENTATIONS`.
    stages: 1, or 3 of Cascade R-CNN, which torchvision does not have.
    **changes: fields.

  Raises:
    ValueError: an unknown implementation, or stages that it does not have.
  """
  if implementation == "mmdetection":
    return RCNNSettings(**changes) if stages == 1 else cascade_settings(**changes)
  if implementation == "detectron2":
    return detectron2_settings(stages, **changes)
  if implementation == "torchvision" and stages == 1:
    return torchvision_settings(**changes)
  raise ValueError(
    f"implementation {implementation!r} of {stages} stages; one of {', '.join(IMPLEMENTATIONS)} "
    "was expected, torchvision with one stage alone"
  )


def level_anchors(
  settings: RCNNSettings,
  grids: Sequence[tuple[int, int]],
  strides: Sequence[int],
  canvas: tuple[int, int],
) -> tuple[np.ndarray, ...]:
  """Anchors of each level, float32 `[h w A, 4]`.

  Args:
    settings: of the anchors.
    grids: (rows, columns) of each map.
    strides: of each map.
    canvas: (height, width) of the padded pictures.

  Raises:
    ValueError: not as many rows of `anchor_sides` as maps.
  """
  sides, ratios = settings.anchor_sides, settings.anchor_ratios
  if sides is None:
    return pyramid_anchors(
      grids, strides, settings.anchor_scales, ratios, order=settings.anchor_order
    )
  if len(sides) != len(grids):
    raise ValueError(
      f"anchor_sides: {len(sides)} rows for a pyramid of {len(grids)} maps; as many were expected"
    )
  if settings.rounded_anchors:
    return torchvision_anchors(grids, canvas, sides, ratios)
  return tuple(
    grid_anchors(base_anchors(1.0, own, ratios, order=settings.anchor_order), grid, (s, s))
    for own, grid, s in zip(sides, grids, strides)
  )


def usable_anchors(
  settings: RCNNSettings,
  anchors: Sequence[np.ndarray],
  grids: Sequence[tuple[int, int]],
  strides: Sequence[int],
  sizes: jax.Array,
) -> jax.Array | None:
  """Which anchors may be trained on: bool `[B, N]`, or None for all.

  Args:
    settings: the border and the divisor are read.
    anchors: as `level_anchors` gives them.
    grids: as there.
    strides: as there.
    sizes: `[B, 2]`, (height, width) of each picture without padding.
  """
  usable = None
  if settings.rpn_size_divisor:
    padded = -(-sizes // settings.rpn_size_divisor) * settings.rpn_size_divisor
    usable = valid_anchors(grids, strides, settings.num_anchors, padded)
  if settings.rpn_allowed_border >= 0:
    within = anchors_within(np.concatenate(anchors), sizes, settings.rpn_allowed_border)
    usable = within if usable is None else usable & within
  return None if usable is None else jnp.asarray(usable)
