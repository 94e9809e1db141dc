"""One example behind its transform, as the rows that batches are made of."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hybrid_vit.data import spec
from hybrid_vit.data.errors import CorruptExampleError, DataReadError
from hybrid_vit.data.sources import Source

Transform = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]

# Seconds between tries to read an example: a hiccup of a network disk passes, an outage does not.
_WAITS = (0.5, 2.0, 8.0)


class StoppedError(Exception):
  """Nobody waits for the result any more."""


def read_row(
  source: Source,
  index: int,
  transform: Transform,
  fields: Mapping[str, spec.Field],
  key: Any,
  stop: threading.Event,
) -> dict[str, Any]:
  """An example's row of each array of a batch, and what stays on the host, None where it has none.

  Args:
    source: the data; its bytes are asked for several times where need be.
    index: of the example.
    transform: `(example, generator) → example`.
    fields: resolved ones.
    key: seed of the generator.
    stop: ends the waiting for another try.

  Raises:
    CorruptExampleError: the example is corrupt.
    DataReadError: it could not be read in several tries.
    StoppedError: `stop` was set meanwhile.
    ValueError: a field is missing or has another shape; a value is out of its range.
  """
  example = _read(source, index, transform, key, stop)
  row = {}
  for name, field in fields.items():
    if field.stays_on_host:
      row[name] = example.get(name)
      continue
    if name not in example:
      raise ValueError(
        f"{source.describe(index)} has no {name!r} behind the transform; it has: "
        f"{', '.join(sorted(example))}"
      )
    try:
      row[name] = spec.row(field, name, example[name])
    except (ValueError, TypeError) as error:
      raise ValueError(f"{source.describe(index)}: {error}") from error
  return row


def _read(
  source: Source, index: int, transform: Transform, key: Any, stop: threading.Event
) -> dict[str, Any]:
  for wait in (*_WAITS, None):
    try:
      return transform(source[index], np.random.default_rng(key))
    except OSError as error:
      name = source.describe(index)
      if wait is None:
        raise DataReadError(
          f"{name} could not be read in {len(_WAITS) + 1} tries over {sum(_WAITS):g} s: {error}. "
          "The disk or the network fails, or the file is gone since the start; the run can go on "
          "from its last checkpoint once it can be read"
        ) from error
      logging.warning("%s could not be read (%s); trying again in %g s", name, error, wait)
      if stop.wait(wait):
        raise StoppedError from error
    except CorruptExampleError:
      raise
    except Exception as error:
      error.add_note(f"while reading {source.describe(index)}")
      raise
  raise AssertionError
