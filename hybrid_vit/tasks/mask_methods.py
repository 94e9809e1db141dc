"""What goes with each head of masks: its losses, their settings, and its rules for pictures.

The heads themselves are those of `heads.mask_model`, by the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from hybrid_vit.config import Config
from hybrid_vit.heads.registry import find_in
from hybrid_vit.mask_rules import KMAX, MASK2FORMER, MaskRules
from hybrid_vit.tasks.kmax_losses import KMaXLoss, kmax_losses
from hybrid_vit.tasks.mask2former_losses import Mask2FormerLoss, mask2former_losses

_T = TypeVar("_T")


class MaskMethod(NamedTuple):
  """How a head is trained and asked.

  Attributes:
    loss_settings: the class of the third argument of `losses`.
    losses: `(answer, targets, settings, key)` → named losses, float32 `[predictions]`, the last
      prediction's at the end; the loss is the sum of all.
    rules: how its answers become segments.
    separable: whether the loss of a batch is the mean of those of its parts.
  """

  loss_settings: type
  losses: Callable[..., dict[str, jax.Array]]
  rules: MaskRules
  separable: bool


_METHODS: Mapping[str, MaskMethod] = {
  # Divided by the batch's own numbers of queries and segments.
  "mask2former": MaskMethod(Mask2FormerLoss, mask2former_losses, MASK2FORMER, separable=False),
  # A mean over pictures.
  "kmax": MaskMethod(KMaXLoss, kmax_losses, KMAX, separable=True),
}


def method_of(head: str) -> MaskMethod:
  """By the name of the head.

  Raises:
    ValueError: an unknown name; the message gives the closest.
  """
  return find_in(_METHODS, head, "head of masks")


def read_settings(given: Mapping[str, Any], kind: type[_T], path: str) -> _T:
  """The fields that a configuration gives at `path` as settings that its head decides.

  Raises:
    ConfigError: an unknown field, or a value of another type; the message names it.
    ValueError: a value that cannot be.
  """
  group = Config(given, path)
  made = group.as_dataclass(kind)
  group.assert_all_read()
  return made
