"""Semantic FPN: every level brought to the finest by convolutions and doublings, and summed.

Alexander Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, arXiv:1901.02446, section
3.1, as mmsegmentation's `FPNHead` has it, with batch norm (the paper has group norm). It stands
behind the neck "fpn".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.heads.layers import check_levels, classifier, conv_norm, dropout_channels
from hybrid_vit.heads.registry import register_head
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.resize import resize_bilinear


@register_head("semantic_fpn")
class SemanticFPN(nn.Module):
  """Logits at the stride of the finest level.

  Attributes:
    features: the levels that it reads; each stride is a power of two times the finest.
    num_outputs: classes.
    channels: of the branches.
    dropout_rate: of whole channels, before the classifier.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation; the classifier is float32.
  """

  features: tuple[FeatureSpec, ...]
  num_outputs: int
  channels: int = 128
  dropout_rate: float = 0.1
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array], train: bool = False) -> jax.Array:
    """Maps `[B, h, w, C]` → float32 `[B, h, w, num_outputs]` of the finest."""
    check_levels("semantic_fpn", self.features, 1)
    finest = self.features[0].stride
    total: Any = None
    for level, feature in enumerate(self.features):
      x = endpoints[feature.name].astype(self.dtype)
      doublings = max(feature.stride // finest, 1).bit_length() - 1
      for i in range(max(doublings, 1)):
        x = conv_norm(self, self.channels, 3, f"level{level}_conv{i}")(x, train)
        if doublings:
          size = (2 * x.shape[1], 2 * x.shape[2])
          x = resize_bilinear(x, size, align_corners=False)
      if total is None:
        total = x
      else:
        total = total + resize_bilinear(x, total.shape[1:3], align_corners=False)
    total = dropout_channels(self, total, self.dropout_rate, train)
    return classifier(self.num_outputs)(total)
