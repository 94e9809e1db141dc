"""Faster, Mask and Cascade R-CNN over any backbone of the registry.

Kaiming He et al., "Mask R-CNN", ICCV 2017, arXiv:1703.06870; Zhaowei Cai and Nuno Vasconcelos,
"Cascade R-CNN", CVPR 2018, arXiv:1712.00726. backbone → neck → proposals → stages of box heads,
each refining the boxes of the one before → masks. `RCNNSettings` holds the numbers and the ways in
which mmdetection, detectron2 and torchvision differ.

Shapes are static: true boxes, proposals, samples and detections are padded, with flags. Every
normaliser is a sum over the whole batch, sharded or not; mmdetection and detectron2 average the
devices' own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.heads.batch_norm_groups import groups_of, with_groups
from hybrid_vit.heads.box_head import BoxHead, box_losses, detect_boxes, refine_boxes
from hybrid_vit.heads.detectors import register_detector
from hybrid_vit.heads.mask_head import MaskHead, mask_loss, mask_targets, select_class
from hybrid_vit.heads.rcnn_settings import (
  RCNNSettings,
  cascade_settings,
  level_anchors,
  settings_of,
  usable_anchors,
)
from hybrid_vit.heads.registry import create_neck, neck_arguments
from hybrid_vit.heads.roi_sampling import RoISample, match_rois, sample_rois
from hybrid_vit.heads.rpn import Proposals, RPNHead, propose, rpn_losses
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.roi_align import pyramid_roi_align

# What the parts of ViTDet (arXiv:2203.16527, appendix A.2) have otherwise, for the factories.
VITDET: Mapping[str, Mapping[str, Any]] = {
  "neck": {"name": "simple_pyramid", "extra": True},
  "rpn": {"num_convs": 2},
  "box_head": {"num_convs": 4, "num_fcs": 1, "norm": "layer"},
  "mask_head": {"norm": "layer"},
}


class Targets(TypedDict, total=False):
  """The true objects of a batch, padded to G a picture.

  Keys:
    boxes: `[B, G, 4]`.
    labels: int `[B, G]`, 0 to K - 1.
    valid: bool `[B, G]`.
    masks: `[B, G, H, W]`, of whole pictures; or
    box_masks: `[B, G, h, w]`, each in the frame of its box. Either where there are mask heads, of
      0 and 1, of values between, or bool.
  """

  boxes: jax.Array
  labels: jax.Array
  valid: jax.Array
  masks: jax.Array
  box_masks: jax.Array


_PARTS = ("backbone", "neck", "stages", "mask_heads")


class RCNN(nn.Module):
  """A detector of two and more stages.

  Its parameters lie under "backbone", "neck", "rpn", "box_head0" … and "mask_head0" ….

  Attributes:
    backbone: of the registry's contract, without a head.
    neck: between backbone and heads, or None where the backbone's maps are of one width.
    rpn: over all levels.
    stages: a box head for each of the settings' stages.
    mask_heads: none; one for each stage; or one, which is trained on the first stage's sample
      (detectron2).
    settings: all that is not a layer.
  """

  backbone: nn.Module
  neck: nn.Module | None
  rpn: nn.Module
  stages: tuple[nn.Module, ...]
  mask_heads: tuple[nn.Module, ...] = ()
  settings: RCNNSettings = RCNNSettings()

  def setup(self) -> None:
    """Gives the heads their names.

    Raises:
      ValueError: not as many heads as stages.
    """
    stages, masks = len(self.settings.stage_ious), len(self.mask_heads)
    if len(self.stages) != stages:
      raise ValueError(f"RCNN: {len(self.stages)} box heads for settings of {stages} stages")
    if masks not in (0, 1, stages) or (masks > 1 and not self.settings.resample):
      raise ValueError(
        f"RCNN: {masks} mask heads for {stages} stages; none, one, or, with settings that "
        "resample, one for each were expected"
      )
    for kind, heads in (("box", self.stages), ("mask", self.mask_heads)):
      for i, head in enumerate(heads):
        setattr(self, f"{kind}_head{i}", head.clone(parent=None, name=None))

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The levels that the heads read."""
    source: Any = self.backbone if self.neck is None else self.neck
    return tuple(source.features if self.neck is None else source.outputs)

  @property
  def batch_norm_groups(self) -> int:
    """See `heads.batch_norm_groups`."""
    return groups_of(self, *_PARTS)

  def with_batch_norm_groups(self, groups: int) -> RCNN:
    """See `heads.batch_norm_groups`."""
    return with_groups(self, groups, *_PARTS)

  def __call__(
    self,
    images: jax.Array,
    train: bool = False,
    targets: Targets | None = None,
    key: jax.Array | None = None,
    sizes: jax.Array | None = None,
  ) -> dict[str, jax.Array]:
    """Losses of a batch, or its detections.

    Args:
      images: `[B, H, W, 3]`, padded below and to the right.
      train: of dropped paths and batch norm.
      targets: what is there; without them, detections come out.
      key: of the samples; needed with targets.
      sizes: int `[B, 2]`, (height, width) of each picture without its padding; all of it by
        default.

    Returns:
      With targets float32 scalars, whose sum is to be minimised: "rpn_class", "rpn_box", and
      "class0", "box0", "mask0" of the first stage, and so on. Else float32 "boxes" `[B, D, 4]`,
      "scores" `[B, D]`, int32 "labels" `[B, D]`, bool "valid" `[B, D]` and "truncated" `[B]` of
      `Detections`, and "masks" `[B, D, 28, 28]`, probabilities in the frames of the boxes.
    """
    _, endpoints = self.backbone(images, train=train)
    maps = endpoints if self.neck is None else self.neck(endpoints, train)
    canvas = (images.shape[1], images.shape[2])
    if sizes is None:
      sizes = jnp.broadcast_to(jnp.array(canvas), (images.shape[0], 2))
    if targets is None:
      return self.detect(maps, sizes, canvas, train=train)
    return self.losses(maps, targets, key, sizes, canvas, train=train)

  def losses(
    self,
    maps: Mapping[str, jax.Array],
    targets: Targets,
    key: jax.Array | None,
    sizes: jax.Array,
    canvas: tuple[int, int],
    *,
    train: bool = True,
    proposals: Proposals | None = None,
  ) -> dict[str, jax.Array]:
    """Losses on a pyramid: see `__call__`.

    Args:
      maps: of `features`.
      targets: as there.
      key: as there.
      sizes: as there.
      canvas: (height, width) of the padded pictures.
      train: of batch norm.
      proposals: instead of the network's own.

    Raises:
      ValueError: no key, or no masks for the mask heads.
    """
    s = self.settings
    if key is None:
      raise ValueError("RCNN: losses need a key, by which anchors and proposals are sampled")
    if self.mask_heads and "masks" not in targets and "box_masks" not in targets:
      raise ValueError(
        f"RCNN: mask heads need targets 'masks' or 'box_masks'; there are {sorted(targets)}"
      )
    gt = (targets["boxes"], targets["labels"], targets["valid"])
    rpn_key, stage_key = jax.random.split(key)
    objectness, deltas, anchors, usable = self._anchored(maps, sizes, canvas, train)
    found = rpn_losses(
      objectness, deltas, anchors, usable, gt[0], gt[2], rpn_key,
      positive_iou=s.rpn_positive_iou, negative_iou=s.rpn_negative_iou,
      min_positive_iou=s.rpn_min_positive_iou, low_quality=s.rpn_low_quality,
      samples=s.rpn_samples, positive_fraction=s.rpn_positive_fraction, beta=s.rpn_beta,
      normaliser=s.rpn_normaliser,
    )  # fmt: skip
    if proposals is None:
      proposals = self._propose(objectness, deltas, anchors, sizes, training=True)
    boxes, valid = proposals.boxes, proposals.valid
    for i, (weight, stds) in enumerate(zip(s.stage_weights, s.stage_stds)):
      sample = self._sample(i, jax.random.fold_in(stage_key, i), boxes, valid, gt)
      logits, offsets = self._box(i, maps, sample.boxes, train)
      found[f"class{i}"], of_boxes = box_losses(
        logits, offsets, sample, stds=stds, kind=s.box_loss, beta=s.box_beta,
        two_sided=s.two_sided_clamp,
      )  # fmt: skip
      found[f"class{i}"] *= weight
      found[f"box{i}"] = weight * s.box_weight * of_boxes
      if i < len(self.mask_heads):
        found[f"mask{i}"] = (
          weight * s.mask_weight * self._mask_loss(i, maps, sample, targets, train)
        )
      if i + 1 < len(s.stage_ious):
        boxes = refine_boxes(
          logits, offsets, sample.boxes, sizes, stds=stds, two_sided=s.two_sided_clamp,
          labels=sample.labels,
        )  # fmt: skip
        if s.resample:
          valid = sample.valid & ~sample.added
        else:
          valid = sample.valid & jnp.all(boxes[..., 2:] > boxes[..., :2], axis=-1)
    return {name: value.astype(jnp.float32) for name, value in found.items()}

  def detect(
    self,
    maps: Mapping[str, jax.Array],
    sizes: jax.Array,
    canvas: tuple[int, int],
    *,
    train: bool = False,
    proposals: Proposals | None = None,
  ) -> dict[str, jax.Array]:
    """Detections on a pyramid: see `__call__`, and `losses` for the arguments."""
    s = self.settings
    if proposals is None:
      objectness, deltas, anchors, _ = self._anchored(maps, sizes, canvas, train)
      proposals = self._propose(objectness, deltas, anchors, sizes, training=False)
    boxes = proposals.boxes
    logits, offsets = self._box(0, maps, boxes, train)
    of_stages = [logits]
    for i in range(1, len(s.stage_ious)):
      boxes = refine_boxes(
        logits, offsets, boxes, sizes, stds=s.stage_stds[i - 1], two_sided=s.two_sided_clamp
      )
      logits, offsets = self._box(i, maps, boxes, train)
      of_stages.append(logits)
    if s.cascade_scores == "logits":
      scores = jax.nn.softmax(jnp.mean(jnp.stack(of_stages), axis=0))
    else:
      scores = jnp.mean(jax.nn.softmax(jnp.stack(of_stages)), axis=0)
    found = detect_boxes(
      scores, offsets, boxes, proposals.valid, sizes, stds=s.stage_stds[-1],
      two_sided=s.two_sided_clamp, score_threshold=s.score_threshold, iou_threshold=s.nms,
      max_candidates=s.candidates, max_detections=s.detections, min_size=s.min_detection_size,
      soft=s.soft_nms,
    )  # fmt: skip
    names = ("boxes", "scores", "labels", "valid", "truncated")
    answer = {name: getattr(found, name) for name in names}
    if self.mask_heads:
      masks = self.masks(maps, found.boxes, found.labels, train=train)
      answer["masks"] = jnp.where(found.valid[..., None, None], masks, 0)
    return answer

  def masks(
    self, maps: Mapping[str, jax.Array], boxes: jax.Array, labels: jax.Array, *, train: bool = False
  ) -> jax.Array:
    """Probabilities `[B, D, 28, 28]` in the frames of boxes: the mean of the mask heads'."""
    features = self._pool(maps, boxes, self.settings.mask_pool)
    flat = features.reshape(-1, *features.shape[2:])
    total = jnp.zeros((), jnp.float32)
    for i in range(len(self.mask_heads)):
      logits = getattr(self, f"mask_head{i}")(flat, train)
      logits = logits.reshape(*boxes.shape[:2], *logits.shape[1:])
      total = total + jax.nn.sigmoid(select_class(logits, labels))
    return total / len(self.mask_heads)

  def _anchored(self, maps, sizes, canvas, train):
    s, levels = self.settings, self.features
    grids = [maps[level.name].shape[1:3] for level in levels]
    strides = [level.stride for level in levels]
    anchors = level_anchors(s, grids, strides, canvas)
    usable = usable_anchors(s, anchors, grids, strides, sizes)
    return *self.rpn(maps, train), anchors, usable

  def _propose(self, objectness, deltas, anchors, sizes, *, training: bool) -> Proposals:
    s, place = self.settings, 0 if training else 1
    return propose(
      objectness, deltas, anchors, sizes, most_before=s.rpn_before[place],
      most_after=s.rpn_after[place], iou_threshold=s.rpn_nms, min_size=s.rpn_min_size,
      two_sided=s.two_sided_clamp,
    )  # fmt: skip

  def _sample(self, stage, key, boxes, valid, gt) -> RoISample:
    s = self.settings
    shared = {"num_classes": self.stages[0].num_classes, "iou": s.stage_ious[stage]}
    if stage and not s.resample:
      return jax.vmap(lambda *given: match_rois(*given, **shared))(boxes, valid, *gt)

    def draw(*given):
      return sample_rois(
        *given, **shared, low_quality=s.roi_low_quality, samples=s.roi_samples,
        positive_fraction=s.roi_positive_fraction, add_gt=s.roi_add_gt,
      )  # fmt: skip

    return jax.vmap(draw)(jax.random.split(key, boxes.shape[0]), boxes, valid, *gt)

  def _pool(self, maps, boxes, size: int) -> jax.Array:
    s = self.settings
    levels = self.features[: s.num_roi_levels]
    return pyramid_roi_align(
      [maps[level.name] for level in levels], boxes, output_size=size,
      strides=[level.stride for level in levels], sampling_ratio=s.sampling_ratio,
      aligned=s.aligned, finest_scale=s.finest_scale, level_rule=s.level_rule,
    )  # fmt: skip

  def _box(self, stage: int, maps, boxes, train) -> tuple[jax.Array, jax.Array]:
    """(logits `[B, S, K + 1]`, offsets `[B, S, K or 1, 4]`) of boxes `[B, S, 4]`."""
    features, kept = self._pool(maps, boxes, self.settings.box_pool), self.settings.stage_gradient
    if kept != 1:
      features = kept * features + lax.stop_gradient((1 - kept) * features)
    head = getattr(self, f"box_head{stage}")
    logits, deltas = head(features.reshape(-1, *features.shape[2:]), train)
    return (
      logits.reshape(*boxes.shape[:2], -1),
      deltas.reshape(*boxes.shape[:2], *deltas.shape[1:]),
    )

  def _mask_loss(self, stage: int, maps, sample: RoISample, targets, train) -> jax.Array:
    # Positives come first in a sample.
    boxes, gt, labels, positive = (
      getattr(sample, name)[:, : self.settings.num_positives]
      for name in ("boxes", "gt", "labels", "positive")
    )
    features = self._pool(maps, boxes, self.settings.mask_pool)
    logits = getattr(self, f"mask_head{stage}")(features.reshape(-1, *features.shape[2:]), train)
    logits = logits.reshape(*boxes.shape[:2], *logits.shape[1:])
    whole = "masks" in targets
    wanted = mask_targets(
      boxes, gt, targets["masks" if whole else "box_masks"], size=logits.shape[2],
      gt_boxes=None if whole else targets["boxes"], aligned=self.settings.aligned,
      binary=self.settings.binary_masks,
    )  # fmt: skip
    return mask_loss(logits, wanted, labels, positive)


