"""FCN: some convolutions on one level, and a classifier. UPerNet's auxiliary head is one.

Jonathan Long et al., "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015,
arXiv:1411.4038, as mmsegmentation's `FCNHead` has it.
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


@register_head("fcn")
class FCN(nn.Module):
  """Logits at the stride of one level.

  Attributes:
    features: the levels that it is given.
    num_outputs: classes.
    level: which of them it reads, from 0; negative ones count from the coarsest.
    channels: of the convolutions.
    num_convs: how many of them there are.
    kernel_size: of each.
    concat_input: whether a further convolution sees the input beside the last one's result.
    dropout_rate: of whole channels, before the classifier.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation; the classifier is float32.
  """

  features: tuple[FeatureSpec, ...]
  num_outputs: int
  level: int = -2
  channels: int = 256
  num_convs: int = 1
  kernel_size: int = 3
  concat_input: bool = False
  dropout_rate: float = 0.1
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array], train: bool = False) -> jax.Array:
    """A map `[B, h, w, C]` → float32 `[B, h, w, num_outputs]`."""
    check_levels("fcn", self.features, 1)
    if not -len(self.features) <= self.level < len(self.features):
      raise ValueError(f"fcn: level is {self.level}, and there are {len(self.features)} levels")
    source = endpoints[self.features[self.level].name].astype(self.dtype)
    x = source
    for i in range(self.num_convs):
      x = conv_norm(self, self.channels, self.kernel_size, f"conv{i}")(x, train)
    if self.concat_input:
      joined = jnp.concatenate([source, x], axis=-1)
      x = conv_norm(self, self.channels, self.kernel_size, "conv_cat")(joined, train)
    x = dropout_channels(self, x, self.dropout_rate, train)
    return classifier(self.num_outputs)(x)
