"""COCO's panoptic annotations: maps of classes, and objects with boxes and masks.

Every segment's pixels get its category's number in the order of the file's categories: 133 of COCO
2017, things and stuff. Crowds, too, since their class is known. Unlabelled pixels are no class.
Segments of things are objects, as in `instances`, classes numbered among the things alone; all of
them are `segments`, too.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hybrid_vit.data.errors import CorruptExampleError, MissingDataError
from hybrid_vit.data.folders import Reader, choose_part
from hybrid_vit.data.instances import (
  NO_CATEGORY,
  MaskForm,
  Notes,
  Picture,
  Size,
  usable_area,
  usable_box,
)
from hybrid_vit.data.lazy_masks import LazyMasks, Read
from hybrid_vit.data.map_reading import IGNORE, check_size, read_segments
from hybrid_vit.data.palettes import spread_palette
from hybrid_vit.data.segments import panoptic_fields
from hybrid_vit.data.splits import PARTS, SPLIT_OF

_FILE = re.compile(r"(?:(.*)/)?panoptic_([a-z]+)(\d*)\.json")
# Of the three bytes of a colour.
_MOST_IDS = 2**24
# What the source wants, for messages.
PANOPTIC_LAYOUT = (
  "annotations/panoptic_train2017.json, the PNG in annotations/panoptic_train2017/ and the photos "
  "in a directory train2017/"
)


class Segments(NamedTuple):
  """What an annotation says of its segments.

  Attributes:
    image_id: of the picture.
    ids: int32 `[S]`.
    classes: int32 `[S]`, `IGNORE` for one whose category is not listed.
    crowd: bool `[S]`.
    objects: what `instances.Objects` has of the N things: "ids" int32 `[N]` of their segments,
      "boxes", "given_boxes" float64 `[N, 4]`, "box_labels", "crowd", "areas" `[N]`.
  """

  image_id: Any
  ids: np.ndarray
  classes: np.ndarray
  crowd: np.ndarray
  objects: Mapping[str, np.ndarray]


class PanopticSource:
  """Photos with a map and objects each; see `sources.Source` and, of objects, `InstanceSource`.

  Args:
    reader: of the folder or zip.
    pairs: (photo, PNG).
    segments: of each PNG, by its path.
    info: of the whole.
  """

  def __init__(
    self,
    reader: Reader,
    pairs: Sequence[tuple[str, str]],
    segments: Mapping[str, Segments],
    info: Mapping[str, Any],
  ):
    self._reader, self._pairs, self._segments = reader, pairs, segments
    self.info = dict(info)

  def __len__(self) -> int:
    return len(self._pairs)

  def __getitem__(self, index: int) -> dict[str, Any]:
    photo_path, path = self._pairs[index]
    name, found = self._reader.full_name(path), self._segments[path]
    ids = read_segments(self._reader.read(path), name)
    photo = self._reader.read(photo_path)
    check_size(ids, photo, name, self._reader.full_name(photo_path))
    size = (ids.shape[0], ids.shape[1])
    objects = dict(found.objects)
    readers = [functools.partial(np.equal, ids, segment) for segment in objects.pop("ids")]
    rows = rows_of(ids, found.ids, name)
    return {
      "image": photo,
      # The last one for pixels of no segment, whose row is -1.
      "map": np.append(found.classes, np.int32(IGNORE))[rows],
      **panoptic_fields(rows, found.classes, found.crowd),
      **{key: values.copy() for key, values in objects.items()},
      "masks": LazyMasks(size, readers),
      "image_id": found.image_id,
      "size": size,
    }

  def describe(self, index: int) -> str:
    """See `sources.Source`."""
    return self._reader.full_name(self._pairs[index][0])


def open_panoptic(reader: Reader, names: Sequence[str], split: str) -> PanopticSource:
  """Opens `coco_panoptic:`.

  Args:
    reader: of the folder or zip.
    names: all of its files.
    split: "train", "validation", "test" or "all".

  Raises:
    MissingDataError: no annotations, or photos or PNG that they name.
    ValueError: two files of annotations with other categories each.
  """
  parts: dict[str, list[tuple[str, str]]] = {part: [] for part in PARTS}
  segments: dict[str, Segments] = {}
  categories: list[dict[str, Any]] = []
  there = set(names)
  notes = Notes()
  for name in names:
    match = _FILE.fullmatch(name)
    if not match or match[2] not in SPLIT_OF:
      continue
    read = read_annotations(reader, name)
    if categories and read["categories"] != categories:
      raise ValueError(f"{reader.full_name(name)}: its categories are not those of the other files")
    categories = read["categories"]
    _check_categories(categories, reader.full_name(name))
    photo_of = _photos(names, f"{match[2]}{match[3]}")
    image_of = {image["id"]: image for image in read["images"]}
    for item in read["annotations"]:
      check_segments(item, reader.full_name(name))
      path = f"{name.removesuffix('.json')}/{item['file_name']}"
      identifier = item.get("image_id")
      image = image_of.get(identifier, {}) if isinstance(identifier, int | str) else {}
      photo = photo_of.get(str(image.get("file_name", "")))
      if photo is None or path not in there:
        missing = path if photo else image.get("file_name", f"image {identifier}")
        raise MissingDataError(
          f"{reader.full_name(name)} names {missing}, which is not there; "
          f"{PANOPTIC_LAYOUT} was expected"
        )
      segments[path] = _segments(item, image, categories, notes, path)
      parts[SPLIT_OF[match[2]]].append((photo, path))
  if not segments:
    raise MissingDataError(f"coco_panoptic: {PANOPTIC_LAYOUT} was looked for in {reader.root}")
  notes.tell(f"{reader.root}: panoptic annotations")
  thing_classes = [i for i, category in enumerate(categories) if is_thing(category)]
  info = {
    "map_class_names": tuple(category["name"] for category in categories),
    "palette": _palette(categories),
    "object_class_names": tuple(categories[i]["name"] for i in thing_classes),
    "category_ids": tuple(categories[i]["id"] for i in thing_classes),
    "object_palette": _palette([categories[i] for i in thing_classes]),
    "thing_classes": tuple(thing_classes),
    "notes": dict(notes.counts),
  }
  return PanopticSource(reader, choose_part(reader.root, parts, split), segments, info)


def read_annotations(
  reader: Reader, name: str, lean: Callable[[dict[str, Any]], Any] | None = None
) -> dict[str, Any]:
  """A JSON with the lists that all of COCO's have.

  Args:
    reader: of the folder or zip.
    name: of the file in it.
    lean: what is kept of each object of the JSON; None for all.

  Raises:
    ValueError: it is no JSON, or lacks one of them.
  """
  full = reader.full_name(name)
  try:
    read = json.loads(reader.read(name), object_hook=lean)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{full} is no JSON, or is cut short: {error}") from error
  lacking = [
    key
    for key in ("images", "annotations", "categories")
    if not isinstance(read, dict) or not isinstance(read.get(key), list)
  ]
  if lacking:
    raise ValueError(
      f"{full} has no {', '.join(lacking)}; lists of images, annotations and categories were "
      "expected, as COCO's instances_train2017.json has them"
    )
  for image in read["images"]:
    if not isinstance(image, dict) or not isinstance(image.get("id"), int | str):
      raise ValueError(f'{full}: {image} among its images; "id" and "file_name" were expected')
  return read


def is_thing(category: Mapping[str, Any]) -> bool:
  """Whether a category's objects can be counted; so can all of a file that does not say."""
  return bool(category.get("isthing", 1))


