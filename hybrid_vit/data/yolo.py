"""Photos with objects in text files: `yolo:/path` of a folder or a zip.

    images/train/x.jpg with labels/train/x.txt, train/images/x.jpg with train/labels/x.txt, or
    x.jpg beside x.txt; names of the classes in data.yaml (or another .yaml with "names"), else one
    a line in classes.txt (or obj.names)

A line is "class cx cy w h", or "class x1 y1 x2 y2 x3 y3 …" of a polygon, all but the class as
fractions of the sides; keypoints, of which `kpt_shape` in the .yaml tells, are passed over. A photo
without a text, or with an empty one, has no objects. Where some objects are polygons there are
masks, and the box of the others stands for theirs.

Options follow a question mark, with commas between: `labels`, the name of the directory of texts
where it is another one than labels; `empty` and `min_size`, see `coco_instances`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit.data import instances
from hybrid_vit.data.coco_instances import PICTURE_OPTIONS, open_reader
from hybrid_vit.data.errors import CorruptExampleError, MissingDataError
from hybrid_vit.data.folders import Reader, choose_part
from hybrid_vit.data.instances import Collector, InstanceSource, Notes, Picture, Size
from hybrid_vit.data.lazy_masks import Read
from hybrid_vit.data.listing import EXTENSIONS
from hybrid_vit.data.map_reading import picture_size
from hybrid_vit.data.source_options import Option, read_options
from hybrid_vit.data.splits import PARTS, SPLIT_OF
from hybrid_vit.data.texts import as_text

_LAYOUT = (
  "images/**/x.jpg with labels/**/x.txt (class cx cy w h in fractions on each line) and the names "
  "of the classes in data.yaml or classes.txt"
)
_OPTIONS = {"labels": Option(str, "the name of a directory"), **PICTURE_OPTIONS}
# Texts beside photos that are no labels.
_NO_LABELS = ("classes.txt", "readme.txt", "train.txt", "val.txt", "test.txt", "requirements.txt")
NO_LINE = "lines left out that are not a class and fractions"
NO_PHOTO = "texts without a photo"
# On a network disk each waits for an answer.
_THREADS = 8


def open_yolo(path: str, split: str) -> InstanceSource:
  """Opens `yolo:path`; see the head of this file.

  Args:
    path: of the folder or zip, with options.
    split: "train", "validation", "test" or "all".

  Raises:
    MissingDataError: no photos with texts, or no names of classes.
    ValueError: an option, or a file of names, that cannot be.
  """
  place, _, text = path.partition("?")
  options = read_options("yolo", text, _OPTIONS)
  reader = open_reader(Path(place), "yolo", _LAYOUT)
  names = reader.names()
  classes, keypoints, told_by = _classes(reader, names)
  notes = Notes()
  pairs = _pairs(reader, names, options.get("labels", "labels"), notes)
  parts: dict[str, list[tuple[str, str]]] = {part: [] for part in PARTS}
  for pair in pairs:
    parts[_part_of(pair[0])].append(pair)
  chosen = choose_part(reader.root, parts, split, "photo")
  with ThreadPoolExecutor(_THREADS) as pool:
    texts = list(pool.map(lambda pair: reader.read(pair[1]) if pair[1] else b"", chosen))
  return _read(reader, chosen, texts, classes, keypoints, told_by, options, notes)


def _read(
  reader: Reader,
  pairs: Sequence[tuple[str, str]],
  texts: Sequence[bytes],
  classes: Mapping[int, str],
  keypoints: bool,
  told_by: str,
  options: Mapping[str, Any],
  notes: Notes,
) -> InstanceSource:
  labels = {number: i for i, number in enumerate(classes)}
  pictures: list[Picture] = []
  collector, has_objects, has_masks = Collector(), [], False
  # COCO's photos are called by the numbers of the pictures.
  stems = [photo.rsplit("/", 1)[-1].rpartition(".")[0] for photo, _ in pairs]
  numbered = all(map(str.isdecimal, stems)) and len({int(stem) for stem in stems}) == len(stems)
  for index, ((photo, path), text) in enumerate(zip(pairs, texts)):
    size = None
    if "min_size" in options:
      try:
        size = picture_size(reader.read(photo), reader.full_name(photo))
      except CorruptExampleError as error:
        notes.add(instances.BAD_PHOTO, str(error))
        continue
    number = len(pictures)
    pictures.append(Picture(photo, int(stems[index]) if numbered else index, size))
    has_objects.append(False)
    for place, line in enumerate(text.decode("utf-8-sig", "replace").splitlines(), 1):
      if not line.strip():
        continue
      name = f"{path}, line {place}"
      words = _numbers(line, keypoints)
      if words is None:
        notes.add(NO_LINE, f"{line[:40]!r} of {name}")
        continue
      words = words[:5] if keypoints else words
      if words[0] not in labels:
        notes.add(instances.NO_CATEGORY, f"{words[0]:g} of {name}; {told_by} lists them")
        continue
      polygon = words[1:] if len(words) > 5 else None
      given = _box_around(words[1:]) if polygon else _from_centre(words[1:])
      box = instances.usable_box(given, (1, 1), notes, name)
      if box is None:
        continue
      has_masks |= polygon is not None
      collector.add(
        number, given, box, labels[int(words[0])], mask=None if polygon is None else [polygon]
      )
      has_objects[-1] = True
  chosen = instances.chosen_pictures(pictures, has_objects, options, notes)
  if not chosen:
    raise MissingDataError(f"{reader.root}: no photo is left with the options {dict(options)}")
  notes.tell(f"{reader.root}: {', '.join(sorted({path.rpartition('/')[0] for _, path in pairs}))}")
  return InstanceSource(
    reader,
    [pictures[i] for i in chosen],
    collector.objects(chosen, has_masks),
    list(classes.values()),
    list(classes),
    _polygon_masks,
    notes,
    relative=True,
  )


def _polygon_masks(
  picture: Picture, encoded: Sequence[Any], size: Size, boxes: np.ndarray, name: str
) -> list[Read]:
  sides = np.array([size[1], size[0]], np.float64)
  pixels = [
    None if mask is None else [(np.array(p).reshape(-1, 2) * sides).ravel() for p in mask]
    for mask in encoded
  ]
  return instances.segmentation_masks(picture, pixels, size, boxes, name)


def _numbers(line: str, keypoints: bool) -> list[float] | None:
  """A class and 4 numbers of a box, or 6 or more of a polygon; None for anything else.

  With keypoints so many more may follow the box.
  """
  try:
    words = [float(word) for word in line.split()]
  except ValueError:
    return None
  right = len(words) == 5 or (len(words) >= 7 and (keypoints or len(words) % 2 == 1))
  return words if right and instances.is_numbers(words) else None


def _from_centre(box: Sequence[float]) -> list[float]:
  cx, cy, w, h = box
  return [cx - w / 2, cy - h / 2, w, h]


def _box_around(polygon: Sequence[float]) -> list[float]:
  left, top = min(polygon[::2]), min(polygon[1::2])
  return [left, top, max(polygon[::2]) - left, max(polygon[1::2]) - top]


def _pairs(
  reader: Reader, names: Sequence[str], directory: str, notes: Notes
) -> list[tuple[str, str]]:
  """(photo, text) sorted by the photos' paths; "" for no text."""
  photos = [name for name in names if name.lower().endswith(EXTENSIONS)]
  texts = {name for name in names if name.endswith(".txt")}
  pairs, used = [], set()
  for photo in photos:
    found = next((text for text in _texts_of(photo, directory) if text in texts), "")
    pairs.append((photo, found))
    used.add(found)
  if not used - {""}:
    near = sorted({part for name in texts for part in name.split("/")[:-1] if "label" in part})[:3]
    hint = f"; there are directories {', '.join(near)}: say which, ?labels=…" if near else ""
    raise MissingDataError(f"yolo: {_LAYOUT} was looked for in {reader.root}{hint}")
  # Where there is a directory of images, pictures of other uses lie outside.
  inside = [pair for pair in pairs if "images" in pair[0].split("/")[:-1]]
  pairs = inside if any(text for _, text in inside) else pairs
  for text in sorted(texts - used):
    if directory in text.split("/")[:-1] and text.rsplit("/", 1)[-1] not in _NO_LABELS:
      notes.add(NO_PHOTO, text)
  return sorted(pairs)


