"""Photos with a map of classes or of depth each, in folders or zips as they are handed out.

    maps:/path?classes=21       images/**/x.jpg with annotations/**/x.png; names of the classes, one
                                a line, in classes.txt, or only their number
    ade20k:/path                the same by ADE20K's scene parsing benchmark: 150 classes, 0 is none
    cityscapes:/path            leftImg8bit/ with gtFine/: labelTrainIds, else labelIds; 19 classes
    coco_panoptic:/path         annotations/panoptic_*.json with PNG folders: segments → 133 classes
    depth:/path?scale=1000      images/**/x.jpg with depth/**/x.png (16 bits) or x.npy (metres)
    nyu_depth:/path             rgb_x.jpg beside sync_depth_x.png, millimetres
    kitti_depth:/path           image_02/data/ of the raw drives with proj_depth/groundtruth/; / 256

Options follow a question mark, with commas between: classes, ignore and reduce_zero_label of maps;
scale of depth; cap and list of all depth. A list (as bts and others have for NYU and KITTI) has
"photo depth" on each line and stands for every split; the word None for a depth leaves it out.

An example is {"image": the photo's bytes, "map": int32 [H, W]} with 255 for no class, or "depth":
float32 [H, W], metres, 0 where nothing was measured. Parts are directories named train, training,
val, … anywhere in the path; where no validation part is set apart, every tenth pair is held out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit.data.archives import ZipReader
from hybrid_vit.data.coco_panoptic import PANOPTIC_LAYOUT, PanopticSource, open_panoptic
from hybrid_vit.data.errors import MissingDataError
from hybrid_vit.data.folders import FolderReader, Reader, choose_part, tell_once
from hybrid_vit.data.listing import EXTENSIONS
from hybrid_vit.data.map_reading import (
  IGNORE,
  check_labels,
  check_size,
  read_depth,
  read_labels,
)
from hybrid_vit.data.palettes import (
  CITYSCAPES_CLASSES,
  CITYSCAPES_IDS,
  CITYSCAPES_PALETTE,
  spread_palette,
)
from hybrid_vit.data.source_options import BOOLEAN, Option, between, read_options
from hybrid_vit.data.splits import PARTS, SPLIT_OF
from hybrid_vit.data.texts import as_text

MAP_SOURCES = (
  "maps", "ade20k", "cityscapes", "coco_panoptic", "depth", "nyu_depth", "kitti_depth",
)  # fmt: skip

_PHOTO = r"\.(?:jpe?g|png|webp|bmp|tiff?|ppm)"
_TOP = r"((?:.*/)?)"
# (photo, map) patterns: what their groups hold is the same for the two of a pair. The first of a
# source's of which both are found is its layout.
_LAYOUTS: Mapping[str, Sequence[tuple[str, str]]] = {
  "maps": (
    (rf"{_TOP}images/(.*){_PHOTO}", rf"{_TOP}annotations/(.*)\.png"),
    (r"(.*)\.jpe?g", r"(.*)\.png"),
  ),
  "cityscapes": (
    (rf"{_TOP}leftImg8bit/(.*)_leftImg8bit\.png", rf"{_TOP}gtFine/(.*)_gtFine_labelTrainIds\.png"),
    (rf"{_TOP}leftImg8bit/(.*)_leftImg8bit\.png", rf"{_TOP}gtFine/(.*)_gtFine_labelIds\.png"),
  ),
  "depth": (
    (rf"{_TOP}images/(.*){_PHOTO}", rf"{_TOP}depth/(.*)\.(?:png|npy)"),
    (rf"{_TOP}rgb_([^/]*){_PHOTO}", rf"{_TOP}(?:sync_)?depth_([^/]*)\.(?:png|npy)"),
    (rf"(.*)(?<!_depth){_PHOTO}", r"(.*)_depth\.(?:png|npy)"),
  ),
  "kitti_depth": (
    (
      rf".*?([\d_]+_drive_\d+_sync)/(image_\d\d)/data/(\d+){_PHOTO}",
      r".*?([\d_]+_drive_\d+_sync)/proj_depth/groundtruth/(image_\d\d)/(\d+)\.png",
    ),
    (rf"{_TOP}rgb_([^/]*){_PHOTO}", rf"{_TOP}depth_([^/]*)\.png"),
  ),
}
_SAME = {"ade20k": "maps", "nyu_depth": "depth"}
_LOOKED_FOR = {
  "maps": "images/**/x.jpg with annotations/**/x.png, or x.jpg beside x.png",
  "cityscapes": "leftImg8bit/**/x_leftImg8bit.png with gtFine/**/x_gtFine_labelTrainIds.png",
  "coco_panoptic": PANOPTIC_LAYOUT,
  "depth": "images/**/x.jpg with depth/**/x.png (or .npy), rgb_x.jpg beside sync_depth_x.png, or "
  "x.jpg beside x_depth.png",
  "kitti_depth": "<drive>_sync/image_02/data/n.png with <drive>_sync/proj_depth/groundtruth/"
  "image_02/n.png, or rgb_x.png beside depth_x.png",
}
# The first and last frames of KITTI's drives have no depth.
_MAY_LACK = ("kitti_depth",)
# Layouts of which every picture has a place; the others have files of other uses.
_WHOLE = ("maps", "depth")
_SCALES = {"depth": 1000.0, "nyu_depth": 1000.0, "kitti_depth": 256.0}
_DEPTH_OPTIONS = {
  "cap": Option(between(1e-6, 1e6, float), "a number of metres above 0"),
  "list": Option(str, "the path of a text file"),
}
_OPTIONS: Mapping[str, Mapping[str, Option]] = {
  "maps": {
    "classes": Option(between(1, IGNORE, int), f"a number from 1 to {IGNORE}"),
    "ignore": Option(between(0, 65535, int), "a number from 0 to 65535"),
    "reduce_zero_label": BOOLEAN,
  },
  "depth": {
    "scale": Option(between(1e-6, 1e6, float), "how many units are one metre, above 0,"),
    **_DEPTH_OPTIONS,
  },
  "nyu_depth": _DEPTH_OPTIONS,
  "kitti_depth": _DEPTH_OPTIONS,
}
_WORD = {name: "depth" if name in _SCALES else "map" for name in MAP_SOURCES}
_MOST_CITYSCAPES_ID = 33
# classes.txt or ADE20K's own table of them.
_CLASS_FILES = {"maps": "classes.txt", "ade20k": "objectInfo150.txt"}

# (the file's bytes, its path in the reader, its full name) → the array.
Read = Callable[[bytes, str, str], np.ndarray]


class PairSource:
  """Photos and a map each; see the head of this file and `sources.Source`.

  Attributes:
    info: of maps "map_class_names" and "palette", uint8 `[classes, 3]`.
  """

  def __init__(
    self,
    reader: Reader,
    pairs: Sequence[tuple[str, str]],
    key: str,
    read: Read,
    info: Mapping[str, Any],
  ):
    self._reader, self._pairs, self._key, self._read = reader, pairs, key, read
    self.info = dict(info)

  def __len__(self) -> int:
    return len(self._pairs)

  def __getitem__(self, index: int) -> dict[str, Any]:
    photo_path, path = self._pairs[index]
    name = self._reader.full_name(path)
    values = self._read(self._reader.read(path), path, name)
    photo = self._reader.read(photo_path)
    check_size(values, photo, name, self._reader.full_name(photo_path))
    return {"image": photo, self._key: values}

  def describe(self, index: int) -> str:
    """See `sources.Source`."""
    return self._reader.full_name(self._pairs[index][0])


def open_maps(kind: str, path: str, split: str) -> PairSource | PanopticSource:
  """Opens one of `MAP_SOURCES`.

  Args:
    kind: its name.
    path: what follows the colon, local.
    split: "train", "validation", "test" or "all".

  Raises:
    MissingDataError: nothing there, a photo without its map, or classes that nothing tells.
    ValueError: an unknown option, or one that cannot be.
  """
  place, _, text = path.partition("?")
  options = read_options(kind, text, _OPTIONS.get(kind, {}))
  root = Path(place)
  if not root.exists():
    raise MissingDataError(
      f"{kind}: {_LOOKED_FOR[_SAME.get(kind, kind)]} was looked for in {root}, which is not there"
    )
  reader: Reader = ZipReader(root) if root.suffix.lower() == ".zip" else FolderReader(root)
  names = reader.names()
  if kind == "coco_panoptic":
    return open_panoptic(reader, names, split)
  if "list" in options:
    pairs = _listed(reader, set(names), Path(options["list"]))
  else:
    pairs = choose_part(reader.root, _parts(_paired(kind, reader, names)), split)
  if kind in _SCALES:
    scale, cap = options.get("scale", _SCALES[kind]), options.get("cap")

    def read_metres(encoded: bytes, path: str, name: str) -> np.ndarray:
      return read_depth(encoded, name, 1.0 if path.lower().endswith(".npy") else scale, cap)

    return PairSource(reader, pairs, "depth", read_metres, {})
  classes, palette, told_by = _classes(kind, reader, names, options.get("classes"))

  def read_map(encoded: bytes, path: str, name: str) -> np.ndarray:
    labels = read_labels(encoded, name)
    if kind == "cityscapes" and path.endswith("_labelIds.png"):
      return _from_cityscapes_ids(labels, name)
    ignore = options.get("ignore", IGNORE)
    reduced = kind == "ade20k" or options.get("reduce_zero_label", False)
    check_labels(labels, len(classes) - (not reduced), ignore, name, told_by)
    none = labels == ignore
    return (
      np.where(none | (labels == 0), IGNORE, labels - 1)
      if reduced
      else (np.where(none, IGNORE, labels))
    )

  info = {"map_class_names": classes, "palette": palette}
  return PairSource(reader, pairs, "map", read_map, info)


def _from_cityscapes_ids(labels: np.ndarray, name: str) -> np.ndarray:
  check_labels(labels, _MOST_CITYSCAPES_ID, IGNORE, name)
  table = np.full(IGNORE + 1, IGNORE, np.int32)
  table[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
  return table[labels]


def _paired(kind: str, reader: Reader, names: Sequence[str]) -> list[tuple[str, str]]:
  """(photo, map) of the layout that is found, in the order of the photos' names."""
  layout = _SAME.get(kind, kind)
  photos: dict[tuple[str, ...], str] = {}
  maps: dict[tuple[str, ...], str] = {}
  for patterns in _LAYOUTS[layout]:
    photos, maps = (_matching(pattern, names, reader) for pattern in patterns)
    if photos and maps:
      break
  else:
    raise MissingDataError(
      f"{kind}: {_LOOKED_FOR[layout]} was looked for in {reader.root} and is not there"
    )
  left: dict[str, list[str]] = {}
  alone = [photos[key] for key in sorted(photos.keys() - maps.keys())]
  if alone and kind not in _MAY_LACK:
    shown = ", ".join(map(reader.full_name, alone[:3])) + (", …" if len(alone) > 3 else "")
    raise MissingDataError(
      f"{kind}: {len(alone):,} of {len(photos):,} photos have no {_WORD[kind]}: {shown}. Take "
      f"them out, or write what is missing; looked for was {_LOOKED_FOR[layout]}"
    )
  both = sorted((photos[key], maps[key]) for key in photos.keys() & maps.keys())
  if not both:
    raise MissingDataError(
      f"{kind}: no photo of {reader.root} has its {_WORD[kind]}, e.g. {reader.full_name(alone[0])}"
    )
  left[f"photos without {_WORD[kind]}"] = alone
  left[f"files of {_WORD[kind]} without a photo"] = [
    maps[key] for key in sorted(maps.keys() - photos.keys())
  ]
  if layout in _WHOLE:
    used = {*photos.values(), *maps.values()}
    left["other pictures"] = [
      name for name in names if name not in used and name.lower().endswith(EXTENSIONS)
    ]
  said = [
    f"{len(found):,} {what}, e.g. {reader.full_name(found[0])}"
    for what, found in left.items()
    if found
  ]
  if said:
    tell_once(f"{reader.root}: left out", "; ".join(said))
  return both


