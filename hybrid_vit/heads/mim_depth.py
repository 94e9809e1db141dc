"""Depth from the last map alone: transposed convolutions, a convolution and two resizings.

Zhenda Xie et al., "Revealing the Dark Secrets of Masked Image Modeling", CVPR 2023,
arXiv:2205.13543, appendix; follows the authors' SwinTransformer/MIM-Depth-Estimation
(`models/model.py`). The decoder is that of Simple Baselines (arXiv:1804.06208).

Additions: the number of transposed convolutions follows from the map's stride where `num_filters`
is not given (three from stride 32 as published, two from a ViT's 16), and the width from the map's
channels: an eighth, which is `embed_dim` of a Swin Transformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.heads.depth_layers import bounded_depth, check_depth_head, conv
from hybrid_vit.heads.layers import Deconv, check_levels
from hybrid_vit.heads.registry import register_head
from hybrid_vit.models.layers import batch_norm
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.resize import resize_bilinear

_INIT = nn.initializers.normal(0.001)
_BATCH_NORM_EPSILON = 1e-5
_FILTERS = 32
_RESIZINGS = 2
# Kernel: rows cut off on each side, rows more at the end; each doubles the map exactly.
_PADDINGS = {2: (0, 0), 3: (1, 1), 4: (1, 0)}


@register_head("mim_depth")
class MIMDepth(nn.Module):
  """Depth in metres, sigmoid times the farthest.

  Attributes:
    features: the last of them is read.
    num_outputs: 1.
    max_depth: metres; 10 for NYU Depth v2, 80 for KITTI.
    num_filters: channels behind each transposed convolution; None for 32 each, as many as lead to
      stride 4 (none where it is finer), from where two resizings lead to stride 1.
    kernels: side of each transposed convolution's kernel, 2, 3 or 4; None for 2 each.
    channels: of the convolutions behind them; None for an eighth of the map's channels.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation; the last convolution and the sigmoid are float32.

  Raises (in a call):
    ValueError: a kernel of another size, not one kernel for each of `num_filters`, or what
      `check_depth_head` raises.
  """

  features: tuple[FeatureSpec, ...]
  num_outputs: int = 1
  max_depth: float = 10.0
  num_filters: tuple[int, ...] | None = None
  kernels: tuple[int, ...] | None = None
  channels: int | None = None
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array], train: bool = False) -> jax.Array:
    """Map `[B, h, w, C]` → float32 `[B, 4 * 2^n h, 4 * 2^n w, 1]`, n transposed convolutions."""
    check_depth_head("mim_depth", self)
    check_levels("mim_depth", self.features, 1)
    filters, kernels = self._deconvs()
    x = endpoints[self.features[-1].name].astype(self.dtype)
    channels = self.channels or max(x.shape[-1] // 8, 1)
    for i, (width, size) in enumerate(zip(filters, kernels)):
      padding, output_padding = _PADDINGS[size]
      x = Deconv(
        width,
        size,
        2,
        padding,
        output_padding,
        use_bias=False,
        kernel_init=_INIT,
        dtype=self.dtype,
        name=f"deconv{i}",
      )(x)
      x = nn.relu(self._norm(f"deconv{i}_norm")(x, train))
    x = conv(channels, 3, "conv", kernel_init=_INIT, dtype=self.dtype)(x)
    x = nn.relu(self._norm("conv_norm")(x, train))
    for _ in range(_RESIZINGS):
      x = resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=False)
    self.sow("intermediates", "decoded", x)
    x = nn.relu(conv(channels, 3, "depth_conv", kernel_init=_INIT, dtype=self.dtype)(x))
    return bounded_depth(conv(1, 3, "depth", kernel_init=_INIT)(x), self.max_depth)

  def _norm(self, name: str) -> Any:
    return batch_norm(self, epsilon=_BATCH_NORM_EPSILON, unbiased_variance=True, name=name)

  def _deconvs(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Channels and kernels of the transposed convolutions."""
    filters = self.num_filters
    if filters is None:
      doublings = self.features[-1].stride.bit_length() - 1 - _RESIZINGS
      filters = (_FILTERS,) * (max(doublings, 0) if self.kernels is None else len(self.kernels))
    kernels = (2,) * len(filters) if self.kernels is None else self.kernels
    if len(kernels) != len(filters):
      raise ValueError(
        f"mim_depth: num_filters has {len(filters)} values {filters} and kernels {len(kernels)} "
        f"values {kernels}; one each for every transposed convolution was expected"
      )
    wrong = [size for size in kernels if size not in _PADDINGS]
    if wrong:
      raise ValueError(f"mim_depth: a kernel of {wrong[0]}; 2, 3 or 4 was expected")
    return tuple(filters), tuple(kernels)
