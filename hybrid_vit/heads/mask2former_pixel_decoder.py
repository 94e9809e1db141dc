"""Mask2Former's pixel decoder: deformable attention over coarse maps, a pyramid step to stride 4.

Cheng et al., "Masked-attention Mask Transformer for Universal Image Segmentation", CVPR 2022,
arXiv:2112.01527, section 3.2 and appendix; follows the authors' `MSDeformAttnPixelDecoder`.

Deviations: padding of pictures within a batch is seen (so it is in the authors' code, whose masks
are all zeros); there is no dropout, whose rate is 0 in all published configurations; the finest map
takes one step of the pyramid whatever its stride is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.heads.deformable import DeformableEncoderLayer, cell_centres
from hybrid_vit.heads.layers import check_levels
from hybrid_vit.heads.sine_positions import sine_positions
from hybrid_vit.models.layers import Conv
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.resize import resize_bilinear

_NORM_EPSILON = 1e-5

# Caffe2's "Xavier": Kaiming uniform with a = 1 over fan_in.
_caffe2_xavier = nn.initializers.variance_scaling(1.0, "fan_in", "uniform")


class PixelMaps(NamedTuple):
  """What the pixel decoder answers.

  Attributes:
    mask_features: `[B, h, w, mask_channels]` at the size of the finest map.
    levels: `[B, h, w, channels]` of the others, the coarsest first.
  """

  mask_features: jax.Array
  levels: tuple[jax.Array, ...]


class PixelDecoder(nn.Module):
  """Maps of a backbone to features of pixels.

  Attributes:
    features: the maps that it reads, the finest first: this one gets the pyramid step, the others
      the attention.
    channels: of everything inside and of `levels`.
    mask_channels: of the mask features.
    num_layers: of deformable attention.
    hidden: width inside their feed-forward parts.
    num_heads: of the attention.
    num_points: that each head samples on each map.
    norm_groups: of the group norms.
    method: of `deformable_attention`.
    remat: recompute each layer in the backward pass instead of storing its inside.
    dtype: of the computation; norm statistics and places are float32.
  """

  features: tuple[FeatureSpec, ...]
  channels: int = 256
  mask_channels: int = 256
  num_layers: int = 6
  hidden: int = 1024
  num_heads: int = 8
  num_points: int = 4
  norm_groups: int = 32
  method: str = "gather"
  remat: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array]) -> PixelMaps:
    """Reads `endpoints[f.name]`, `[B, h, w, C]`, of all `features`."""
    check_levels("mask2former", self.features, 2)
    coarse = [endpoints[f.name] for f in self.features[:0:-1]]
    levels = self._attend([self._projected(x, i) for i, x in enumerate(coarse)])

    finest = endpoints[self.features[0].name]
    lateral = self._conv(self.channels, 1, False, _caffe2_xavier, "lateral")(finest)
    lateral = self._norm("lateral_norm")(lateral)
    x = lateral + resize_bilinear(levels[-1], lateral.shape[1:3], align_corners=False)
    x = self._conv(self.channels, 3, False, _caffe2_xavier, "fusion")(x)
    x = nn.relu(self._norm("fusion_norm")(x))
    x = self._conv(self.mask_channels, 1, True, _caffe2_xavier, "mask_features")(x)
    return PixelMaps(x, tuple(levels))

  def _projected(self, x: jax.Array, level: int) -> jax.Array:
    x = self._conv(self.channels, 1, True, nn.initializers.xavier_uniform(), f"projection{level}")(
      x
    )
    return self._norm(f"projection{level}_norm")(x)

  def _attend(self, maps: list[jax.Array]) -> list[jax.Array]:
    """Maps `[B, h, w, channels]`, the coarsest first, to the same shapes."""
    batch = maps[0].shape[0]
    shapes = tuple((x.shape[1], x.shape[2]) for x in maps)
    embeddings = self.param(
      "level_embedding", nn.initializers.normal(1.0), (len(maps), self.channels), jnp.float32
    )
    positions = jnp.concatenate(
      [flat_positions(shape, self.channels) + embeddings[i] for i, shape in enumerate(shapes)]
    )[None]
    reference = jnp.asarray(cell_centres(shapes))
    x = jnp.concatenate([x.reshape(batch, -1, self.channels) for x in maps], axis=1)
    layer_class = DeformableEncoderLayer
    if self.remat:
      layer_class = nn.remat(layer_class, static_argnums=(4,))  # the sizes
    for i in range(self.num_layers):
      x = layer_class(
        self.hidden,
        self.num_heads,
        self.num_points,
        self.method,
        self.dtype,
        name=f"encoder{i}",
      )(x, positions, reference, shapes)
    cells = [math.prod(shape) for shape in shapes]
    parts = jnp.split(x, np.cumsum(cells)[:-1], axis=1)
    return [part.reshape(batch, *shape, -1) for part, shape in zip(parts, shapes)]

  def _conv(self, features: int, size: int, use_bias: bool, init: Any, name: str) -> nn.Conv:
    pad = size // 2
    return Conv(
      features,
      (size, size),
      padding=((pad, pad), (pad, pad)),
      use_bias=use_bias,
      kernel_init=init,
      dtype=self.dtype,
      name=name,
    )

  def _norm(self, name: str) -> nn.GroupNorm:
    return nn.GroupNorm(
      self.norm_groups,
      epsilon=_NORM_EPSILON,
      use_fast_variance=False,
      dtype=self.dtype,
      name=name,
    )


@functools.cache
def flat_positions(size: tuple[int, int], features: int) -> np.ndarray:
  """Mask2Former's sine positions of a map, float32 `[height * width, features]`."""
  table = sine_positions(size, features, temperature=10000.0, offset=0.0)
  return table.reshape(-1, features)
