"""Pyramids from maps of one size, for plain transformers.

"feature2pyramid": mmsegmentation's `Feature2Pyramid`, as BEiT (arXiv:2106.08254) and MAE
(arXiv:2111.06377) feed UPerNet with four blocks of a ViT. "simple_pyramid": ViTDet's (Yanghao Li et
al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022,
arXiv:2203.16527, section 3), from the last map alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.heads.layers import Deconv, check_levels
from hybrid_vit.heads.registry import register_neck
from hybrid_vit.models.layers import Conv, batch_norm, gelu, layer_norm, torch_bias_init
from hybrid_vit.models.registry import FeatureSpec

# ConvTranspose2d's of PyTorch, 2x2 kernels: uniform within 1 / sqrt(4 * out channels).
_DECONV_INIT = nn.initializers.variance_scaling(1 / 3, "fan_out", "uniform")


def _deconv(width: int, dtype: Any, name: str) -> Deconv:
  return Deconv(
    width,
    2,
    2,
    kernel_init=_DECONV_INIT,
    bias_init=torch_bias_init(4 * width),
    dtype=dtype,
    name=name,
  )


@register_neck("feature2pyramid")
class Feature2Pyramid(nn.Module):
  """Four maps of one stride s → strides s/4, s/2, s and 2s, "level0" to "level3", of equal width.

  Fewer than four maps are taken too: the last one then stands for those that are missing.

  Attributes:
    features: one to four levels of one stride and width.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation.
  """

  features: tuple[FeatureSpec, ...]
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @property
  def outputs(self) -> tuple[FeatureSpec, ...]:
    """The levels that it gives."""
    stride, width = self.features[-1].stride, self.features[-1].channels
    strides = (stride // 4, stride // 2, stride, 2 * stride)
    return tuple(FeatureSpec(f"level{i}", s, width) for i, s in enumerate(strides))

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array], train: bool = False) -> dict[str, Any]:
    """Maps `[B, h, w, C]` → maps of the levels' strides."""
    check_levels("feature2pyramid", self.features, 1, 4)
    _check_one_size("feature2pyramid", self.features)
    names = [f.name for f in self.features]
    names += [names[-1]] * (4 - len(names))
    finest, fine, middle, coarse = (endpoints[name].astype(self.dtype) for name in names)
    width = self.features[-1].channels
    x = _deconv(width, self.dtype, "up4_0")(finest)
    x = batch_norm(self, epsilon=1e-5, unbiased_variance=True, name="up4_norm")(x, train)
    x = _deconv(width, self.dtype, "up4_1")(gelu(x))
    y = _deconv(width, self.dtype, "up2")(fine)
    return {"level0": x, "level1": y, "level2": middle, "level3": _max_pool(coarse)}


@register_neck("simple_pyramid")
class SimplePyramid(nn.Module):
  """The last map, of stride s → strides s/4, s/2, s, 2s (and 4s), by their strides "p2" …

  Attributes:
    features: the last of them is read.
    channels: of every map.
    extra: whether there is a further level, every second row and column of the coarsest.
    layer_norm_epsilon: of every layer norm.
    dtype: of the computation.
  """

  features: tuple[FeatureSpec, ...]
  channels: int = 256
  extra: bool = False
  layer_norm_epsilon: float = 1e-6
  dtype: Any = jnp.float32

  @property
  def outputs(self) -> tuple[FeatureSpec, ...]:
    """The levels that it gives."""
    stride = self.features[-1].stride
    strides = [stride // 4, stride // 2, stride, 2 * stride, *([4 * stride] if self.extra else [])]
    return tuple(FeatureSpec(f"p{s.bit_length() - 1}", s, self.channels) for s in strides)

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array], train: bool = False) -> dict[str, Any]:
    """A map `[B, h, w, C]` → maps `[B, …, channels]`."""
    check_levels("simple_pyramid", self.features, 1)
    x = endpoints[self.features[-1].name].astype(self.dtype)
    width = x.shape[-1]
    up2 = _deconv(width // 2, self.dtype, "up2")(x)
    up4 = _deconv(width // 2, self.dtype, "up4_0")(x)
    up4 = gelu(layer_norm(self.layer_norm_epsilon, self.dtype, "up4_norm")(up4))
    up4 = _deconv(width // 4, self.dtype, "up4_1")(up4)
    results = []
    for level, y in zip(self.outputs, (up4, up2, x, _max_pool(x))):
      for i, size in enumerate((1, 3)):
        name, pad = f"{level.name}_conv{i}", (size // 2, size // 2)
        y = Conv(
          self.channels,
          (size, size),
          padding=(pad, pad),
          use_bias=False,
          kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
          dtype=self.dtype,
          name=name,
        )(y)
        y = layer_norm(self.layer_norm_epsilon, self.dtype, f"{level.name}_norm{i}")(y)
      results.append(y)
    if self.extra:
      results.append(results[-1][:, ::2, ::2])
    return {level.name: y for level, y in zip(self.outputs, results)}


def _check_one_size(name: str, features: tuple[FeatureSpec, ...]) -> None:
  first = features[0]
  for feature in features:
    if (feature.stride, feature.channels) != (first.stride, first.channels):
      raise ValueError(
        f"{name} takes maps of one size; {first.name} has stride {first.stride} and "
        f"{first.channels} channels, {feature.name} {feature.stride} and {feature.channels}"
      )


def _max_pool(x: jax.Array) -> jax.Array:
  """2x2, what does not fill a window is cut off."""
  return nn.max_pool(x, (2, 2), strides=(2, 2), padding="VALID")
