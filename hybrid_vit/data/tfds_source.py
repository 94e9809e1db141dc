"""TFDS data sets prepared as ArrayRecord, read without TensorFlow."""

from __future__ import annotations

from typing import Any

from hybrid_vit.data.sources import MissingDataError


class TfdsSource:
  """A split of a prepared TFDS data set; pictures come as their encoded bytes.

  Args:
    name: "imagenet2012", "name/config", with ":1.0.0" for a version; or a directory that holds a
      prepared data set.
    split: TFDS's own, with its slicing.
    data_dir: as in TFDS; None for its default.

  Raises:
    MissingDataError: not prepared, or prepared in another format.
    ValueError: a split it does not have, or features without "image" and "label".
  """

  def __init__(self, name: str, split: str, data_dir: str | None):
    import tensorflow_datasets as tfds

    self._name, self._split = name, split
    builder = _builder(tfds, name, data_dir)
    if builder.info.file_format is not None and builder.info.file_format.value != "array_record":
      directory = builder.data_path
      raise MissingDataError(
        f"TFDS data set {name!r} in {directory} is prepared as {builder.info.file_format.value}, "
        "which cannot be read by index. Convert it once, byte for byte: python -m "
        f"hybrid_vit.tools.prepare_data tfrecord {directory} NEW_DIRECTORY, then use "
        "tfds:NEW_DIRECTORY"
      )
    base = split.partition("[")[0]
    if base not in builder.info.splits:
      raise ValueError(
        f"TFDS data set {name!r} has no split {base!r}; it has: {', '.join(builder.info.splits)}"
      )
    features = builder.info.features
    if not {"image", "label"} <= set(features):
      raise ValueError(f"TFDS data set {name!r} has no 'image' and 'label', but {list(features)}")
    self.class_names = tuple(features["label"].names)
    self.num_classes = features["label"].num_classes
    self._data = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

  def __len__(self) -> int:
    return len(self._data)

  def __getitem__(self, index: int) -> dict[str, Any]:
    example = self._data[index]
    return {"image": example["image"], "label": int(example["label"])}

  def describe(self, index: int) -> str:
    """See `Source`."""
    return f"tfds:{self._name} {self._split} #{index}"


def _builder(tfds: Any, name: str, data_dir: str | None) -> Any:
  from pathlib import Path

  directory = Path(name).expanduser()
  if (directory / "dataset_info.json").is_file():
    return tfds.builder_from_directory(str(directory))
  roots = [Path(data_dir).expanduser()] if data_dir else [Path.home() / "tensorflow_datasets"]
  base, _, version = name.partition(":")
  for root in roots:
    found = sorted((root / base).glob(f"{version or '*'}/dataset_info.json"), key=_version)
    if found:
      return tfds.builder_from_directory(str(found[-1].parent))
  raise MissingDataError(
    f"TFDS data set {name!r} was looked for in {', '.join(map(str, roots))} (config.data.data_dir) "
    f"and is not prepared there. On a machine with its archives: python -m hybrid_vit.tools."
    f"prepare_data tfds {base} --data_dir={roots[0]} ; a copy prepared as TFRecord: python -m "
    "hybrid_vit.tools.prepare_data tfrecord OLD_DIRECTORY NEW_DIRECTORY"
  )


def _version(path: Any) -> tuple[int, ...]:
  return tuple(int(n) if n.isdecimal() else -1 for n in path.parent.name.split("."))
