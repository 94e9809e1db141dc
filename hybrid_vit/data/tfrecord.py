"""TFRecord files without TensorFlow: records by index, checksums verified.

The format: for each record its length (uint64, little-endian), a masked CRC-32C of the length, the
payload, a masked CRC-32C of the payload. A file has no index; one pass over the lengths makes it,
which reads 12 bytes a record and none of the payloads.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_HEADER, _FOOTER = 12, 4
# CRC-32C (Castagnoli), bits reversed; the mask is the TFRecord format's.
_POLYNOMIAL = 0x82F63B78
_MASK_DELTA = 0xA282EAD8
# A payload's checksum is computed over blocks side by side and then joined.
_BLOCK = 64


class TfRecordError(ValueError):
  """A file that is cut short or whose checksums do not fit."""


class TfRecordShards:
  """Payloads by index over parts of several files; thread-safe.

  A file is indexed when one of its records is first asked for. Checksums of lengths are verified
  then; those of payloads are not verified here, see `read_records`.

  Args:
    parts: (path, number of records to skip, number to take, number in the whole file) each.
  """

  def __init__(self, parts: Sequence[tuple[Path, int, int, int]]):
    self._parts = tuple(parts)
    self._ends = list(itertools.accumulate(take for _, _, take, _ in self._parts))
    self._offsets: dict[Path, np.ndarray] = {}

  def __len__(self) -> int:
    return self._ends[-1] if self._ends else 0

  def __getitem__(self, index: int) -> bytes:
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of {len(self)}")
    part = bisect.bisect_right(self._ends, index)
    path, skip, take, records = self._parts[part]
    offsets = self._offsets.get(path)
    if offsets is None:
      # Two threads may both do this; they find the same.
      offsets = self._offsets[path] = index_records(path)
      check_count(path, len(offsets) - 1, records)
    row = skip + index - (self._ends[part] - take)
    with path.open("rb") as file:
      file.seek(int(offsets[row]) + _HEADER)
      return file.read(int(offsets[row + 1] - offsets[row]) - _HEADER - _FOOTER)


def index_records(path: Path) -> np.ndarray:
  """Where each record begins, and where the last one ends: int64 `[N + 1]`.

  Raises:
    TfRecordError: cut short, or a length whose checksum does not fit.
  """
  size = path.stat().st_size
  starts = [0]
  headers: list[bytes] = []
  with path.open("rb", buffering=0) as file:
    while starts[-1] < size:
      file.seek(starts[-1])
      header = file.read(_HEADER)
      end = starts[-1] + _HEADER + int.from_bytes(header[:8], "little") + _FOOTER
      if len(header) < _HEADER or end > size:
        raise TfRecordError(
          f"{path}: record {len(headers)}, which begins at byte {starts[-1]}, does not end within "
          f"the file's {size} bytes: the file is cut short or is no TFRecord"
        )
      headers.append(header)
      starts.append(end)
  if headers:
    table = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _HEADER)
    stored = np.ascontiguousarray(table[:, 8:]).view("<u4")[:, 0]
    lengths = table[:, :8].copy()
    lengths[:, :4] ^= 0xFF
    wrong = np.flatnonzero(_mask(~_crc_of_rows(lengths)) != stored)
    if wrong.size:
      raise TfRecordError(f"{path}: the length of record {wrong[0]} does not fit its checksum")
  return np.asarray(starts, np.int64)


def read_records(path: Path) -> Iterator[bytes]:
  """All payloads in order, each verified.

  Raises:
    TfRecordError: see `index_records`; or a payload whose checksum does not fit.
  """
  offsets = index_records(path)
  with path.open("rb") as file:
    for row, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
      record = file.read(end - start)
      payload, stored = record[_HEADER:-_FOOTER], int.from_bytes(record[-_FOOTER:], "little")
      if masked_crc32c(payload) != stored:
        raise TfRecordError(f"{path}: record {row} does not fit its checksum: its bytes changed")
      yield payload


def check_count(path: Path, found: int, expected: int) -> None:
  """Raises TfRecordError where a file has another number of records than it should."""
  if found != expected:
    raise TfRecordError(
      f"{path} has {found} records, and dataset_info.json says {expected}: the file or "
      "dataset_info.json belongs to another copy"
    )


def masked_crc32c(data: bytes) -> int:
  """The checksum that TFRecord stores."""
  return int(_mask(np.uint32(crc32c(data))))


def crc32c(data: bytes) -> int:
  """CRC-32C; about 100 MB/s."""
  if len(data) < 4:
    crc = 0xFFFFFFFF
    for byte in data:
      crc = int(_byte_table()[(crc ^ byte) & 0xFF]) ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF
  # Zeros before the data change nothing once the initial ones are folded into its first bytes.
  rows = -(-len(data) // _BLOCK)
  padded = np.zeros(rows * _BLOCK, np.uint8)
  padded[-len(data) :] = np.frombuffer(data, np.uint8)
  first = len(padded) - len(data)
  padded[first : first + 4] ^= 0xFF
  crcs = _crc_of_rows(padded.reshape(rows, _BLOCK))
  level = 0
  while len(crcs) > 1:
    if len(crcs) % 2:
      crcs = np.concatenate([np.zeros(1, np.uint32), crcs])
    crcs = _shift(crcs[0::2], _shift_tables(level)) ^ crcs[1::2]
    level += 1
  return int(~crcs[0])


def _mask(crc: Any) -> Any:
  # As 64-bit numbers, so that the sum does not overflow.
  wide = np.asarray(crc).astype(np.uint64)
  turned = ((wide >> np.uint64(15)) | (wide << np.uint64(17))) & np.uint64(0xFFFFFFFF)
  return ((turned + np.uint64(_MASK_DELTA)) & np.uint64(0xFFFFFFFF)).astype(np.uint32)


@functools.cache
def _byte_table() -> np.ndarray:
  table = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    table = np.where(table & 1, np.uint32(_POLYNOMIAL) ^ (table >> 1), table >> 1).astype(np.uint32)
  return table


def _crc_of_rows(rows: np.ndarray) -> np.ndarray:
  """uint8 `[N, M]` → uint32 `[N]`, from an initial 0 and without the final complement."""
  table = _byte_table()
  crcs = np.zeros(len(rows), np.uint32)
  for column in np.ascontiguousarray(rows.T):
    crcs = table[(crcs ^ column) & 0xFF] ^ (crcs >> 8)
  return crcs


@functools.cache
def _shift_tables(level: int) -> np.ndarray:
  """What 2^level blocks of zeros do to a checksum: uint32 `[4, 256]`, one row for each byte."""
  if level == 0:
    tables = np.arange(256, dtype=np.uint32) << np.array([[0], [8], [16], [24]], np.uint32)
    for _ in range(_BLOCK):
      tables = _byte_table()[tables & 0xFF] ^ (tables >> 8)
    return tables
  half = _shift_tables(level - 1)
  return _shift(half, half)


def _shift(crcs: np.ndarray, tables: np.ndarray) -> np.ndarray:
  return (
    tables[0][crcs & 0xFF]
    ^ tables[1][(crcs >> 8) & 0xFF]
    ^ tables[2][(crcs >> 16) & 0xFF]
    ^ tables[3][crcs >> 24]
  )
