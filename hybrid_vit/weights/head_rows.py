"""Rows of a pretrained head for the classes of other data: ImageNet-22K's for 1K, for example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrid_vit.data.classes import matching_classes

BY_NAME = "names"


def head_rows(
  mapping: str, old_names: Sequence[str], new_names: Sequence[str], old_width: int, new_width: int
) -> np.ndarray:
  """For each class of the new head, the class of the old one that it continues.

  Args:
    mapping: "names" for the classes that are called alike in both, WordNet numbers and ImageNet's
      words meaning the same; else a file with one line for each new class, a number (counted from
      0) or a name of the old ones, or "-" for none.
    old_names: of the weights' classes; () where they are not known.
    new_names: of the data's; () where they are not known.
    old_width: of the weights' head.
    new_width: of the new one.

  Returns:
    int64 `[new_width]`; -1 where a class begins anew.

  Raises:
    ValueError: names that are not known, a file that cannot be read or says something else, or a
      mapping under which nothing is carried over.
  """
  if mapping == BY_NAME:
    if len(old_names) != old_width or len(new_names) != new_width:
      whose = "weights" if len(old_names) != old_width else "data"
      raise ValueError(
        f"config.carry_head is {BY_NAME!r} and the {whose} do not say what their classes are "
        "called: give a file of numbers instead, one line for each class of the data"
      )
    rows = matching_classes(old_names, new_names)
  else:
    rows = _from_file(Path(mapping).expanduser(), old_names, old_width, new_width)
  if (rows < 0).all():
    raise ValueError(
      f"config.carry_head is {mapping!r}, by which no class of the data is one of the weights': "
      "leave it out, and the head begins anew (config.reinitialize_head = True)"
    )
  return rows


def carry_head(
  weights: Mapping[str, Any], rows: np.ndarray, fresh: Mapping[str, Any]
) -> dict[str, Any]:
  """The weights with a head of the new classes.

  Args:
    weights: {"params", "batch_stats"}.
    rows: see `head_rows`.
    fresh: the new head's own values, for classes that begin anew: {"kernel": `[..., K]`, …}.

  Raises:
    ValueError: the weights have no head, or one of other leaves or another width of features.
  """
  head = weights["params"].get("head", {})
  if set(head) != set(fresh):
    raise ValueError(
      f"config.carry_head: the weights' head has {sorted(head) or 'no leaves'}, the network's "
      f"{sorted(fresh)}"
    )
  new = {}
  for name, old in head.items():
    if old.shape[:-1] != fresh[name].shape[:-1]:
      raise ValueError(
        f"config.carry_head: head/{name} is {tuple(old.shape)} in the weights and "
        f"{tuple(fresh[name].shape)} in the network"
      )
    new[name] = np.where(rows < 0, np.asarray(fresh[name]), np.asarray(old)[..., rows])
  return {**weights, "params": {**weights["params"], "head": new}}


def _from_file(path: Path, names: Sequence[str], old_width: int, new_width: int) -> np.ndarray:
  try:
    lines = path.read_text().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise ValueError(f"config.carry_head: {path} cannot be read: {error}") from error
  entries = [line.strip() for line in lines if line.strip()]
  if len(entries) != new_width:
    raise ValueError(
      f"config.carry_head: {path} has {len(entries)} lines; {new_width} were expected, one for "
      "each class of the data"
    )
  number_of = {name: i for i, name in enumerate(names)}
  rows = np.full(new_width, -1, np.int64)
  for i, entry in enumerate(entries):
    if entry == "-":
      continue
    if entry in number_of:
      rows[i] = number_of[entry]
    elif entry.isascii() and entry.isdecimal() and int(entry) < old_width:
      rows[i] = int(entry)
    else:
      known = f"their names, e.g. {names[0]!r}" if names else "they have no names"
      raise ValueError(
        f"config.carry_head: line {i + 1} of {path} is {entry!r}; a number below {old_width}, the "
        f"width of the weights' head, was expected, or one of {known}"
      )
  return rows