def _texts_of(photo: str, directory: str) -> list[str]:
  """Where a photo's text may lie: in the directory beside images, or beside the photo."""
  *path, name = photo.split("/")
  text = f"{name.rpartition('.')[0]}.txt"
  found = []
  if "images" in path:
    last = len(path) - 1 - path[::-1].index("images")
    found.append("/".join([*path[:last], directory, *path[last + 1 :], text]))
  return [*found, "/".join([*path, text])]


def _part_of(path: str) -> str:
  """The part that a directory in the path says, the year taken off; others are for training."""
  words = (re.sub(r"\d+$", "", word) for word in path.lower().split("/")[:-1])
  return next((SPLIT_OF[word] for word in words if word in SPLIT_OF), "train")


def _classes(reader: Reader, names: Sequence[str]) -> tuple[dict[int, str], bool, str]:
  """Number → name, whether keypoints follow each box, and the file that says so."""
  by_depth = sorted(names, key=lambda name: (name.count("/"), name))
  for name in by_depth:
    if name.endswith((".yaml", ".yml")):
      found, keypoints = _of_yaml(reader.read(name), reader.full_name(name))
      if found:
        return found, keypoints, name
  for name in by_depth:
    if name.rsplit("/", 1)[-1] in ("classes.txt", "obj.names"):
      lines = as_text(reader.read(name), reader.full_name(name)).splitlines()
      found = {i: line.strip() for i, line in enumerate(line for line in lines if line.strip())}
      if found:
        return found, False, name
  raise MissingDataError(
    f"yolo: nothing tells the classes of {reader.root}: put data.yaml with their `names`, or their "
    "names, one a line, in classes.txt beside images/"
  )


def _of_yaml(text: bytes, name: str) -> tuple[dict[int, str], bool]:
  import yaml

  try:
    read = yaml.safe_load(text)
  except yaml.YAMLError as error:
    raise ValueError(f"{name} is no YAML: {error}") from error
  found = read.get("names") if isinstance(read, dict) else None
  if isinstance(found, list):
    found = dict(enumerate(found))
  if not isinstance(found, dict):
    return {}, False
  if not all(isinstance(number, int) for number in found):
    raise ValueError(f"{name}: names are {list(found)[:3]}…; numbers of classes were expected")
  return {number: str(found[number]) for number in sorted(found)}, "kpt_shape" in read
