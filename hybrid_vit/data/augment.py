"""Colour and geometry: the operations behind RandAugment, AutoAugment and their relatives.

uint8 RGB `[H, W, 3]` in and out; PIL does the pixels, as in timm (timm/data/auto_augment.py and
random_erasing.py), whose levels these are. Deviation: random erasing of a uint8 picture, whose
noise is rounded and clipped to its range (see `erase`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

Colour = tuple[int, int, int]

# "random" draws one of the two for each operation.
FILTERS = {
  "bilinear": (Image.Resampling.BILINEAR,),
  "bicubic": (Image.Resampling.BICUBIC,),
  "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
}
_MAX_LEVEL = 10.0
_IMAGENET_MEAN = np.array([123.675, 116.28, 103.53])
_IMAGENET_STD = np.array([58.395, 57.12, 57.375])

OPERATIONS = (
  "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add",
  "color", "contrast", "brightness", "sharpness",
  "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip

# AutoAugment's ImageNet policy: (operation, probability, level), twice.
_IMAGENET_POLICY = (
  (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
  (("solarize", 0.6, 5), ("auto_contrast", 0.6, 5)),
  (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
  (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
  (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
  (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
  (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
  (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
  (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
  (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
  (("rotate", 0.8, 8), ("color", 0.4, 0)),
  (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
  (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
  (("invert", 0.6, 4), ("equalize", 1.0, 8)),
  (("color", 0.6, 4), ("contrast", 1.0, 8)),
  (("rotate", 0.8, 8), ("color", 1.0, 2)),
  (("color", 0.8, 8), ("solarize", 0.8, 7)),
  (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
  (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
  (("color", 0.4, 0), ("equalize", 0.6, 3)),
  (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
  (("solarize", 0.6, 5), ("auto_contrast", 0.6, 5)),
  (("invert", 0.6, 4), ("equalize", 1.0, 8)),
  (("color", 0.6, 4), ("contrast", 1.0, 8)),
  (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)


def apply_operation(
  name: str,
  image: Image.Image,
  level: float,
  rng: np.random.Generator,
  *,
  increasing: bool = False,
  paper_posterize: bool = False,
  interpolation: str = "bicubic",
  fill: Colour = (124, 116, 104),
) -> Image.Image:
  """One operation of `OPERATIONS` at a level of 0 to 10, or beyond.

  Args:
    name: the operation.
    image: an RGB picture.
    level: its strength; signs are drawn from `rng`.
    rng: where chance comes from.
    increasing: strength rises with the level for every operation (timm's inc1); else posterize,
      solarize and the enhancements run the ways of the first implementations.
    paper_posterize: AutoAugment's own posterize, which keeps 4 to 8 bits.
    interpolation: a name in `FILTERS`, of rotations, shears and shifts.
    fill: colour of what they uncover; ImageNet's mean by default, as in timm.
  """
  part = level / _MAX_LEVEL

  def signed(value: float) -> float:
    return -value if rng.random() < 0.5 else value

  if name == "auto_contrast":
    return ImageOps.autocontrast(image)
  if name == "equalize":
    return ImageOps.equalize(image)
  if name == "invert":
    return ImageOps.invert(image)
  if name == "posterize":
    bits = int(part * 4)
    bits = bits + 4 if paper_posterize else 4 - bits if increasing else bits
    return image if bits >= 8 else posterize(image, bits)
  if name == "solarize":
    threshold = min(256, int(part * 256))
    return ImageOps.solarize(image, 256 - threshold if increasing else threshold)
  if name == "solarize_add":
    return solarize_add(image, min(128, int(part * 110)))
  if name in _ENHANCERS:
    factor = max(0.1, 1.0 + signed(part * 0.9)) if increasing else part * 1.8 + 0.1
    return _ENHANCERS[name](image).enhance(factor)
  filters = FILTERS[interpolation]
  resample = filters[int(rng.integers(len(filters)))]
  if name == "rotate":
    return image.rotate(signed(part * 30.0), resample=resample, fillcolor=fill)
  amount = signed(part * (0.3 if name.startswith("shear") else 0.45))
  width, height = image.size
  matrices = {
    "shear_x": (1, amount, 0, 0, 1, 0),
    "shear_y": (1, 0, 0, amount, 1, 0),
    "translate_x": (1, 0, amount * width, 0, 1, 0),
    "translate_y": (1, 0, 0, 0, 1, amount * height),
  }
  return image.transform(
    image.size, Image.Transform.AFFINE, matrices[name], resample=resample, fillcolor=fill
  )


_ENHANCERS: dict[str, Callable[[Image.Image], ImageEnhance._Enhance]] = {
  "color": ImageEnhance.Color,
  "contrast": ImageEnhance.Contrast,
  "brightness": ImageEnhance.Brightness,
  "sharpness": ImageEnhance.Sharpness,
}


def posterize(image: Image.Image, bits: int) -> Image.Image:
  """Keeps the upper `bits` bits; 0 gives black (PIL's own begins at 1)."""
  mask = (0xFF << (8 - bits)) & 0xFF
  return image.point([value & mask for value in range(256)] * 3)


def solarize_add(image: Image.Image, addend: int, threshold: int = 128) -> Image.Image:
  """Adds to what is darker than the threshold."""
  table = [min(255, v + addend) if v < threshold else v for v in range(256)]
  return image.point(table * 3)


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """RandAugment by timm's rules: draws operations with replacement, each done by chance."""

  num_layers: int
  magnitude: float
  magnitude_std: float = 0.0
  increasing: bool = False
  probability: float = 0.5
  magnitude_max: float = 10.0
  interpolation: str = "bicubic"
  fill: Colour = (124, 116, 104)

  def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 `[H, W, 3]` to the same."""
    picture = _picture(image)
    for index in rng.integers(len(OPERATIONS), size=self.num_layers):
      if rng.random() >= self.probability:
        continue
      picture = apply_operation(
        OPERATIONS[index],
        picture,
        draw_magnitude(self.magnitude, self.magnitude_std, self.magnitude_max, rng),
        rng,
        increasing=self.increasing,
        interpolation=self.interpolation,
        fill=self.fill,
      )
    return np.asarray(picture)


def draw_magnitude(magnitude: float, std: float, largest: float, rng: np.random.Generator) -> float:
  """Normal around the magnitude, or uniform below it where `std` is infinite; clipped.

  Args:
    magnitude: the mean, on the scale of levels.
    std: the deviation; 0 draws nothing.
    largest: the upper bound; the lower is 0.
    rng: where chance comes from.
  """
  if math.isinf(std):
    magnitude = rng.uniform(0.0, magnitude)
  elif std > 0:
    magnitude = rng.normal(magnitude, std)
  return max(0.0, min(float(magnitude), largest))


@dataclasses.dataclass(frozen=True)
class AutoAugment:
  """One of the 25 pairs of AutoAugment's ImageNet policy (timm's "original")."""

  magnitude_std: float = 0.0
  interpolation: str = "bicubic"
  fill: Colour = (124, 116, 104)

  def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """uint8 `[H, W, 3]` to the same."""
    picture = _picture(image)
    for name, probability, level in _IMAGENET_POLICY[int(rng.integers(len(_IMAGENET_POLICY)))]:
      if rng.random() < probability:
        picture = apply_operation(
          name,
          picture,
          draw_magnitude(level, self.magnitude_std, _MAX_LEVEL, rng),
          rng,
          paper_posterize=True,
          interpolation=self.interpolation,
          fill=self.fill,
        )
    return np.asarray(picture)


def three_augment(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Grey, solarise (128) or Gaussian blur (radius 0.1 to 2), one of the three (DeiT III)."""
  picture = _picture(image)
  choice = int(rng.integers(3))
  if choice == 0:
    picture = ImageOps.grayscale(picture).convert("RGB")
  elif choice == 1:
    picture = ImageOps.solarize(picture, 128)
  else:
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))
  return np.asarray(picture)


