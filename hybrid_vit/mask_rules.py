"""By which rules answers of queries become segments, and the settings of these rules.

Heads that predict a class and a mask of each query differ in what a mask's logits say: each mask of
Mask2Former stands for itself (a sigmoid), those of kMaX-DeepLab share the pixels (a softmax over
queries). All that follows of it for a picture is in a head's `MaskRules`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from hybrid_vit.canvas_inference import CanvasSettings
from hybrid_vit.data import arguments as check
from hybrid_vit.tasks import kmax_inference, mask2former_inference
from hybrid_vit.tasks.mask2former_inference import Instances, Segment


@dataclasses.dataclass(frozen=True)
class InstanceInferenceSettings(CanvasSettings):
  """How a picture is seen, and what is found in it.

  Attributes:
    max_instances: pairs of a query and a class that are taken.
  """

  max_instances: int = 100

  def __post_init__(self) -> None:
    super().__post_init__()
    check.whole("inference.max_instances", self.max_instances)


@dataclasses.dataclass(frozen=True)
class PanopticInferenceSettings(InstanceInferenceSettings):
  """See `InstanceInferenceSettings` and `mask2former_inference.panoptic_segments`.

  Attributes:
    object_threshold: a segment's class has to be surer than that.
    overlap_threshold: least part of its mask that a segment owns.
  """

  object_threshold: float = 0.8
  overlap_threshold: float = 0.8

  def __post_init__(self) -> None:
    super().__post_init__()
    _check_parts(self, "object_threshold", "overlap_threshold")


@dataclasses.dataclass(frozen=True)
class KMaXInstanceSettings(InstanceInferenceSettings):
  """See `InstanceInferenceSettings` and `kmax_inference.instances`.

  Attributes:
    pixel_threshold: a pixel of a mask has to be surer than that.
  """

  pixel_threshold: float = 0.4

  def __post_init__(self) -> None:
    super().__post_init__()
    _check_parts(self, "pixel_threshold")


@dataclasses.dataclass(frozen=True)
class KMaXPanopticSettings(KMaXInstanceSettings):
  """See `KMaXInstanceSettings` and `kmax_inference.panoptic_segments`; COCO's figures.

  Attributes:
    thing_threshold: a thing's class has to be surer than that.
    stuff_threshold: stuff's class has to be surer than that.
    overlap_threshold: more than this part of a segment's mask has to be left to it.
  """

  thing_threshold: float = 0.7
  stuff_threshold: float = 0.5
  overlap_threshold: float = 0.8

  def __post_init__(self) -> None:
    super().__post_init__()
    _check_parts(self, "thing_threshold", "stuff_threshold", "overlap_threshold")


class _Scores(Protocol):
  def __call__(self, class_logits: jax.Array, masks: jax.Array) -> jax.Array: ...


class _Instances(Protocol):
  def __call__(
    self, class_logits: np.ndarray, masks: Any, things: Collection[int] | None, settings: Any
  ) -> Instances: ...


class _Panoptic(Protocol):
  def __call__(
    self, class_logits: np.ndarray, masks: Any, things: Collection[int], settings: Any
  ) -> tuple[np.ndarray, list[Segment]]: ...


class _Aligned(Protocol):
  def __call__(self, width: int) -> bool: ...


class MaskRules(NamedTuple):
  """The rules of one head.

  Attributes:
    semantic_scores: class logits `[B, Q, K + 1]` and mask logits `[B, H, W, Q]` → `[B, H, W, K]`.
    instances: of one picture, class logits `[Q, K + 1]` and mask logits `[H, W, Q]`.
    panoptic: likewise, the map of ids and its segments.
    align_corners: whether maps are resized with aligned corners, by the input's width.
    instance_settings: what `instances` reads.
    panoptic_settings: what both read.
  """

  semantic_scores: _Scores
  instances: _Instances
  panoptic: _Panoptic
  align_corners: _Aligned
  instance_settings: type[InstanceInferenceSettings]
  panoptic_settings: type[InstanceInferenceSettings]


def _mask2former_instances(
  class_logits: np.ndarray,
  masks: Any,
  things: Collection[int] | None,
  settings: InstanceInferenceSettings,
) -> Instances:
  return mask2former_inference.instances(
    class_logits, masks, max_instances=settings.max_instances, things=things
  )


def _mask2former_panoptic(
  class_logits: np.ndarray,
  masks: Any,
  things: Collection[int],
  settings: PanopticInferenceSettings,
) -> tuple[np.ndarray, list[Segment]]:
  return mask2former_inference.panoptic_segments(
    class_logits,
    masks,
    things=things,
    object_threshold=settings.object_threshold,
    overlap_threshold=settings.overlap_threshold,
  )


def _kmax_instances(
  class_logits: np.ndarray,
  masks: Any,
  things: Collection[int] | None,
  settings: KMaXInstanceSettings,
) -> Instances:
  return kmax_inference.instances(
    class_logits,
    masks,
    max_instances=settings.max_instances,
    things=things,
    pixel_threshold=settings.pixel_threshold,
  )


def _kmax_panoptic(
  class_logits: np.ndarray, masks: Any, things: Collection[int], settings: KMaXPanopticSettings
) -> tuple[np.ndarray, list[Segment]]:
  return kmax_inference.panoptic_segments(
    class_logits,
    masks,
    things=things,
    thing_threshold=settings.thing_threshold,
    stuff_threshold=settings.stuff_threshold,
    pixel_threshold=settings.pixel_threshold,
    overlap_threshold=settings.overlap_threshold,
  )


def _never(width: int) -> bool:
  del width
  return False


def _check_parts(settings: Any, *names: str) -> None:
  for name in names:
    check.number(f"inference.{name}", getattr(settings, name), 0, 1)


MASK2FORMER = MaskRules(
  mask2former_inference.semantic_scores,
  _mask2former_instances,
  _mask2former_panoptic,
  _never,
  InstanceInferenceSettings,
  PanopticInferenceSettings,
)
KMAX = MaskRules(
  kmax_inference.semantic_scores,
  _kmax_instances,
  _kmax_panoptic,
  kmax_inference.aligns_corners,
  KMaXInstanceSettings,
  KMaXPanopticSettings,
)
