"""ConvNeXt: a plain convolutional pyramid with the habits of transformers.

Zhuang Liu et al., "A ConvNet for the 2020s", CVPR 2022, arXiv:2201.03545. Follows the authors'
PyTorch code (facebookresearch/ConvNeXt, `models/convnext.py`), a baseline of the papers rebuilt
here, with this difference: an input without a single whole patch of 32 is an error that says so.
The isotropic networks of the paper's section 3.3 are not here.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.models import layers
from hybrid_vit.models.blocks import apply_blocks
from hybrid_vit.models.registry import (
  FeatureSpec,
  Published,
  imagenet_preprocessing,
  output_pyramid,
  register,
)

# The authors cut the draw at +-2, a hundred deviations: plain normal.
_INIT = nn.initializers.normal(0.02)
_LAYER_NORM_EPSILON = 1e-6
_KERNEL_SIZE = 7
_EXPANSION = 4
_STEM_STRIDE = 4


class ConvNeXt(nn.Module):
  """The ConvNeXt backbone with its classifier (paper, section 2).

  A call takes images `[B, H, W, 3]` and returns logits `[B, num_classes]` in float32 (None when
  `num_classes` is 0) and the endpoints: "stem", "stage1" to "stage4", "stage1_block0" and so on,
  "stage1_norm" and so on (see `output_norms`), and "pre_logits" `[B, C]` (the mean over the map;
  with a classifier, after its layer norm). Rows and columns that do not fill a patch are left out:
  a map of stride s has H // s rows.

  Attributes:
    depths: blocks of each stage.
    widths: channels of each stage.
    num_classes: 0 for no classifier: neither norm nor head.
    layer_scale_init: where the blocks' layer scale begins; None for no layer scale.
    head_init_scale: factor of the classifier's first kernel; fine-tuning takes 0.001.
    output_norms: stages, counted from 1, whose output has a layer norm beside the trunk;
      `features` then names these outputs alone. For dense tasks.
    drop_path_rate: of the last block; the first has 0, evenly between.
    remat: recompute each block in the backward pass instead of storing its inside.
    scan_blocks: equal blocks as the turns of a loop, see `models/blocks.py`.
    dtype: of the computation; parameters and norm statistics are float32.

  Raises (in a call):
    ValueError: sides too small for one cell of the last stage.
  """

  depths: tuple[int, ...]
  widths: tuple[int, ...]
  num_classes: int = 1000
  layer_scale_init: float | None = 1e-6
  head_init_scale: float = 1.0
  output_norms: tuple[int, ...] = ()
  drop_path_rate: float = 0.0
  remat: bool = False
  scan_blocks: bool = False
  dtype: Any = jnp.float32

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The feature pyramid: name, stride and channels of each stage."""
    pyramid = [
      FeatureSpec(f"stage{i + 1}", _STEM_STRIDE * 2**i, width)
      for i, width in enumerate(self.widths)
    ]
    return output_pyramid(pyramid, self.output_norms)

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    self._check(images.shape)
    endpoints: dict[str, jax.Array] = {}
    rates = layers.linear_drop_path_rates(self.drop_path_rate, self.depths)
    x = images.astype(self.dtype)
    for i, (depth, width) in enumerate(zip(self.depths, self.widths), start=1):
      if i == 1:
        x = Patches(width, _STEM_STRIDE, norm_first=False, dtype=self.dtype, name="stem")(x)
        endpoints["stem"] = x
      else:
        x = Patches(width, 2, norm_first=True, dtype=self.dtype, name=f"stage{i}_downsample")(x)
      blocks = [
        {
          "kernel_size": _KERNEL_SIZE,
          "hidden": _EXPANSION * width,
          "layer_scale_init": self.layer_scale_init,
          "layer_norm_epsilon": _LAYER_NORM_EPSILON,
          "drop_path_rate": rates[i - 1][j],
          "kernel_init": _INIT,
          "dtype": self.dtype,
        }
        for j in range(depth)
      ]
      x, outputs = apply_blocks(self, layers.ConvNeXtBlock, f"stage{i}_block", blocks, x, train)
      endpoints |= outputs
      endpoints[f"stage{i}"] = x
      if i in self.output_norms:
        name = f"stage{i}_norm"
        endpoints[name] = layers.layer_norm(_LAYER_NORM_EPSILON, self.dtype, name)(x)

    x = x.mean((1, 2), dtype=jnp.float32)
    logits = None
    if self.num_classes:
      # The classifier is float32 throughout: it is small, and logits are promised in float32.
      x = layers.layer_norm(_LAYER_NORM_EPSILON, jnp.float32, "head_norm")(x)
      init = nn.initializers.normal(0.02 * self.head_init_scale)
      logits = nn.Dense(self.num_classes, kernel_init=init, dtype=jnp.float32, name="head")(x)
    endpoints["pre_logits"] = x
    return logits, endpoints

  def _check(self, shape: tuple[int, ...]) -> None:
    layers.check_stages(self, "widths")
    layers.check_output_norms(self)
    stride = _STEM_STRIDE * 2 ** (len(self.widths) - 1)
    if min(shape[1:3]) < stride:
      raise ValueError(
        f"ConvNeXt: the image is {shape[1]} x {shape[2]}; both sides must be at least {stride}"
      )


