"""UPerNet: pyramid pooling of the coarsest level, a feature pyramid above it, all levels fused.

Tete Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018,
arXiv:1807.10221, as mmsegmentation's `UPerHead` has it; the decoder of Swin, ConvNeXt, FocalNet,
SMT, L2ViT and RevCol on ADE20K. Any number of levels from two on is taken; the published form has
four.
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
from hybrid_vit.ops.resize import adaptive_average_pool, resize_bilinear


@register_head("upernet")
class UPerNet(nn.Module):
  """Logits at the stride of the finest level.

  Attributes:
    features: the levels that it reads.
    num_outputs: classes.
    channels: of everything inside; 512, with ViT-B 768.
    pool_scales: bins a side of the pyramid pooling.
    dropout_rate: of whole channels, before the classifier.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation; the classifier is float32.
  """

  features: tuple[FeatureSpec, ...]
  num_outputs: int
  channels: int = 512
  pool_scales: tuple[int, ...] = (1, 2, 3, 6)
  dropout_rate: float = 0.1
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array], train: bool = False) -> jax.Array:
    """Maps `[B, h, w, C]` → float32 `[B, h, w, num_outputs]` of the finest."""
    check_levels("upernet", self.features, 2)
    maps = [endpoints[f.name].astype(self.dtype) for f in self.features]
    levels = [
      conv_norm(self, self.channels, 1, f"lateral{i}")(x, train) for i, x in enumerate(maps[:-1])
    ]
    levels.append(self._pyramid_pooling(maps[-1], train))
    for i in range(len(levels) - 1, 0, -1):
      finer = levels[i - 1]
      levels[i - 1] = finer + resize_bilinear(levels[i], finer.shape[1:3], align_corners=False)
    fused = [
      conv_norm(self, self.channels, 3, f"output{i}")(x, train) for i, x in enumerate(levels[:-1])
    ]
    fused.append(levels[-1])
    size = fused[0].shape[1:3]
    joined = [resize_bilinear(x, size, align_corners=False) for x in fused]
    x = conv_norm(self, self.channels, 3, "fusion")(jnp.concatenate(joined, axis=-1), train)
    x = dropout_channels(self, x, self.dropout_rate, train)
    return classifier(self.num_outputs)(x)

  def _pyramid_pooling(self, x: jax.Array, train: bool) -> jax.Array:
    """The map beside its means over bins (PPM, arXiv:1612.01105), through one convolution."""
    parts = [x]
    for i, bins in enumerate(self.pool_scales):
      pooled = conv_norm(self, self.channels, 1, f"pool{i}")(adaptive_average_pool(x, bins), train)
      parts.append(resize_bilinear(pooled, x.shape[1:3], align_corners=False))
    joined = jnp.concatenate(parts, axis=-1)
    return conv_norm(self, self.channels, 3, "pool_fusion")(joined, train)
