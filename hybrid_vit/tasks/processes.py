"""Evaluation of which each process does its own part: variables for it alone, and exact sums."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def local_variables(variables: Any) -> Any:
  """Variables that this process alone can compute with.

  Those of one process are taken as they lie; those of several are gathered and copied to each of
  this process's devices.
  """
  if jax.process_count() == 1:
    return variables
  whole = multihost_utils.process_allgather(variables, tiled=True)
  mesh = Mesh(np.array(jax.local_devices()), ("data",))
  return jax.device_put(whole, NamedSharding(mesh, PartitionSpec()))


def summed_over_processes(counts: Mapping[str, np.ndarray], part: int) -> dict[str, np.ndarray]:
  """Sums over processes in the type of the counts; processes of one part count once.

  Args:
    counts: float64 or whole-number arrays, of the same shapes on every process.
    part: which part of the data this process has read.
  """
  rows = gathered_over_processes([counts], part)
  return {name: np.sum([row[name] for row in rows], axis=0) for name in counts}


def gathered_over_processes(items: list[Any], part: int) -> list[Any]:
  """All processes' lists in one, on each of them; processes of one part count once.

  Args:
    items: what can be pickled.
    part: which part of the data this process has read.
  """
  if jax.process_count() == 1:
    return items
  packed = np.frombuffer(pickle.dumps((part, items)), np.uint8)
  lengths = multihost_utils.process_allgather(np.asarray(len(packed), np.int32))
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[: len(packed)] = packed
  rows = multihost_utils.process_allgather(padded)
  by_part: dict[int, list[Any]] = {}
  for row, length in zip(rows, lengths):
    other, found = pickle.loads(np.asarray(row[: int(length)]).tobytes())
    by_part.setdefault(other, found)
  return [item for key in sorted(by_part) for item in by_part[key]]
