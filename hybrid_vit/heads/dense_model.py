"""A backbone of the registry with a decoder: what segmentation and depth train.

backbone → its pyramid → neck, where there is one → head; an auxiliary head reads the neck's maps,
or the backbone's where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.heads.batch_norm_groups import groups_of, with_groups
from hybrid_vit.heads.registry import create_head, create_neck, head_arguments, neck_arguments
from hybrid_vit.models.registry import FeatureSpec

# What heads and necks take from the run where they have it.
_SHARED = ("batch_norm_groups", "dtype")
_PARTS = ("backbone", "neck", "head", "auxiliary_head")


class DenseModel(nn.Module):
  """One map of each picture, coarser than it by the stride of the head.

  Its parameters lie under "backbone", "neck", "head" and "auxiliary_head".

  Attributes:
    backbone: of the registry's contract, without a head.
    head: over the neck's pyramid, else the backbone's.
    neck: between the two, or None.
    auxiliary_head: a further head, read in training only, or None.
  """

  backbone: nn.Module
  head: nn.Module
  neck: nn.Module | None = None
  auxiliary_head: nn.Module | None = None

  @property
  def batch_norm_groups(self) -> int:
    """See `heads.batch_norm_groups`."""
    return groups_of(self, *_PARTS)

  def with_batch_norm_groups(self, groups: int) -> DenseModel:
    """See `heads.batch_norm_groups`."""
    return with_groups(self, groups, *_PARTS)

  def __call__(self, images: jax.Array, train: bool = False) -> tuple[Any, dict[str, Any]]:
    """`[B, H, W, 3]` → float32 `[B, h, w, K]`, or what else the head gives, and endpoints.

    Among these are "answer", "auxiliary" in training, and "bin_centers" of a head that has bins.
    """
    _, endpoints = self.backbone(images, train=train)
    maps = endpoints
    if self.neck is not None:
      maps = {**endpoints, **self.neck(endpoints, train)}
    found = dict(maps)
    if hasattr(self.head, "num_bins"):
      answer, found["bin_centers"] = self.head(maps, train, with_bins=True)
    else:
      answer = self.head(maps, train)
    # A half-precision backbone must not make a half-precision answer.
    found["answer"] = answer = jax.tree.map(lambda x: x.astype(jnp.float32), answer)
    if self.auxiliary_head is not None and (train or self.is_initializing()):
      found["auxiliary"] = self.auxiliary_head(maps, train).astype(jnp.float32)
    return answer, found


def create_dense_model(
  backbone: nn.Module,
  num_outputs: int,
  *,
  head: Mapping[str, Any],
  neck: Mapping[str, Any] | None = None,
  auxiliary: Mapping[str, Any] | None = None,
  batch_norm_groups: int | None = None,
) -> DenseModel:
  """Puts a decoder on a backbone.

  A backbone whose maps have all one stride (a plain transformer) gets the neck "feature2pyramid"
  where none is named and the head asks for several levels.

  Args:
    backbone: with `features`; built with `num_classes=0`.
    num_outputs: of both heads.
    head: {"name": as registered, further attributes}.
    neck: likewise, or None.
    auxiliary: likewise, or None.
    batch_norm_groups: of the decoder's batch norms; None for what the backbone has.

  Raises:
    ValueError: an unknown name or attribute.
  """
  shared = shared_attributes(backbone, batch_norm_groups)
  parts = dict(head)
  head_name = parts.pop("name")
  made_neck, features = neck_over(backbone, neck, head_name, shared)
  made = create_head(
    head_name, features, num_outputs, **with_shared(shared, head_arguments(head_name), parts)
  )
  made_auxiliary = None
  if auxiliary is not None:
    own = dict(auxiliary)
    name = own.pop("name")
    made_auxiliary = create_head(
      name, features, num_outputs, **with_shared(shared, head_arguments(name), own)
    )
  return DenseModel(backbone, made, made_neck, made_auxiliary)


def neck_over(
  backbone: nn.Module, neck: Mapping[str, Any] | None, head: str, shared: Mapping[str, Any]
) -> tuple[nn.Module | None, Sequence[FeatureSpec]]:
  """The neck on a backbone, or None, and the levels that a head named `head` reads.

  See `create_dense_model`; `shared` is what the neck takes from the run where it has it.
  """
  features: Sequence[FeatureSpec] = tuple(backbone.features)
  if neck is None and needs_pyramid(features, head):
    neck = {"name": "feature2pyramid"}
  if neck is None:
    return None, features
  parts = dict(neck)
  name = parts.pop("name")
  made = create_neck(name, features, **with_shared(shared, neck_arguments(name), parts))
  return made, made.outputs


def needs_pyramid(features: Sequence[FeatureSpec], head: str) -> bool:
  """Whether maps of one stride have to become a pyramid for this head."""
  one_stride = len({f.stride for f in features}) == 1
  return one_stride and len(features) < _ONE_STRIDE.get(head, len(features) + 1)


# Heads that take maps of one stride as they are, from so many on.
_ONE_STRIDE = {"fcn": 2, "mim_depth": 1, "dpt_depth": 2, "dpt_segmentation": 2}


def shared_attributes(backbone: nn.Module, batch_norm_groups: int | None) -> dict[str, Any]:
  """What heads and necks take from the run: the backbone's, and these groups where not None."""
  shared = {name: getattr(backbone, name) for name in _SHARED if hasattr(backbone, name)}
  return shared if batch_norm_groups is None else {**shared, "batch_norm_groups": batch_norm_groups}


def with_shared(
  shared: Mapping[str, Any], known: Sequence[str], own: Mapping[str, Any]
) -> dict[str, Any]:
  """A part's own attributes, and those of the run that it has (`known`)."""
  return {**{name: value for name, value in shared.items() if name in known}, **own}
