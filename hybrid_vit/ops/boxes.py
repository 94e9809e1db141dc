"""Boxes: areas, overlaps, clipping, and the coding of boxes by offsets from others.

A box is (x1, y1, x2, y2) in pixels, x to the right and y down, pixel i covering [i, i + 1]: its
width is x2 - x1. The coding is that of R-CNN (arXiv:1311.2524, appendix C), with the clamp of the
sizes that detectron2, torchvision (upper side) and mmdetection (both sides) have.

Deviation: a union or hull below `eps` counts as `eps` (mmdetection's rule), so that two empty boxes
have overlap 0; torchvision's is no number, and fvcore adds 1e-7 to every union. In overlaps, a box
with one side of negative length has area 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

# A side may grow to this multiple of the largest usual input over the smallest usual stride.
MAX_LOG_RATIO = math.log(1000 / 16)
_EPS = 1e-6
_PAIRWISE = ("iou", "giou", "iof")


def box_areas(boxes: jax.Array) -> jax.Array:
  """Areas `[...]` of boxes `[..., 4]`; a side of negative length counts as it is."""
  return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(
  first: jax.Array, second: jax.Array, kind: str = "iou", eps: float = _EPS
) -> jax.Array:
  """Overlap of every box with every other.

  Args:
    first: `[..., N, 4]`.
    second: `[..., M, 4]`.
    kind: "iou": intersection over union; "giou": generalised (arXiv:1902.09630), -1 to 1; "iof":
      intersection over the area of the first.
    eps: the least union, hull or area that is divided by.

  Returns:
    `[..., N, M]`.

  Raises:
    ValueError: another kind.
  """
  if kind not in _PAIRWISE:
    raise ValueError(f"pairwise_iou: kind is {kind!r}; one of {', '.join(_PAIRWISE)} was expected")
  return _overlap(first[..., :, None, :], second[..., None, :, :], kind, eps)


def elementwise_giou(first: jax.Array, second: jax.Array, eps: float = _EPS) -> jax.Array:
  """Generalised IoU `[...]` of each box of `[..., 4]` with the same one of another `[..., 4]`."""
  return _overlap(first, second, "giou", eps)


def clip_boxes(boxes: jax.Array, size: Sequence[int] | jax.Array) -> jax.Array:
  """Moves every corner into the picture.

  Args:
    boxes: `[..., 4]`.
    size: (height, width), or an array `[..., 2]` of them that broadcasts against the boxes.

  Returns:
    `[..., 4]`, x from 0 to width and y from 0 to height.
  """
  size = jnp.asarray(size, boxes.dtype)
  limits = size[..., jnp.array([1, 0, 1, 0])]
  return jnp.clip(boxes, 0, limits)


def encode_boxes(
  anchors: jax.Array,
  boxes: jax.Array,
  means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
  stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
  eps: float = 0.0,
) -> jax.Array:
  """Offsets (dx, dy, dw, dh) that lead from anchors to boxes.

  Centres' distances in sides of the anchor, logarithms of the sides' ratios; less `means`, over
  `stds` (torchvision's and detectron2's weights are 1 / stds).

  Args:
    anchors: `[..., 4]`, of positive sides.
    boxes: `[..., 4]`, likewise; a padded one of no size needs `eps`.
    means: of each offset.
    stds: of each offset.
    eps: the least side that counts; above 0, offsets of empty boxes are finite.

  Returns:
    `[..., 4]`.
  """
  anchor_x, anchor_y, anchor_w, anchor_h = _centred(anchors)
  x, y, w, h = _centred(boxes)
  if eps:
    anchor_w, anchor_h, w, h = (jnp.maximum(side, eps) for side in (anchor_w, anchor_h, w, h))
  deltas = jnp.stack(
    [(x - anchor_x) / anchor_w, (y - anchor_y) / anchor_h, jnp.log(w / anchor_w),
     jnp.log(h / anchor_h)],
    axis=-1,
  )  # fmt: skip
  return (deltas - jnp.asarray(means, deltas.dtype)) / jnp.asarray(stds, deltas.dtype)


def decode_boxes(
  anchors: jax.Array,
  deltas: jax.Array,
  means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
  stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
  *,
  two_sided: bool,
  max_log_ratio: float = MAX_LOG_RATIO,
  size: Sequence[int] | jax.Array | None = None,
) -> jax.Array:
  """The boxes that offsets lead to from anchors: the inverse of `encode_boxes`.

  Args:
    anchors: `[..., 4]`.
    deltas: `[..., 4]`; leading axes broadcast: `[N, C, 4]` with anchors `[N, 1, 4]` are C classes'.
    means: of each offset.
    stds: of each offset.
    two_sided: dw and dh are clamped at -`max_log_ratio`, too (mmdetection); else from above alone
      (detectron2, torchvision).
    max_log_ratio: the clamp.
    size: (height, width) or `[..., 2]` of the picture to clip to; None does not.

  Returns:
    `[..., 4]`.
  """
  deltas = deltas * jnp.asarray(stds, deltas.dtype) + jnp.asarray(means, deltas.dtype)
  anchor_x, anchor_y, anchor_w, anchor_h = _centred(anchors)
  least = -max_log_ratio if two_sided else None
  logs = jnp.clip(deltas[..., 2:], least, max_log_ratio)
  x = anchor_x + deltas[..., 0] * anchor_w
  y = anchor_y + deltas[..., 1] * anchor_h
  half_w = 0.5 * (jnp.exp(logs[..., 0]) * anchor_w)
  half_h = 0.5 * (jnp.exp(logs[..., 1]) * anchor_h)
  boxes = jnp.stack([x - half_w, y - half_h, x + half_w, y + half_h], axis=-1)
  return boxes if size is None else clip_boxes(boxes, size)


def corners_to_centres(boxes: jax.Array) -> jax.Array:
  """(x1, y1, x2, y2) to (centre x, centre y, width, height), `[..., 4]`."""
  return jnp.stack(_centred(boxes), axis=-1)


def centres_to_corners(boxes: jax.Array) -> jax.Array:
  """(centre x, centre y, width, height) to (x1, y1, x2, y2), `[..., 4]`."""
  centre, half = boxes[..., :2], 0.5 * boxes[..., 2:]
  return jnp.concatenate([centre - half, centre + half], axis=-1)


def _centred(boxes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  x1, y1, x2, y2 = (boxes[..., i] for i in range(4))
  return 0.5 * (x1 + x2), 0.5 * (y1 + y2), x2 - x1, y2 - y1


def _overlap(a: jax.Array, b: jax.Array, kind: str, eps: float) -> jax.Array:
  width = jnp.minimum(a[..., 2], b[..., 2]) - jnp.maximum(a[..., 0], b[..., 0])
  height = jnp.minimum(a[..., 3], b[..., 3]) - jnp.maximum(a[..., 1], b[..., 1])
  # Each product passes a maximum, so that no compiler fuses it with the sum that follows: overlaps
  # are compared for equality in assignment, and are to be rounded as PyTorch rounds them.
  shared = jnp.maximum(jnp.maximum(width, 0) * height, 0)
  first, second = jnp.maximum(box_areas(a), 0), jnp.maximum(box_areas(b), 0)
  if kind == "iof":
    return shared / jnp.maximum(first, eps)
  union = jnp.maximum(first + second - shared, eps)
  iou = shared / union
  if kind == "iou":
    return iou
  hull_w = jnp.maximum(a[..., 2], b[..., 2]) - jnp.minimum(a[..., 0], b[..., 0])
  hull_h = jnp.maximum(a[..., 3], b[..., 3]) - jnp.minimum(a[..., 1], b[..., 1])
  hull = jnp.maximum(jnp.maximum(hull_w, 0) * jnp.maximum(hull_h, 0), eps)
  return iou - (hull - union) / hull
