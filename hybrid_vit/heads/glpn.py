"""GLPN: four maps fused from the coarsest on, each pixel choosing between local and global.

Doyeon Kim et al., "Global-Local Path Networks for Monocular Depth Estimation with Vertical
CutDepth", arXiv:2201.07436, section 3; follows vinvino02/GLPDepth as transformers
(`models/glpn`) has it.

Differences: a map is resized to the size of the next finer one, which is twice its own but for odd
sizes, where the authors' code fails; any number of maps is taken, not only four. Kernels begin
normal with 0.02, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.heads.depth_layers import bounded_depth, check_depth_head, conv
from hybrid_vit.heads.layers import check_levels
from hybrid_vit.heads.registry import register_head
from hybrid_vit.models.layers import PointwiseConv, batch_norm
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.resize import resize_bilinear

_INIT = nn.initializers.normal(0.02)
_BATCH_NORM_EPSILON = 1e-5


@register_head("glpn")
class GLPN(nn.Module):
  """Depth in metres, sigmoid times the farthest, at a quarter of the finest map's stride.

  Attributes:
    features: the levels, the finest first.
    num_outputs: 1.
    max_depth: metres; 10 for NYU Depth v2, 80 for KITTI.
    channels: of everything inside; a map that has as many is taken without a convolution. Even.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation; the last convolution and the sigmoid are float32.

  Raises (in a call):
    ValueError: an odd number of channels, no map, or what `check_depth_head` raises.
  """

  features: tuple[FeatureSpec, ...]
  num_outputs: int = 1
  max_depth: float = 10.0
  channels: int = 64
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array], train: bool = False) -> jax.Array:
    """Maps `[B, h, w, C]` → float32 `[B, 4h, 4w, 1]` of the finest."""
    check_depth_head("glpn", self)
    check_levels("glpn", self.features, 1)
    if self.channels % 2:
      raise ValueError(f"glpn: channels is {self.channels}; an even number was expected")
    maps = [endpoints[f.name].astype(self.dtype) for f in reversed(self.features)]
    # Stages are counted from the coarsest, as in the authors' names.
    x: Any = None
    for i, local in enumerate(maps):
      if local.shape[-1] != self.channels:
        local = PointwiseConv(
          self.channels, kernel_init=_INIT, dtype=self.dtype, name=f"stage{i}_conv"
        )(local)
      x = local if x is None else self._fused(local, x, train, f"stage{i}_fusion")
      finer = i + 1 < len(maps)
      x = _resized(x, maps[i + 1].shape[1:3] if finer else _doubled(x))
      if finer:
        self.sow("intermediates", f"stage{i}", x)
    x = _resized(x, _doubled(x))
    self.sow("intermediates", f"stage{len(maps) - 1}", x)
    x = nn.relu(conv(self.channels, 3, "depth_conv", kernel_init=_INIT, dtype=self.dtype)(x))
    return bounded_depth(conv(1, 3, "depth", kernel_init=_INIT)(x), self.max_depth)

  def _fused(self, local: jax.Array, coarse: jax.Array, train: bool, name: str) -> jax.Array:
    """Selective feature fusion (section 3.4): two weights in each cell, not summing to 1."""
    y = jnp.concatenate([local, coarse], axis=-1)
    for j, width in enumerate((self.channels, self.channels // 2)):
      y = conv(width, 3, f"{name}_conv{j}", kernel_init=_INIT, dtype=self.dtype)(y)
      norm = batch_norm(
        self, epsilon=_BATCH_NORM_EPSILON, unbiased_variance=True, name=f"{name}_norm{j}"
      )
      y = nn.relu(norm(y, train))
    y = conv(2, 3, f"{name}_conv2", kernel_init=_INIT, dtype=self.dtype)(y)
    weights = jax.nn.sigmoid(y.astype(jnp.float32)).astype(self.dtype)
    return local * weights[..., :1] + coarse * weights[..., 1:]


def _doubled(x: jax.Array) -> tuple[int, int]:
  return 2 * x.shape[1], 2 * x.shape[2]


def _resized(x: jax.Array, size: tuple[int, ...]) -> jax.Array:
  return resize_bilinear(x, size, align_corners=False)
