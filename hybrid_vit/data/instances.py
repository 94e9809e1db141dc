"""Photos with objects: boxes, classes, and masks where there are some, whoever wrote them down.

What cannot be used is left out or mended when the source is opened, counted by its reason and
named: `Notes`. A picture without objects stays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hybrid_vit.data.errors import CorruptExampleError
from hybrid_vit.data.folders import Reader, tell_once
from hybrid_vit.data.lazy_masks import LazyMasks, Read
from hybrid_vit.data.map_reading import picture_size
from hybrid_vit.data.mask_encoding import read_segmentation
from hybrid_vit.data.palettes import spread_palette

Size = tuple[int, int]  # (height, width)

NO_AREA = "objects left out whose box has no area or lies outside the picture"
NO_NUMBERS = "objects left out whose box is not four finite numbers"
NO_CATEGORY = "objects left out of a category that is not listed"
NO_PICTURE = "objects left out whose picture is not listed or not there"
NO_PHOTO = "pictures left out whose photo is not there"
CUT = "boxes cut at the border that reached over it by more than a pixel"
NO_MASK = "objects without a mask, for which their box stands"
BAD_MASK = "objects whose mask cannot be one, for which their box stands"
OTHER_SIZE = "objects whose mask is of another size than their picture, for which their box stands"
NO_AREA_GIVEN = "objects whose area is no number, for which that of their box stands"
EMPTY = "pictures without objects"
BAD_PHOTO = "pictures left out whose photo cannot be read"
SMALL = "pictures left out that are smaller than min_size"
# Of a box over the border: COCO's own are rounded to hundredths.
_TOLERANCE = 1.0


class Notes:
  """Counts by reason, with the first name of each.

  Attributes:
    counts: reason → how many.
  """

  def __init__(self) -> None:
    self.counts: dict[str, int] = {}
    self._first: dict[str, str] = {}

  def add(self, reason: str, name: str) -> None:
    """Notes one."""
    self.counts[reason] = self.counts.get(reason, 0) + 1
    self._first.setdefault(reason, name)

  def tell(self, head: str) -> None:
    """One warning with all of them, once in a process."""
    if self.counts:
      found = (f"{n:,} {why}, e.g. {self._first[why]}" for why, n in self.counts.items())
      tell_once(head, "; ".join(found))


class Picture(NamedTuple):
  """A photo with objects.

  Attributes:
    photo: its path in the reader.
    image_id: as the annotations have it.
    size: (height, width) as they have it; None where they do not say.
    masks: the path of a file with its masks, where these lie in one.
  """

  photo: str
  image_id: Any
  size: Size | None = None
  masks: str = ""


@dataclasses.dataclass
class Objects:
  """All objects of a source, a row each; those of one picture in a run.

  Attributes:
    ends: int64 `[pictures]`: a picture's rows are those from the end of the one before to here.
    given: float64 `[N, 4]`, (x, y, width, height) as in the file.
    boxes: float64 `[N, 4]`, (x0, y0, x1, y1), cut at the border.
    labels: int32 `[N]`.
    crowd: bool `[N]`.
    areas: float64 `[N]`, as in the file.
    masks: the encoded mask of each, None where it has none; None where no object has one.
  """

  ends: np.ndarray
  given: np.ndarray
  boxes: np.ndarray
  labels: np.ndarray
  crowd: np.ndarray
  areas: np.ndarray
  masks: Sequence[Any] | None


class Collector:
  """Takes objects one by one and gives `Objects`."""

  def __init__(self) -> None:
    self._pictures: list[int] = []
    self._numbers: list[tuple[float, ...]] = []
    self._labels: list[int] = []
    self._crowd: list[bool] = []
    self._masks: list[Any] = []

  def add(
    self,
    picture: int,
    given: Sequence[float],
    box: Sequence[float],
    label: int,
    *,
    crowd: bool = False,
    area: float | None = None,
    mask: Any = None,
  ) -> None:
    """One object; see `Objects` for what they are, `area` None for that of the box."""
    self._pictures.append(picture)
    area = given[2] * given[3] if area is None else area
    self._numbers.append((*given, *box, area))
    self._labels.append(label)
    self._crowd.append(crowd)
    self._masks.append(mask)

  def objects(self, order: Sequence[int], has_masks: bool) -> Objects:
    """Those of the pictures `order`, in it."""
    pictures = np.array(self._pictures, np.int64)
    place = np.full(max(pictures.max(initial=-1), max(order, default=-1)) + 1, -1)
    place[np.array(order, np.int64)] = np.arange(len(order))
    rows = np.argsort(place[pictures], kind="stable")
    rows = rows[place[pictures[rows]] >= 0]
    numbers = np.array(self._numbers, np.float64).reshape(-1, 9)[rows]
    counts = np.bincount(place[pictures[rows]], minlength=len(order))
    return Objects(
      ends=np.cumsum(counts),
      given=numbers[:, :4],
      boxes=numbers[:, 4:8],
      labels=np.array(self._labels, np.int32)[rows],
      crowd=np.array(self._crowd, bool)[rows],
      areas=numbers[:, 8],
      masks=[self._masks[i] for i in rows] if has_masks else None,
    )


# (picture, encoded masks, size, boxes `[N, 4]`, the photo's full name) → what reads each mask.
MaskForm = Callable[[Picture, Sequence[Any], Size, np.ndarray, str], list[Read]]


class InstanceSource:
  """Photos with objects; see `sources.Source`.

  An example is {"image": the photo's bytes, "boxes": float32 `[N, 4]`, (x0, y0, x1, y1) in pixels,
  "box_labels": int32 `[N]`, "crowd": bool `[N]`, "areas": float32 `[N]`, "masks": `LazyMasks`
  where the source has masks, "given_boxes": float64 `[N, 4]`, (x, y, width, height) as in the file,
  for measures, "image_id", "size": (height, width)}.

  Args:
    reader: of the folder or zip.
    pictures: all of them.
    objects: theirs.
    names: of the classes.
    category_ids: the number of each class in the file.
    mask_form: reads masks.
    notes: what was left out.
    relative: boxes and polygons are fractions of the sides.

  Attributes:
    info: "object_class_names", "category_ids", "palette" and "object_palette" uint8
      `[classes, 3]`, "object_counts" int64 `[classes]`,
      "most_objects" (of one picture), "has_masks", "notes" (reason → how many).
  """

  def __init__(
    self,
    reader: Reader,
    pictures: Sequence[Picture],
    objects: Objects,
    names: Sequence[str],
    category_ids: Sequence[int],
    mask_form: MaskForm,
    notes: Notes,
    relative: bool = False,
  ):
    self._reader, self._pictures, self._objects = reader, pictures, objects
    self._mask_form, self._relative = mask_form, relative
    counts = np.diff(objects.ends, prepend=0)
    self.info: dict[str, Any] = {
      "object_class_names": tuple(names),
      "category_ids": tuple(category_ids),
      "palette": spread_palette(len(names)),
      "object_palette": spread_palette(len(names)),
      "object_counts": np.bincount(objects.labels, minlength=len(names)),
      "most_objects": int(counts.max(initial=0)),
      "has_masks": objects.masks is not None,
      "notes": dict(notes.counts),
    }

  def __len__(self) -> int:
    return len(self._pictures)

  @property
  def sizes(self) -> np.ndarray | None:
    """int64 `[N, 2]`, (height, width) of each photo; None where the annotations do not say."""
    sizes = [picture.size for picture in self._pictures]
    return None if None in sizes else np.array(sizes, np.int64)

  def __getitem__(self, index: int) -> dict[str, Any]:
    picture, name = self._pictures[index], self.describe(index)
    photo = self._reader.read(picture.photo)
    size = picture_size(photo, name)
    if picture.size is not None and size != picture.size:
      raise CorruptExampleError(
        f"{name} is {size[0]} x {size[1]} and its annotations were made for {picture.size[0]} x "
        f"{picture.size[1]} (height x width): look whether the photo was resized or turned since"
      )
    start = int(self._objects.ends[index - 1]) if index else 0
    rows = slice(start, int(self._objects.ends[index]))
    sides = np.array([size[1], size[0]] * 2, np.float64) if self._relative else 1.0
    boxes, given = self._objects.boxes[rows] * sides, self._objects.given[rows] * sides
    area = size[0] * size[1] if self._relative else 1.0
    example = {
      "image": photo,
      "boxes": boxes.astype(np.float32),
      "box_labels": self._objects.labels[rows].copy(),
      "crowd": self._objects.crowd[rows].copy(),
      "areas": (self._objects.areas[rows] * area).astype(np.float32),
      "given_boxes": given,
      "image_id": picture.image_id,
      "size": size,
    }
    if self._objects.masks is not None:
      encoded = self._objects.masks[rows]
      example["masks"] = LazyMasks(size, self._mask_form(picture, encoded, size, boxes, name))
    return example

  def describe(self, index: int) -> str:
    """See `sources.Source`."""
    return self._reader.full_name(self._pictures[index].photo)


def segmentation_masks(
  picture: Picture, encoded: Sequence[Any], size: Size, boxes: np.ndarray, name: str
) -> list[Read]:
  """A `MaskForm`: each mask in one of COCO's forms, None for the whole box."""
  return [
    _Segmentation(mask, size, boxes[i], f"{name}, object {i}") for i, mask in enumerate(encoded)
  ]


