"""Photos with objects in COCO's JSON, as they are on disk: `coco:/path` of a folder or a zip.

    annotations/instances_train2017.json, instances_val2017.json    COCO
    lvis_v1_train.json, …                                           LVIS
    zhiyuan_objv2_train.json, objects365_train.json                 Objects365
    train/_annotations.coco.json, valid/…                           exports of labelling tools
    annotations/panoptic_train2017.json with PNG beside             the things among the segments

The first of these that is there is taken, or the files that the option `annotations` names a part
of. Photos may lie anywhere: of several with one file name that is taken which shares most of its
path with what the JSON says ("file_name", LVIS's "coco_url"), or lies in a directory called as the
file of annotations ends ("train2017"), or beside it.

Options follow a question mark, with commas between: `annotations`; `empty=false` leaves pictures
without objects out, and `min_size=32` those with a smaller side, as mmdetection does in training.

Classes are numbered in the order of their ids, in which COCO has holes; `info["category_ids"]` has
them.
"""

from __future__ import annotations

import array
import itertools
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hybrid_vit.data import instances
from hybrid_vit.data.archives import ZipReader
from hybrid_vit.data.coco_panoptic import (
  check_segments,
  is_crowd,
  is_thing,
  panoptic_masks,
  read_annotations,
)
from hybrid_vit.data.errors import CorruptExampleError, MissingDataError
from hybrid_vit.data.folders import FolderReader, Reader, choose_part
from hybrid_vit.data.instances import Collector, InstanceSource, Notes, Picture, Size
from hybrid_vit.data.listing import EXTENSIONS
from hybrid_vit.data.map_reading import picture_size
from hybrid_vit.data.mask_encoding import count_pixels, mask_box, read_segmentation
from hybrid_vit.data.source_options import BOOLEAN, Option, between, read_options
from hybrid_vit.data.splits import PARTS, SPLIT_OF

_FILES = {
  "instances": r"(?:.*/)?instances_[^/]*\.json",
  "lvis": r"(?:.*/)?lvis_[^/]*\.json",
  "objects365": r"(?:.*/)?(?:zhiyuan_objv2|objects365)_[^/]*\.json",
  "tools": r"(?:.*/)?_annotations\.coco\.json",
  "panoptic": r"(?:.*/)?panoptic_[^/]*\.json",
}
_LAYOUT = (
  "annotations/instances_train2017.json (or lvis_v1_train.json, zhiyuan_objv2_train.json, "
  "train/_annotations.coco.json, panoptic_train2017.json), with the photos anywhere"
)
PICTURE_OPTIONS: Mapping[str, Option] = {
  "empty": BOOLEAN,
  "min_size": Option(between(1, 65535, int), "a number of pixels from 1"),
}
_OPTIONS = {
  "annotations": Option(str, "a part of the path of a file of annotations"),
  **PICTURE_OPTIONS,
}


def open_coco(path: str, split: str) -> InstanceSource:
  """Opens `coco:path`; see the head of this file.

  Args:
    path: of the folder or zip, with options.
    split: "train", "validation", "test" or "all".

  Raises:
    MissingDataError: no annotations, or none of their photos.
    ValueError: an option or a file of annotations that cannot be.
  """
  place, _, text = path.partition("?")
  options = read_options("coco", text, _OPTIONS)
  reader = open_reader(Path(place), "coco", _LAYOUT)
  names = reader.names()
  parts = _annotation_files(reader, names, options.get("annotations"))
  photos = _Photos(reader, names)
  notes = Notes()
  apart = parts["validation"] or parts["test"]
  if split == "all" or apart:
    files = choose_part(reader.root, parts, split, "file of annotations")
    return _read(reader, photos, files, None, options, notes)
  return _read(reader, photos, parts["train"], split, options, notes)


def open_reader(root: Path, kind: str, layout: str) -> Reader:
  """A folder's or a zip's; MissingDataError where there is none."""
  if not root.exists():
    raise MissingDataError(f"{kind}: {layout} was looked for in {root}, which is not there")
  return ZipReader(root) if root.suffix.lower() == ".zip" else FolderReader(root)


