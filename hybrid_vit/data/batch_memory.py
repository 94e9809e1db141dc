"""Memory of batches that comes back when nobody holds the batch any more.

A wide batch is above what the allocator keeps: each one would be mapped anew, and its pages zeroed
one by one under the threads that fill it.
"""

from __future__ import annotations

import collections
import math
import threading
import weakref
from typing import Any

import numpy as np

# Smaller arrays are the allocator's; so many unused ones of one size are kept.
_SMALL = 2**20
_KEPT = 4


class BatchMemory:
  """Makes arrays as `np.empty` does; safe with threads.

  An array's memory is taken again once the array and all views of it are gone. A JAX array that
  shares it, and a transfer to a device, hold one.
  """

  def __init__(self) -> None:
    self._unused: dict[int, collections.deque[np.ndarray]] = {}
    self._lock = threading.Lock()

  def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of the shape and type, whose values are whatever was there."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < _SMALL:
      return np.empty(shape, dtype)
    with self._lock:
      unused = self._unused.setdefault(size, collections.deque(maxlen=_KEPT))
      memory = unused.pop() if unused else np.empty(size, np.uint8)
    # What views of an array over a memoryview hold is that array, not what lies under it.
    owner = np.frombuffer(memory.data, dtype)
    weakref.finalize(owner, unused.append, memory).atexit = False
    return owner.reshape(shape)
