"""Transforms: small registered operations on one example, written as one string.

    "decode|random_resized_crop(224)|flip_lr|randaugment(2, 9, magnitude_std=0.5)"

The same registry serves training and evaluation. Every operation takes the example (a dict with
"image", uint8 RGB `[H, W, 3]` once decoded) and a NumPy Generator, and draws from that alone.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image

from hybrid_vit.data import augment
from hybrid_vit.data.errors import CorruptExampleError

Example = dict[str, Any]
Transform = Callable[[Example, np.random.Generator], Example]

DECODERS = ("opencv", "pil")
_PIL_FILTERS = {
  "nearest": Image.Resampling.NEAREST,
  "bilinear": Image.Resampling.BILINEAR,
  "bicubic": Image.Resampling.BICUBIC,
}
_CV_FILTERS = {
  "nearest": cv2.INTER_NEAREST,
  "bilinear": cv2.INTER_LINEAR,
  "bicubic": cv2.INTER_CUBIC,
}

_REGISTRY: dict[str, Callable[..., Any]] = {}

# The loader's threads are the parallelism; OpenCV's own would fight them.
cv2.setNumThreads(0)


class CorruptPictureError(CorruptExampleError):
  """Bytes that are no picture, or only part of one."""


def register_transform(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """Adds `factory(*arguments, [decoder]) → transform` to what strings may name."""

  def add(factory: Callable[..., Any]) -> Callable[..., Any]:
    if name in _REGISTRY:
      raise ValueError(f"transform {name!r} is registered already")
    _REGISTRY[name] = factory
    return factory

  return add


def transform_signatures() -> dict[str, str]:
  """Every registered name with its arguments, for the documentation."""
  return {name: _signature(name) for name in sorted(_REGISTRY)}


def parse_transform(text: str, decoder: str = "opencv") -> Transform:
  """A string of operations → one function.

  Args:
    text: operations separated by "|"; arguments are Python literals.
    decoder: "opencv" (fast; antialiased by area when it shrinks) or "pil" (the reference:
      antialiased by the filter itself, as timm and torchvision resize).

  Raises:
    ValueError: an unknown operation or a bad argument, naming the closest and its signature.
  """
  if decoder not in DECODERS:
    raise ValueError(f"decoder {decoder!r} is not one of {', '.join(DECODERS)}")
  steps = [_parse_one(part.strip(), decoder) for part in _split(text)]

  def transform(example: Example, rng: np.random.Generator) -> Example:
    for step in steps:
      example = step(example, rng)
    return example

  return transform


def _split(text: str) -> list[str]:
  parts = text.split("|")
  if not all(part.strip() for part in parts):
    raise ValueError(f"transform {text!r} has an empty operation between its bars")
  return parts


def _parse_one(text: str, decoder: str) -> Transform:
  try:
    node = ast.parse(text, mode="eval").body
  except SyntaxError as error:
    raise ValueError(f"transform {text!r} cannot be read: name(arguments) was expected") from error
  call = node if isinstance(node, ast.Call) else None
  head = call.func if call is not None else node
  if not isinstance(head, ast.Name):
    raise ValueError(f"transform {text!r} cannot be read: name(arguments) was expected")
  if head.id not in _REGISTRY:
    near = difflib.get_close_matches(head.id, list(_REGISTRY), n=1, cutoff=0.4)
    hint = f"did you mean {_signature(near[0])}?" if near else f"there are: {', '.join(_REGISTRY)}"
    raise ValueError(f"unknown transform {head.id!r}; {hint}")
  factory = _REGISTRY[head.id]
  try:
    arguments = [ast.literal_eval(argument) for argument in (call.args if call else [])]
    keywords = {str(k.arg): ast.literal_eval(k.value) for k in (call.keywords if call else [])}
    if "decoder" in inspect.signature(factory).parameters:
      keywords.setdefault("decoder", decoder)
    return factory(*arguments, **keywords)
  except (TypeError, ValueError) as error:
    raise ValueError(f"transform {text!r}: {error}; it is {_signature(head.id)}") from error


def _signature(name: str) -> str:
  signature = inspect.signature(_REGISTRY[name])
  parameters = [
    p.replace(annotation=inspect.Parameter.empty)
    for p in signature.parameters.values()
    if p.name != "decoder"
  ]
  text = str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
  return name + text


@register_transform("decode")
def decode(decoder: str = "opencv") -> Transform:
  """Encoded bytes → uint8 RGB; arrays pass. EXIF orientation is not applied, as timm does not."""

  def transform(example: Example, rng: np.random.Generator) -> Example:
    del rng
    image = example["image"]
    if isinstance(image, np.ndarray):
      return example
    return {**example, "image": _decode(bytes(image), decoder)}

  return transform


def _decode(encoded: bytes, decoder: str) -> np.ndarray:
  if decoder == "opencv" and _looks_whole(encoded):
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    if image is not None:
      return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
  try:
    with Image.open(io.BytesIO(encoded)) as picture:
      return np.asarray(picture.convert("RGB"))
  except Exception as error:  # PIL's plugins raise whatever their formats bring up.
    raise CorruptPictureError(str(error)) from error


def _looks_whole(encoded: bytes) -> bool:
  """Whether JPEG and PNG end as they should.

  OpenCV may fill what is missing with grey without a word; PIL decides what is not clear from here:
  it refuses a truncated picture and reads one with foreign bytes after its end.
  """
  for start, end in ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG", b"IEND")):
    if encoded.startswith(start):
      return end in encoded[-64:]
  return bool(encoded)


def resize_image(
  image: np.ndarray, size: tuple[int, int], interpolation: str, decoder: str
) -> np.ndarray:
  """uint8 `[H, W, 3]` → `size` (height, width), antialiased when it shrinks.

  With "pil" by the filter itself; with "opencv" by area when both sides shrink.
  """
  height, width = size
  if image.shape[:2] == (height, width):
    return image
  if interpolation not in _PIL_FILTERS:
    raise ValueError(f"interpolation {interpolation!r}: one of {', '.join(_PIL_FILTERS)}")
  if decoder == "pil":
    picture = Image.fromarray(np.ascontiguousarray(image))
    return np.asarray(picture.resize((width, height), _PIL_FILTERS[interpolation]))
  shrinks = height <= image.shape[0] and width <= image.shape[1]
  if shrinks and interpolation != "nearest":
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
  return cv2.resize(image, (width, height), interpolation=_CV_FILTERS[interpolation])


@register_transform("resize")
def resize(size: int | Sequence[int], interpolation: str = "bicubic", *, decoder: str) -> Transform:
  """Straight to `size` ("squash"): one number, or (height, width)."""
  target = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
  return _on_image(lambda image, rng: resize_image(image, target, interpolation, decoder))


@register_transform("resize_short")
def resize_short(size: int, interpolation: str = "bicubic", *, decoder: str) -> Transform:
  """The short side to `size`, the other in proportion (rounded down, as torchvision does)."""

  def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    if height <= width:
      target = (size, int(size * width / height))
    else:
      target = (int(size * height / width), size)
    return resize_image(image, target, interpolation, decoder)

  return _on_image(apply)


@register_transform("center_crop")
def center_crop(size: int) -> Transform:
  """The middle `size` x `size`; smaller pictures are padded with black."""

  def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    pad_h, pad_w = max(size - height, 0), max(size - width, 0)
    if pad_h or pad_w:
      top, left = pad_h // 2, pad_w // 2
      image = np.pad(image, ((top, pad_h - top), (left, pad_w - left), (0, 0)))
      height, width = image.shape[:2]
    # torchvision's rounding, which evaluations are published with.
    top, left = round((height - size) / 2.0), round((width - size) / 2.0)
    return image[top : top + size, left : left + size]

  return _on_image(apply)


@register_transform("resize_center_crop")
def resize_center_crop(
  size: int, crop_ratio: float = 0.875, interpolation: str = "bicubic", *, decoder: str
) -> Transform:
  """The usual evaluation: short side to floor(size / crop_ratio), then the middle."""
  short = resize_short(math.floor(size / crop_ratio), interpolation, decoder=decoder)
  crop = center_crop(size)
  return lambda example, rng: crop(short(example, rng), rng)


@register_transform("random_resized_crop")
def random_resized_crop(
  size: int,
  scale: Sequence[float] = (0.08, 1.0),
  ratio: Sequence[float] = (3 / 4, 4 / 3),
  interpolation: str = "bicubic",
  *,
  decoder: str,
) -> Transform:
  """A random part of the area and aspect given, resized (Szegedy et al., 2015; torchvision)."""
  if not 0 < scale[0] <= scale[1] or not 0 < ratio[0] <= ratio[1]:
    raise ValueError(f"scale {scale} and ratio {ratio} must be rising pairs of positive numbers")

  def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    top, left, height, width = _random_box(image.shape[0], image.shape[1], scale, ratio, rng)
    part = image[top : top + height, left : left + width]
    return resize_image(part, (size, size), interpolation, decoder)

  return _on_image(apply)


def _random_box(
  height: int,
  width: int,
  scale: Sequence[float],
  ratio: Sequence[float],
  rng: np.random.Generator,
) -> tuple[int, int, int, int]:
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
    h = round(width / ratio[0])
  elif width / height > ratio[1]:
    w = round(height * ratio[1])
  return (height - h) // 2, (width - w) // 2, h, w


@register_transform("random_crop")
def random_crop(size: int, padding: int = 0, mode: str = "constant") -> Transform:
  """A random `size` x `size` of the picture padded on each side: for small pictures."""
  modes = ("constant", "reflect", "edge")
  if mode not in modes:
    raise ValueError(f"mode {mode!r} is not one of {', '.join(modes)}")

  def apply(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if padding:
      image = np.pad(image, ((padding, padding), (padding, padding), (0, 0)), mode=mode)  # type: ignore[call-overload]
    if min(image.shape[:2]) < size:
      raise ValueError(f"random_crop({size}) of a picture of {image.shape[:2]}: resize it first")
    top = int(rng.integers(0, image.shape[0] - size + 1))
    left = int(rng.integers(0, image.shape[1] - size + 1))
    return image[top : top + size, left : left + size]

  return _on_image(apply)


@register_transform("flip_lr")
def flip_lr(probability: float = 0.5) -> Transform:
  """Mirrors left and right."""
  return _on_image(lambda image, rng: image[:, ::-1] if rng.random() < probability else image)


@register_transform("color_jitter")
def color_jitter(
  brightness: float, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.0
) -> Transform:
  """torchvision's ColorJitter: factors from [1 - x, 1 + x], a turn of the hue, in random order."""
  strengths = (brightness, contrast, saturation, hue)
  if min(strengths) < 0 or hue > 0.5:
    raise ValueError(f"strengths {strengths} must not be negative, and hue at most 0.5")
  return _on_image(lambda image, rng: augment.color_jitter(image, strengths, rng))


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
) -> Transform:
  """RandAugment (Cubuk et al., 2019) as timm defines it: rand-m{magnitude}-mstd{std}-inc1 …

  A `magnitude_std` of "inf" or above 100 draws uniformly up to the magnitude; `increasing` is
  timm's inc1, `magnitude_max` its mmax.
  """
  std = float(magnitude_std)
  policy = augment.RandAugment(
    num_layers=num_layers,
    magnitude=magnitude,
    magnitude_std=math.inf if std > 100 else std,
    increasing=increasing,
    probability=probability,
    magnitude_max=magnitude_max,
    interpolation=_known_filter(interpolation),
    fill=(fill[0], fill[1], fill[2]),
  )
  return _on_image(policy)