def _annotation_files(
  reader: Reader, names: Sequence[str], wanted: str | None
) -> dict[str, list[str]]:
  """Part → files of annotations of the first kind that is there."""
  found: list[str] = []
  if wanted:
    found = [name for name in names if name.endswith(".json") and wanted in name]
  else:
    for pattern in _FILES.values():
      found = found or [name for name in names if re.fullmatch(pattern, name)]
  if not found:
    looked = f"a JSON with {wanted!r} in its path" if wanted else _LAYOUT
    others = [name for name in names if name.endswith(".json")][:3]
    hint = f"; there are {', '.join(others)}: say which, ?annotations=…" if others else ""
    raise MissingDataError(f"coco: {looked} was looked for in {reader.root}{hint}")
  parts: dict[str, list[str]] = {part: [] for part in PARTS}
  for name in found:
    parts[_part_of(name)].append(name)
  return parts


def _part_of(name: str) -> str:
  """The part that a file's name, or else a directory in its path, says; others are for training."""
  *directories, stem = name.removesuffix(".json").lower().split("/")
  words = [*re.findall(r"[a-z]+", stem), *reversed(directories)]
  return next((SPLIT_OF[word] for word in words if word in SPLIT_OF), "train")


class _Annotation(NamedTuple):
  identifier: Any
  image: Any
  category: Any
  box: Any
  mask: Any
  crowd: bool
  area: float | None


def _lean(read: dict[str, Any]) -> Any:
  """A dict of the JSON without what nobody asks for, its numbers packed, as soon as it is read.

  The lists of all polygons of COCO would take several gigabytes.
  """
  if "image_id" in read and ("bbox" in read or "segmentation" in read):
    mask = read.get("segmentation")
    if isinstance(mask, list):
      # Some tools write the numbers of the only polygon without a list around them.
      mask = [mask] if mask and isinstance(mask[0], int | float) else mask
      mask = [_packed(polygon, "d") for polygon in mask]
    return _Annotation(
      read.get("id"),
      read["image_id"],
      read.get("category_id"),
      read.get("bbox"),
      mask,
      is_crowd(read),
      read.get("area"),
    )
  if "counts" in read and "size" in read:
    return {"size": read["size"], "counts": _packed(read["counts"], "q")}
  if "file_name" in read or "coco_url" in read:
    kept = ("id", "file_name", "coco_url", "height", "width", "image_id", "segments_info")
    return {key: read[key] for key in kept if key in read}
  return read


def _packed(values: Any, code: str) -> Any:
  """A list of numbers as an array; anything else as it is."""
  if isinstance(values, list):
    try:
      return array.array(code, values)
    except (TypeError, OverflowError):
      pass
  return values


def _read(
  reader: Reader,
  photos: _Photos,
  files: Sequence[str],
  held_out: str | None,
  options: Mapping[str, Any],
  notes: Notes,
) -> InstanceSource:
  """The pictures of all files, or those of a split where a tenth is held out."""
  pictures: list[Picture] = []
  collector = Collector()
  has_objects: list[bool] = []
  categories: list[dict[str, Any]] = []
  has_masks = panoptic = False
  for name in files:
    read = _parsed(reader, name)
    found = _categories(read["categories"], reader.full_name(name))
    if categories and found != categories:
      raise ValueError(f"{reader.full_name(name)}: its categories are not those of the other files")
    categories = found
    panoptic = any("segments_info" in item for item in read["annotations"][:1])
    first = len(pictures)
    number = {}
    for image in read["images"]:
      if image["id"] in number:
        raise ValueError(f"{reader.full_name(name)}: two images have the id {image['id']}")
      photo = photos.find(image, name)
      if photo is None:
        notes.add(instances.NO_PHOTO, f"{image.get('file_name', image.get('coco_url'))} of {name}")
        number[image["id"]] = -1
        continue
      try:
        size = _size(reader, image, photo)
      except CorruptExampleError as error:
        notes.add(instances.BAD_PHOTO, str(error))
        number[image["id"]] = -1
        continue
      number[image["id"]] = len(pictures)
      pictures.append(Picture(photo, image["id"], size))
    has_objects += [False] * (len(pictures) - first)
    if panoptic:
      annotations: Iterable[_Annotation] = _things(name, read, number, pictures)
    else:
      annotations = read["annotations"]
    has_masks |= panoptic or any(annotation.mask for annotation in read["annotations"])
    labels = {c["id"]: i for i, c in enumerate(filter(is_thing, categories))}
    for annotation in annotations:
      index = _add(collector, annotation, number, pictures, labels, has_masks, name, notes)
      if index is not None:
        has_objects[index] = True
  if not pictures:
    raise MissingDataError(
      f"coco: none of the photos that {reader.full_name(files[0])} names is below {reader.root}"
    )
  chosen = instances.chosen_pictures(pictures, has_objects, options, notes)
  chosen.sort(key=lambda i: pictures[i].photo)
  if held_out is not None:
    chosen = choose_part(
      reader.root, {"train": chosen, "validation": [], "test": []}, held_out, "picture"
    )
  notes.tell(f"{reader.root}: {', '.join(files)}")
  kept = [category for category in categories if is_thing(category)]
  return InstanceSource(
    reader,
    [pictures[i] for i in chosen],
    collector.objects(chosen, has_masks),
    [str(category["name"]) for category in kept],
    [category["id"] for category in kept],
    panoptic_masks(reader) if panoptic else instances.segmentation_masks,
    notes,
  )


