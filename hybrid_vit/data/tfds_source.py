"""TFDS data sets prepared as ArrayRecord or TFRecord, read without TensorFlow."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hybrid_vit.data.errors import MissingDataError
from hybrid_vit.data.tfrecord import TfRecordShards


class TfdsSource:
  """A split of a prepared TFDS data set; pictures come as their encoded bytes.

  Args:
    name: "imagenet2012", "name/config", with ":1.0.0" for a version (the newest otherwise); or a
      directory that holds a prepared data set.
    split: TFDS's own, with its slicing.
    data_dir: as in TFDS; None for its default ($TFDS_DATA_DIR or ~/tensorflow_datasets).

  Raises:
    MissingDataError: not prepared, or prepared in a format that has no access by index.
    ValueError: a split it does not have, or features without "image" and "label".
  """

  def __init__(self, name: str, split: str, data_dir: str | None):
    import tensorflow_datasets as tfds

    self._name, self._split = name, split
    builder = tfds.builder_from_directory(str(_directory(name, data_dir)))
    base = re.split(r"[\[+]", split)[0]
    if base not in builder.info.splits and base != "all":
      raise ValueError(
        f"TFDS data set {name!r} has no split {base!r}; it has: {', '.join(builder.info.splits)}"
      )
    features = builder.info.features
    if not {"image", "label"} <= set(features):
      raise ValueError(f"TFDS data set {name!r} has no 'image' and 'label', but {list(features)}")
    self.class_names = tuple(features["label"].names)
    self.num_classes = features["label"].num_classes
    self._features = features
    self._decoders = {"image": tfds.decode.SkipDecoding()}
    self._records = _records(builder, split)

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    example = self._features.deserialize_example_np(self._records[index], decoders=self._decoders)
    return {"image": example["image"], "label": int(example["label"])}

  def describe(self, index: int) -> str:
    """See `Source`."""
    return f"tfds:{self._name} {self._split} #{index}"


def _records(builder: Any, split: str) -> Any:
  """Serialized examples by index."""
  instructions = builder.info.splits[split].file_instructions
  # The files' names tell the format; data sets of old have no such field in dataset_info.json.
  format_name = shard_format(Path(str(instructions[0].filename)))
  if format_name == "array_record":
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource(instructions)
  if format_name == "tfrecord":
    return TfRecordShards(
      [(Path(str(i.filename)), i.skip, i.take, i.examples_in_shard) for i in instructions]
    )
  raise MissingDataError(
    f"the TFDS data set in {builder.data_path} is prepared as {format_name}, which cannot be read "
    "by index; array_record and tfrecord can. Prepare it again with file_format='array_record'"
  )


def shard_format(path: Path) -> str:
  """The format of a TFDS shard by its name, "cifar10-train.array_record-00000-of-00001"."""
  match = re.search(r"\.([a-z_]+)(?:-\d+-of-\d+)?$", path.name)
  return match[1] if match else "unknown"


def _directory(name: str, data_dir: str | None) -> Path:
  directory = Path(name).expanduser()
  if (directory / "dataset_info.json").is_file():
    return directory
  root = Path(
    data_dir or os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets"
  ).expanduser()
  base, _, version = name.partition(":")
  found = sorted((root / base).glob(f"{version or '*'}/dataset_info.json"), key=_version)
  if found:
    return found[-1].parent
  raise MissingDataError(
    f"TFDS data set {name!r} was looked for in {root} (config.data.data_dir) and is not prepared "
    "there. To prepare it once, install the extra [tf] (TFDS makes most of its data sets with "
    "TensorFlow) and run python -c \"import tensorflow_datasets as tfds; tfds.builder('"
    f"{base}', data_dir='{root}', file_format='array_record').download_and_prepare()\"; "
    "docs/data.md says more"
  )


def _version(path: Path) -> tuple[int, ...]:
  return tuple(int(n) if n.isdecimal() else -1 for n in path.parent.name.split("."))