def create_mask_rcnn(
  backbone: nn.Module,
  num_classes: int,
  *,
  neck: Mapping[str, Any] | None = None,
  rpn: Mapping[str, Any] | None = None,
  box_head: Mapping[str, Any] | None = None,
  mask_head: Mapping[str, Any] | None = None,
  masks: bool = True,
  mask_head_per_stage: bool = True,
  settings: RCNNSettings | None = None,
  batch_norm_groups: int | None = None,
) -> RCNN:
  """Mask R-CNN on a backbone, or without masks Faster R-CNN.

  Args:
    backbone: with `features`; built with `num_classes=0`.
    num_classes: K, without background.
    neck: {"name": as registered, further attributes}; FPN and a max-pooled level by default.
    rpn: attributes of `RPNHead`.
    box_head: of `BoxHead`.
    mask_head: of `MaskHead`.
    masks: whether there are mask heads.
    mask_head_per_stage: one for each stage of the settings, else one.
    settings: `RCNNSettings()` by default.
    batch_norm_groups: of the heads' batch norms; None for what the backbone has.

  Raises:
    ValueError: an unknown neck, or attribute of it.
  """
  settings = RCNNSettings() if settings is None else settings
  groups = getattr(backbone, "batch_norm_groups", 1)
  groups = groups if batch_norm_groups is None else batch_norm_groups
  shared = {"dtype": getattr(backbone, "dtype", jnp.float32), "batch_norm_groups": groups}
  own = dict(neck or {"name": "fpn", "extra": "max_pool", "num_extra": 1})
  name = own.pop("name")
  known = neck_arguments(name)
  own = {**{k: v for k, v in shared.items() if k in known}, **own}
  made_neck = create_neck(name, tuple(backbone.features), **own)
  rpn_parts = {"num_anchors": settings.num_anchors, "channels": made_neck.outputs[0].channels}
  stages = len(settings.stage_ious)
  made_boxes = BoxHead(num_classes, **{**shared, **(box_head or {})})
  made_masks = MaskHead(num_classes, **{**shared, **(mask_head or {})})
  return RCNN(
    backbone,
    made_neck,
    RPNHead(made_neck.outputs, **{**rpn_parts, "dtype": shared["dtype"], **(rpn or {})}),
    (made_boxes,) * stages,
    (made_masks,) * ((stages if mask_head_per_stage else 1) if masks else 0),
    settings,
  )


