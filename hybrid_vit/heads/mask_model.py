"""Any backbone of the registry under a head that predicts a class and a mask of each query.

backbone → its pyramid → neck, where there is one → head: a `DenseModel` whose answer is a dict, see
`heads.mask2former.Mask2Former` and `heads.kmax.KMaX`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from hybrid_vit.heads.dense_model import DenseModel, neck_over, shared_attributes, with_shared
from hybrid_vit.heads.kmax import KMaX
from hybrid_vit.heads.mask2former import Mask2Former
from hybrid_vit.heads.registry import as_attribute, check_arguments, find_in

# By the name in a configuration.
_HEADS: Mapping[str, type[nn.Module]] = {"mask2former": Mask2Former, "kmax": KMaX}


def create_mask_model(
  backbone: nn.Module,
  num_classes: int,
  *,
  head: Mapping[str, Any],
  neck: Mapping[str, Any] | None = None,
  batch_norm_groups: int | None = None,
) -> DenseModel:
  """Puts the head on a backbone.

  Args:
    backbone: with `features`; built with `num_classes=0`.
    num_classes: without "no object".
    head: {"name": "mask2former" or "kmax", further attributes}.
    neck: {"name": as registered, further attributes}; None for none, or for what a plain
      transformer needs.
    batch_norm_groups: of the neck's batch norms; None for what the backbone has.

  Raises:
    ValueError: an unknown name or attribute, or a backbone without a pyramid.
  """
  if not hasattr(backbone, "features"):
    raise ValueError(f"{type(backbone).__name__} has no `features` for a decoder to read")
  parts = dict(head)
  name = parts.pop("name")
  head_class: Any = find_in(_HEADS, name, "head of masks")
  fields = [f.name for f in dataclasses.fields(head_class)]
  known = [n for n in fields if n not in ("parent", "name", "features", "num_outputs")]
  check_arguments(parts, known, name, "head")
  shared = shared_attributes(backbone, batch_norm_groups)
  made_neck, features = neck_over(backbone, neck, name, shared)
  attributes = {k: as_attribute(v) for k, v in with_shared(shared, known, parts).items()}
  made = head_class(features=tuple(features), num_outputs=num_classes, **attributes)
  return DenseModel(backbone, made, made_neck)
