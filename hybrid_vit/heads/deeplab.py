"""DeepLabV3+: atrous convolutions of several rates, and a decoder with one fine level.

Liang-Chieh Chen et al., "Encoder-Decoder with Atrous Separable Convolution for Semantic Image
Segmentation", ECCV 2018, arXiv:1802.02611, as deeplab2's `DeepLabV3Plus` has it (its ASPP is of
dense 3x3 convolutions): the decoder of MOAT's and tiny-MOAT's models on ADE20K.

Not known: with which rates on their map of stride 32 MOAT's authors trained; these are deeplab2's
for stride 16. Sizes of pictures are best 2^k n + 1 (513, 641), so that the corners stay aligned.

Difference: kernels begin He-normal by their fan out, as in the other heads; deeplab2's are
truncated normal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.heads.layers import check_levels, classifier, conv_norm
from hybrid_vit.heads.registry import register_head
from hybrid_vit.models.layers import DepthwiseConv, batch_norm
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.resize import resize_bilinear

_EPSILON = 1e-3
# deeplab2's batch norm: TensorFlow's running variance is the batch's own.
_NORM: dict[str, Any] = {"epsilon": _EPSILON, "unbiased_variance": False}


@register_head("deeplabv3plus")
class DeepLabV3Plus(nn.Module):
  """Logits at the stride of the finest level.

  Attributes:
    features: the levels that it is given; it reads the finest and the coarsest.
    num_outputs: classes.
    aspp_channels: of the atrous convolutions.
    atrous_rates: of the three.
    low_level_channels: to which the fine level is brought.
    decoder_channels: of the two separable convolutions.
    dropout_rate: behind the atrous convolutions.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation; the classifier is float32.
  """

  features: tuple[FeatureSpec, ...]
  num_outputs: int
  aspp_channels: int = 256
  atrous_rates: tuple[int, ...] = (6, 12, 18)
  low_level_channels: int = 48
  decoder_channels: int = 256
  dropout_rate: float = 0.1
  batch_norm_momentum: float = 0.99
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array], train: bool = False) -> jax.Array:
    """Maps `[B, h, w, C]` → float32 `[B, h, w, num_outputs]` of the finest."""
    check_levels("deeplabv3plus", self.features, 2)
    low = endpoints[self.features[0].name].astype(self.dtype)
    high = self.aspp(endpoints[self.features[-1].name].astype(self.dtype), train)
    low = conv_norm(self, self.low_level_channels, 1, "low_level", **_NORM)(low, train)
    high = resize_bilinear(high, low.shape[1:3], align_corners=True)
    x = jnp.concatenate([high, low], axis=-1)
    for i in range(2):
      x = self._separable(x, f"decoder{i}", train)
    return classifier(self.num_outputs)(x)

  def aspp(self, x: jax.Array, train: bool) -> jax.Array:
    """Atrous spatial pyramid pooling, `[B, h, w, C]` → `[B, h, w, aspp_channels]`."""
    conv = functools.partial(conv_norm, self, self.aspp_channels, **_NORM)
    y = atrous_pyramid(conv, x, self.atrous_rates, train)
    return nn.Dropout(self.dropout_rate, deterministic=not train, name="aspp_dropout")(y)

  def _separable(self, x: jax.Array, name: str, train: bool) -> jax.Array:
    """A depthwise 3x3 and a 1x1 convolution, each with batch norm and ReLU."""
    y = DepthwiseConv(
      (3, 3),
      stride=1,
      padding=((1, 1), (1, 1)),
      use_bias=False,
      kernel_init=nn.initializers.variance_scaling(2.0, "fan_in", "normal"),
      dtype=self.dtype,
      name=f"{name}_depthwise",
    )(x)
    y = nn.relu(batch_norm(self, name=f"{name}_depthwise_norm", **_NORM)(y, train))
    return conv_norm(self, self.decoder_channels, 1, f"{name}_pointwise", **_NORM)(y, train)


def atrous_pyramid(
  conv: Callable[..., Any], x: jax.Array, rates: Sequence[int], train: bool
) -> jax.Array:
  """Convolutions of several rates and the mean of the map, joined by one more convolution.

  Args:
    conv: `(kernel_size, name, dilation=…) → layer`, which is called as `layer(x, train)`.
    x: `[B, h, w, C]`.
    rates: of the 3x3 convolutions.
    train: passed on.

  Returns:
    `[B, h, w, features]` of the convolutions.
  """
  parts = [conv(1, "aspp_conv")(x, train)]
  for i, rate in enumerate(rates):
    parts.append(conv(3, f"aspp_atrous{i}", dilation=rate)(x, train))
  mean = x.mean((1, 2), keepdims=True, dtype=jnp.float32).astype(x.dtype)
  pooled = conv(1, "aspp_pool")(mean, train)
  parts.append(jnp.broadcast_to(pooled, (*x.shape[:3], pooled.shape[-1])))
  return conv(1, "aspp_projection")(jnp.concatenate(parts, axis=-1), train)
