"""SegFormer's head: each level through a linear layer, all at the finest size, mixed by another.

Enze Xie et al., "SegFormer", NeurIPS 2021, arXiv:2105.15203, section 3.2, as transformers'
`SegformerDecodeHead` has it: the light choice for any backbone. 256 channels are those of B0 and
B1, 768 of the larger ones.

Difference: dropout drops single values there and in mmsegmentation whole channels; whole channels
here, as in the other heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.heads.layers import check_levels, classifier, conv_norm, dropout_channels
from hybrid_vit.heads.registry import register_head
from hybrid_vit.models.layers import PointwiseConv
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.resize import resize_bilinear


@register_head("segformer")
class SegFormerHead(nn.Module):
  """Logits at the stride of the finest level.

  Attributes:
    features: the levels that it reads.
    num_outputs: classes.
    channels: of everything inside.
    dropout_rate: of whole channels, before the classifier.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation; the classifier is float32.
  """

  features: tuple[FeatureSpec, ...]
  num_outputs: int
  channels: int = 256
  dropout_rate: float = 0.1
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array], train: bool = False) -> jax.Array:
    """Maps `[B, h, w, C]` → float32 `[B, h, w, num_outputs]` of the finest."""
    check_levels("segformer", self.features, 1)
    size = endpoints[self.features[0].name].shape[1:3]
    parts = []
    for i, feature in enumerate(self.features):
      x = endpoints[feature.name].astype(self.dtype)
      x = PointwiseConv(
        self.channels,
        kernel_init=nn.initializers.normal(0.02),
        dtype=self.dtype,
        name=f"linear{i}",
      )(x)
      parts.append(resize_bilinear(x, size, align_corners=False))
    # The coarsest first, as the authors join them.
    joined = jnp.concatenate(parts[::-1], axis=-1)
    x = conv_norm(self, self.channels, 1, "fusion")(joined, train)
    x = dropout_channels(self, x, self.dropout_rate, train)
    return classifier(self.num_outputs)(x)
