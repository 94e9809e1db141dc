"""DPT: tokens of four blocks put together as maps, fused from the coarsest on; depth or classes.

René Ranftl et al., "Vision Transformers for Dense Prediction", ICCV 2021, arXiv:2103.13413,
section 3 and the supplement; follows transformers (`models/dpt`), which the published weights are
kept for.

Differences and additions:
- Maps of a backbone with several strides have no readout, no projection and no resizing: a 3x3
  convolution takes each as it is, transformers' form for Swin backbones. DPT-Hybrid (a ResNet's
  maps together with tokens) is not here.
- The coarsest fusion has one residual unit: the other one in the published files is never used.
- Where a map is not twice as large as the next coarser one (odd sizes), it is resized to the fused
  map, as in transformers, not the other way round: results are then a little larger than the
  stride says, and the picture's size is reached by resizing them.
- Depth is in metres unless asked otherwise: "bounded" beside the published "inverse" and "metric".
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
from hybrid_vit.models.layers import Conv, PointwiseConv, batch_norm, gelu
from hybrid_vit.models.registry import FeatureSpec
from hybrid_vit.ops.resize import resize_bilinear

_INIT = nn.initializers.normal(0.02)
_BATCH_NORM_EPSILON = 1e-5
_LEAST_INVERSE = 1e-8
READOUTS = ("project", "add", "ignore")
ANSWERS = ("bounded", "inverse", "metric")


class DPTDecoder(nn.Module):
  """Reassembles and fuses the maps (section 3.2 and figure 1).

  A call takes maps `[B, h, w, C]` and for a readout the class tokens `[B, C]`, "<map>_token" among
  the endpoints, and returns the fused map of the finest level, `[B, 2 h', 2 w', channels]`, h'
  being the rows of the finest map put together.

  Attributes:
    features: the levels, the finest (or the first block) first.
    channels: of the fused maps.
    level_channels: of each map put together; unused where the levels have several strides.
    factors: how many times larger each map becomes: n or 1 / n; unused with several strides.
    readout: what becomes of the class token: "project" (beside each patch, through a linear layer
      and GELU), "add" or "ignore"; unused with several strides.
    use_batch_norm: in the residual units, behind each convolution.
    use_bias: of the residual units' convolutions; None where there is no batch norm.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation.

  Raises (in a call):
    ValueError: lengths that do not agree, an unknown readout, a factor that is neither n nor 1 / n,
      or a readout where the backbone has no class token.
  """

  features: tuple[FeatureSpec, ...]
  channels: int = 256
  level_channels: tuple[int, ...] = (96, 192, 384, 768)
  factors: tuple[float, ...] = (4, 2, 1, 0.5)
  readout: str = "project"
  use_batch_norm: bool = False
  use_bias: bool | None = None
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @property
  def is_pyramid(self) -> bool:
    """Whether the levels have several strides."""
    return len({f.stride for f in self.features}) > 1

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array], train: bool) -> jax.Array:
    if not self.is_pyramid:
      self._check()
    x: Any = None
    # Fusions are counted from the coarsest, levels from the finest, as in the published names.
    last = len(self.features) - 1
    for i in range(last, -1, -1):
      y = endpoints[self.features[i].name].astype(self.dtype)
      if not self.is_pyramid:
        y = self._reassembled(y, i, endpoints)
      y = conv(
        self.channels, 3, f"level{i}_conv", kernel_init=_INIT, use_bias=False, dtype=self.dtype
      )(y)
      x = self._fused(x, y, train, f"fusion{last - i}")
      self.sow("intermediates", f"fusion{last - i}", x)
    return x

  def _reassembled(self, x: jax.Array, i: int, endpoints: Mapping[str, jax.Array]) -> jax.Array:
    """Readout, projection and resizing of level i."""
    if self.readout != "ignore":
      token = self._token(i, endpoints)[:, None, None]
      if self.readout == "add":
        x = x + token
      else:
        joined = jnp.concatenate([x, jnp.broadcast_to(token, x.shape)], axis=-1)
        x = PointwiseConv(
          x.shape[-1], kernel_init=_INIT, dtype=self.dtype, name=f"level{i}_readout"
        )(joined)
        x = gelu(x)
    width, factor = self.level_channels[i], self.factors[i]
    x = PointwiseConv(width, kernel_init=_INIT, dtype=self.dtype, name=f"level{i}_projection")(x)
    if factor > 1:
      x = Deconv(
        width, int(factor), int(factor), kernel_init=_INIT, dtype=self.dtype, name=f"level{i}_up"
      )(x)
    elif factor < 1:
      step = round(1 / factor)
      x = Conv(
        width,
        (3, 3),
        strides=step,
        padding=((1, 1), (1, 1)),
        kernel_init=_INIT,
        dtype=self.dtype,
        name=f"level{i}_down",
      )(x)
    return x

  def _token(self, i: int, endpoints: Mapping[str, jax.Array]) -> jax.Array:
    name = f"{self.features[i].name}_token"
    if name not in endpoints:
      raise ValueError(
        f"DPT: readout {self.readout!r} needs the class token {name!r}, which the backbone does "
        "not give; take readout='ignore'"
      )
    return endpoints[name].astype(self.dtype)

  def _fused(self, x: Any, skip: jax.Array, train: bool, name: str) -> jax.Array:
    """One fusion: the finer map through a residual unit, another unit, doubled, projected."""
    if x is None:
      x = skip
    else:
      skip = resize_bilinear(skip, x.shape[1:3], align_corners=False)
      x = x + self._residual(skip, train, f"{name}_residual1")
    x = self._residual(x, train, f"{name}_residual2")
    x = resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=True)
    return PointwiseConv(
      self.channels, kernel_init=_INIT, dtype=self.dtype, name=f"{name}_projection"
    )(x)

  def _residual(self, x: jax.Array, train: bool, name: str) -> jax.Array:
    """The residual convolutional unit of RefineNet (arXiv:1611.06612)."""
    y = x
    use_bias = not self.use_batch_norm if self.use_bias is None else self.use_bias
    for j in (1, 2):
      y = conv(
        self.channels,
        3,
        f"{name}_conv{j}",
        kernel_init=_INIT,
        use_bias=use_bias,
        dtype=self.dtype,
      )(nn.relu(y))
      if self.use_batch_norm:
        y = _norm(self, f"{name}_norm{j}")(y, train)
    return x + y

  def _check(self) -> None:
    if self.readout not in READOUTS:
      raise ValueError(f"DPT: readout is {self.readout!r}; one of {READOUTS} was expected")
    for name in ("level_channels", "factors"):
      values = getattr(self, name)
      if len(values) != len(self.features):
        raise ValueError(
          f"DPT: {len(self.features)} maps but {name} has {len(values)} values: {values}"
        )
    for factor in self.factors:
      times = factor if factor >= 1 else 1 / factor if factor > 0 else 0.5
      if abs(times - round(times)) > 1e-6:
        raise ValueError(f"DPT: factors has {factor}; n or 1 / n was expected")


@register_head("dpt_depth")
class DPTDepth(nn.Module):
  """Depth by three convolutions on the fused map, at the finest map's stride over 4.

  For maps of one stride that is: of a ViT with patches of 16 the picture's own size.

  Attributes:
    features: the levels, the finest (or the first block) first.
    num_outputs: 1.
    answer: "bounded", sigmoid times the farthest, metres, as in other heads; "inverse", ReLU as
      published: relative inverse depth, up to an unknown scale and shift; "metric", metres, of the
      latter 1 / max(scale * inverse + shift, 1e-8), the DPT authors' `invert`.
    scale: of "metric". The authors' NYU Depth v2 weights have 0.000305, KITTI's 0.00006016.
    shift: of "metric"; 0.1378 and 0.00579.
    max_depth: metres, of "bounded".
    head_channels: behind the second convolution.
    projection: a 3x3 convolution and ReLU before the others.
    channels, level_channels, factors, readout, use_batch_norm, use_bias: see `DPTDecoder`.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation; what follows the last convolution is float32.

  Raises (in a call):
    ValueError: an unknown answer, fewer than two maps, or what `DPTDecoder` and `check_depth_head`
      raise.
  """

  features: tuple[FeatureSpec, ...]
  num_outputs: int = 1
  answer: str = "bounded"
  scale: float = 1.0
  shift: float = 0.0
  max_depth: float = 10.0
  head_channels: int = 32
  projection: bool = False
  channels: int = 256
  level_channels: tuple[int, ...] = (96, 192, 384, 768)
  factors: tuple[float, ...] = (4, 2, 1, 0.5)
  readout: str = "project"
  use_batch_norm: bool = False
  use_bias: bool | None = None
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, endpoints: Mapping[str, jax.Array], train: bool = False) -> jax.Array:
    """Maps `[B, h, w, C]` → float32 `[B, 4h', 4w', 1]`, h' the rows of the finest put together."""
    check_depth_head("dpt_depth", self)
    check_levels("dpt_depth", self.features, 2)
    if self.answer not in ANSWERS:
      raise ValueError(f"dpt_depth: answer is {self.answer!r}; one of {ANSWERS} was expected")
    x = _decoder(self)(endpoints, train)
    if self.projection:
      x = nn.relu(self._conv(self.channels, 3, "projection")(x))
    x = self._conv(self.channels // 2, 3, "depth_conv0")(x)
    x = resize_bilinear(x, (2 * x.shape[1], 2 * x.shape[2]), align_corners=True)
    x = nn.relu(self._conv(self.head_channels, 3, "depth_conv1")(x))
    x = conv(1, 1, "depth", kernel_init=_INIT)(x)
    if self.answer == "bounded":
      return bounded_depth(x, self.max_depth)
    x = nn.relu(x)
    if self.answer == "metric":
      x = 1.0 / jnp.maximum(self.scale * x + self.shift, _LEAST_INVERSE)
    return x

  def _conv(self, features: int, size: int, name: str) -> nn.Conv:
    return conv(features, size, name, kernel_init=_INIT, dtype=self.dtype)


@register_head("dpt_segmentation")
class DPTSegmentation(nn.Module):
  """Logits by two convolutions on the fused map, at the finest map's stride over 4.

  Attributes:
    features: the levels, the finest (or the first block) first.
    num_outputs: classes.
    dropout_rate: of single values, before the classifiers.
    auxiliary: whether there is a second classifier of the fused map (`use_auxiliary_head`).
    channels, level_channels, factors, readout, use_batch_norm, use_bias: see `DPTDecoder`. The
      published network has batch norm.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with statistics of their own.
    dtype: of the computation; the classifiers are float32.

  Raises (in a call):
    ValueError: fewer than two maps, auxiliary logits asked for where `auxiliary` is False, or what
      `DPTDecoder` raises.
  """

  features: tuple[FeatureSpec, ...]
  num_outputs: int
  dropout_rate: float = 0.1
  auxiliary: bool = False
  channels: int = 256
  level_channels: tuple[int, ...] = (96, 192, 384, 768)
  factors: tuple[float, ...] = (4, 2, 1, 0.5)
  readout: str = "project"
  use_batch_norm: bool = True
  use_bias: bool | None = None
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    endpoints: Mapping[str, jax.Array],
    train: bool = False,
    *,
    with_auxiliary: bool = False,
  ) -> Any:
    """Maps `[B, h, w, C]` → float32 `[B, 4h', 4w', num_outputs]`.

    With `with_auxiliary` a pair: these, and `[B, 2h', 2w', num_outputs]` of the second classifier.
    """
    check_levels("dpt_segmentation", self.features, 2)
    if with_auxiliary and not self.auxiliary:
      raise ValueError("dpt_segmentation: auxiliary logits need auxiliary=True")
    x = _decoder(self)(endpoints, train)
    logits = self._classified(x, train, "")
    logits = resize_bilinear(logits, (2 * logits.shape[1], 2 * logits.shape[2]), align_corners=True)
    if not self.auxiliary or not (with_auxiliary or self.is_initializing()):
      return logits
    second = self._classified(x, train, "auxiliary_")
    return (logits, second) if with_auxiliary else logits

  def _classified(self, x: jax.Array, train: bool, prefix: str) -> jax.Array:
    x = conv(
      self.channels, 3, f"{prefix}conv", kernel_init=_INIT, use_bias=False, dtype=self.dtype
    )(x)
    x = nn.relu(_norm(self, f"{prefix}norm")(x, train))
    x = nn.Dropout(self.dropout_rate, deterministic=not train, name=f"{prefix}dropout")(x)
    return conv(self.num_outputs, 1, f"{prefix}classifier", kernel_init=_INIT)(x)


def _decoder(head: Any) -> DPTDecoder:
  names = (
    "features", "channels", "level_channels", "factors", "readout", "use_batch_norm", "use_bias",
    "batch_norm_momentum", "batch_norm_groups", "dtype",
  )  # fmt: skip
  return DPTDecoder(**{name: getattr(head, name) for name in names}, name="decoder")


def _norm(module: Any, name: str) -> Any:
  return batch_norm(module, epsilon=_BATCH_NORM_EPSILON, unbiased_variance=True, name=name)
