"""COCO's panoptic annotations as maps of classes.

Every segment's pixels get its category's number in the order of the file's categories: 133 of COCO
2017, things and stuff. Crowds, too, since their class is known. Unlabelled pixels are no class.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hybrid_vit.data.errors import CorruptExampleError, MissingDataError
from hybrid_vit.data.folders import Reader
from hybrid_vit.data.map_reading import IGNORE, read_segments
from hybrid_vit.data.palettes import spread_palette
from hybrid_vit.data.splits import PARTS, SPLIT_OF

_FILE = re.compile(r"(?:(.*)/)?panoptic_([a-z]+)(\d*)\.json")
# What the source wants, for messages.
PANOPTIC_LAYOUT = (
  "annotations/panoptic_train2017.json, the PNG in annotations/panoptic_train2017/ and the photos "
  "in a directory train2017/"
)


def panoptic_pairs(
  reader: Reader, names: Sequence[str]
) -> tuple[
  dict[str, list[tuple[str, str]]], Callable[[bytes, str, str], np.ndarray], dict[str, Any]
]:
  """Part → (photo, PNG) of each annotation, what reads a PNG's bytes, and the source's info.

  Args:
    reader: of the folder or zip.
    names: all of its files.

  Raises:
    MissingDataError: no annotations, or photos or PNG that they name.
    ValueError: two files of annotations with other categories each.
  """
  parts: dict[str, list[tuple[str, str]]] = {part: [] for part in PARTS}
  segments: dict[str, tuple[np.ndarray, np.ndarray]] = {}
  categories: list[dict[str, Any]] = []
  there = set(names)
  for name in names:
    match = _FILE.fullmatch(name)
    if not match or match[2] not in SPLIT_OF:
      continue
    read = json.loads(reader.read(name))
    if categories and read["categories"] != categories:
      raise ValueError(f"{reader.full_name(name)}: its categories are not those of the other files")
    categories = read["categories"]
    number = {category["id"]: i for i, category in enumerate(categories)}
    photo_of = _photos(names, f"{match[2]}{match[3]}")
    file_of = {image["id"]: image["file_name"] for image in read["images"]}
    for item in read["annotations"]:
      path = f"{name.removesuffix('.json')}/{item['file_name']}"
      photo = photo_of.get(file_of.get(item["image_id"], ""))
      if photo is None or path not in there:
        missing = path if photo else file_of.get(item["image_id"], f"image {item['image_id']}")
        raise MissingDataError(
          f"{reader.full_name(name)} names {missing}, which is not there; "
          f"{PANOPTIC_LAYOUT} was expected"
        )
      found = item["segments_info"]
      segments[path] = (
        np.array([segment["id"] for segment in found], np.int32),
        np.array([number[segment["category_id"]] for segment in found], np.int32),
      )
      parts[SPLIT_OF[match[2]]].append((photo, path))
  if not segments:
    raise MissingDataError(f"coco_panoptic: {PANOPTIC_LAYOUT} was looked for in {reader.root}")

  def read_map(encoded: bytes, path: str, name: str) -> np.ndarray:
    return classes_of(read_segments(encoded, name), *segments[path], name)

  return (
    parts,
    read_map,
    {
      "map_class_names": tuple(category["name"] for category in categories),
      "palette": _palette(categories),
    },
  )


def classes_of(ids: np.ndarray, segments: np.ndarray, classes: np.ndarray, name: str) -> np.ndarray:
  """Each pixel's class.

  Args:
    ids: int32 `[H, W]`, the segment of each pixel; 0 for none.
    segments: int32 `[N]`, the ids that there are.
    classes: int32 `[N]`, the class of each.
    name: of the file, for the message.

  Returns:
    int32 `[H, W]`, `IGNORE` for no class.

  Raises:
    CorruptExampleError: a segment that is not among them.
  """
  order = np.argsort(segments)
  keys = np.concatenate([[0], segments[order]]).astype(np.int32)
  table = np.concatenate([[IGNORE], classes[order]]).astype(np.int32)
  places = np.minimum(np.searchsorted(keys, ids), len(keys) - 1)
  strange = ids[keys[places] != ids]
  if strange.size:
    raise CorruptExampleError(
      f"{name} has segment {strange[0]}, which its annotation does not know: the PNG and the JSON "
      "belong to different data"
    )
  return table[places]


def _photos(names: Sequence[str], directory: str) -> dict[str, str]:
  """File name → path of what lies in a directory of that name."""
  inside = (name for name in names if name.split("/")[-2:-1] == [directory])
  return {name.rsplit("/", 1)[-1]: name for name in inside}


def _palette(categories: Sequence[dict[str, Any]]) -> np.ndarray:
  """The file's own colours where it has them."""
  if all("color" in category for category in categories):
    return np.array([category["color"] for category in categories], np.uint8)
  return spread_palette(len(categories))
