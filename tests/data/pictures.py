"""Small data sets that the tests of `hybrid_vit.data` write for themselves."""

import io
import json
import shutil
import struct
import zipfile
from pathlib import Path

import cv2
import numpy as np
from PIL import Image


def photo(seed: int, height: int = 40, width: int = 60) -> np.ndarray:
  """uint8 `[H, W, 3]`, smooth as photos are."""
  coarse = np.random.default_rng(seed).integers(0, 256, (6, 9, 3), dtype=np.uint8)
  return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(image: np.ndarray, format_name: str = "JPEG") -> bytes:
  """The picture as a file."""
  buffer = io.BytesIO()
  Image.fromarray(image).save(buffer, format_name)
  return buffer.getvalue()


def shared_data(name: str) -> Path | None:
  """Real data in a directory shared/data beside the checkout, or above; None where it is not."""
  places = (parent / "shared" / "data" / name for parent in Path(__file__).parents[2:])
  return next((place for place in places if place.exists()), None)


def write_folder(root: Path, counts: dict[str, int], **size: int) -> Path:
  """{"train/cat": 3} → three JPEG pictures there, all different."""
  for number, (folder, count) in enumerate(counts.items()):
    directory = root / folder
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(count):
      (directory / f"{i:03d}.jpg").write_bytes(encoded(photo(1000 * number + i, **size)))
  return root


def write_zip(path: Path, folder: Path, prefix: str = "") -> Path:
  """The folder in a zip, below `prefix`."""
  with zipfile.ZipFile(path, "w") as file:
    for item in sorted(folder.rglob("*")):
      if item.is_file():
        file.write(item, prefix + item.relative_to(folder).as_posix())
  return path


def crc32c_bit_by_bit(data: bytes) -> int:
  """The definition: polynomial 0x1EDC6F41, reflected."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
  crc = crc32c_bit_by_bit(data)
  return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def tfrecord(records: list[bytes]) -> bytes:
  """A TFRecord file's bytes."""
  out = b""
  for record in records:
    length = struct.pack("<Q", len(record))
    out += length + _masked(length) + record + _masked(record)
  return out


def as_tfrecord(prepared: Path, to: Path, shards: dict[str, int]) -> Path:
  """A TFDS data set in ArrayRecord → the same in TFRecord, each split in so many files."""
  from array_record.python import array_record_module

  to.mkdir(parents=True)
  info = json.loads((prepared / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  for split in info["splits"]:
    name, number = split["name"], shards[split["name"]]
    (old,) = prepared.glob(f"*-{name}.array_record*")
    reader = array_record_module.ArrayRecordReader(str(old))
    parts = np.array_split(np.arange(reader.num_records()), number)
    records = reader.read_all()
    split["shardLengths"] = [str(len(part)) for part in parts]
    for k, part in enumerate(parts):
      stem = old.name.partition("-")[0]
      path = to / f"{stem}-{name}.tfrecord-{k:05d}-of-{number:05d}"
      path.write_bytes(tfrecord([records[i] for i in part]))
  for path in prepared.iterdir():
    if ".array_record" not in path.name:
      shutil.copy(path, to)
  (to / "dataset_info.json").write_text(json.dumps(info))
  return to
