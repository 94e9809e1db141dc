"""Operations for photos with a map of classes or of depth, by the recipes that train on them.

Deviations: pictures are resized as everywhere here, by Pillow's antialiased filters, where
mmsegmentation's OpenCV does not antialias; borders have the mean colour before normalisation, where
mmsegmentation puts 0 behind it. CutDepth comes by chance, where the authors count to every fourth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hybrid_vit.data import arguments as check
from hybrid_vit.data import photometric
from hybrid_vit.data.geometry import Crop, Pad, Plane, Resize, Size, move, plane_size
from hybrid_vit.data.map_reading import as_depth, read_depth, read_labels
from hybrid_vit.data.resizing import FILTERS
from hybrid_vit.data.transform_registry import (
  Example,
  OnImages,
  OnPlane,
  Transform,
  only_key,
  register_transform,
  value_of,
)  # fmt: skip

# Of `random_crop_map`, before it takes what comes.
_TRIES = 10


@register_transform("decode_map")
def decode_map(source: str, *, kinds: Mapping[str, str]) -> Transform:
  """The encoded map under the key `source` becomes the task's map: of TFDS, whose names differ."""
  target = only_key(kinds, "map")

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    value = value_of(example, source)
    if isinstance(value, np.ndarray):
      labels = value[..., 0] if value.ndim == 3 and value.shape[2] == 1 else value
      return {**example, target: labels.astype(np.int32)}
    return {**example, target: read_labels(bytes(value), f"its {source!r}")}

  return transform


@register_transform("decode_depth")
def decode_depth(source: str, scale: float = 1.0, *, kinds: Mapping[str, str]) -> Transform:
  """What is under the key `source`, `scale` units a metre, becomes the task's depth: of TFDS."""
  check.positive("scale", scale)
  target = only_key(kinds, "depth")

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    value = value_of(example, source)
    if isinstance(value, np.ndarray):
      return {**example, target: as_depth(value, f"its {source!r}", scale)}
    return {**example, target: read_depth(bytes(value), f"its {source!r}", scale)}

  return transform


@register_transform("resize_range")
def resize_range(
  scale: Sequence[int], ratio: Sequence[float] = (0.5, 2.0), interpolation: str = "bilinear"
) -> OnPlane:
  """As large as fits into `scale` (long, short side) times a ratio drawn; keeps the aspect.

  mmsegmentation's RandomResize with keep_ratio, roundings included; a ratio of (1, 1) is its test.
  """
  sides = check.sides("scale", scale)
  low, high = check.rising("ratio", ratio)
  check.choice("interpolation", interpolation, FILTERS)

  def draw(height: int, width: int, rng: np.random.Generator) -> Resize:
    drawn = rng.uniform(low, high)
    long, short = max(sides), min(sides)
    long, short = max(int(long * drawn), 1), max(int(short * drawn), 1)
    factor = min(long / max(height, width), short / min(height, width))
    size = max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)
    return Resize(size, (height, width), interpolation)

  return OnPlane(draw)


@register_transform("random_crop_map")
def random_crop_map(
  size: int | Sequence[int],
  category_max_ratio: float = 0.75,
  ignore: int = 255,
  *,
  kinds: Mapping[str, str],
) -> Transform:
  """A random crop in which no class of the map has `category_max_ratio` or more of the pixels.

  mmsegmentation's RandomCrop with cat_max_ratio: up to ten tries, until there is also more than one
  class; pixels of `ignore` count for nothing. Of a smaller picture the whole side stays: `pad`
  behind it.
  """
  target = check.sides("size", size)
  check.number("category_max_ratio", category_max_ratio, 0, 1)
  check.whole("ignore", ignore, 0)
  maps = [name for name, kind in kinds.items() if kind == "map"]

  def draw(before: Size, rng: np.random.Generator) -> Crop:
    after = min(target[0], before[0]), min(target[1], before[1])
    top, left = (int(rng.integers(0, b - a + 1)) for a, b in zip(after, before))
    return Crop(after, before, top, left)

  def transform(example: Example, rng: np.random.Generator) -> Example:
    before = plane_size(example, kinds)
    there = [name for name in maps if name in example]
    if category_max_ratio < 1 and not there:
      raise ValueError("random_crop_map looks at a map, and the example has none: take random_crop")
    crop = draw(before, rng)
    for _ in range(_TRIES if category_max_ratio < 1 else 0):
      if _is_mixed(crop.map(example[there[0]], ignore), category_max_ratio, ignore):
        break
      crop = draw(before, rng)
    return move(example, [crop], kinds)

  return transform


def _is_mixed(labels: np.ndarray, most: float, ignore: int) -> bool:
  _, counts = np.unique(labels[labels != ignore], return_counts=True)
  return len(counts) > 1 and counts.max() / counts.sum() < most


@register_transform("pad")
def pad(
  size: int | Sequence[int], fill: Sequence[int] = (124, 116, 104), ignore: int = 255
) -> OnPlane:
  """To at least `size`, at the right and below: the picture with `fill`, maps with `ignore`."""
  target = check.sides("size", size)
  color = check.colour("fill", fill)
  check.whole("ignore", ignore, 0)

  def draw(height: int, width: int, rng: np.random.Generator) -> Plane:
    after = max(target[0], height), max(target[1], width)
    return Pad(after, (height, width), color, ignore=ignore)

  return OnPlane(draw)


