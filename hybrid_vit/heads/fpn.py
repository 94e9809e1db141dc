"""FPN: every level of a pyramid with what the coarser ones know.

Tsung-Yi Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, arXiv:1612.03144,
as mmdetection's and mmsegmentation's `FPN` and torchvision's `FeaturePyramidNetwork` have it: no
norm, no activation, nearest resizing to the exact size of the finer map, so that odd sizes fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.heads.layers import check_levels
from hybrid_vit.heads.registry import register_neck
from hybrid_vit.models.layers import Conv
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.resize import resize_nearest

EXTRA_LEVELS = ("none", "max_pool", "on_input", "on_output")
_XAVIER = nn.initializers.xavier_uniform()


@register_neck("fpn")
class FPN(nn.Module):
  """Maps "p2", "p3" … (by their strides: 4 is p2) of equal width.

  Attributes:
    features: the levels that it reads.
    channels: of every map.
    extra: more levels behind the coarsest: "none"; "max_pool", every second row and column of it
      (Mask R-CNN: one); "on_input", strided convolutions from the backbone's coarsest map
      (RetinaNet: two); "on_output", from the coarsest of the results (ATSS: two).
    num_extra: how many of them.
    relu_before_extra: a ReLU before the second of the convolutions and further ones (torchvision
      and detectron2 have it, mmdetection does not).
    dtype: of the computation.
  """

  features: tuple[FeatureSpec, ...]
  channels: int = 256
  extra: str = "none"
  num_extra: int = 0
  relu_before_extra: bool = False
  dtype: Any = jnp.float32

  @property
  def outputs(self) -> tuple[FeatureSpec, ...]:
    """The levels that it gives."""
    strides = [f.stride for f in self.features]
    strides += [strides[-1] * 2 ** (i + 1) for i in range(self.num_extra)]
    return tuple(FeatureSpec(f"p{s.bit_length() - 1}", s, self.channels) for s in strides)

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array], train: bool = False) -> dict[str, Any]:
    """Maps `[B, h, w, C]` → maps `[B, h, w, channels]`."""
    self._check()
    inputs = [endpoints[f.name].astype(self.dtype) for f in self.features]
    maps = [self._conv(1, f"lateral{i}")(x) for i, x in enumerate(inputs)]
    for i in range(len(maps) - 1, 0, -1):
      maps[i - 1] = maps[i - 1] + resize_nearest(maps[i], maps[i - 1].shape[1:3])
    results = [self._conv(3, f"output{i}")(x) for i, x in enumerate(maps)]
    source = inputs[-1] if self.extra == "on_input" else results[-1]
    for i in range(self.num_extra):
      if self.extra == "max_pool":
        source = source[:, ::2, ::2]
      else:
        source = nn.relu(source) if i and self.relu_before_extra else source
        source = self._conv(3, f"extra{i}", stride=2)(source)
      results.append(source)
    return {level.name: x for level, x in zip(self.outputs, results)}

  def _conv(self, size: int, name: str, stride: int = 1) -> nn.Conv:
    pad = (size // 2, size // 2)
    return Conv(
      self.channels,
      (size, size),
      strides=stride,
      padding=(pad, pad),
      kernel_init=_XAVIER,
      dtype=self.dtype,
      name=name,
    )

  def _check(self) -> None:
    check_levels("fpn", self.features, 1)
    if self.extra not in EXTRA_LEVELS:
      raise ValueError(f"fpn: extra is {self.extra!r}; one of {', '.join(EXTRA_LEVELS)}")
    if (self.extra == "none") != (self.num_extra == 0):
      raise ValueError(
        f"fpn: extra is {self.extra!r} and num_extra {self.num_extra}; levels need a rule, and a "
        "rule levels"
      )
