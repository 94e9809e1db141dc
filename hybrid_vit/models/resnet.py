"""ResNet with bottleneck blocks.

Kaiming He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, arXiv:1512.03385.
Follows torchvision's code (`torchvision/models/resnet.py`), a baseline of the papers rebuilt here:
a stage is strided in its 3x3 convolution, not in the 1x1 before it as in the paper. Plain blocks
(ResNet-18 and 34), groups and dilation are not here.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.models import layers
from hybrid_vit.models.blocks import apply_blocks
from hybrid_vit.models.registry import FeatureSpec, Preprocessing, Published, register

# torch's kaiming_normal_ with fan_out and relu.
_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
_BATCH_NORM_EPSILON = 1e-5
# Width of a block's output over that of its 3x3 convolution.
_EXPANSION = 4


class ResNet(nn.Module):
  """The ResNet with bottleneck blocks and its classifier (paper, section 3.3 and table 1).

  A call takes images `[B, H, W, 3]` of any size and returns logits `[B, num_classes]` in float32
  (None when `num_classes` is 0) and the endpoints: "stem" (after the pooling), "stage1" to
  "stage4", "stage1_block0" and so on, and "pre_logits" `[B, C]` (the mean over the map).

  Attributes:
    depths: blocks of each stage.
    widths: channels of each stage's output, multiples of 4.
    stem_width: channels of the first convolution.
    num_classes: 0 for no classifier.
    drop_path_rate: of the last block; the first has 0, evenly between.
    batch_norm_momentum: of the running statistics; short trainings want less.
    batch_norm_groups: groups of the batch with batch norm statistics of their own.
    remat: recompute each block in the backward pass instead of storing its inside.
    scan_blocks: equal blocks as the turns of a loop, see `models/blocks.py`.
    dtype: of the computation; parameters and norm statistics are float32.
  """

  depths: tuple[int, ...]
  widths: tuple[int, ...] = (256, 512, 1024, 2048)
  stem_width: int = 64
  num_classes: int = 1000
  drop_path_rate: float = 0.0
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  remat: bool = False
  scan_blocks: bool = False
  dtype: Any = jnp.float32

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The feature pyramid: name, stride and channels of each stage."""
    return tuple(FeatureSpec(f"stage{i + 1}", 4 * 2**i, w) for i, w in enumerate(self.widths))

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    self._check()
    endpoints: dict[str, jax.Array] = {}
    norm: dict[str, Any] = {
      "momentum": self.batch_norm_momentum,
      "groups": self.batch_norm_groups,
    }
    x = Stem(self.stem_width, **norm, dtype=self.dtype, name="stem")(
      images.astype(self.dtype), train
    )
    endpoints["stem"] = x
    rates = layers.linear_drop_path_rates(self.drop_path_rate, self.depths)
    for i, (depth, width) in enumerate(zip(self.depths, self.widths), start=1):
      blocks = [
        {
          "width": width,
          "stride": 2 if i > 1 and j == 0 else 1,
          "drop_path_rate": rates[i - 1][j],
          **norm,
          "dtype": self.dtype,
        }
        for j in range(depth)
      ]
      x, outputs = apply_blocks(self, Bottleneck, f"stage{i}_block", blocks, x, train)
      endpoints |= outputs
      endpoints[f"stage{i}"] = x

    x = x.mean((1, 2), dtype=jnp.float32)
    endpoints["pre_logits"] = x
    logits = None
    if self.num_classes:
      logits = nn.Dense(
        self.num_classes,
        kernel_init=layers.torch_conv_init,
        bias_init=layers.torch_bias_init(x.shape[-1]),
        dtype=jnp.float32,
        name="head",
      )(x)
    return logits, endpoints

  def _check(self) -> None:
    layers.check_stages(self, "widths")
    if any(width % _EXPANSION for width in self.widths):
      raise ValueError(f"ResNet: widths must be multiples of {_EXPANSION}, not {self.widths}")


class Stem(nn.Module):
  """A 7x7 convolution of stride 2, batch norm, ReLU, and 3x3 max pooling of stride 2."""

  width: int
  momentum: float
  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = _conv(self.width, 7, 2, self.dtype, "conv")(x)
    x = nn.relu(_batch_norm(self, "norm")(x, train))
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


class Bottleneck(nn.Module):
  """1x1, 3x3 and 1x1 convolutions with batch norms, plus the input; ReLU after the sum.

  Attributes as in `ResNet`; `stride` is that of the 3x3 convolution.
  """

  width: int
  stride: int
  drop_path_rate: float
  momentum: float
  groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    shortcut, inner = x, self.width // _EXPANSION
    if x.shape[-1] != self.width or self.stride > 1:
      cells = x[:, :: self.stride, :: self.stride]
      shortcut = layers.pointwise_conv_norm(
        cells,
        train,
        _pointwise(self.width, self.dtype, "shortcut_conv"),
        _batch_norm(self, "shortcut_norm"),
      )
    y = _pointwise(inner, self.dtype, "conv1")(x)
    y = nn.relu(_batch_norm(self, "norm1")(y, train))
    y = _conv(inner, 3, self.stride, self.dtype, "conv2")(y)
    y = nn.relu(_batch_norm(self, "norm2")(y, train))
    y = layers.pointwise_conv_norm(
      y, train, _pointwise(self.width, self.dtype, "conv3"), _batch_norm(self, "norm3")
    )
    return nn.relu(shortcut + layers.DropPath(self.drop_path_rate, name="drop_path")(y, train))


def _conv(width: int, size: int, stride: int, dtype: Any, name: str) -> nn.Conv:
  pad = size // 2
  return layers.Conv(
    width,
    (size, size),
    strides=stride,
    padding=((pad, pad), (pad, pad)),
    use_bias=False,
    kernel_init=_INIT,
    dtype=dtype,
    name=name,
  )


def _pointwise(width: int, dtype: Any, name: str) -> layers.PointwiseConv:
  return layers.PointwiseConv(width, use_bias=False, kernel_init=_INIT, dtype=dtype, name=name)


def _batch_norm(module: Any, name: str) -> layers.BatchNorm:
  return layers.BatchNorm(
    epsilon=_BATCH_NORM_EPSILON,
    momentum=module.momentum,
    num_groups=module.groups,
    unbiased_variance=True,
    dtype=module.dtype,
    name=name,
  )


def _register_family() -> None:
  # name, depths, parameters, multiply-adds in 10^9, top-1 of torchvision's first weights
  table: tuple[tuple[Any, ...], ...] = (
    ("resnet50", (3, 4, 6, 3), 25557032, 4.09, 76.13),
    ("resnet101", (3, 4, 23, 3), 44549160, 7.8, 77.374),
  )
  for name, depths, parameters, giga, top1 in table:
    register(
      name,
      ResNet,
      {"depths": depths},
      preprocessing=Preprocessing(
        image_size=224,
        crop_ratio=0.875,
        interpolation="bilinear",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
      ),
      published=Published(
        parameters=parameters,
        multiply_adds=round(giga * 1e9),
        top1=top1,
        source="torchvision, IMAGENET1K_V1; ImageNet-1K",
      ),
    )


_register_family()