def color_jitter(
  image: np.ndarray, strengths: Sequence[float], rng: np.random.Generator
) -> np.ndarray:
  """torchvision's ColorJitter: brightness, contrast, saturation and hue, in random order.

  Args:
    image: uint8 `[H, W, 3]`.
    strengths: of the four. The first three are factors drawn from [max(0, 1 - x), 1 + x], the last
      is a turn of the hue drawn from [-x, x], x at most 0.5 (of a full turn). 0 leaves one out.
    rng: where chance comes from.
  """
  picture = _picture(image)
  enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
  for index in rng.permutation(4):
    strength = strengths[index]
    if not strength:
      continue
    if index < 3:
      factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
      picture = enhancers[index](picture).enhance(factor)
    else:
      picture = turn_hue(picture, rng.uniform(-strength, strength))
  return np.asarray(picture)


def turn_hue(image: Image.Image, turn: float) -> Image.Image:
  """Turns the hue by a part of the full circle; on PIL's 8-bit HSV, as torchvision."""
  hue, saturation, value = image.convert("HSV").split()
  shift = int(turn * 255)
  hue = hue.point([(h + shift) % 256 for h in range(256)])
  return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def erase(
  image: np.ndarray,
  probability: float,
  area: Sequence[float],
  aspect: Sequence[float],
  rng: np.random.Generator,
) -> np.ndarray:
  """Fills one random box with noise; see the transform `random_erasing`."""
  if rng.random() >= probability:
    return image
  height, width = image.shape[:2]
  for _ in range(10):
    part = rng.uniform(area[0], area[1]) * height * width
    ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
    h, w = round(math.sqrt(part * ratio)), round(math.sqrt(part / ratio))
    if h < height and w < width:
      top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
      noise = rng.standard_normal((h, w, 3))
      if image.dtype == np.uint8:
        noise = np.clip(np.round(noise * _IMAGENET_STD + _IMAGENET_MEAN), 0, 255)
      image = image.copy()
      image[top : top + h, left : left + w] = noise.astype(image.dtype)
      return image
  return image


def _picture(image: np.ndarray) -> Image.Image:
  if image.dtype != np.uint8:
    raise TypeError(f"colours of a {image.dtype} picture cannot be changed: put normalize last")
  return Image.fromarray(np.ascontiguousarray(image))