def create_cascade_mask_rcnn(
  backbone: nn.Module,
  num_classes: int,
  *,
  box_head: Mapping[str, Any] | None = None,
  settings: RCNNSettings | None = None,
  **arguments: Any,
) -> RCNN:
  """Cascade Mask R-CNN as Swin Transformer's detection and its followers have it.

  Three box heads of four convolutions with batch norm and one linear layer, boxes for each class,
  generalised IoU, and three mask heads.

  Args:
    backbone: as in `create_mask_rcnn`.
    num_classes: likewise.
    box_head: attributes of `BoxHead` that replace these.
    settings: `cascade_settings()` by default.
    **arguments: further ones of `create_mask_rcnn`.
  """
  heads = {"num_convs": 4, "num_fcs": 1, "norm": "batch", **(box_head or {})}
  return create_mask_rcnn(
    backbone, num_classes, box_head=heads, settings=settings or cascade_settings(), **arguments
  )


@register_detector("mask_rcnn")
def _mask_rcnn(
  backbone: nn.Module,
  num_classes: int,
  *,
  implementation: str = "mmdetection",
  settings: Mapping[str, Any] | None = None,
  **arguments: Any,
) -> RCNN:
  """`create_mask_rcnn` by plain values; whose numbers `settings` replace, `implementation` says."""
  made = settings_of(implementation, 1, **(settings or {}))
  return create_mask_rcnn(backbone, num_classes, settings=made, **arguments)


@register_detector("cascade_mask_rcnn")
def _cascade_mask_rcnn(
  backbone: nn.Module,
  num_classes: int,
  *,
  implementation: str = "mmdetection",
  settings: Mapping[str, Any] | None = None,
  **arguments: Any,
) -> RCNN:
  """`create_cascade_mask_rcnn` by plain values, see `_mask_rcnn`."""
  made = settings_of(implementation, 3, **(settings or {}))
  return create_cascade_mask_rcnn(backbone, num_classes, settings=made, **arguments)