def _matching(pattern: str, names: Sequence[str], reader: Reader) -> dict[tuple[str, ...], str]:
  """What pairs a file with its other half → the file."""
  compiled = re.compile(pattern, re.IGNORECASE)
  found: dict[tuple[str, ...], str] = {}
  for name in names:
    match = compiled.fullmatch(name)
    if match and found.setdefault(match.groups(), name) != name:
      raise ValueError(
        f"{reader.full_name(found[match.groups()])} and {reader.full_name(name)} would belong to "
        "the same pair: leave one of them"
      )
  return found


def _listed(reader: Reader, names: set[str], path: Path) -> list[tuple[str, str]]:
  """The pairs of a list: "photo depth" on each line, and what else there may be behind."""
  if not path.is_file():
    raise MissingDataError(f"a list of pairs was looked for at {path} and is not there")
  pairs = []
  for number, line in enumerate(as_text(path.read_bytes(), str(path)).splitlines(), 1):
    words = [word.lstrip("/") for word in line.split()]
    if not words:
      continue
    if len(words) < 2:
      raise ValueError(f"{path}, line {number}: {line!r}; 'photo depth' was expected")
    if words[1] == "None":
      continue
    for name in words[:2]:
      if name not in names:
        raise MissingDataError(
          f"{path}, line {number}: {name} is not there; it was looked for below {reader.root}"
        )
    pairs.append((words[0], words[1]))
  if not pairs:
    raise MissingDataError(f"{path} lists no pair")
  return pairs