def text_masks(counts: Sequence[str | bytes], size: Size, boxes: np.ndarray) -> LazyMasks:
  """Masks of compressed run lengths, "" for the whole box of `boxes` `[N, 4]`."""
  encoded = [{"size": size, "counts": text} if len(text) else None for text in counts]
  return LazyMasks(size, segmentation_masks(Picture("", 0), encoded, size, boxes, "an example"))


class _Segmentation:
  def __init__(self, encoded: Any, size: Size, box: np.ndarray, name: str):
    self._encoded, self._size, self._box, self._name = encoded, size, box, name

  def __call__(self) -> Any:
    if self._encoded is None:
      return box_mask(self._box, self._size)
    try:
      return read_segmentation(self._encoded, self._size)
    except (ValueError, TypeError, KeyError) as error:
      raise CorruptExampleError(f"the mask of {self._name}: {error}") from error


def box_mask(box: np.ndarray, size: Size) -> np.ndarray:
  """The pixels whose centres lie in a box, bool `[H, W]`; of a thinner one the nearest line."""
  mask = np.zeros(size, bool)
  edges = np.round(box).astype(int)
  (left, right), (top, bottom) = (
    (min(edges[i], size[1 - i] - 1), max(edges[i + 2], edges[i] + 1)) for i in (0, 1)
  )
  mask[top:bottom, left:right] = True
  return mask


