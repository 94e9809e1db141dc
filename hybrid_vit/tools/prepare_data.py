r"""Makes a TFDS data set in ArrayRecord: from one in TFRecord, or from pictures in a folder or zip.

    python -m hybrid_vit.tools.prepare_data \
      --from=/old/imagenet2012/5.1.0 --to=/data/imagenet2012/5.1.0
    python -m hybrid_vit.tools.prepare_data \
      --from=folder:/path/flowers --to=/data/flowers/1.0.0
    python -m hybrid_vit.tools.prepare_data --from=coco:/path/coco --to=/data/my_coco/1.0.0

`--to` is the directory of one version, DATA_DIR/NAME/VERSION; with `config.data.data_dir` DATA_DIR
its name is `tfds:NAME`. Nothing is decoded: records, and pictures, are copied byte for byte. The
directory appears when all of it is there. No TensorFlow is needed. `coco:` and `yolo:` get TFDS's
features of coco/2017, and masks as compressed run lengths beside them.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fcntl
import glob
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm

from hybrid_vit.data.ahead import available_cores
from hybrid_vit.data.errors import MissingDataError
from hybrid_vit.data.mask_encoding import compress_counts
from hybrid_vit.data.sources import create_source
from hybrid_vit.data.splits import PARTS
from hybrid_vit.data.tfds_source import shard_format
from hybrid_vit.data.tfrecord import check_count, read_records
from hybrid_vit.paths import as_path, is_remote
from hybrid_vit.standard_streams import run_tool

_OBJECTS = ("coco:", "yolo:")


def main(arguments: Sequence[str] | None = None) -> int:
  """The command; returns its exit status."""
  parser = argparse.ArgumentParser(
    prog="python -m hybrid_vit.tools.prepare_data",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    "--from",
    dest="origin",
    required=True,
    help="directory of a TFDS version in TFRecord, folder:/path, zip:/path.zip, coco:/path or "
    "yolo:/path",
  )
  parser.add_argument("--to", required=True, help="DATA_DIR/NAME/VERSION, to be made")
  parser.add_argument(
    "--processes", type=int, default=available_cores(), help="that convert files at once"
  )
  options = parser.parse_args(arguments)
  try:
    to = _local(options.to)
    if options.origin.startswith(("folder:", "zip:", *_OBJECTS)):
      counts = store_pictures(options.origin, to)
    else:
      counts = convert_tfrecord(_local(options.origin), to, options.processes)
  except (OSError, ValueError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 1
  what = ", ".join(f"{split} {count:,}" for split, count in counts.items())
  print(f"{to}: {what} examples. Use it as tfds:{to}")
  return 0


def _local(path: str) -> Path:
  if is_remote(as_path(path)):
    raise ValueError(
      f"{path}: data is prepared on a local disk; copy it from or to the object store before or "
      "afterwards"
    )
  return Path(as_path(path))


def convert_tfrecord(origin: Path, to: Path, processes: int = 1) -> dict[str, int]:
  """Copies a TFDS data set from TFRecord to ArrayRecord, record by record.

  Checksums of every record are verified, and numbers of records compared with dataset_info.json.

  Args:
    origin: directory of one version: dataset_info.json, features.json and the TFRecord files.
    to: the new directory.
    processes: that work at once, each on a file.

  Returns:
    Examples of each split.

  Raises:
    MissingDataError: `origin` is no TFDS data set in TFRecord, or lacks files.
    FileExistsError: `to` is there.
    TfRecordError: a record is damaged, or there are too many or too few.
  """
  import tensorflow_datasets as tfds

  _check_new(to)
  if not (origin / "dataset_info.json").is_file():
    raise MissingDataError(
      f"{origin} has no dataset_info.json: the directory of one version of a prepared TFDS data "
      "set was expected, e.g. ~/tensorflow_datasets/imagenet2012/5.1.0"
    )
  splits = tfds.builder_from_directory(str(origin)).info.splits
  jobs, counts = [], {}
  for name in splits:
    counts[name] = int(splits[name].num_examples)
    for part in splits[name].file_instructions:
      path = Path(str(part.filename))
      if shard_format(path) != "tfrecord":
        raise MissingDataError(
          f"{origin} is prepared as {shard_format(path)}; tfrecord was expected"
          + (" (nothing to do: it can be read)" if shard_format(path) == "array_record" else "")
        )
      if not path.is_file():
        raise MissingDataError(f"{path} is not there, and dataset_info.json names it")
      jobs.append((path, int(part.examples_in_shard)))
  with _partial(to) as partial:
    for path in origin.iterdir():
      if path.is_file() and shard_format(path) != "tfrecord":
        shutil.copy2(path, partial)
    _describe_as_array_record(partial / "dataset_info.json")
    tasks = [(path, partial / _renamed(path.name), records) for path, records in jobs]
    if processes > 1 and len(tasks) > 1:
      # Spawned: the packages read so far have threads, which a fork would lose.
      context = multiprocessing.get_context("spawn")
      with concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=context, initializer=_end_with_parent
      ) as pool:
        done = pool.map(_convert_file, *zip(*tasks))
        list(tqdm.tqdm(done, total=len(tasks), unit="file"))
    else:
      for task in tqdm.tqdm(tasks, unit="file"):
        _convert_file(*task)
    partial.rename(to)
  return counts


def _end_with_parent() -> None:
  """Ends this worker when the process that began it is killed: it would wait for files for good."""
  parent = multiprocessing.parent_process()

  def end() -> None:
    if parent is not None:
      parent.join()
      os._exit(1)

  threading.Thread(target=end, daemon=True).start()


def _convert_file(path: Path, new: Path, records: int) -> None:
  from array_record.python import array_record_module

  # One record a group: the random access that training needs.
  writer = array_record_module.ArrayRecordWriter(str(new), "group_size:1")
  count = 0
  for record in read_records(path):
    writer.write(record)
    count += 1
  writer.close()
  check_count(path, count, records)
  reader = array_record_module.ArrayRecordReader(str(new))
  check_count(new, reader.num_records(), records)
  reader.close()


def _renamed(name: str) -> str:
  return name.replace(".tfrecord", ".array_record")


def _describe_as_array_record(path: Path) -> None:
  info = json.loads(path.read_text())
  info["fileFormat"] = "array_record"
  for split in info["splits"]:
    if "filepathTemplate" in split:
      split["filepathTemplate"] = _renamed(split["filepathTemplate"])
  path.write_text(json.dumps(info, indent=2))


def store_pictures(spec: str, to: Path) -> dict[str, int]:
  """Writes a folder or zip of pictures as a TFDS data set with image, label and file_name.

  Of `coco:` and `yolo:` it has image, image/id, image/filename and objects.

  The parts are those of `hybrid_vit.data.sources`, so that training on it is training on the
  folder; a test part is written where it is another than the validation part.

  Args:
    spec: "folder:/path", "zip:/path.zip", "coco:/path" or "yolo:/path".
    to: the new directory, DATA_DIR/NAME/VERSION.

  Returns:
    Examples of each split.

  Raises:
    MissingDataError: no pictures there.
    FileExistsError: `to` is there.
    ValueError: `to` is no name and version that TFDS takes.
  """
  _check_new(to)
  name, version = to.parent.name, to.name
  if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or not re.fullmatch(r"\d+\.\d+\.\d+", version):
    raise ValueError(
      f"{to}: DATA_DIR/NAME/VERSION was expected, with a name in small letters and a version such "
      "as 1.0.0, e.g. /data/flowers/1.0.0"
    )
  sources = {split: create_source(spec, split) for split in PARTS}
  names = {split: _names(source) for split, source in sources.items()}
  if names["test"] == names["validation"]:
    del sources["test"]
  with _partial(to) as partial:
    builder = _builder(name, version, sources, partial)
    builder.download_and_prepare()
    Path(builder.data_path).rename(to)
  return {split: len(source) for split, source in sources.items()}


def _names(source: Any) -> list[str]:
  return [source.describe(i) for i in range(len(source))]


def _builder(name: str, version: str, sources: dict[str, Any], data_dir: Path) -> Any:
  import tensorflow_datasets as tfds

  objects = "object_class_names" in sources["train"].info

  class Pictures(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    VERSION = tfds.core.Version(version)
    code_path = None  # TFDS would look for checksums of downloads beside this file.

    def _info(self) -> Any:
      info = sources["train"].info
      described = _object_features(info) if objects else _class_features(info)
      return tfds.core.DatasetInfo(
        builder=self,
        features=tfds.features.FeaturesDict(described),
        description="From a folder of pictures.",
        metadata=tfds.core.MetadataDict(category_ids=list(info["category_ids"]))
        if objects
        else None,
      )

    def _split_generators(self, dl_manager: Any) -> Any:
      return {split: self._generate_examples(split) for split in sources}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
      source = sources[split]
      for index in range(len(source)):
        file_name = "/".join(Path(source.describe(index)).parts[-2:])
        example = source[index]
        stored = (
          _stored_objects(example, index, file_name)
          if objects
          else {**example, "file_name": file_name}
        )
        # TFDS orders examples by a hash of their key; the place of the folder must not count.
        yield str(index), stored

  Pictures.name = name
  return Pictures(data_dir=str(data_dir), file_format="array_record")


def _class_features(info: Mapping[str, Any]) -> dict[str, Any]:
  from tensorflow_datasets import features

  return {
    "image": features.Image(shape=(None, None, 3)),
    "label": features.ClassLabel(names=list(info["class_names"])),
    "file_name": features.Text(),
  }


def _object_features(info: Mapping[str, Any]) -> dict[str, Any]:
  """Those of TFDS's coco/2017, and masks."""
  from tensorflow_datasets import features

  names = [str(name) for name in info["object_class_names"]]
  # TFDS wants names that differ; exports of some tools have a class twice.
  unique = [
    name if names.count(name) == 1 else f"{name} ({number})"
    for name, number in zip(names, info["category_ids"])
  ]
  one = {
    "area": np.float32,
    "bbox": features.BBoxFeature(),
    "id": np.int64,
    "is_crowd": np.bool_,
    "label": features.ClassLabel(names=unique),
  }
  if info["has_masks"]:
    one["segmentation"] = features.Text()
  return {
    "image": features.Image(shape=(None, None, 3)),
    "image/filename": features.Text(),
    "image/id": np.int64,
    "objects": features.Sequence(one),
  }