def _parts(pairs: Sequence[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
  """Pairs by the part that a directory in the path of either names; others are for training."""
  parts: dict[str, list[tuple[str, str]]] = {name: [] for name in PARTS}
  for pair in pairs:
    directories = [word.lower() for path in pair[::-1] for word in path.split("/")[:-1]]
    found = (SPLIT_OF[word] for word in directories if word in SPLIT_OF)
    parts[next(found, "train")].append(pair)
  return parts


def _classes(
  kind: str, reader: Reader, names: Sequence[str], count: int | None
) -> tuple[tuple[str, ...], np.ndarray, str]:
  """Names and colours of the classes, and the full name of the file that has them, "" for none."""
  if kind == "cityscapes":
    return CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, ""
  count = 150 if kind == "ade20k" else count
  wanted = _CLASS_FILES[kind]
  # The nearest to the top, where there are several.
  found = sorted((n for n in names if n.rsplit("/", 1)[-1] == wanted), key=lambda n: n.count("/"))
  lines: list[str] = []
  if found:
    text = as_text(reader.read(found[0]), reader.full_name(found[0]))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if kind == "ade20k":  # a head, and names in the last column
      lines = [line.split("\t")[-1].strip() for line in lines[1:]]
    if not lines:
      raise ValueError(
        f"{reader.full_name(found[0])} names no class; a name in each line was expected"
      )
    if count is not None and len(lines) != count:
      raise ValueError(
        f"{reader.full_name(found[0])} names {len(lines)} classes where {count} were expected"
      )
    if len(lines) > IGNORE:
      raise ValueError(
        f"{reader.full_name(found[0])} names {len(lines)} classes; at most {IGNORE} were expected, "
        f"since {IGNORE} stands for none"
      )
  elif count is None:
    raise MissingDataError(
      f"{kind}: nothing tells the classes of {reader.root}: put their names, one a line, into "
      f"{wanted} beside images/, or say how many there are, {kind}:/path?classes=21"
    )
  # Numbers of the file where there are no names.
  first = int(kind == "ade20k")
  classes = tuple(lines) or tuple(str(first + i) for i in range(count or 0))
  return classes, spread_palette(len(classes)), reader.full_name(found[0]) if found else ""
