"""TFDS data sets prepared as ArrayRecord or TFRecord, read without TensorFlow."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from etils import epath

from hybrid_vit.data.caption_fields import CAPTION, without_empty
from hybrid_vit.data.errors import CorruptExampleError, MissingDataError
from hybrid_vit.data.palettes import spread_palette
from hybrid_vit.data.tfrecord import TfRecordError, TfRecordShards
from hybrid_vit.paths import as_path, is_remote

# The numbers of COCO's 80 classes in its files.
COCO_IDS = tuple(n for n in range(1, 91) if n not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83))


class TfdsSource:
  """A split of a prepared TFDS data set, with all of its features.

  Pictures come as their encoded bytes, text as str, whole numbers as int, the rest as TFDS decodes
  it. Where there is a feature "label" with classes, their names are in `info`; of "objects" with
  labels, as coco has them, there are what `instances.InstanceSource` says of them. A feature
  "captions" or "caption" of strings, also where they are the "text" of several parts as COCO's,
  comes as "captions" {"caption": strings}.

  Args:
    name: "imagenet2012", "name/config", with ":1.0.0" for a version (the newest otherwise); or a
      directory that holds a prepared data set, here or in a bucket (gs://).
    split: TFDS's own, with its slicing.
    data_dir: as in TFDS; None for its default ($TFDS_DATA_DIR or ~/tensorflow_datasets).

  Raises:
    MissingDataError: not prepared, or prepared in a format that has no access by index.
    ValueError: a split it does not have; or it lies in a store from which it cannot be read, or
      what it says of itself is damaged.
  """

  def __init__(self, name: str, split: str, data_dir: str | None):
    import tensorflow_datasets as tfds

    self._name, self._split = name, split
    directory = _directory(name, data_dir)
    try:
      builder = tfds.builder_from_directory(str(directory))
    except ImportError as error:
      raise ValueError(f"tfds:{name} lies in an object store: {error}") from error
    except Exception as error:  # JSON's, protobuf's or TFDS's, as the damage has it
      raise ValueError(
        f"what describes the TFDS data set in {directory} (dataset_info.json, features.json and "
        f"beside them) cannot be read: {type(error).__name__}: {error}. Get these files anew"
      ) from error
    base = re.split(r"[\[+]", split)[0]
    if base not in builder.info.splits and base != "all":
      raise ValueError(
        f"TFDS data set {name!r} has no split {base!r}; it has: {', '.join(builder.info.splits)}"
      )
    self._features = builder.info.features
    kinds = tfds.features
    self._decoders = {
      key: tfds.decode.SkipDecoding()
      for key, feature in self._features.items()
      if isinstance(feature, kinds.Image)
    }
    self._texts = [key for key, item in self._features.items() if isinstance(item, kinds.Text)]
    self.info: dict[str, Any] = {}
    if "label" in self._features and isinstance(self._features["label"], kinds.ClassLabel):
      self.info["class_names"] = tuple(self._features["label"].names)
    self.info |= _of_objects(self._features, builder.info.metadata)
    self._records = _records(builder, split)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    try:
      record = self._records[index]
      example = self._features.deserialize_example_np(record, decoders=self._decoders)
      if any(example[key] is None for key in self._decoders):
        raise ValueError("a record without its picture")
    except (OSError, TfRecordError):
      raise
    except Exception as error:  # the format's, protobuf's, NumPy's or TFDS's, as the damage has it
      raise CorruptExampleError(
        f"{self.describe(index)} cannot be decoded: {type(error).__name__}: {error}"
      ) from error
    for key in self._texts:
      if isinstance(example[key], bytes):
        example[key] = example[key].decode(errors="replace")
    found = {key: _plain(value) for key, value in example.items()}
    captions = _captions(example)
    return found if captions is None else {**found, "captions": captions}

  def describe(self, index: int) -> str:
    """See `sources.Source`."""
    return f"tfds:{self._name} {self._split} #{index}"


def _of_objects(features: Mapping[str, Any], metadata: Any) -> dict[str, Any]:
  """What `info` says of a feature "objects" with labels, as TFDS's coco has it."""
  one = getattr(features["objects"], "feature", None) if "objects" in features else None
  if one is None or "label" not in one or not hasattr(one["label"], "names"):
    return {}
  names = tuple(one["label"].names)
  ids = (metadata or {}).get("category_ids")
  if ids is None and len(names) == len(COCO_IDS) and names[::79] == ("person", "toothbrush"):
    ids = COCO_IDS
  return {
    "object_class_names": names,
    "category_ids": tuple(range(len(names)) if ids is None else ids),
    "palette": spread_palette(len(names)),
    "object_palette": spread_palette(len(names)),
    "has_masks": "segmentation" in one,
  }


def _captions(example: Mapping[str, Any]) -> dict[str, list[str]] | None:
  """Captions by caption source, of a feature "captions" or else "caption"; None without any."""
  value = example.get("captions", example.get("caption"))
  # Of a sequence of {"text", "id"} TFDS makes a dict of arrays.
  value = value.get("text") if isinstance(value, Mapping) else value
  many = [value] if isinstance(value, str | bytes) else value
  if not np.iterable(many) or not all(isinstance(text, str | bytes) for text in many):
    return None
  texts = [t.decode(errors="replace") if isinstance(t, bytes) else t for t in many]
  return without_empty({CAPTION: [text.strip() for text in texts]})


def _plain(value: Any) -> Any:
  """A NumPy scalar that is a whole number as an int."""
  whole = getattr(value, "ndim", None) == 0 and getattr(value, "dtype", None) is not None
  return int(value) if whole and value.dtype.kind in "iu" else value


def _records(builder: Any, split: str) -> Any:
  """Serialized examples by index."""
  instructions = builder.info.splits[split].file_instructions
  # The files' names tell the format; data sets of old have no such field in dataset_info.json.
  first = str(instructions[0].filename)
  format_name = shard_format(first)
  if format_name == "array_record":
    if is_remote(first) and not first.startswith("gs://"):
      raise ValueError(f"{builder.data_path}: ArrayRecord is read from local disks and gs:// only")
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource(instructions)
  if format_name == "tfrecord":
    if is_remote(first):
      raise ValueError(
        f"{builder.data_path} is TFRecord, which has no index and would be read whole from the "
        "store to make one; convert it to ArrayRecord (hybrid_vit.tools.prepare_data)"
      )
    return TfRecordShards(
      [(Path(str(i.filename)), i.skip, i.take, i.examples_in_shard) for i in instructions]
    )
  raise MissingDataError(
    f"the TFDS data set in {builder.data_path} is prepared as {format_name}, which cannot be read "
    "by index; array_record and tfrecord can. Prepare it again with file_format='array_record'"
  )


def shard_format(path: str | os.PathLike[str]) -> str:
  """The format of a TFDS shard by its name, "cifar10-train.array_record-00000-of-00001"."""
  match = re.search(r"\.([a-z_]+)(?:-\d+-of-\d+)?$", PurePath(path).name)
  return match[1] if match else "unknown"


def _directory(name: str, data_dir: str | None) -> epath.Path:
  directory = as_path(name)
  if (directory / "dataset_info.json").exists():
    return directory
  if is_remote(name):
    raise MissingDataError(
      f"a prepared TFDS data set was looked for at {name} and there is no dataset_info.json: the "
      "directory of one version was expected"
    )
  root = as_path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
  base, _, version = name.partition(":")
  found = sorted(_versions(root / base, version), key=_version)
  if found:
    return found[-1]
  raise MissingDataError(
    f"TFDS data set {name!r} was looked for in {root} (config.data.data_dir) and is not prepared "
    "there. To prepare it once, install the extra [tf] (TFDS makes most of its data sets with "
    "TensorFlow) and run python -c \"import tensorflow_datasets as tfds; tfds.builder('"
    f"{base}', data_dir='{root}', file_format='array_record').download_and_prepare()\"; "
    "docs/data.md says more"
  )


def _versions(folder: epath.Path, version: str) -> Iterator[epath.Path]:
  if version:
    candidates = [folder / version]
  else:
    # Others lie beside them while a version is being written: ".1.0.0.partial.x", "incomplete.x".
    candidates = list(folder.iterdir()) if folder.is_dir() else []
    candidates = [path for path in candidates if re.match(r"\d", path.name)]
  for candidate in candidates:
    if (candidate / "dataset_info.json").exists():
      yield candidate


def _version(path: epath.Path) -> tuple[int, ...]:
  return tuple(int(n) if n.isdecimal() else -1 for n in path.name.split("."))
