"""From a picture of any size to a map of its own size: whole or by windows, several scales, flips.

The protocol is mmsegmentation's: a picture is resized to fit a scale; the network sees it whole, or
in windows that overlap and whose answers are averaged; answers are brought to the size of the
network's picture, then to that of the original, and only there does a softmax make probabilities,
which several scales and flips average. Programs are compiled once for each shape: windows all have
one, and the last step, whose sizes differ with every picture, works in strips.

Deviations: pictures are resized by Pillow's antialiased filters, as everywhere here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from hybrid_vit.data import arguments as check
from hybrid_vit.data.resizing import FILTERS, resize_image
from hybrid_vit.ops.resize import bilinear_places, resize_bilinear

MODES = ("whole", "slide")
# Rows of the result that are made at once; its columns are padded to a multiple of the second.
_STRIP, _COLUMNS = 64, 64

Size = tuple[int, int]  # (height, width)


@dataclasses.dataclass(frozen=True)
class InferenceSettings:
  """How a picture becomes a map.

  Attributes:
    mode: "whole", or "slide": by windows.
    scale: (long, short): a picture is resized, its aspect kept, as large as fits; None to leave it.
    size: (height, width) or a side to resize to instead, whatever the aspect.
    size_divisor: sides are rounded up to multiples of it.
    crop: (height, width) of a window; of a smaller picture the whole side.
    stride: (down, right) between windows; the last ones are moved inside.
    ratios: factors of the scale, or of the size, whose probabilities are averaged. (Those of the
      test-time pipelines of mmsegmentation 1.x multiply the original size: no scale there.)
    flip: whether each is averaged with what its mirror image gives.
    window_batch: windows that the network sees at once.
    interpolation: of the picture.
    align_corners: of the answer when it is brought to the size of the network's picture, and from
      there to that of the original.

  Raises:
    ValueError: a value that cannot be; the message names it.
  """

  mode: str = "whole"
  scale: tuple[int, int] | None = None
  size: tuple[int, int] | int | None = None
  size_divisor: int = 1
  crop: tuple[int, int] | int = (512, 512)
  stride: tuple[int, int] | int = (341, 341)
  ratios: tuple[float, ...] = (1.0,)
  flip: bool = False
  window_batch: int = 4
  interpolation: str = "bilinear"
  align_corners: bool = False

  def __post_init__(self) -> None:
    check.choice("inference.mode", self.mode, MODES)
    check.choice("inference.interpolation", self.interpolation, FILTERS)
    check.whole("inference.size_divisor", self.size_divisor)
    check.whole("inference.window_batch", self.window_batch)
    for name in ("scale", "size", "crop", "stride"):
      if getattr(self, name) is not None:
        check.sides(f"inference.{name}", getattr(self, name))
    if self.scale is not None and self.size is not None:
      raise ValueError("inference.scale and inference.size are both given: one was expected")
    crop, stride = check.sides("crop", self.crop), check.sides("stride", self.stride)
    if any(s > c for s, c in zip(stride, crop)):
      raise ValueError(
        f"inference.stride {self.stride} is larger than inference.crop {self.crop}: pixels between "
        "the windows would never be seen"
      )
    if not self.ratios or not all(ratio > 0 for ratio in self.ratios):
      raise ValueError(f"inference.ratios is {self.ratios}; numbers above 0 were expected")

  def __str__(self) -> str:
    if self.size is not None:
      seen = "at {} x {}".format(*check.sides("inference.size", self.size))
    elif self.scale is not None:
      seen = f"as large as fits into {max(self.scale)} x {min(self.scale)}"
    else:
      seen = "at their own size"
    if self.size_divisor > 1:
      seen += f", sides multiples of {self.size_divisor}"
    way = "whole"
    if self.mode == "slide":
      crop, stride = check.sides("crop", self.crop), check.sides("stride", self.stride)
      way = "by windows of {} x {} every {} and {} pixels".format(*crop, *stride)
    several = f", averaged over the factors {self.ratios}" if len(self.ratios) > 1 else ""
    return f"{way}, {seen}{several}" + (" and mirror images" if self.flip else "")

  def input_size(self, size: Size, ratio: float = 1.0) -> Size:
    """(height, width) at which the network sees a picture of `size`."""
    if self.size is not None:
      sides = check.sides("inference.size", self.size)
      height, width = (max(round(side * ratio), 1) for side in sides)
    elif self.scale is not None:
      long, short = (max(int(side * ratio), 1) for side in (max(self.scale), min(self.scale)))
      factor = min(long / max(size), short / min(size))
      height, width = (max(int(side * factor + 0.5), 1) for side in size)
    else:
      height, width = (max(int(side * ratio + 0.5), 1) for side in size)
    multiple = self.size_divisor
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def windows(size: Size, crop: Size, stride: Size) -> list[tuple[int, int]]:
  """(top, left) of the windows of `crop` over a picture of `size`, none of them beyond it.

  mmsegmentation's: as many strides as it takes, the last row and column moved inside.
  """
  places = []
  for length, window, step in zip(size, crop, stride):
    number = max(length - window + step - 1, 0) // step + 1
    places.append([max(min(i * step + window, length) - window, 0) for i in range(number)])
  return [(top, left) for top in places[0] for left in places[1]]


class MapInference:
  """Maps of pictures by one network; compiled programs are kept."""

  def __init__(
    self,
    predict: Callable[[Any, jax.Array], jax.Array],
    settings: InferenceSettings,
    *,
    softmax: bool,
  ):
    """
    Args:
      predict: pure, `(variables, images [N, h, w, 3]) → float32 [N, h', w', K]`.
      settings: how.
      softmax: whether answers are logits of classes; else they are averaged as they are.
    """
    self.settings = settings
    self._softmax = softmax

    @jax.jit
    def answers(variables: Any, images: jax.Array) -> jax.Array:
      maps = predict(variables, images)
      return resize_bilinear(maps, images.shape[1:3], align_corners=settings.align_corners)

    # `(variables, images [N, h, w, 3]) → [N, h, w, K]`, of one size of the network's picture.
    self.answers = answers

  def classes(self, variables: Any, image: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, 3]` → the likeliest class of each pixel, int32 `[H, W]`."""
    return self._joined(variables, image, best=True)

  def values(self, variables: Any, image: np.ndarray) -> np.ndarray:
    """uint8 `[H, W, 3]` → averaged probabilities, or answers, float32 `[H, W, K]`."""
    return self._joined(variables, image, best=False)

  def _joined(self, variables: Any, image: np.ndarray, *, best: bool) -> np.ndarray:
    strips = self._strips(variables, image, best)
    return np.concatenate([np.asarray(strip)[:rows] for strip, rows in strips])[:, : image.shape[1]]

  def _strips(
    self, variables: Any, image: np.ndarray, best: bool
  ) -> Iterator[tuple[jax.Array, int]]:
    """Strips of the result from the top, each with the number of its rows that count."""
    size = image.shape[0], image.shape[1]
    maps, columns, rows = [], [], []
    corners = self.settings.align_corners
    for ratio in self.settings.ratios:
      seen_size = self.settings.input_size(size, ratio)
      seen = resize_image(image, seen_size, self.settings.interpolation)
      for flipped in (False, True) if self.settings.flip else (False,):
        maps.append(self._map(variables, seen[:, ::-1] if flipped else seen))
        places = bilinear_places(seen_size[1], size[1], corners)
        columns.append(_padded(_mirrored(places, seen_size[1]) if flipped else places, _COLUMNS))
        rows.append(_padded(bilinear_places(seen_size[0], size[0], corners), _STRIP))
    for top in range(0, size[0], _STRIP):
      strip_rows = [tuple(part[top : top + _STRIP] for part in places) for places in rows]
      strip = _strip(tuple(maps), tuple(strip_rows), tuple(columns), self._softmax, best)
      yield strip, min(_STRIP, size[0] - top)

  def _map(self, variables: Any, image: np.ndarray) -> jax.Array:
    """A resized picture `[h, w, 3]` → answers `[h, w, K]`."""
    place = _placement(variables)
    if self.settings.mode == "whole":
      return self.answers(variables, place(image[None]))[0]
    settings, size = self.settings, (image.shape[0], image.shape[1])
    wanted = check.sides("crop", settings.crop)
    crop = min(wanted[0], size[0]), min(wanted[1], size[1])
    found = windows(size, crop, check.sides("stride", settings.stride))
    batch = settings.window_batch
    total, count = None, np.zeros(size, np.float32)
    for start in range(0, len(found), batch):
      part = found[start : start + batch]
      cut = [image[top : top + crop[0], left : left + crop[1]] for top, left in part]
      cut += [np.zeros_like(cut[0])] * (batch - len(part))
      answers = self.answers(variables, place(np.stack(cut)))
      if total is None:
        total = jnp.zeros((*size, answers.shape[-1]), jnp.float32)
      for i, (top, left) in enumerate(part):
        total = _added(total, answers, i, top, left)
        count[top : top + crop[0], left : left + crop[1]] += 1
    return _divided(total, count)


