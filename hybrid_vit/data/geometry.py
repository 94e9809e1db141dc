"""Operations on the picture's plane, once drawn: how each kind of key follows.

Coordinates are continuous: x is 0 at the left edge of the first pixel and W at the right edge of
the last, so that the pixel in column j lies from j to j + 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import cv2
import numpy as np

from hybrid_vit.data.resizing import resize_image, resize_nearest

# Kinds of keys (see spec.KINDS) that lie on the picture's plane.
PLANE_KINDS = ("image", "map", "depth", "boxes", "points", "masks")

Size = tuple[int, int]  # (height, width)


@dataclasses.dataclass(frozen=True)
class Plane:
  """One drawn change of the plane. Your own says of itself what the three methods do.

  Attributes:
    size: (height, width) afterwards.
    ignore: what a map holds where no picture was.
  """

  size: Size
  ignore: int = dataclasses.field(default=255, kw_only=True)

  def image(self, image: np.ndarray) -> np.ndarray:
    """`[H, W, C]` → `[*size, C]` of the same type."""
    raise NotImplementedError

  def map(self, values: np.ndarray, fill: int) -> np.ndarray:
    """`[H, W, …]` → `[*size, …]`: each value is one that was there, or `fill` where none was."""
    raise NotImplementedError

  def points(self, points: np.ndarray) -> np.ndarray:
    """(x, y) before, float64 `[N, 2]`, → (x, y) afterwards; they may lie outside."""
    raise NotImplementedError


class OnPlaneLater:
  """A value on the plane that notes a change and makes it when it is looked at.

  Attributes:
    shape: that of the array which it will be.
  """

  @property
  def shape(self) -> tuple[int, ...]:
    """See the class."""
    raise NotImplementedError

  def moved(self, plane: Plane) -> OnPlaneLater:
    """The value after a change."""
    raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Resize(Plane):
  """From the size `before`; pictures by the filter named, everything else by the nearest pixel."""

  before: Size
  interpolation: str

  def image(self, image: np.ndarray) -> np.ndarray:
    return resize_image(image, self.size, self.interpolation)

  def map(self, values: np.ndarray, fill: int) -> np.ndarray:
    return resize_nearest(values, self.size)

  def points(self, points: np.ndarray) -> np.ndarray:
    return points * _factors(self.before, self.size)


@dataclasses.dataclass(frozen=True)
class Crop(Plane):
  """What begins at (top, left) of the size `before`, either of which may be negative.

  `mode` is NumPy's name of how the outside is filled: constant (black), reflect or edge.
  """

  before: Size
  top: int
  left: int
  mode: str = "constant"

  def image(self, image: np.ndarray) -> np.ndarray:
    return self.map(image, 0)

  def map(self, values: np.ndarray, fill: int) -> np.ndarray:
    rows = _taken(self.before[0], self.top, self.size[0], self.mode)
    columns = _taken(self.before[1], self.left, self.size[1], self.mode)
    if isinstance(rows, slice) and isinstance(columns, slice):
      return values[rows, columns]
    outside = np.zeros(self.size, bool)
    if not isinstance(rows, slice):
      outside |= (rows < 0)[:, None]
    if not isinstance(columns, slice):
      outside |= columns < 0
    out = values[rows][:, columns]
    if outside.any():
      _check_fill(values.dtype, fill)
      out[outside] = fill
    return out

  def points(self, points: np.ndarray) -> np.ndarray:
    return points - np.array([self.left, self.top])


@dataclasses.dataclass(frozen=True)
class ResizedCrop(Plane):
  """A resize to `whole` and what begins there at (top, left), without making the whole."""

  before: Size
  interpolation: str
  whole: Size
  top: int
  left: int

  def image(self, image: np.ndarray) -> np.ndarray:
    inner = resize_image(image, self.whole, self.interpolation, self._inner)
    return self._border.image(inner)

  def map(self, values: np.ndarray, fill: int) -> np.ndarray:
    return self._border.map(resize_nearest(values, self.whole, self._inner), fill)

  def points(self, points: np.ndarray) -> np.ndarray:
    return points * _factors(self.before, self.whole) - np.array([self.left, self.top])

  @property
  def _inner(self) -> tuple[int, int, int, int]:
    top, left = max(self.top, 0), max(self.left, 0)
    bottom = min(self.top + self.size[0], self.whole[0])
    right = min(self.left + self.size[1], self.whole[1])
    return top, left, bottom - top, right - left

  @property
  def _border(self) -> Crop:
    """What puts the black border around the inner part."""
    return Crop(self.size, self._inner[2:], min(self.top, 0), min(self.left, 0))


@dataclasses.dataclass(frozen=True)
class Mirror(Plane):
  """Left and right change places."""

  def image(self, image: np.ndarray) -> np.ndarray:
    # A picture that is read backwards is copied ten times as slowly.
    if image.dtype == np.uint8 and image.shape[2] == 3:
      return cv2.flip(image, 1)
    return image[:, ::-1]

  def map(self, values: np.ndarray, fill: int) -> np.ndarray:
    return values[:, ::-1]

  def points(self, points: np.ndarray) -> np.ndarray:
    return np.array([self.size[1], 0]) + points * np.array([-1, 1])


@dataclasses.dataclass(frozen=True)
class Pad(Plane):
  """To a larger size: what follows at the right and below has the colour `fill`."""

  before: Size
  fill: tuple[int, int, int]

  def image(self, image: np.ndarray) -> np.ndarray:
    height, width = self.before
    out = np.empty((*self.size, image.shape[2]), image.dtype)
    # Whole lines are copied faster than three numbers are repeated.
    line = np.tile(np.array(self.fill, image.dtype), (self.size[1], 1))
    out[:height, :width] = image
    out[:height, width:] = line[width:]
    out[height:] = line
    return out

  def map(self, values: np.ndarray, fill: int) -> np.ndarray:
    height, width = self.before
    out = np.empty((*self.size, *values.shape[2:]), values.dtype)
    out[:height, :width] = values
    if self.size != self.before:
      _check_fill(values.dtype, fill)
      out[:height, width:] = fill
      out[height:] = fill
    return out

  def points(self, points: np.ndarray) -> np.ndarray:
    return points


def plane_size(example: Mapping[str, Any], kinds: Mapping[str, str]) -> Size:
  """(height, width) of what the example's keys show.

  Raises:
    ValueError: nothing has a size, or two keys have different ones.
    TypeError: a picture is still encoded.
  """
  found: dict[str, Size] = {}
  for name, kind in kinds.items():
    if name not in example or kind not in ("image", "map", "depth", "masks"):
      continue
    value = example[name]
    if not isinstance(value, np.ndarray | OnPlaneLater):
      hint = ' begin the transform with "decode|"' if kind == "image" else " its source decodes it"
      raise TypeError(f"{name!r} is {type(value).__name__}, not decoded:{hint}")
    height, width = value.shape[1:3] if kind == "masks" else value.shape[:2]
    found[name] = height, width
  if not found:
    wanted = ", ".join(map(repr, kinds)) or "a picture"
    raise ValueError(f"the example has none of {wanted}; it has: {', '.join(sorted(example))}")
  (first, size), *others = found.items()
  for name, other in others:
    if other != size:
      raise ValueError(
        f"{first!r} is {size[0]} x {size[1]} and {name!r} {other[0]} x {other[1]}; what one "
        "example shows must have one size"
      )
  return size


def move(
  example: Mapping[str, Any], planes: Iterable[Plane], kinds: Mapping[str, str]
) -> dict[str, Any]:
  """The example after the changes in their order, each key by its kind; other keys stay.

  Boxes are cut off at the border after each change. One of which nothing is left stays, with an
  area of 0, so that what else is known of the boxes keeps its rows.
  """
  moved = dict(example)
  planes = merged(planes)
  for name, kind in kinds.items():
    if kind in PLANE_KINDS and name in moved:
      value = moved[name]
      for plane in planes:
        value = _moved(value, plane, kind)
      moved[name] = value
  return moved


def merged(planes: Iterable[Plane]) -> list[Plane]:
  """A resize and the crop behind it become one change, so that only the crop is computed."""
  out: list[Plane] = []
  for plane in planes:
    last = out[-1] if out else None
    if isinstance(last, Resize) and isinstance(plane, Crop) and plane.mode == "constant":
      whole = last.size
      out[-1] = ResizedCrop(
        plane.size, last.before, last.interpolation, whole, plane.top, plane.left,
        ignore=plane.ignore,
      )  # fmt: skip
    else:
      out.append(plane)
  return out


def _moved(value: Any, plane: Plane, kind: str) -> Any:
  if isinstance(value, OnPlaneLater):
    return value.moved(plane)
  if kind == "image":
    return plane.image(value)
  if kind == "map":
    return plane.map(value, plane.ignore)
  if kind == "depth":
    return plane.map(value, 0)
  if kind == "masks":
    return np.moveaxis(plane.map(np.moveaxis(value, 0, 2), 0), 2, 0)
  if kind == "points":
    points = np.asarray(value, np.float64).reshape(-1, 2)
    return plane.points(points).astype(np.float32)
  return _moved_boxes(np.asarray(value, np.float64).reshape(-1, 4), plane)


def _moved_boxes(boxes: np.ndarray, plane: Plane) -> np.ndarray:
  """The smallest upright boxes around the moved corners, cut at the border."""
  corners = boxes[:, [[0, 1], [2, 1], [2, 3], [0, 3]]].reshape(-1, 2)
  moved = plane.points(corners).reshape(-1, 4, 2)
  height, width = plane.size
  edges = np.concatenate([moved.min(1), moved.max(1)], axis=1)
  return np.clip(edges, 0, [width, height, width, height]).astype(np.float32)


def _factors(before: Size, after: Size) -> np.ndarray:
  return np.array([after[1] / before[1], after[0] / before[0]])


def _taken(before: int, start: int, length: int, mode: str) -> slice | np.ndarray:
  """Which pixels along one side; -1 for none."""
  lacking = max(-start, 0), max(start + length - before, 0)
  if not any(lacking):
    return slice(start, start + length)
  if mode == "constant":
    padded = np.pad(np.arange(before), lacking, constant_values=-1)
  else:
    padded = np.pad(np.arange(before), lacking, mode=mode)  # type: ignore[call-overload]
  first = start + lacking[0]
  return padded[first : first + length]


def _check_fill(dtype: np.dtype, fill: int) -> None:
  if np.issubdtype(dtype, np.integer) and not np.iinfo(dtype).min <= fill <= np.iinfo(dtype).max:
    raise ValueError(
      f"a map of {dtype} cannot hold {fill}, which stands for no picture: take another `ignore` "
      "or a wider type"
    )
