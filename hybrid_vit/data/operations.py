"""The operations that strings may name: arguments checked, one registered factory each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hybrid_vit.data import arguments as check
from hybrid_vit.data import augment
from hybrid_vit.data.decoding import decode_picture
from hybrid_vit.data.geometry import Crop, Mirror, Plane, Resize
from hybrid_vit.data.resizing import FILTERS
from hybrid_vit.data.scaled_decoding import scaled_picture
from hybrid_vit.data.transform_registry import (
  Example,
  Later,
  OnImages,
  OnPlane,
  Transform,
  register_transform,
)  # fmt: skip


@register_transform("decode")
def decode(*, scaled: bool = False, decoder: str, kinds: Mapping[str, str]) -> Transform | Later:
  """Encoded pictures → uint8 RGB (see `decode_picture`); arrays pass.

  With `scaled` a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where what the operations on the
  plane behind it want is at least that much smaller: faster for large photos, and other pixels. On
  photos they are 1 to 3 grey levels off on average, and a crop's border also sees what lies around
  it. What is drawn stays the same; smaller pictures and other formats are decoded whole.
  """
  names = [name for name, kind in kinds.items() if kind == "image"]
  if not isinstance(scaled, bool):
    raise ValueError(f"scaled is {scaled!r}; True or False was expected")
  read: Callable[[bytes, str], Any] = scaled_picture if scaled else decode_picture

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    decoded = {
      name: read(bytes(example[name]), decoder)
      for name in names
      if name in example and not isinstance(example[name], np.ndarray)
    }
    return {**example, **decoded}

  return Later(transform) if scaled else transform


@register_transform("resize")
def resize(size: int | Sequence[int], interpolation: str = "bicubic") -> OnPlane:
  """Straight to `size` ("squash"): one number, or (height, width)."""
  target = check.sides("size", size)
  check.choice("interpolation", interpolation, FILTERS)
  return OnPlane(lambda height, width, rng: Resize(target, (height, width), interpolation))


@register_transform("resize_short")
def resize_short(size: int, interpolation: str = "bicubic") -> OnPlane:
  """The short side to `size`, the other in proportion (rounded down, as torchvision does)."""
  check.whole("size", size)
  check.choice("interpolation", interpolation, FILTERS)
  return OnPlane(lambda height, width, rng: _to_short_side(height, width, size, interpolation))


@register_transform("center_crop")
def center_crop(size: int, ignore: int = 255) -> OnPlane:
  """The middle `size` x `size`; smaller pictures are padded with black, maps with `ignore`."""
  check.whole("size", size)
  check.whole("ignore", ignore, 0)
  return OnPlane(lambda height, width, rng: _middle(height, width, size, ignore))


@register_transform("resize_center_crop")
def resize_center_crop(
  size: int, crop_ratio: float = 0.875, interpolation: str = "bicubic", ignore: int = 255
) -> OnPlane:
  """The usual evaluation: short side to floor(size / crop_ratio), then the middle."""
  check.whole("size", size)
  check.positive("crop_ratio", crop_ratio)
  check.choice("interpolation", interpolation, FILTERS)
  check.whole("ignore", ignore, 0)
  short = math.floor(size / crop_ratio)
  if short < 1:
    raise ValueError(f"crop_ratio {crop_ratio!r} leaves no pixel of {size}")

  def draw(height: int, width: int, rng: np.random.Generator) -> list[Plane]:
    resized = _to_short_side(height, width, short, interpolation)
    return [resized, _middle(*resized.size, size, ignore)]

  return OnPlane(draw)


def _to_short_side(height: int, width: int, size: int, interpolation: str) -> Resize:
  if height <= width:
    target = (size, int(size * width / height))
  else:
    target = (int(size * height / width), size)
  return Resize(target, (height, width), interpolation)


def _middle(height: int, width: int, size: int, ignore: int) -> Crop:
  def start(side: int) -> int:
    # torchvision's rounding, which evaluations are published with.
    return round((side - size) / 2.0) if side >= size else -((size - side) // 2)

  return Crop((size, size), (height, width), start(height), start(width), ignore=ignore)


@register_transform("random_resized_crop")
def random_resized_crop(
  size: int,
  scale: Sequence[float] = (0.08, 1.0),
  ratio: Sequence[float] = (3 / 4, 4 / 3),
  interpolation: str = "bicubic",
) -> OnPlane:
  """A random part of the area and aspect given, resized (Szegedy et al., 2015; torchvision)."""
  check.whole("size", size)
  areas, aspects = check.rising("scale", scale), check.rising("ratio", ratio)
  check.choice("interpolation", interpolation, FILTERS)

  def draw(height: int, width: int, rng: np.random.Generator) -> list[Plane]:
    top, left, h, w = random_box(height, width, areas, aspects, rng)
    return [
      Crop((h, w), (height, width), top, left),
      Resize((size, size), (h, w), interpolation),
    ]

  return OnPlane(draw)


def random_box(
  height: int,
  width: int,
  scale: tuple[float, float],
  ratio: tuple[float, float],
  rng: np.random.Generator,
) -> tuple[int, int, int, int]:
  """(top, left, height, width) of a part of the area and aspect (width over height) given."""
  area = height * width
  for _ in range(10):
    part = area * rng.uniform(scale[0], scale[1])
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(part * aspect)), round(math.sqrt(part / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
  # The middle, as near to the allowed aspects as it goes.
  w, h = width, height
  if width / height < ratio[0]:
    h = max(1, round(width / ratio[0]))
  elif width / height > ratio[1]:
    w = max(1, round(height * ratio[1]))
  return (height - h) // 2, (width - w) // 2, h, w


@register_transform("random_crop")
def random_crop(
  size: int | Sequence[int], padding: int = 0, mode: str = "constant", ignore: int = 255
) -> OnPlane:
  """A random part of `size`, one number or (height, width), of the picture padded on each side."""
  h, w = check.sides("size", size)
  check.whole("padding", padding, 0)
  check.choice("mode", mode, ("constant", "reflect", "edge"))
  check.whole("ignore", ignore, 0)

  def draw(height: int, width: int, rng: np.random.Generator) -> Plane:
    if height + 2 * padding < h or width + 2 * padding < w:
      raise ValueError(f"random_crop({size}) of a picture of {height} x {width}: resize it first")
    top = int(rng.integers(0, height + 2 * padding - h + 1)) - padding
    left = int(rng.integers(0, width + 2 * padding - w + 1)) - padding
    return Crop((h, w), (height, width), top, left, mode, ignore=ignore)

  return OnPlane(draw)


@register_transform("flip_lr")
def flip_lr(probability: float = 0.5) -> OnPlane:
  """Mirrors left and right."""
  check.number("probability", probability, 0, 1)
  return OnPlane(
    lambda height, width, rng: [Mirror((height, width))] if rng.random() < probability else []
  )


@register_transform("color_jitter")
def color_jitter(
  brightness: float, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0
) -> OnImages:
  """torchvision's ColorJitter: factors from [1 - x, 1 + x], a turn of the hue, in random order."""
  strengths = (
    check.number("brightness", brightness, 0),
    check.number("contrast", contrast, 0),
    check.number("saturation", saturation, 0),
    check.number("hue", hue, 0, 0.5),
  )
  return OnImages(lambda image, rng: augment.color_jitter(image, strengths, rng))


