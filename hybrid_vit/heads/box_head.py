"""The box head of R-CNN: class and box of each proposal from its pooled features.

Ross Girshick, "Fast R-CNN", ICCV 2015, arXiv:1504.08083, section 2; two linear layers as in FPN
(arXiv:1612.03144, section 4.2), or convolutions before one (Wu and He, arXiv:1803.08494, section
4.3, "4conv1fc"), as mmdetection's `ConvFCBBoxHead` and detectron2's `FastRCNNConvFCHead` have them.
The last class is background.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.heads.detection_losses import cross_entropy, smooth_l1
from hybrid_vit.heads.layers import he_normal_fan_out
from hybrid_vit.heads.roi_sampling import RoISample
from hybrid_vit.models.layers import Conv, batch_norm, layer_norm
from hybrid_vit.ops.boxes import decode_boxes, elementwise_giou, encode_boxes
from hybrid_vit.ops.nms import Detections, SoftNMS, multiclass_nms

NORMS = (None, "batch", "layer")
# Offsets to padded boxes, whose sides are 0, must be finite.
_LEAST_SIDE = 1e-6
_STDS = (0.1, 0.1, 0.2, 0.2)


class BoxHead(nn.Module):
  """Convolutions, linear layers, then class logits and offsets.

  Attributes:
    num_classes: K, without background.
    num_convs: 3x3 convolutions with ReLU before the linear layers.
    num_fcs: linear layers with ReLU.
    conv_channels: of each convolution, or of all.
    fc_channels: of each linear layer, or of all.
    norm: behind each convolution, which then has no bias: None, "batch" or "layer" (over channels).
    class_agnostic: one box for all classes, else one for each.
    batch_norm_epsilon: of "batch".
    layer_norm_epsilon: of "layer".
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation; what comes out is computed in float32.
  """

  num_classes: int
  num_convs: int = 0
  num_fcs: int = 2
  conv_channels: int | tuple[int, ...] = 256
  fc_channels: int | tuple[int, ...] = 1024
  norm: str | None = None
  class_agnostic: bool = False
  batch_norm_epsilon: float = 1e-5
  layer_norm_epsilon: float = 1e-6
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
    """Features of boxes `[R, P, P, C]` → logits `[R, K + 1]`, offsets `[R, K or 1, 4]`, float32."""
    x = x.astype(self.dtype)
    for i, width in enumerate(
      widths("box head", "conv_channels", self.conv_channels, self.num_convs)
    ):
      x = conv_relu(self, x, width, f"conv{i}", train)
    # PyTorch flattens channels first; so do we, that weights fit.
    x = jnp.transpose(x, (0, 3, 1, 2)).reshape(x.shape[0], -1)
    for i, width in enumerate(widths("box head", "fc_channels", self.fc_channels, self.num_fcs)):
      init = nn.initializers.xavier_uniform()
      x = nn.relu(nn.Dense(width, kernel_init=init, dtype=self.dtype, name=f"fc{i}")(x))
    x = x.astype(jnp.float32)
    classes = nn.Dense(
      self.num_classes + 1, kernel_init=nn.initializers.normal(0.01), name="classifier"
    )(x)
    boxes = 1 if self.class_agnostic else self.num_classes
    deltas = nn.Dense(4 * boxes, kernel_init=nn.initializers.normal(0.001), name="deltas")(x)
    return classes, deltas.reshape(-1, boxes, 4)


def conv_relu(module: Any, x: jax.Array, width: int, name: str, train: bool) -> jax.Array:
  """A 3x3 convolution with the head's norm, if any, and ReLU.

  Args:
    module: a head with `norm`, `dtype` and what the norms need.
    x: `[R, h, w, C]`.
    width: channels of the result.
    name: of the convolution; the norm's is `name` + "_norm".
    train: of batch norm.

  Raises:
    ValueError: another norm.
  """
  if module.norm not in NORMS:
    raise ValueError(f"norm is {module.norm!r}; None, 'batch' or 'layer' was expected")
  x = Conv(
    width, (3, 3), padding=((1, 1), (1, 1)), use_bias=module.norm is None,
    kernel_init=he_normal_fan_out, dtype=module.dtype, name=name,
  )(x)  # fmt: skip
  if module.norm == "batch":
    epsilon = module.batch_norm_epsilon
    x = batch_norm(module, epsilon=epsilon, unbiased_variance=True, name=f"{name}_norm")(x, train)
  elif module.norm == "layer":
    x = layer_norm(module.layer_norm_epsilon, module.dtype, f"{name}_norm")(x)
  return nn.relu(x)


def widths(what: str, name: str, value: int | tuple[int, ...], count: int) -> tuple[int, ...]:
  """A width for each of `count` layers.

  Raises:
    ValueError: a tuple of another length.
  """
  found = (value,) * count if isinstance(value, int) else tuple(value)
  if len(found) != count:
    raise ValueError(f"{what}: {name} is {found} for {count} layers; one for each was expected")
  return found


def box_losses(
  logits: jax.Array,
  deltas: jax.Array,
  sample: RoISample,
  *,
  stds: tuple[float, float, float, float] = _STDS,
  kind: str = "l1",
  beta: float = 0.0,
  two_sided: bool = True,
) -> tuple[jax.Array, jax.Array]:
  """Losses of a batch's samples, each a mean over all that were sampled.

  Args:
    logits: `[B, S, K + 1]`.
    deltas: `[B, S, K or 1, 4]`.
    sample: of `[B, S]` boxes.
    stds: of the offsets.
    kind: "l1": smooth L1 of the offsets' four numbers, summed; "giou": 1 - generalised IoU of the
      decoded box, neither clipped.
    beta: of `smooth_l1`; 0 is L1.
    two_sided: of `decode_boxes`, for "giou".

  Returns:
    The cross-entropy of the classes, and the box loss of the positives' own classes, float32.
  """
  count = jnp.maximum(jnp.sum(sample.valid), 1)
  entropy = jnp.where(sample.valid, cross_entropy(logits, sample.labels), 0)
  found = class_rows(deltas, jnp.where(sample.positive, sample.labels, 0))
  if kind == "giou":
    boxes = decode_boxes(sample.boxes, found, stds=stds, two_sided=two_sided)
    each = 1 - elementwise_giou(boxes, sample.gt_boxes)
  else:
    wanted = encode_boxes(sample.boxes, sample.gt_boxes, stds=stds, eps=_LEAST_SIDE)
    each = jnp.sum(smooth_l1(found, wanted, beta), axis=-1)
  return jnp.sum(entropy) / count, jnp.sum(jnp.where(sample.positive, each, 0)) / count


def refine_boxes(
  logits: jax.Array,
  deltas: jax.Array,
  boxes: jax.Array,
  sizes: jax.Array,
  *,
  stds: tuple[float, float, float, float],
  two_sided: bool,
  labels: jax.Array | None = None,
) -> jax.Array:
  """The boxes that a stage hands to the next, clipped to the picture, without gradient.

  Args:
    logits: `[B, S, K + 1]`.
    deltas: `[B, S, K or 1, 4]`.
    boxes: `[B, S, 4]`.
    sizes: `[B, 2]`, (height, width).
    stds: of the offsets.
    two_sided: of `decode_boxes`.
    labels: int `[B, S]`, whose class's offsets are taken; where they are background, and by
      default, the likeliest class's.

  Returns:
    `[B, S, 4]`.
  """
  background = logits.shape[-1] - 1
  likeliest = jnp.argmax(logits[..., :-1], axis=-1)
  if labels is not None:
    likeliest = jnp.where(labels == background, likeliest, labels)
  found = class_rows(deltas, likeliest)
  moved = decode_boxes(boxes, found, stds=stds, two_sided=two_sided, size=sizes[:, None])
  return jax.lax.stop_gradient(moved)


def detect_boxes(
  scores: jax.Array,
  deltas: jax.Array,
  boxes: jax.Array,
  valid: jax.Array,
  sizes: jax.Array,
  *,
  stds: tuple[float, float, float, float] = _STDS,
  two_sided: bool = True,
  score_threshold: float = 0.05,
  iou_threshold: float = 0.5,
  max_candidates: int = 2000,
  max_detections: int = 100,
  min_size: float = 0.0,
  soft: SoftNMS | None = None,
) -> Detections:
  """Decodes the boxes of all classes, and suppresses within each.

  Args:
    scores: `[B, R, K + 1]`, probabilities.
    deltas: `[B, R, K or 1, 4]`.
    boxes: `[B, R, 4]`, proposals.
    valid: bool `[B, R]`.
    sizes: `[B, 2]`, (height, width), to which boxes are clipped.
    stds: of the offsets.
    two_sided: of `decode_boxes`.
    score_threshold: of `multiclass_nms`, and so are the next three.
    iou_threshold: likewise.
    max_candidates: likewise.
    max_detections: D.
    min_size: boxes with a side below are dropped.
    soft: of `multiclass_nms`.

  Returns:
    `Detections` of `[B, D]`.
  """

  def one(scores, deltas, boxes, valid, size):
    found = decode_boxes(boxes[:, None], deltas, stds=stds, two_sided=two_sided, size=size)
    if min_size:
      wide = jnp.all(found[..., 2:] - found[..., :2] >= min_size, axis=-1)
      scores = jnp.where(wide, scores, -jnp.inf)
    found = found[:, 0] if found.shape[1] == 1 else found
    return multiclass_nms(
      found, scores, score_threshold=score_threshold, iou_threshold=iou_threshold,
      max_candidates=min(max_candidates, scores.size), max_detections=max_detections, valid=valid,
      soft=soft,
    )  # fmt: skip

  return jax.vmap(one)(scores[..., :-1], deltas, boxes, valid, sizes)


def class_rows(deltas: jax.Array, labels: jax.Array) -> jax.Array:
  """Offsets `[..., 4]` of one class each from `[..., K or 1, 4]`; labels int `[...]`."""
  if deltas.shape[-2] == 1:
    return deltas[..., 0, :]
  return jnp.take_along_axis(deltas, labels[..., None, None], axis=-2)[..., 0, :]
