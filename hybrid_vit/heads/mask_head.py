"""The mask head of Mask R-CNN, its targets and its loss.

Kaiming He et al., "Mask R-CNN", ICCV 2017, arXiv:1703.06870, section 3 and figure 4 (right), as
mmdetection's `FCNMaskHead` and detectron2's `MaskRCNNConvUpsampleHead` have it.

A true mask is given over the whole picture, or in the frame of its own box at a fixed size, which
takes a small part of the memory: then it is resampled twice, and its target differs in single cells
at its edge. Of ellipses, 8 to 150 pixels large, 0.1 to 0.4 % of a target's cells differ where the
frame has 56x56 numbers between 0 and 1, 0.5 to 1 % where these are bits, and 0.3 to 0.4 % with
112x112 bits.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from hybrid_vit.heads.box_head import conv_relu, widths
from hybrid_vit.heads.detection_losses import binary_cross_entropy
from hybrid_vit.heads.layers import Deconv, he_normal_fan_out
from hybrid_vit.models.layers import Conv
from hybrid_vit.ops.roi_align import roi_align

# Boxes whose targets are cut from whole pictures at a time.
_AT_ONCE = 16
# Of `roi_align` of masks: one channel, and boxes that may be of any size against a mask's frame,
# where reading cell by cell would take as many rounds.
_FORM = "matrix"


class MaskHead(nn.Module):
  """Convolutions, a transposed one that doubles the size, then a mask for each class.

  Attributes:
    num_classes: K, without background.
    num_convs: 3x3 convolutions with ReLU.
    channels: of each convolution, or of all; the transposed one has the last's.
    norm: behind each convolution, which then has no bias: None, "batch" or "layer" (over channels).
    batch_norm_epsilon: of "batch".
    layer_norm_epsilon: of "layer".
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation; what comes out is computed in float32.
  """

  num_classes: int
  num_convs: int = 4
  channels: int | tuple[int, ...] = 256
  norm: str | None = None
  batch_norm_epsilon: float = 1e-5
  layer_norm_epsilon: float = 1e-6
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Features of boxes `[R, P, P, C]` → logits `[R, 2 P, 2 P, K]`, float32."""
    x = x.astype(self.dtype)
    for i, width in enumerate(widths("mask head", "channels", self.channels, self.num_convs)):
      x = conv_relu(self, x, width, f"conv{i}", train)
    width = self.channels if isinstance(self.channels, int) else self.channels[-1]
    x = nn.relu(Deconv(width, 2, 2, dtype=self.dtype, name="upsample")(x))
    return Conv(
      self.num_classes, (1, 1), kernel_init=he_normal_fan_out, dtype=jnp.float32, name="classifier"
    )(x.astype(jnp.float32))


def mask_targets(
  boxes: jax.Array,
  gt: jax.Array,
  masks: jax.Array,
  *,
  size: int,
  gt_boxes: jax.Array | None = None,
  aligned: bool = True,
  binary: bool = True,
) -> jax.Array:
  """True masks in the frames of proposals, by `roi_align` with adaptive sampling.

  Args:
    boxes: `[B, M, 4]`.
    gt: int `[B, M]`, which true mask each wants.
    masks: `[B, G, H, W]`, of whole pictures; with `gt_boxes` `[B, G, h, w]`, each in the frame of
      its own box, whose cells divide that evenly. 0 to 1, or bool.
    size: of the targets.
    gt_boxes: `[B, G, 4]`, the frames of the masks; None if those are of whole pictures.
    aligned: of `roi_align`; in a frame's cells it always is.
    binary: 1 from 0.5 on, else 0 (mmdetection, detectron2); else what was sampled (torchvision).

  Returns:
    float32 `[B, M, size, size]`; zeros where there are no true masks at all.
  """
  if not masks.shape[1]:
    return jnp.zeros((*boxes.shape[:2], size, size), jnp.float32)
  boxes = boxes.astype(jnp.float32)
  if gt_boxes is None:
    found = _from_pictures(boxes, gt, masks, size, aligned)
  else:
    found = _from_frames(boxes, gt, masks, gt_boxes, size)
  return (found >= 0.5).astype(jnp.float32) if binary else found


def mask_loss(
  logits: jax.Array, targets: jax.Array, labels: jax.Array, positive: jax.Array
) -> jax.Array:
  """Mean binary cross-entropy over the cells of the positives' own classes; 0 without positives.

  Args:
    logits: `[B, M, h, w, K]`.
    targets: `[B, M, h, w]`.
    labels: int `[B, M]`.
    positive: bool `[B, M]`.
  """
  own = select_class(logits, jnp.where(positive, labels, 0))
  each = jnp.mean(binary_cross_entropy(own, targets), axis=(-2, -1))
  return jnp.sum(jnp.where(positive, each, 0)) / jnp.maximum(jnp.sum(positive), 1)


def select_class(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Masks `[..., h, w]` of one class each from `[..., h, w, K]`; labels int `[...]`."""
  return jnp.take_along_axis(logits, labels[..., None, None, None], axis=-1)[..., 0]


def _from_pictures(boxes, gt, masks, size, aligned) -> jax.Array:
  def picture(boxes, gt, masks):
    def one(given):
      box, index = given
      mask = masks[index].astype(jnp.float32)[None, :, :, None]
      return roi_align(
        mask, box[None, None], output_size=size, spatial_scale=1.0, sampling_ratio=0,
        aligned=aligned, form=_FORM,
      )[0, 0, ..., 0]  # fmt: skip

    return lax.map(one, (boxes, gt), batch_size=min(_AT_ONCE, boxes.shape[0]))

  return jax.vmap(picture)(boxes, gt, masks)


def _from_frames(boxes, gt, masks, gt_boxes, size) -> jax.Array:
  batch, count = gt.shape
  height, width = masks.shape[2:]
  # Nothing lies outside of the frame: a rim of zeros says so.
  rim = jnp.pad(masks.astype(jnp.float32), ((0, 0), (0, 0), (1, 1), (1, 1)))
  own = jax.vmap(lambda rows, index: rows[index])
  frames, chosen = own(gt_boxes.astype(jnp.float32), gt), own(rim, gt)
  sides = jnp.maximum(frames[..., 2:] - frames[..., :2], 1e-6)
  cells = jnp.array([width, height], jnp.float32)
  corners = boxes.reshape(batch, count, 2, 2) - frames[:, :, None, :2]
  inside = (corners / sides[:, :, None] * cells + 1).reshape(batch * count, 1, 4)
  found = roi_align(
    chosen.reshape(batch * count, height + 2, width + 2, 1), inside, output_size=size,
    spatial_scale=1.0, sampling_ratio=0, aligned=True, form=_FORM,
  )  # fmt: skip
  return found[:, 0, ..., 0].reshape(batch, count, size, size)