def _placement(variables: Any) -> Callable[[np.ndarray], Any]:
  """Puts pictures where the variables are: split over all devices where they divide the batch."""
  leaves = jax.tree.leaves(variables)
  sharding = getattr(leaves[0], "sharding", None) if leaves else None
  if not isinstance(sharding, NamedSharding) or sharding.mesh.size == 1:
    return lambda images: images
  mesh = sharding.mesh

  def place(images: np.ndarray) -> jax.Array:
    split = tuple(mesh.axis_names) if len(images) % mesh.size == 0 else None
    return jax.device_put(images, NamedSharding(mesh, PartitionSpec(split)))

  return place


def _mirrored(places: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, ...]:
  low, high, part = places
  return length - 1 - low, length - 1 - high, part


def _padded(places: Sequence[np.ndarray], multiple: int) -> tuple[np.ndarray, ...]:
  """Places of more cells, which are cut off later, so that fewer sizes are compiled for."""
  more = -len(places[0]) % multiple
  low, high, part = (np.pad(values, (0, more)) for values in places)
  return low.astype(np.int32), high.astype(np.int32), part.astype(np.float32)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _strip(maps: Any, rows: Any, columns: Any, softmax: bool, best: bool) -> jax.Array:
  """Some rows of the result: the mean of all maps, resized, or its largest class."""
  total: Any = 0.0
  for answers, (top, bottom, down), (left, right, over) in zip(maps, rows, columns):
    part = answers[top] * (1 - down[:, None, None]) + answers[bottom] * down[:, None, None]
    part = part[:, left] * (1 - over[:, None]) + part[:, right] * over[:, None]
    # One map's likeliest class needs no softmax.
    total = total + (jax.nn.softmax(part) if softmax and not (best and len(maps) == 1) else part)
  return jnp.argmax(total, axis=-1).astype(jnp.int32) if best else total / len(maps)


@functools.partial(jax.jit, donate_argnums=0)
def _added(total: jax.Array, answers: jax.Array, row: Any, top: Any, left: Any) -> jax.Array:
  height, width, channels = answers.shape[1:]
  before = jax.lax.dynamic_slice(total, (top, left, 0), (height, width, channels))
  return jax.lax.dynamic_update_slice(total, before + answers[row], (top, left, 0))


@functools.partial(jax.jit, donate_argnums=0)
def _divided(total: jax.Array, count: jax.Array) -> jax.Array:
  return total / count[..., None]