def is_crowd(read: Mapping[str, Any]) -> bool:
  """Whether an object or segment is one; of a text, as some tools write it, "0" would be true."""
  return str(read.get("iscrowd") or 0).lower() not in ("0", "false")


def check_segments(item: Mapping[str, Any], name: str) -> None:
  """Raises ValueError for a panoptic annotation without what is asked of it."""
  segments = item.get("segments_info") if isinstance(item, Mapping) else None
  good = isinstance(segments, list) and all(
    isinstance(segment, dict)
    and isinstance(segment.get("id"), int)
    and 0 <= segment["id"] < _MOST_IDS
    and isinstance(segment.get("category_id"), int | str)
    for segment in segments
  )
  if not good or not isinstance(item.get("file_name"), str):
    raise ValueError(
      f'{name}: {str(item)[:100]} among its annotations; "file_name" of a PNG and "segments_info", '
      'each with "id" and "category_id", were expected'
    )


def panoptic_masks(reader: Reader) -> MaskForm:
  """How the ids of segments in a picture's PNG become masks; the PNG is read with the first."""

  def masks(
    picture: Picture, encoded: Sequence[Any], size: Size, boxes: np.ndarray, name: str
  ) -> list[Read]:
    del size, boxes, name  # sizes are checked with the masks

    @functools.cache
    def ids() -> np.ndarray:
      return read_segments(reader.read(picture.masks), reader.full_name(picture.masks))

    return [lambda segment=segment: ids() == segment for segment in encoded]  # type: ignore[misc]

  return masks


