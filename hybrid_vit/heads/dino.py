"""DINO over any backbone of the registry.

Hao Zhang et al., "DINO: DETR with Improved DeNoising Anchor Boxes for End-to-End Object Detection",
ICLR 2023, arXiv:2203.03605. backbone → maps of one width → encoder → the best cells' boxes as
queries → decoder, which refines them. Training adds noised true boxes. `DINOSettings` holds the
numbers.

Deviations are listed in `dino_network`, `dino_denoising` and `dino_losses`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.heads.batch_norm_groups import groups_of, with_groups
from hybrid_vit.heads.detectors import register_without_masks
from hybrid_vit.heads.dino_denoising import (
  DenoisingDraws,
  DenoisingQueries,
  denoising_queries,
  draw_denoising,
  num_denoising_slots,
)
from hybrid_vit.heads.dino_losses import (
  BoxTargets,
  SetLossSettings,
  denoising_losses,
  set_losses,
  weighted_losses,
)
from hybrid_vit.heads.dino_network import DINONetwork, DINOPredictions
from hybrid_vit.heads.rcnn import Targets
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.boxes import centres_to_corners, corners_to_centres
from hybrid_vit.ops.top_places import top_places


@dataclasses.dataclass(frozen=True)
class DINOSettings:
  """All that is not a layer.

  Attributes:
    denoising_number: pairs of denoising queries, see `denoising_queries`; 0 for none.
    label_noise: likewise.
    box_noise: likewise; 0.4 in the authors' released configuration, 1.0 in the paper and detrex.
    losses: weights.
    detections: D, so many of a picture.
  """

  denoising_number: int = 100
  label_noise: float = 0.5
  box_noise: float = 0.4
  losses: SetLossSettings = dataclasses.field(default_factory=SetLossSettings)
  detections: int = 300


_PARTS = ("backbone",)


class DINO(nn.Module):
  """The detector. Its parameters lie under "backbone" and "head".

  Attributes:
    backbone: of the registry's contract, without a head.
    head: over the backbone's maps.
    settings: all that is not a layer.
  """

  backbone: nn.Module
  head: DINONetwork
  settings: DINOSettings = DINOSettings()

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The backbone's levels that the head reads."""
    return self.head.features

  @property
  def batch_norm_groups(self) -> int:
    """See `heads.batch_norm_groups`."""
    return groups_of(self, *_PARTS)

  def with_batch_norm_groups(self, groups: int) -> DINO:
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
      targets: what is there, masks not read; without them, detections come out.
      key: of the noise; needed with targets, unless there is no denoising.
      sizes: int `[B, 2]`, (height, width) of each picture without its padding; all of it by
        default.

    Returns:
      With targets float32 scalars, whose sum is to be minimised: "class0", "l1_0", "giou0" of the
      first decoder layer and so on, "encoder_class" …, and "denoising_class0" …. Else float32
      "boxes" `[B, D, 4]`, by falling "scores" `[B, D]`, int32 "labels" `[B, D]`, and bool "valid"
      `[B, D]`, all true.
    """
    backbone: Any = self.backbone
    _, endpoints = backbone(images, train=train)
    canvas = (images.shape[1], images.shape[2])
    if sizes is None:
      sizes = jnp.broadcast_to(jnp.array(canvas), (images.shape[0], 2))
    if targets is None:
      return self.detect(endpoints, sizes, canvas)
    return self.losses(endpoints, targets, key, sizes, canvas)

  def losses(
    self,
    maps: Mapping[str, jax.Array],
    targets: Targets,
    key: jax.Array | None,
    sizes: jax.Array,
    canvas: tuple[int, int],
    *,
    draws: DenoisingDraws | None = None,
  ) -> dict[str, jax.Array]:
    """Losses on a pyramid: see `__call__`.

    Args:
      maps: of `features`.
      targets: as there.
      key: as there.
      sizes: as there.
      canvas: (height, width) of the padded pictures.
      draws: of the noise, instead of the key's.

    Raises:
      ValueError: neither key nor draws.
    """
    wanted = relative_targets(targets, sizes)
    noised = self.noised(wanted, key, draws)
    found = self.head(maps, sizes, canvas, noised)
    return dino_losses(found, wanted, noised, self.settings.losses)

  def noised(
    self, targets: BoxTargets, key: jax.Array | None, draws: DenoisingDraws | None = None
  ) -> DenoisingQueries | None:
    """The denoising queries of a batch, or None: see `losses`."""
    s = self.settings
    if not s.denoising_number:
      return None
    if draws is None:
      if key is None:
        raise ValueError("DINO: losses need a key, by which true boxes are noised")
      batch, room = targets.labels.shape
      slots = num_denoising_slots(s.denoising_number, room)
      draws = draw_denoising(key, batch, slots, self.head.num_outputs)
    return denoising_queries(
      *targets, draws, number=s.denoising_number, label_noise=s.label_noise, box_noise=s.box_noise
    )

  def detect(
    self, maps: Mapping[str, jax.Array], sizes: jax.Array, canvas: tuple[int, int]
  ) -> dict[str, jax.Array]:
    """Detections on a pyramid: see `__call__`, and `losses` for the arguments."""
    found = self.head(maps, sizes, canvas)
    boxes = centres_to_corners(found.boxes[-1]) * picture_sides(sizes)
    return top_detections(found.logits[-1], boxes, self.settings.detections)


def dino_losses(
  found: DINOPredictions,
  targets: BoxTargets,
  noised: DenoisingQueries | None,
  settings: SetLossSettings,
) -> dict[str, jax.Array]:
  """All weighted losses by name: see `DINO.__call__`."""
  slots = 0 if noised is None else noised.labels.shape[1]
  # The decoder's layers and the encoder are matched at once.
  logits = jnp.concatenate([found.logits[:, :, slots:], found.encoder_logits[None]])
  boxes = jnp.concatenate([found.boxes[:, :, slots:], found.encoder_boxes[None]])
  layers = found.logits.shape[0]
  answer: dict[str, jax.Array] = {}
  for name, value in weighted_losses(
    set_losses(logits, boxes, targets, settings), settings
  ).items():
    answer |= {numbered(name, i): value[i] for i in range(layers)}
    answer[f"encoder_{name}"] = value[layers]
  if noised is not None:
    of_noised = denoising_losses(
      found.logits[:, :, :slots], found.boxes[:, :, :slots], noised, targets, settings
    )
    for name, value in weighted_losses(of_noised, settings).items():
      answer |= {f"denoising_{numbered(name, i)}": value[i] for i in range(layers)}
  return answer


def numbered(name: str, layer: int) -> str:
  """ "class0", "l1_0": the name of a layer's loss."""
  return f"{name}{'_' if name[-1].isdigit() else ''}{layer}"


