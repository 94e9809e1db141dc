"""Operations for photos with objects, by the recipes of detectors.

Each row of boxes, masks and of `ROWS` is an object; operations that drop objects drop their rows of
all of these.

Deviations: pictures are resized by Pillow's antialiased filters, where mmdetection's OpenCV does
not antialias; borders have the mean colour before normalisation, where mmdetection and ViTDet put 0
behind it and Mask2Former grey (128). Masks of polygons follow the picture as bitmaps, by the
nearest pixel, where detectron2 moves the polygons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hybrid_vit.data import arguments as check
from hybrid_vit.data.folders import tell_once
from hybrid_vit.data.geometry import Crop, Pad, Plane, Resize, Size, move, plane_size
from hybrid_vit.data.instances import text_masks
from hybrid_vit.data.lazy_masks import as_lazy
from hybrid_vit.data.resizing import FILTERS
from hybrid_vit.data.transform_registry import (
  Example,
  OnPlane,
  Transform,
  only_key,
  register_transform,
  value_of,
)  # fmt: skip

# What else is known of each object, besides keys of kind "boxes" and "masks".
ROWS = ("box_labels", "crowd", "areas", "given_boxes")

_SHORT_SIDES = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


@register_transform("resize_short_side")
def resize_short_side(
  sizes: int | Sequence[int] = _SHORT_SIDES,
  long: int = 1333,
  interpolation: str = "bilinear",
  within: Sequence[int] | None = None,
) -> OnPlane:
  """The short side to one of `sizes`, drawn; less where the long one would be above `long`.

  mmdetection's Resize with keep_ratio and several scales, roundings included; of one size its test.
  A picture is no larger than `within`, (height, width), where that is given: a canvas.
  """
  shorts = check.wholes("sizes", sizes)
  check.whole("long", long)
  check.choice("interpolation", interpolation, FILTERS)
  room = None if within is None else check.sides("within", within)
  return OnPlane(
    lambda height, width, rng: _to_short_side(height, width, shorts, long, interpolation, rng, room)
  )


def _to_short_side(
  height: int,
  width: int,
  sizes: Sequence[int],
  long: int,
  interpolation: str,
  rng: np.random.Generator,
  room: Size | None = None,
) -> Resize:
  short = sizes[int(rng.integers(len(sizes)))]
  factor = min(long / max(height, width), short / min(height, width))
  size = max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)
  if room is not None and (size[0] > room[0] or size[1] > room[1]):
    factor = min(room[0] / height, room[1] / width)
    size = (
      min(max(int(height * factor + 0.5), 1), room[0]),
      min(max(int(width * factor + 0.5), 1), room[1]),
    )
  return Resize(size, (height, width), interpolation)


@register_transform("detr_augmentation")
def detr_augmentation(
  sizes: int | Sequence[int] = _SHORT_SIDES,
  long: int = 1333,
  before: int | Sequence[int] = (400, 500, 600),
  crop: Sequence[int] = (384, 600),
  probability: float = 0.5,
  interpolation: str = "bilinear",
  within: Sequence[int] | None = None,
) -> OnPlane:
  """DETR's multi-scale training: `resize_short_side`, or with `probability` a crop before it.

  That is: the short side to one of `before`, the long one at most `long`, then a random part whose
  sides are drawn from `crop`, both ends included and each at most the picture's. mmdetection's
  RandomCrop with "absolute_range"; `filter_boxes` behind it takes out what was cut away, and a
  picture without objects stays (`allow_negative_crop`). At the end a picture is no larger than
  `within`, (height, width), where that is given: a crop of a lying picture may stand.
  """
  shorts, firsts = check.wholes("sizes", sizes), check.wholes("before", before)
  check.whole("long", long)
  low, high = (int(n) for n in check.rising("crop", crop))
  check.number("probability", probability, 0, 1)
  check.choice("interpolation", interpolation, FILTERS)
  room = None if within is None else check.sides("within", within)

  def draw(height: int, width: int, rng: np.random.Generator) -> list[Plane]:
    planes: list[Plane] = []
    if rng.random() < probability:
      first = _to_short_side(height, width, firsts, long, interpolation, rng)
      after = tuple(int(rng.integers(min(n, low), min(n, high) + 1)) for n in first.size)
      top, left = (int(rng.integers(n - m + 1)) for n, m in zip(first.size, after))
      height, width = after
      planes = [first, Crop((height, width), first.size, top, left)]
    return [*planes, _to_short_side(height, width, shorts, long, interpolation, rng, room)]

  return OnPlane(draw)


@register_transform("large_scale_jitter")
def large_scale_jitter(
  size: int | Sequence[int] = 1024,
  scale: Sequence[float] = (0.1, 2.0),
  interpolation: str = "bilinear",
) -> OnPlane:
  """As large as fits into `size` times a number drawn from `scale`, then at most `size` of it.

  detectron2's ResizeScale and FixedSizeCrop: one number places the crop along both sides. `pad_to`
  behind it fills what is missing.
  """
  target = check.sides("size", size)
  low, high = check.rising("scale", scale)
  check.choice("interpolation", interpolation, FILTERS)

  def draw(height: int, width: int, rng: np.random.Generator) -> list[Plane]:
    drawn = rng.uniform(low, high)
    factor = min(target[0] * drawn / height, target[1] * drawn / width)
    whole = max(round(height * factor), 1), max(round(width * factor), 1)
    after = min(whole[0], target[0]), min(whole[1], target[1])
    place = rng.uniform()
    top, left = (round((w - a) * place) for w, a in zip(whole, after))
    resized = Resize(whole, (height, width), interpolation)
    return [resized] if whole == after else [resized, Crop(after, whole, top, left)]

  return OnPlane(draw)


@register_transform("pad_to")
def pad_to(
  size: int | Sequence[int],
  fill: Sequence[int] = (124, 116, 104),
  ignore: int = 255,
  *,
  kinds: Mapping[str, str],
) -> Transform:
  """To `size` exactly, at the right and below; "true_size", float32, is (height, width) before."""
  target = check.sides("size", size)
  color = check.colour("fill", fill)
  check.whole("ignore", ignore, 0)

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    before = plane_size(example, kinds)
    if before[0] > target[0] or before[1] > target[1]:
      raise ValueError(
        f"pad_to({size}) of a picture of {before[0]} x {before[1]}: resize it to at most that "
        "before, e.g. by resize_short_side with a `long` that fits"
      )
    padded = move(example, [Pad(target, before, color, ignore=ignore)], kinds)
    return {**padded, "true_size": np.array(before, np.float32)}

  return transform


@register_transform("filter_boxes")
def filter_boxes(min_side: float = 1.0, *, kinds: Mapping[str, str]) -> Transform:
  """Drops objects whose box is narrower or lower than `min_side` pixels, or has no area."""
  check.number("min_side", min_side, 0)
  name = only_key(kinds, "boxes")

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    sides = example[name][:, 2:] - example[name][:, :2]
    return take_rows(example, ((sides >= min_side) & (sides > 0)).all(-1), kinds)

  return transform


@register_transform("drop_crowd")
def drop_crowd(*, kinds: Mapping[str, str]) -> Transform:
  """Drops objects that are crowds: detectors do not train on them."""

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    if "crowd" not in example:
      return example
    return take_rows(example, ~np.asarray(example["crowd"], bool), kinds)

  return transform


@register_transform("keep_largest")
def keep_largest(count: int = 100, *, kinds: Mapping[str, str]) -> Transform:
  """Of more than `count` objects those of the largest boxes, in their order.

  How many were dropped is there as "objects_left_out", int32, and told once.
  """
  check.whole("count", count)
  name = only_key(kinds, "boxes")

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    boxes = np.asarray(example[name])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    rows, left_out = largest_rows(areas, count, "keep_largest", "objects")
    if left_out:
      example = take_rows(example, rows, kinds)
    return {**example, "objects_left_out": left_out}

  return transform


@register_transform("boxes_from_masks")
def boxes_from_masks(*, kinds: Mapping[str, str]) -> Transform:
  """Each box becomes the smallest around what is left of its mask, as detectron2 does after crops.

  Of an empty mask it has no area: `filter_boxes` behind it.
  """
  name, masks_name = only_key(kinds, "boxes"), only_key(kinds, "masks")

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    boxes, masks = np.array(example[name], np.float32), as_lazy(example[masks_name])
    for row, box in enumerate(boxes):
      # A mask by the nearest pixel may reach over its moved box.
      top, left, bottom, right = _around(box, masks.shape[1:], 2)
      part = masks.part(row, top, left, bottom, right)
      rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
      boxes[row] = (
        (left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1)
        if rows.size
        else (0, 0, 0, 0)
      )
    return {**example, name: boxes}

  return transform


@register_transform("crop_masks")
def crop_masks(size: int = 112, *, kinds: Mapping[str, str]) -> Transform:
  """Each mask within its own box, resampled to `size` x `size`: uint8, 0 for outside, 255 inside.

  A cell is the mean of bilinear samples, as many along each side as it has pixels: RoIAlign
  (aligned, adaptive) of the mask by its box, rounded to 255 levels. Of 100 objects 1.25 MB go into
  a batch, where their bitmaps at 800 x 1344 are 107 MB. Nothing on the plane may follow it.
  """
  check.whole("size", size)
  name, masks_name = only_key(kinds, "boxes"), only_key(kinds, "masks")

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    boxes, masks = np.asarray(example[name], np.float64), as_lazy(example[masks_name])
    if len(boxes) != len(masks):
      raise ValueError(f"crop_masks: {len(boxes)} boxes and {len(masks)} masks")
    out = np.zeros((len(boxes), size, size), np.uint8)
    for row, box in enumerate(boxes):
      top, left, bottom, right = _around(box, masks.shape[1:], 1)
      if not (box[2:] > box[:2]).all() or bottom <= top or right <= left:
        continue
      part = masks.part(row, top, left, bottom, right)
      lines = _sampled(part, box[1], box[3], size, top)
      out[row] = np.round(255 * _sampled(lines.T, box[0], box[2], size, left).T).clip(0, 255)
    return {**example, masks_name: out}

  return transform


def _around(box: np.ndarray, size: Sequence[int], margin: int) -> tuple[int, int, int, int]:
  """(top, left, bottom, right) of the whole pixels that a box touches, and `margin` around."""
  return (
    max(math.floor(box[1]) - margin, 0),
    max(math.floor(box[0]) - margin, 0),
    min(math.ceil(box[3]) + margin, size[0]),
    min(math.ceil(box[2]) + margin, size[1]),
  )


def _sampled(part: np.ndarray, low: float, high: float, cells: int, start: int) -> np.ndarray:
  """Cells between `low` and `high` along the first axis, which begins at `start`: `[cells, …]`."""
  samples = max(math.ceil((high - low) / cells), 1)
  count = cells * samples
  # In pixels' centres, of which the first is at 0.
  places = low + (np.arange(count) + 0.5) * ((high - low) / count) - 0.5
  places = np.clip(places - start, 0, len(part) - 1)
  first = np.minimum(places.astype(np.int64), max(len(part) - 2, 0))
  after = np.minimum(first + 1, len(part) - 1)
  share = (places - first).astype(np.float32)[:, None]
  lines = part[first] * (1 - share) + part[after] * share
  return lines.reshape(cells, samples, -1).mean(1)


@register_transform("decode_objects")
def decode_objects(source: str = "objects", *, kinds: Mapping[str, str]) -> Transform:
  """TFDS's objects under the key `source` become boxes, classes and the rest: of tfds:coco/2017.

  Read are "bbox" (y0, x0, y1, x1 as fractions), "label", and where they are there "is_crowd",
  "area", "id" and "segmentation": run lengths as text, which `tools.prepare_data` writes. Behind
  `decode`.
  """
  name = only_key(kinds, "boxes")

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    if name in example:  # noise on which shapes are tried
      return example
    objects = value_of(example, source)
    images = {key: kind for key, kind in kinds.items() if kind == "image"}
    found = _objects(objects, plane_size(example, images), name, kinds)
    if "image/id" in example:
      found["image_id"] = int(example["image/id"])
    return {**example, **found}

  return transform


def _objects(
  found: Mapping[str, Any], size: Size, name: str, kinds: Mapping[str, str]
) -> dict[str, Any]:
  height, width = size
  fractions = np.asarray(found["bbox"], np.float64).reshape(-1, 4)
  boxes = fractions[:, [1, 0, 3, 2]] * [width, height, width, height]
  sides = boxes[:, 2:] - boxes[:, :2]
  out: dict[str, Any] = {
    name: boxes.clip(0, [width, height, width, height]).astype(np.float32),
    "given_boxes": np.concatenate([boxes[:, :2], sides], axis=1),
    "box_labels": np.asarray(found["label"], np.int32).reshape(-1),
    "crowd": np.asarray(found.get("is_crowd", np.zeros(len(boxes))), bool).reshape(-1),
    "areas": np.asarray(found.get("area", sides.prod(-1)), np.float32).reshape(-1),
    "size": size,
  }
  if "segmentation" in found:
    masks = [key for key, kind in kinds.items() if kind == "masks"]
    out |= dict.fromkeys(masks, text_masks(found["segmentation"], size, boxes))
  return out


def largest_rows(
  areas: np.ndarray, count: int, operation: str, what: str
) -> tuple[np.ndarray, np.ndarray]:
  """Which of some areas are the `count` largest, rising, and how many are left out, int32.

  Where some are, that is told once.

  Args:
    areas: of a picture's objects.
    count: at most so many stay.
    operation: the transform's name, for people.
    what: "objects" or what else has these areas, for people.
  """
  left_out = max(len(areas) - count, 0)
  if left_out:
    tell_once(
      f"{operation}({count})",
      f"a picture has {len(areas):,} {what}, of which the {count} largest stay; of this one and "
      'others "objects_left_out" says how many did not',
    )
  chosen = np.sort(np.argsort(-areas, kind="stable")[:count])
  return chosen, np.array(left_out, np.int32)


def take_rows(example: Example, rows: np.ndarray, kinds: Mapping[str, str]) -> Example:
  """The example with chosen objects, in the order of `rows`: whole numbers, or bool for each.

  Raises:
    ValueError: what is known of the objects has not as many rows as there are boxes.
  """
  names = [name for name, kind in kinds.items() if kind in ("boxes", "masks")]
  there = [name for name in dict.fromkeys((*names, *ROWS)) if name in example]
  lengths = {name: len(example[name]) for name in there}
  if len(set(lengths.values())) > 1:
    raise ValueError(f"the objects have other numbers of rows each: {lengths}")
  return {**example, **{name: example[name][rows] for name in there}}
