"""Where examples come from: random access by index, one spec string for each kind.

    digits                  1,797 handwritten digits, shipped with the package
    folder:/path            train/<class>/*, a part val or test where there is one
    zip:/path.zip           the same, in a zip
    fashion_mnist[:/path]   the four files of Fashion-MNIST
    tfds:name[/config][:version]   a prepared TFDS data set, ArrayRecord or TFRecord, or tfds:/path
                            of its directory; no TensorFlow needed
    scenes[:size=64,…]      drawn from their number, with captions, maps, boxes, depth: `scenes`
    tar:/path/{00000..00099}.tar   image–text pairs in WebDataset's tars, see `tars`
    captions:/path/file.csv   image–text pairs of files and a table, see `caption_tables`
    imagenet_v2:/path, …    ImageNet's other evaluation sets, see `imagenet_variants`
    maps:/path, ade20k:/path, cityscapes:/path, coco_panoptic:/path, depth:/path, nyu_depth:/path,
    kitti_depth:/path       photos with a map of classes or of depth each, see `maps`
    coco:/path, yolo:/path  photos with objects: boxes, classes, masks; see `coco_instances`, `yolo`

A split is "train", "validation" or "test", with a slice in TFDS's manner: "train[:90%]". Where a
folder or zip has no validation part, a fixed tenth of each class of the training part is held out;
a slice of one holds every class in proportion (`splits.spread_order`), of the others it is a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hybrid_vit.data.archives import ZipReader
from hybrid_vit.data.arrays import digits, fashion_mnist
from hybrid_vit.data.caption_tables import CaptionTable
from hybrid_vit.data.coco_instances import open_coco
from hybrid_vit.data.folders import FileSource, FolderReader, open_files
from hybrid_vit.data.imagenet_variants import VARIANTS, open_variant
from hybrid_vit.data.maps import MAP_SOURCES, open_maps
from hybrid_vit.data.scenes import open_scenes
from hybrid_vit.data.splits import parse_split, part_slice, spread_order
from hybrid_vit.data.tars import TarSource
from hybrid_vit.data.tfds_source import TfdsSource
from hybrid_vit.data.yolo import open_yolo
from hybrid_vit.paths import as_path, is_remote

_KINDS = (
  "digits, scenes, folder:/path, zip:/path.zip, fashion_mnist[:/path], tfds:name, tar:/path, "
  "captions:/path.csv, coco:/path, yolo:/path, "
  + ", ".join(f"{name}:/path" for name in (*VARIANTS, *MAP_SOURCES))
)
OBJECT_SOURCES = {"coco": open_coco, "yolo": open_yolo}
_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"


class Source(Protocol):
  """Random access to examples; thread-safe.

  Attributes:
    info: what there is to know of the whole: "class_names" (tuple of str) where there are classes.
  """

  @property
  def info(self) -> Mapping[str, Any]: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The example: "image" as encoded bytes or uint8 `[H, W, 3]`, "label" as an int, or others.

    Raises:
      OSError: its bytes could not be read; another try may succeed.
      CorruptExampleError: they were read and are damaged.
    """
    ...

  def describe(self, index: int) -> str:
    """The example's name for people: its path, or its place in the data set."""
    ...


def create_source(spec: str, split: str, data_dir: str | None = None) -> Source:
  """Opens a source.

  Args:
    spec: see the head of this file.
    split: see there.
    data_dir: where prepared TFDS data lies; None for TFDS's own default.

  Raises:
    ValueError: unknown kind or split, or data that cannot be read; the message says how it could.
    MissingDataError: nothing there.
  """
  kind, _, rest = spec.partition(":")
  if kind == "tfds":
    return TfdsSource(rest, split, data_dir)
  if kind in VARIANTS:
    # Each has one part, whatever it is called.
    return open_variant(kind, str(_local(spec, rest)), parse_split(split)[1])
  if kind in ("tar", "captions"):
    place = str(_local(spec, rest))
    pairs = TarSource(place) if kind == "tar" else CaptionTable(place)
    # One part, too.
    return _part(pairs, spec, split)
  if kind not in (
    "digits",
    "scenes",
    "folder",
    "zip",
    "fashion_mnist",
    *OBJECT_SOURCES,
    *MAP_SOURCES,
  ):
    raise ValueError(f"unknown data source {spec!r}; there are: {_KINDS}")
  name, _ = parse_split(split)
  source: Source
  if name == "all" and kind in ("digits", "scenes", "fashion_mnist"):
    raise ValueError(f"split {split!r}: {kind} has train, validation and test; all is for others")
  if kind == "digits":
    source = digits(name)
  elif kind == "scenes":
    source = open_scenes(spec, name)
  elif kind == "fashion_mnist":
    source = fashion_mnist(_local(spec, rest or _FASHION_MNIST), name)
  elif kind in OBJECT_SOURCES:
    source = OBJECT_SOURCES[kind](str(_local(spec, rest)), name)
  elif kind in MAP_SOURCES:
    source = open_maps(kind, str(_local(spec, rest)), name)
  else:
    path = _local(spec, rest)
    source = open_files(FolderReader(path) if kind == "folder" else ZipReader(path), name)
  return _part(source, spec, split)


def _part(source: Source, spec: str, split: str) -> Source:
  """The slice of a split."""
  _, part = parse_split(split)
  chosen: Sequence[int] | np.ndarray = range(len(source))[part_slice(part, len(source))]
  if not len(chosen):
    raise ValueError(f"split {split!r} of {spec!r} is empty")
  if len(chosen) == len(source):
    return source
  if isinstance(source, FileSource):
    # Sorted by class: a run of it would lack classes.
    chosen = np.sort(spread_order(source.labels)[part_slice(part, len(source))])
  return Subset(source, chosen)


def _local(spec: str, path: str) -> Path:
  if not path:
    raise ValueError(f"data source {spec!r} names no path; there are: {_KINDS}")
  found = as_path(path)
  if is_remote(found):
    raise ValueError(
      f"{spec!r}: only tfds: reads from an object store; every picture would be a request of its "
      "own. Make one data set of them where the pictures are (hybrid_vit.tools.prepare_data), copy "
      "it there and read it as tfds:gs://…; or mount the bucket, or copy it to a local disk"
    )
  return Path(found)


class Subset:
  """Chosen examples of a source, in their order; one may come several times.

  `labels`, and `sizes` of photos with objects, are those of the examples, None where the source
  does not know them without reading.
  """

  def __init__(self, source: Source, chosen: Sequence[int] | np.ndarray):
    self._source, self._chosen = source, chosen
    self.info = source.info
    self.labels, self.sizes = (
      None if known is None else np.asarray(known)[np.asarray(chosen)]
      for known in (getattr(source, name, None) for name in ("labels", "sizes"))
    )

  def __len__(self) -> int:
    return len(self._chosen)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._source[int(self._chosen[index])]

  def describe(self, index: int) -> str:
    return self._source.describe(int(self._chosen[index]))