def _parsed(reader: Reader, name: str) -> dict[str, Any]:
  full = reader.full_name(name)
  read = read_annotations(reader, name, _lean)
  if all(isinstance(item, dict) and "segments_info" in item for item in read["annotations"]):
    for item in read["annotations"]:
      check_segments(item, full)
    return read
  kept = [item for item in read["annotations"] if isinstance(item, _Annotation)]
  if len(kept) != len(read["annotations"]):
    other = next(item for item in read["annotations"] if not isinstance(item, _Annotation))
    raise ValueError(
      f'{full}: {str(other)[:100]} among its annotations; "image_id", "category_id" and '
      '"bbox" were expected'
    )
  return read


def _categories(read: Sequence[Any], name: str) -> list[dict[str, Any]]:
  """Sorted by their ids."""
  kinds = {type(item.get("id")) if isinstance(item, dict) else None for item in read}
  if len(kinds) > 1 or not kinds <= {int, str, type(None)}:
    raise ValueError(f'{name}: categories whose "id" are not all numbers, or all texts')
  kept = [
    {key: item[key] for key in ("id", "name", "isthing", "color") if key in item} for item in read
  ]
  if not all("id" in item and "name" in item for item in kept):
    raise ValueError(f'{name}: categories without "id" or "name"')
  kept.sort(key=lambda item: item["id"])
  for one, other in itertools.pairwise(kept):
    if one["id"] == other["id"]:
      raise ValueError(f"{name}: categories {one['name']!r} and {other['name']!r} have one id")
  return kept


def _size(reader: Reader, image: Mapping[str, Any], photo: str) -> Size:
  """As the file has it, else the photo's own."""
  sides = image.get("height"), image.get("width")
  if all(isinstance(side, int) and side > 0 for side in sides):
    return sides  # type: ignore[return-value]
  return picture_size(reader.read(photo), reader.full_name(photo))


def _things(
  file: str, read: Mapping[str, Any], number: Mapping[Any, int], pictures: list[Picture]
) -> Iterable[_Annotation]:
  """The segments of things as annotations; notes the PNG of each picture."""
  stuff = {category["id"] for category in read["categories"] if not is_thing(category)}
  for item in read["annotations"]:
    index = number.get(item.get("image_id"), -1)
    if index >= 0:
      png = f"{file.removesuffix('.json')}/{item['file_name']}"
      pictures[index] = pictures[index]._replace(masks=png)
    for segment in item["segments_info"]:
      if segment["category_id"] not in stuff:
        yield _Annotation(
          segment["id"],
          item.get("image_id"),
          segment["category_id"],
          segment.get("bbox"),
          segment["id"],
          is_crowd(segment),
          segment.get("area"),
        )