@register_transform("randaugment")
def randaugment(
  num_layers: int = 2,
  magnitude: float = 9,
  magnitude_std: float | str = 0.0,
  increasing: bool = False,
  probability: float = 0.5,
  magnitude_max: float = 10.0,
  interpolation: str = "bicubic",
  fill: Sequence[int] = (124, 116, 104),
) -> OnImages:
  """RandAugment (Cubuk et al., 2019) as timm defines it: rand-m{magnitude}-mstd{std}-inc1 …

  A `magnitude_std` of "inf" or above 100 draws uniformly up to the magnitude; `increasing` is
  timm's inc1, `magnitude_max` its mmax.
  """
  std = check.deviation("magnitude_std", magnitude_std)
  if not isinstance(increasing, bool):
    raise ValueError(f"increasing is {increasing!r}; True or False was expected")
  policy = augment.RandAugment(
    num_layers=check.whole("num_layers", num_layers, 0),
    magnitude=check.number("magnitude", magnitude, 0),
    magnitude_std=math.inf if std > 100 else std,
    increasing=increasing,
    probability=check.number("probability", probability, 0, 1),
    magnitude_max=check.positive("magnitude_max", magnitude_max),
    interpolation=check.choice("interpolation", interpolation, tuple(augment.FILTERS)),
    fill=check.colour("fill", fill),
  )
  return OnImages(policy, moves=True)


@register_transform("autoaugment")
def autoaugment(
  magnitude_std: float | str = 0.0,
  interpolation: str = "bicubic",
  fill: Sequence[int] = (124, 116, 104),
) -> OnImages:
  """AutoAugment's ImageNet policy (Cubuk et al., 2018), timm's "original"."""
  policy = augment.AutoAugment(
    check.deviation("magnitude_std", magnitude_std),
    check.choice("interpolation", interpolation, tuple(augment.FILTERS)),
    check.colour("fill", fill),
  )
  return OnImages(policy, moves=True)


@register_transform("three_augment")
def three_augment() -> OnImages:
  """DeiT III's: one of grey, solarise and Gaussian blur (Touvron et al., 2022)."""
  return OnImages(augment.three_augment)


@register_transform("random_erasing")
def random_erasing(
  probability: float = 0.25,
  area: Sequence[float] = (0.02, 1 / 3),
  aspect: Sequence[float] = (0.3, 10 / 3),
) -> OnImages:
  """Random erasing (Zhong et al., 2017), timm's pixel mode.

  The box is filled with normal noise for each pixel: of deviation 1 in a normalised float picture;
  in a uint8 one of ImageNet's mean and deviation, which is the same before normalisation, clipped.
  """
  check.number("probability", probability, 0, 1)
  areas, aspects = check.rising("area", area, 1), check.rising("aspect", aspect)
  return OnImages(lambda image, rng: augment.erase(image, probability, areas, aspects, rng))


@register_transform("normalize")
def normalize(mean: float | Sequence[float], std: float | Sequence[float]) -> OnImages:
  """uint8 → float32, (x / 255 - mean) / std. The device does this itself to uint8 pictures."""
  offset = np.array(check.channels("mean", mean), np.float32)
  scale = np.array(check.channels("std", std), np.float32)
  if not (scale > 0).all():
    raise ValueError(f"std is {std!r}; numbers above 0 were expected")

  def apply(image: np.ndarray, rng: Any) -> np.ndarray:
    if image.dtype != np.uint8:
      raise TypeError(
        f"normalize of a {image.dtype} picture; uint8, not yet normalised, was expected"
      )
    return (image.astype(np.float32) / np.float32(255) - offset) / scale

  return OnImages(apply)