@register_transform("crop_box")
def crop_box(top: int, left: int, bottom: int, right: int) -> OnPlane:
  """A fixed box in pixels: crop_box(45, 43, 472, 608) is NYU Depth v2 without its white border."""
  check.whole("top", top, 0)
  check.whole("left", left, 0)
  check.whole("bottom", bottom, top + 1)
  check.whole("right", right, left + 1)

  def draw(height: int, width: int, rng: np.random.Generator) -> Crop:
    if bottom > height or right > width:
      raise ValueError(
        f"crop_box({top}, {left}, {bottom}, {right}) of a picture of {height} x {width}"
      )
    return Crop((bottom - top, right - left), (height, width), top, left)

  return OnPlane(draw)


@register_transform("crop_bottom")
def crop_bottom(size: int | Sequence[int]) -> OnPlane:
  """The middle of the bottom: crop_bottom((352, 1216)) is that of KITTI's depth benchmark."""
  target = check.sides("size", size)

  def draw(height: int, width: int, rng: np.random.Generator) -> Crop:
    if target[0] > height or target[1] > width:
      raise ValueError(f"crop_bottom({size}) of a picture of {height} x {width}")
    top, left = height - target[0], (width - target[1]) // 2
    return Crop(target, (height, width), top, left)

  return OnPlane(draw)


@register_transform("reduce_zero_label")
def reduce_zero_label(ignore: int = 255, *, kinds: Mapping[str, str]) -> Transform:
  """Maps whose 0 is no class: 0 becomes `ignore`, every other number one less (ADE20K)."""
  check.whole("ignore", ignore, 0)
  names = [name for name, kind in kinds.items() if kind == "map"]

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    reduced = {}
    for name in names:
      if name in example:
        values = example[name]
        none = (values == 0) | (values == ignore)
        reduced[name] = np.where(none, ignore, values - 1).astype(values.dtype)
    return {**example, **reduced}

  return transform


@register_transform("photometric_distortion")
def photometric_distortion(
  brightness: float = 32,
  contrast: Sequence[float] = (0.5, 1.5),
  saturation: Sequence[float] = (0.5, 1.5),
  hue: int = 18,
) -> OnImages:
  """mmsegmentation's PhotoMetricDistortion: four changes, each with probability 0.5."""
  check.number("brightness", brightness, 0, 255)
  factors = check.rising("contrast", contrast), check.rising("saturation", saturation)
  check.whole("hue", hue, 0)
  return OnImages(lambda image, rng: photometric.distort(image, brightness, *factors, hue, rng))


@register_transform("brightness_contrast")
def brightness_contrast(
  brightness: float = 0.2, contrast: float = 0.2, probability: float = 0.5
) -> OnImages:
  """albumentations' RandomBrightnessContrast: x (1 + c) + 255 b, both from [-limit, limit]."""
  check.number("brightness", brightness, 0, 1)
  check.number("contrast", contrast, 0, 1)
  check.number("probability", probability, 0, 1)
  return OnImages(
    lambda image, rng: (
      photometric.brightness_contrast(image, brightness, contrast, rng)
      if rng.random() < probability
      else image
    )
  )


@register_transform("random_gamma")
def random_gamma(limits: Sequence[float] = (0.8, 1.2), probability: float = 0.5) -> OnImages:
  """albumentations' RandomGamma: (x / 255)^gamma, gamma drawn evenly between the `limits`."""
  bounds = check.rising("limits", limits)
  check.number("probability", probability, 0, 1)
  return OnImages(
    lambda image, rng: (
      photometric.gamma(image, rng.uniform(*bounds)) if rng.random() < probability else image
    )
  )


@register_transform("hue_saturation_value")
def hue_saturation_value(
  hue: float = 20, saturation: float = 30, value: float = 20, probability: float = 0.5
) -> OnImages:
  """albumentations' HueSaturationValue: added to OpenCV's 8-bit HSV, whose hue runs to 180."""
  limits = (
    check.number("hue", hue, 0, 180),
    check.number("saturation", saturation, 0, 255),
    check.number("value", value, 0, 255),
  )
  check.number("probability", probability, 0, 1)
  return OnImages(
    lambda image, rng: (
      photometric.hue_saturation_value(image, limits, rng) if rng.random() < probability else image
    )
  )


@register_transform("cut_depth")
def cut_depth(
  probability: float = 0.25, portion: float = 0.75, *, kinds: Mapping[str, str]
) -> Transform:
  """Vertical CutDepth (arXiv:2201.07436): a strip of the picture shows the depth instead.

  From column aW on, max((W - aW) b `portion`, 1) wide, a and b from [0, 1]. Into an 8-bit picture
  whole metres go, as with the authors.
  """
  check.number("probability", probability, 0, 1)
  check.number("portion", portion, 0, 1)
  images = [name for name, kind in kinds.items() if kind == "image"]
  depths = [name for name, kind in kinds.items() if kind == "depth"]

  def transform(example: Example, rng: np.random.Generator) -> Example:
    if rng.random() >= probability:
      return example
    there = [name for name in depths if name in example]
    if not there:
      raise ValueError("cut_depth copies a depth into the picture, and the example has none")
    _, width = plane_size(example, kinds)
    a, b = rng.random(2)
    left = int(a * width)
    right = left + int(max((width - a * width) * b * portion, 1))
    cut = dict(example)
    for name in images:
      if name in example:
        cut[name] = example[name].copy()
        strip = example[there[0]][:, left:right, None]
        cut[name][:, left:right] = np.clip(strip, 0, 255).astype(cut[name].dtype)
    return cut

  return transform
