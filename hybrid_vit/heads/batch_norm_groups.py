"""Groups of the batch with batch norm statistics of their own, alike in all parts of a model.

A part that has batch norm, has an attribute `batch_norm_groups`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn


def groups_of(model: nn.Module, *names: str) -> int:
  """The number of groups that the parts of these names have."""
  parts = [part for name in names for part in _as_parts(getattr(model, name))]
  return max((getattr(part, "batch_norm_groups", 1) for part in parts), default=1)


def with_groups(model: Any, groups: int, *names: str) -> Any:
  """The same model with another number of groups in each of these parts that has batch norm."""

  def regrouped(part: Any) -> Any:
    if isinstance(part, tuple):
      return tuple(map(regrouped, part))
    return part.clone(batch_norm_groups=groups) if hasattr(part, "batch_norm_groups") else part

  return model.clone(**{name: regrouped(getattr(model, name)) for name in names})


def _as_parts(part: Any) -> tuple[Any, ...]:
  return part if isinstance(part, tuple) else (part,)