def _stored_objects(example: Mapping[str, Any], index: int, file_name: str) -> dict[str, Any]:
  from tensorflow_datasets import features

  height, width = example["size"]
  fractions = np.clip(example["boxes"] / [width, height, width, height], 0, 1)
  image_id, masks = example["image_id"], example.get("masks")
  objects = []
  for row, (x0, y0, x1, y1) in enumerate(fractions.tolist()):
    one = {
      "area": example["areas"][row],
      "bbox": features.BBox(ymin=y0, xmin=x0, ymax=y1, xmax=x1),
      "id": row,
      "is_crowd": bool(example["crowd"][row]),
      "label": int(example["box_labels"][row]),
    }
    if masks is not None:
      one["segmentation"] = compress_counts(masks.rle(row).counts)
    objects.append(one)
  return {
    "image": example["image"],
    "image/filename": file_name,
    # Some tools' are no numbers.
    "image/id": image_id if isinstance(image_id, int) else index,
    "objects": objects,
  }


def _check_new(to: Path) -> None:
  if to.exists():
    # Killed after its last renaming, a run has left a directory, too.
    _remove_what_killed_runs_left(to)
    raise FileExistsError(f"{to} is there already; a new directory was expected")


@contextlib.contextmanager
def _partial(to: Path) -> Iterator[Path]:
  """A directory beside `to` that is gone in the end, whatever happens."""
  to.parent.mkdir(parents=True, exist_ok=True)
  _remove_what_killed_runs_left(to)
  with _held(to.parent, wait=True):
    path = Path(tempfile.mkdtemp(prefix=_prefix(to), dir=to.parent))
    path.chmod(0o755)
    holding = contextlib.ExitStack()
    holding.enter_context(_held(path))
  with holding:
    try:
      yield path
    finally:
      shutil.rmtree(path, ignore_errors=True)


def _remove_what_killed_runs_left(to: Path) -> None:
  """Directories of `_partial` that nobody holds: the system has taken the locks of the killed."""
  with _held(to.parent, wait=True):
    for left in to.parent.glob(f"{glob.escape(_prefix(to))}*"):
      with _held(left) as free:
        if free:
          shutil.rmtree(left, ignore_errors=True)


def _prefix(to: Path) -> str:
  return f".{to.name}.partial."


@contextlib.contextmanager
def _held(directory: Path, *, wait: bool = False) -> Iterator[bool]:
  """Holds the system's lock on a directory, where it can be had; whether it is held."""
  with contextlib.ExitStack() as stack:
    held = True
    try:
      descriptor = os.open(directory, os.O_RDONLY)
      stack.callback(os.close, descriptor)
      fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # another process has it, or a disk knows no locks
      held = False
    yield held


if __name__ == "__main__":
  run_tool(main)