def _add(
  collector: Collector,
  annotation: _Annotation,
  number: Mapping[Any, int],
  pictures: Sequence[Picture],
  labels: Mapping[Any, int],
  has_masks: bool,
  file: str,
  notes: Notes,
) -> int | None:
  """Takes an annotation and gives its picture; None, and a note, where it cannot be used."""
  name = f"annotation {annotation.identifier} of image {annotation.image} in {file}"
  index = number.get(annotation.image, -1) if isinstance(annotation.image, Hashable) else -1
  if index < 0:
    notes.add(instances.NO_PICTURE, name)
    return None
  if not isinstance(annotation.category, Hashable) or annotation.category not in labels:
    notes.add(instances.NO_CATEGORY, f"{annotation.category} of {name}")
    return None
  size = pictures[index].size
  assert size is not None
  mask = annotation.mask if has_masks else None
  if has_masks and not isinstance(mask, int):
    mask = _usable_mask(mask, size, notes, name)
  given = annotation.box
  if given is None and mask is not None and not isinstance(mask, int):
    given = _box_around(mask, size)
  box = instances.usable_box(given, size, notes, name)
  if box is None:
    return None
  area = instances.usable_area(annotation.area, notes, name)
  collector.add(
    index,
    given,
    box,
    labels[annotation.category],
    crowd=annotation.crowd,
    area=area,
    mask=mask,
  )
  return index


def _usable_mask(mask: Any, size: Size, notes: Notes, name: str) -> Any:
  """The mask, its polygons of fewer than three points left out; None, and a note, for none."""
  if not mask:
    notes.add(instances.NO_MASK, name)
    return None
  if isinstance(mask, Mapping):
    counts, own = mask.get("counts"), mask.get("size")
    if counts is None or not isinstance(own, list):
      notes.add(instances.BAD_MASK, name)
      return None
    if tuple(own) != size:
      found = " x ".join(map(str, own))
      notes.add(instances.OTHER_SIZE, f"{found} in {size[0]} x {size[1]}, {name}")
      return None
    if isinstance(counts, str):
      return mask
    pixels = count_pixels(counts)
    if pixels != size[0] * size[1]:
      notes.add(instances.BAD_MASK, f"{pixels} pixels in {size[0]} x {size[1]}, {name}")
      return None
    return mask
  polygons = [
    polygon
    for polygon in mask
    if isinstance(polygon, array.array)
    and len(polygon) >= 6
    and len(polygon) % 2 == 0
    and math.isfinite(sum(polygon))
  ]
  if len(polygons) < len(mask):
    notes.add(instances.BAD_MASK if not polygons else "polygons left out", name)
  return polygons or None


def _box_around(mask: Any, size: Size) -> list[float]:
  """(x, y, width, height) around a mask."""
  if isinstance(mask, Mapping):
    try:
      return [float(n) for n in mask_box(read_segmentation(mask, size))]
    except ValueError:
      return [0.0] * 4
  points = np.concatenate([np.asarray(polygon).reshape(-1, 2) for polygon in mask])
  low, high = points.min(0), points.max(0)
  return [*low.tolist(), *(high - low).tolist()]


class _Photos:
  """Finds photos by what a file of annotations says of them."""

  def __init__(self, reader: Reader, names: Sequence[str]):
    self._reader = reader
    self._by_name: dict[str, list[str]] = {}
    for name in names:
      if name.lower().endswith(EXTENSIONS):
        self._by_name.setdefault(name.rsplit("/", 1)[-1], []).append(name)

  def find(self, image: Mapping[str, Any], file: str) -> str | None:
    """The path of an image's photo, None where it is not there.

    Raises:
      ValueError: several that are as likely as each other.
    """
    said = str(image.get("file_name") or image.get("coco_url", ""))
    said = said.replace("\\", "/")
    found = self._by_name.get(said.rsplit("/", 1)[-1], [])
    if len(found) < 2:
      return found[0] if found else None
    spellings = [said, str(image.get("coco_url", ""))]
    ending = file.rsplit("/", 1)[-1].removesuffix(".json").rpartition("_")[2]
    scores = [
      (
        max(_common(path, spelling) for spelling in spellings),
        ending in path.split("/")[:-1],
        path.rpartition("/")[0] == file.rpartition("/")[0],
      )
      for path in found
    ]
    best = max(scores)
    if scores.count(best) > 1:
      one, other = [path for path, score in zip(found, scores) if score == best][:2]
      raise ValueError(
        f"{self._reader.full_name(one)} and {self._reader.full_name(other)} could both be "
        f"{said} of {file}: call the directory {ending!r}, or leave one of them"
      )
    return found[scores.index(best)]


def _common(path: str, other: str) -> int:
  """How many parts of two paths are the same from their ends."""
  count = 0
  for one, two in zip(reversed(path.split("/")), reversed(other.split("/"))):
    if one != two:
      break
    count += 1
  return count