class Patches(nn.Module):
  """One convolution of patches side by side, a layer norm before it (`norm_first`) or after."""

  width: int
  size: int
  norm_first: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    norm = layers.layer_norm(_LAYER_NORM_EPSILON, self.dtype, "norm")
    conv = layers.Conv(
      self.width,
      (self.size, self.size),
      strides=self.size,
      padding="VALID",
      kernel_init=_INIT,
      dtype=self.dtype,
      name="conv",
    )
    return conv(norm(x)) if self.norm_first else norm(conv(x))


def _register_family() -> None:
  deep = (3, 3, 27, 3)
  # size: depths, first width, parameters with a head of 1,000 and of 21,841 classes
  sizes: dict[str, tuple[Any, ...]] = {
    "tiny": ((3, 3, 9, 3), 96, 28589128, 44615857),
    "small": (deep, 96, 50223688, 66250417),
    "base": (deep, 128, 88591464, 109953489),
    "large": (deep, 192, 197767336, 229799953),
    "xlarge": (deep, 256, 350196968, 392900177),
  }
  # size, suffix of the name, trained on, input size, drop path, multiply-adds in 10^9, top-1
  k1, k22, both = "ImageNet-1K", "ImageNet-22K", "ImageNet-22K, then 1K"
  table: tuple[tuple[Any, ...], ...] = (
    ("tiny", "", k1, 224, 0.1, 4.5, 82.1),
    ("small", "", k1, 224, 0.4, 8.7, 83.1),
    ("base", "", k1, 224, 0.5, 15.4, 83.8),
    ("large", "", k1, 224, 0.5, 34.4, 84.3),
    ("base", "_384", k1, 384, 0.8, 45.0, 85.1),
    ("large", "_384", k1, 384, 0.95, 101.0, 85.5),
    ("tiny", "_22k", k22, 224, 0.0, None, None),
    ("small", "_22k", k22, 224, 0.0, None, None),
    ("base", "_22k", k22, 224, 0.1, None, None),
    ("large", "_22k", k22, 224, 0.1, None, None),
    ("xlarge", "_22k", k22, 224, 0.2, None, None),
    ("tiny", "_22kto1k", both, 224, 0.1, 4.5, 82.9),
    ("small", "_22kto1k", both, 224, 0.2, 8.7, 84.6),
    ("base", "_22kto1k", both, 224, 0.2, 15.4, 85.8),
    ("large", "_22kto1k", both, 224, 0.3, 34.4, 86.6),
    ("xlarge", "_22kto1k", both, 224, 0.4, 60.9, 87.0),
    ("tiny", "_384_22kto1k", both, 384, 0.1, 13.1, 84.1),
    ("small", "_384_22kto1k", both, 384, 0.2, 25.5, 85.8),
    # The authors' table says 47.0 here and 45.0 for the same network above.
    ("base", "_384_22kto1k", both, 384, 0.2, 45.0, 86.8),
    ("large", "_384_22kto1k", both, 384, 0.3, 101.0, 87.5),
    ("xlarge", "_384_22kto1k", both, 384, 0.4, 179.0, 87.8),
  )
  for size, suffix, trained_on, image_size, drop_path, giga, top1 in table:
    depths, width, with_1k, with_22k = sizes[size]
    register(
      f"convnext_{size}{suffix}",
      ConvNeXt,
      {
        "depths": depths,
        "widths": tuple(width * 2**i for i in range(4)),
        "num_classes": 21841 if trained_on == k22 else 1000,
        "drop_path_rate": drop_path,
      },
      preprocessing=imagenet_preprocessing(image_size),
      published=Published(
        parameters=with_22k if trained_on == k22 else with_1k,
        multiply_adds=None if giga is None else round(giga * 1e9),
        top1=top1,
        source=f"facebookresearch/ConvNeXt README; {trained_on}",
      ),
    )


_register_family()