def _segments(
  item: Mapping[str, Any],
  image: Mapping[str, Any],
  categories: Sequence[Mapping[str, Any]],
  notes: Notes,
  path: str,
) -> Segments:
  number = {category["id"]: i for i, category in enumerate(categories)}
  labels = {c["id"]: i for i, c in enumerate(filter(is_thing, categories))}
  found = item["segments_info"]
  rows = []
  for segment in found:
    name, category = f"segment {segment['id']} of {path}", segment["category_id"]
    if category not in number:
      notes.add(NO_CATEGORY, f"{category} of {name}")
    if category not in labels or "bbox" not in segment:
      continue
    given = segment["bbox"]
    size = image.get("height", math.inf), image.get("width", math.inf)
    box = usable_box(given, size, notes, name)
    if box is not None:
      area = usable_area(segment.get("area"), notes, name)
      area = given[2] * given[3] if area is None else area
      rows.append((segment["id"], labels[category], is_crowd(segment), area, *given, *box))
  table = np.array(rows, np.float64).reshape(-1, 12)
  return Segments(
    item["image_id"],
    np.array([segment["id"] for segment in found], np.int32),
    np.array([number.get(segment["category_id"], IGNORE) for segment in found], np.int32),
    np.array([is_crowd(segment) for segment in found], bool),
    {
      "ids": table[:, 0].astype(np.int32),
      "boxes": table[:, 8:].astype(np.float32),
      "box_labels": table[:, 1].astype(np.int32),
      "crowd": table[:, 2] > 0,
      "areas": table[:, 3].astype(np.float32),
      "given_boxes": table[:, 4:8],
    },
  )


def rows_of(ids: np.ndarray, segments: np.ndarray, name: str) -> np.ndarray:
  """Each pixel's row in the list of segments.

  Args:
    ids: int32 `[H, W]`, the segment of each pixel; 0 for none.
    segments: int32 `[N]`, the ids that there are.
    name: of the file, for the message.

  Returns:
    int32 `[H, W]`, -1 for no segment.

  Raises:
    CorruptExampleError: a segment that is not among them.
  """
  order = np.argsort(segments)
  keys = np.concatenate([[0], segments[order]]).astype(np.int32)
  table = np.concatenate([[-1], order]).astype(np.int32)
  places = np.minimum(np.searchsorted(keys, ids), len(keys) - 1)
  strange = ids[keys[places] != ids]
  if strange.size:
    raise CorruptExampleError(
      f"{name} has segment {strange[0]}, which its annotation does not know: the PNG and the JSON "
      "belong to different data"
    )
  return table[places]


def _check_categories(categories: Sequence[Any], name: str) -> None:
  """Raises ValueError for categories without what is asked of them."""
  for category in categories:
    good = isinstance(category, dict) and isinstance(category.get("id"), int | str)
    color = category.get("color", [0] * 3) if good else None
    shades = isinstance(color, list) and len(color) == 3 and all(c in range(256) for c in color)
    if not good or "name" not in category or not shades:
      raise ValueError(
        f'{name}: {str(category)[:100]} among its categories; "id" and "name" were expected, and '
        'three numbers from 0 to 255 where there is a "color"'
      )


def _photos(names: Sequence[str], directory: str) -> dict[str, str]:
  """File name → path of what lies in a directory of that name."""
  inside = (name for name in names if name.split("/")[-2:-1] == [directory])
  return {name.rsplit("/", 1)[-1]: name for name in inside}


def _palette(categories: Sequence[dict[str, Any]]) -> np.ndarray:
  """The file's own colours where it has them."""
  if all("color" in category for category in categories):
    return np.array([category["color"] for category in categories], np.uint8)
  return spread_palette(len(categories))