def relative_targets(targets: Targets, sizes: jax.Array) -> BoxTargets:
  """Boxes (x1, y1, x2, y2) in pixels as (centre x, centre y, width, height) of their pictures."""
  sides = picture_sides(sizes)
  valid = jnp.asarray(targets["valid"], bool)
  boxes = corners_to_centres(jnp.asarray(targets["boxes"], jnp.float32) / sides)
  return BoxTargets(
    jnp.where(valid[..., None], boxes, 0.0), jnp.asarray(targets["labels"], jnp.int32), valid
  )


def picture_sides(sizes: jax.Array) -> jax.Array:
  """(height, width) `[B, 2]` → (width, height, width, height) `[B, 1, 4]`."""
  return jnp.tile(jnp.asarray(sizes, jnp.float32)[:, None, ::-1], 2)


def top_detections(logits: jax.Array, boxes: jax.Array, count: int) -> dict[str, jax.Array]:
  """The pairs of a query and a class with the highest probabilities; nothing is suppressed.

  Args:
    logits: `[B, Q, K]`.
    boxes: `[B, Q, 4]`, in pixels.
    count: D, of which there are no more than pairs.

  Returns:
    See `DINO.__call__`; boxes may stand out of the picture, as the authors' do.
  """
  batch, queries, classes = logits.shape
  all_scores = jax.nn.sigmoid(logits).reshape(batch, -1)
  pairs = top_places(all_scores, min(count, queries * classes))
  scores = jnp.take_along_axis(all_scores, pairs, axis=1)
  chosen = jnp.take_along_axis(boxes, (pairs // classes)[..., None], axis=1)
  return {
    "boxes": chosen,
    "scores": scores,
    "labels": (pairs % classes).astype(jnp.int32),
    "valid": jnp.ones(scores.shape, bool),
  }


def create_dino(
  backbone: nn.Module,
  num_classes: int,
  *,
  num_levels: int = 4,
  head: Mapping[str, Any] | None = None,
  settings: DINOSettings | None = None,
) -> DINO:
  """DINO on a backbone, 4-scale or 5-scale.

  Args:
    backbone: with `features`; built with `num_classes=0`.
    num_classes: K.
    num_levels: of the pyramid, of which all but one are the backbone's coarsest maps: 4 read
      strides 8 to 32, 5 strides 4 to 32.
    head: attributes of `DINONetwork` that replace the defaults.
    settings: `DINOSettings()` by default.

  Raises:
    ValueError: a backbone with fewer maps.
  """
  known: tuple[FeatureSpec, ...] = tuple(backbone.features)
  if len(known) < num_levels - 1:
    raise ValueError(
      f"DINO of {num_levels} levels reads {num_levels - 1} maps; the backbone gives {len(known)}"
    )
  parts = {"dtype": getattr(backbone, "dtype", jnp.float32), **(head or {})}
  network = DINONetwork(known[1 - num_levels :], num_classes, num_levels, **parts)
  return DINO(backbone, network, DINOSettings() if settings is None else settings)


register_without_masks("dino", create_dino, DINOSettings)
