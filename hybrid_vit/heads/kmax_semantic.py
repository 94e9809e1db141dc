"""kMaX-DeepLab's auxiliary semantic decoder, which training alone reads.

Panoptic-DeepLab's decoder and head (arXiv:1911.10194) of one branch, as kMaX's authors have them
(`SemanticPredictor`): atrous pooling of the coarsest map and two steps to finer ones, with kMaX's
norms and GELUs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.heads.deeplab import atrous_pyramid
from hybrid_vit.heads.kmax_layers import (
  BATCH_NORM_MOMENTUM,
  depthwise_pair,
  normed_conv,
  resize_map,
  truncated_normal,
)
from hybrid_vit.models.layers import PointwiseConv
from hybrid_vit.models.registry import FeatureSpec

_ATROUS_RATES = (6, 12, 18)
_DROPOUT_RATE = 0.1


class SemanticDecoder(nn.Module):
  """Logits of classes at the finest map.

  Attributes:
    features: three maps, the finest first; published: strides 4, 8 and 32.
    num_outputs: channels of the result.
    channels: of everything inside.
    low_level_channels: to which the finer maps are brought, the finest first.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation; logits and norm statistics are float32.
  """

  features: tuple[FeatureSpec, ...]
  num_outputs: int
  channels: int = 256
  low_level_channels: tuple[int, int] = (32, 64)
  batch_norm_momentum: float = BATCH_NORM_MOMENTUM
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array], train: bool = False) -> jax.Array:
    """Maps `[B, h, w, C]` → float32 `[B, h, w, num_outputs]` of the finest."""
    *fine, coarse = (endpoints[f.name].astype(self.dtype) for f in self.features)
    side = coarse.shape[2]

    def conv(kernel_size: int, name: str, **options: Any) -> nn.Module:
      return normed_conv(self, self.channels, kernel_size, name, **options)

    x = atrous_pyramid(conv, coarse, _ATROUS_RATES, train)
    x = nn.Dropout(_DROPOUT_RATE, deterministic=not train, name="aspp_dropout")(x)
    pair = functools.partial(depthwise_pair, self, features=self.channels, train=train)
    for i in (1, 0):
      low = normed_conv(self, self.low_level_channels[i], 1, f"low_level{i}")(fine[i], train)
      x = jnp.concatenate([resize_map(x, low.shape[1:3], side), low], axis=-1)
      x = pair(x, names=(f"fusion{i}_depthwise", f"fusion{i}"))
    x = pair(x, names=("hidden_depthwise", "hidden"))
    return PointwiseConv(
      self.num_outputs,
      kernel_init=truncated_normal(0.01),
      dtype=jnp.float32,
      name="classifier",
    )(x)