def usable_box(given: Any, size: Size, notes: Notes, name: str) -> list[float] | None:
  """(x, y, width, height) → (x0, y0, x1, y1) cut at the border; None, and a note, for none.

  Args:
    given: what the file has.
    size: (height, width) of the picture; (1, 1) for fractions.
    notes: takes what is wrong.
    name: of the object.
  """
  if not is_numbers(given) or len(given) != 4:
    notes.add(NO_NUMBERS, name)
    return None
  x, y, w, h = given
  box = [max(x, 0.0), max(y, 0.0), min(x + w, float(size[1])), min(y + h, float(size[0]))]
  if w <= 0 or h <= 0 or box[2] <= box[0] or box[3] <= box[1]:
    notes.add(NO_AREA, name)
    return None
  tolerance = _TOLERANCE if size != (1, 1) else 0.01
  if min(x, y) < -tolerance or x + w > size[1] + tolerance or y + h > size[0] + tolerance:
    notes.add(CUT, name)
  return box


def usable_area(given: Any, notes: Notes, name: str) -> float | None:
  """An area as the file has it; None for none, and a note for what is no number.

  Args:
    given: what the file has.
    notes: takes what is wrong.
    name: of the object.
  """
  if given is None or is_numbers([given]):
    return given
  notes.add(NO_AREA_GIVEN, name)
  return None


def is_numbers(values: Any) -> bool:
  """Whether it is a sequence of finite numbers."""
  try:
    return all(math.isfinite(value) for value in values)
  except (TypeError, OverflowError):  # a whole number that no float can be
    return False


def chosen_pictures(
  pictures: Sequence[Picture],
  has_objects: Sequence[bool],
  options: Mapping[str, Any],
  notes: Notes,
) -> list[int]:
  """The numbers of those that stay: by the options `empty` and `min_size`."""
  chosen = []
  for number, picture in enumerate(pictures):
    if not has_objects[number]:
      notes.add(EMPTY if options.get("empty", True) else f"{EMPTY}, left out", picture.photo)
      if not options.get("empty", True):
        continue
    if picture.size is not None and min(picture.size) < options.get("min_size", 0):
      notes.add(SMALL, picture.photo)
      continue
    chosen.append(number)
  return chosen