@register_transform("autoaugment")
def autoaugment(
  magnitude_std: float | str = 0.0,
  interpolation: str = "bicubic",
  fill: Sequence[int] = (124, 116, 104),
) -> Transform:
  """AutoAugment's ImageNet policy (Cubuk et al., 2018), timm's "original"."""
  colour = (fill[0], fill[1], fill[2])
  return _on_image(augment.AutoAugment(float(magnitude_std), _known_filter(interpolation), colour))


def _known_filter(interpolation: str) -> str:
  if interpolation not in augment.FILTERS:
    raise ValueError(f"interpolation {interpolation!r}: one of {', '.join(augment.FILTERS)}")
  return interpolation


@register_transform("three_augment")
def three_augment() -> Transform:
  """DeiT III's: one of grey, solarise and Gaussian blur (Touvron et al., 2022)."""
  return _on_image(augment.three_augment)


@register_transform("random_erasing")
def random_erasing(
  probability: float = 0.25,
  area: Sequence[float] = (0.02, 1 / 3),
  aspect: Sequence[float] = (0.3, 10 / 3),
) -> Transform:
  """Random erasing (Zhong et al., 2017), timm's pixel mode.

  The box is filled with normal noise for each pixel: of deviation 1 in a normalised float picture;
  in a uint8 one of ImageNet's mean and deviation, which is the same before normalisation, clipped.
  """
  return _on_image(lambda image, rng: augment.erase(image, probability, area, aspect, rng))


@register_transform("normalize")
def normalize(mean: Sequence[float], std: Sequence[float]) -> Transform:
  """uint8 → float32, (x / 255 - mean) / std. The device does this itself to uint8 pictures."""
  offset, scale = np.asarray(mean, np.float32), np.asarray(std, np.float32)
  return _on_image(lambda image, rng: (image.astype(np.float32) / np.float32(255) - offset) / scale)


def _on_image(apply: Callable[[np.ndarray, np.random.Generator], np.ndarray]) -> Transform:
  def transform(example: Example, rng: np.random.Generator) -> Example:
    image = example["image"]
    if not isinstance(image, np.ndarray):
      raise TypeError('the picture is not decoded: begin the transform with "decode|"')
    return {**example, "image": apply(image, rng)}

  return transform
