"""FocalNet: focal modulation in the place of attention.

Jianwei Yang et al., "Focal Modulation Networks", NeurIPS 2022, arXiv:2203.11926. Follows the
authors' code (microsoft/FocalNet): `classification/focalnet.py`, and with `pad_maps`,
`stem_padding=3` and `output_norms` the backbone of `detection/` and `segmentation/`. Differences:
the classifier's norm exists only with a classifier, and the released backbone's lack of post-norm,
normalised modulator and norm inside the modulation is not repeated, so that the large networks can
be backbones too.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.models import layers
from hybrid_vit.models.blocks import apply_blocks
from hybrid_vit.models.registry import (
  FeatureSpec,
  Preprocessing,
  Published,
  output_pyramid,
  register,
)

# The authors cut their normal at the absolute values 2 and -2: it is a plain one.
_INIT = nn.initializers.normal(0.02)
_LAYER_NORM_EPSILON = 1e-5


class FocalNet(nn.Module):
  """The FocalNet backbone with its classifier (paper, section 3).

  A call takes images `[B, H, W, 3]` of any size and returns logits `[B, num_classes]` in float32
  (None when `num_classes` is 0) and the endpoints: "stem", "stage1" and so on (the raw sums),
  "stage1_block0" and so on for every block, "stage2_embedding" and so on (what opens a later
  stage), "stage1_norm" and so on (see `output_norms`), with a classifier "head_norm"
  `[B, H / 32, W / 32, C]`, and "pre_logits" `[B, C]`, the mean of that or of the last map.

  Without `pad_maps` the plain embeddings drop the rows and columns that do not fill a patch.

  Attributes:
    embed_dim: channels of the first stage; each later stage has twice as many.
    depths: blocks of each stage.
    num_classes: 0 for no classifier: neither norm nor head.
    focal_levels: depthwise convolutions in a modulation, for each stage.
    focal_windows: side of the first of these kernels, for each stage; each next one is 2 larger.
    patch_size: kernel and stride of the plain stem.
    conv_embed: overlapping embeddings: a stem of 7x7 with stride 4, then 3x3 with stride 2.
    stem_padding: of the overlapping stem on each side: 2 for classification, 3 for dense tasks.
    patch_norm: a layer norm in the stem.
    pad_maps: pad images and maps at the right and the bottom to whole patches before an embedding,
      as dense tasks do.
    output_norms: stages, counted from 1, whose output has a layer norm beside the trunk;
      `features` then names these outputs alone. For dense tasks.
    mlp_ratio: hidden width of a block's second half over its width.
    layer_scale: initial value of the scale of each branch's channels; None for none.
    post_norm: normalise the output of a branch instead of its input.
    modulation_norm: a layer norm inside the modulation, before its last projection.
    normalize_modulator: divide the gathered context by the number of its levels.
    drop_path_rate: of the last block; from 0 in the first one, evenly.
    remat: recompute each block in the backward pass instead of storing its inside.
    scan_blocks: equal blocks as the turns of a loop, see `models/blocks.py`.
    dtype: of the computation; parameters, norm statistics and pooling are float32.
  """

  embed_dim: int
  depths: tuple[int, ...]
  num_classes: int = 1000
  focal_levels: tuple[int, ...] = (2, 2, 2, 2)
  focal_windows: tuple[int, ...] = (3, 3, 3, 3)
  patch_size: int = 4
  conv_embed: bool = False
  stem_padding: int = 2
  patch_norm: bool = True
  pad_maps: bool = False
  output_norms: tuple[int, ...] = ()
  mlp_ratio: float = 4.0
  layer_scale: float | None = None
  post_norm: bool = False
  modulation_norm: bool = False
  normalize_modulator: bool = False
  drop_path_rate: float = 0.0
  remat: bool = False
  scan_blocks: bool = False
  dtype: Any = jnp.float32

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The feature pyramid: name, stride and channels of each stage."""
    stride = 4 if self.conv_embed else self.patch_size
    pyramid = [
      FeatureSpec(f"stage{i + 1}", stride * 2**i, self.embed_dim * 2**i)
      for i in range(len(self.depths))
    ]
    return output_pyramid(pyramid, self.output_norms)

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    self._check()
    endpoints = {}
    rates = layers.linear_drop_path_rates(self.drop_path_rate, self.depths)
    x = images.astype(self.dtype)
    for stage, depth in enumerate(self.depths):
      name = f"stage{stage + 1}_embedding" if stage else "stem"
      x = self._embedding(stage, name)(x)
      endpoints[name] = x
      window, levels = self.focal_windows[stage], self.focal_levels[stage]
      blocks = [
        {
          "kernel_sizes": tuple(window + 2 * level for level in range(levels)),
          "mlp_ratio": self.mlp_ratio,
          "layer_scale": self.layer_scale,
          "post_norm": self.post_norm,
          "modulation_norm": self.modulation_norm,
          "normalize_modulator": self.normalize_modulator,
          "drop_path_rate": rates[stage][i],
          "dtype": self.dtype,
        }
        for i in range(depth)
      ]
      x, outputs = apply_blocks(self, Block, f"stage{stage + 1}_block", blocks, x, train)
      endpoints |= outputs
      endpoints[f"stage{stage + 1}"] = x
      if stage + 1 in self.output_norms:
        name = f"stage{stage + 1}_norm"
        endpoints[name] = _layer_norm(self.dtype, name)(x)

    if self.num_classes:
      x = _layer_norm(self.dtype, "head_norm")(x)
      endpoints["head_norm"] = x
    x = x.mean((1, 2), dtype=jnp.float32)
    endpoints["pre_logits"] = x
    logits = None
    if self.num_classes:
      # The classifier is float32 throughout: it is small, and logits are promised in float32.
      logits = nn.Dense(self.num_classes, kernel_init=_INIT, dtype=jnp.float32, name="head")(x)
    return logits, endpoints

  def _embedding(self, stage: int, name: str) -> "PatchEmbedding":
    if stage == 0:
      kernel, stride, padding = self.patch_size, self.patch_size, 0
      if self.conv_embed:
        kernel, stride, padding = 7, 4, self.stem_padding
      multiple = self.patch_size
    else:
      kernel, stride, padding = (3, 2, 1) if self.conv_embed else (2, 2, 0)
      multiple = 2
    return PatchEmbedding(
      width=self.embed_dim * 2**stage,
      kernel_size=kernel,
      stride=stride,
      padding=padding,
      pad_to_multiple=multiple if self.pad_maps else 1,
      norm=self.patch_norm or stage > 0,
      dtype=self.dtype,
      name=name,
    )

  def _check(self) -> None:
    layers.check_stages(self, "focal_levels", "focal_windows")
    even = [window for window in self.focal_windows if window % 2 == 0]
    if even:
      raise ValueError(
        f"FocalNet: a focal window has an odd side, so that it has a centre; found {even[0]} in "
        f"focal_windows {self.focal_windows}"
      )
    layers.check_output_norms(self)


class PatchEmbedding(nn.Module):
  """A strided convolution and a layer norm after it: the stem, and what opens a later stage."""

  width: int
  kernel_size: int
  stride: int
  padding: int
  pad_to_multiple: int
  norm: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` to `[B, H', W', width]`.

    Raises:
      ValueError: for a map that is smaller than one patch.
    """
    rows, columns = (-n % self.pad_to_multiple for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (0, rows), (0, columns), (0, 0)))
    if min(x.shape[1:3]) + 2 * self.padding < self.kernel_size:
      raise ValueError(
        f"FocalNet: {self.name} needs a map of at least "
        f"{self.kernel_size - 2 * self.padding} rows and columns, got {x.shape[1]} x {x.shape[2]}: "
        f"give larger images"
      )
    x = layers.Conv(
      self.width,
      (self.kernel_size, self.kernel_size),
      strides=self.stride,
      padding=self.padding,
      kernel_init=layers.torch_conv_init,
      bias_init=layers.torch_bias_init(self.kernel_size**2 * x.shape[-1]),
      dtype=self.dtype,
      name="conv",
    )(x)
    return _layer_norm(self.dtype, "norm")(x) if self.norm else x


class Block(nn.Module):
  """Focal modulation, then two dense layers, each added to its input; attributes as in `FocalNet`.

  `kernel_sizes` are those of the modulation.
  """

  kernel_sizes: tuple[int, ...]
  mlp_ratio: float
  layer_scale: float | None
  post_norm: bool
  modulation_norm: bool
  normalize_modulator: bool
  drop_path_rate: float
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    modulation = FocalModulation(
      self.kernel_sizes,
      self.modulation_norm,
      self.normalize_modulator,
      dtype=self.dtype,
      name="modulation",
    )
    x = x + self._finish(modulation(self._normed(x, 1)), 1, train)

    y = self._normed(x, 2)
    y = self._dense(int(self.mlp_ratio * x.shape[-1]), "mlp_fc1")(y)
    y = self._dense(x.shape[-1], "mlp_fc2")(layers.gelu(y))
    return x + self._finish(y, 2, train)

  def _normed(self, x: jax.Array, branch: int) -> jax.Array:
    return x if self.post_norm else _layer_norm(self.dtype, f"norm{branch}")(x)

  def _finish(self, x: jax.Array, branch: int, train: bool) -> jax.Array:
    if self.post_norm:
      x = _layer_norm(self.dtype, f"norm{branch}")(x)
    if self.layer_scale is not None:
      x = layers.LayerScale(self.layer_scale, name=f"layer_scale{branch}")(x)
    return layers.DropPath(self.drop_path_rate, name=f"drop_path{branch}")(x, train)

  def _dense(self, width: int, name: str) -> layers.PointwiseConv:
    return layers.PointwiseConv(width, kernel_init=_INIT, dtype=self.dtype, name=name)


class FocalModulation(nn.Module):
  """Multiplies each position's query by a modulator gathered from its growing surroundings.

  Paper, section 3.2. Level l reads the output of level l - 1; the last level is the mean over the
  map. Each position has a gate for each level, and neither gates nor query have an activation.

  Attributes:
    kernel_sizes: of the depthwise convolutions, one for each level but the last.
    norm: see `FocalNet.modulation_norm`.
    normalize_modulator: see `FocalNet`.
    dtype: of the computation.
  """

  kernel_sizes: tuple[int, ...]
  norm: bool
  normalize_modulator: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, C]` to the same shape."""
    width, levels = x.shape[-1], len(self.kernel_sizes)
    projected = layers.PointwiseConv(
      2 * width + levels + 1, kernel_init=_INIT, dtype=self.dtype, name="projection_in"
    )(x)
    query, context, gates = jnp.split(projected, (width, 2 * width), axis=-1)
    gathered: Any = 0.0
    for level, size in enumerate(self.kernel_sizes):
      context = layers.DepthwiseConv(
        (size, size),
        stride=1,
        padding=((size // 2, size // 2),) * 2,
        use_bias=False,
        kernel_init=layers.torch_conv_init,
        dtype=self.dtype,
        name=f"focal_conv_{level}",
      )(context)
      context = layers.gelu(context)
      gathered = gathered + context * gates[..., level : level + 1]
    everywhere = context.mean((1, 2), keepdims=True, dtype=jnp.float32)
    gathered = gathered + layers.gelu(everywhere).astype(self.dtype) * gates[..., levels:]
    if self.normalize_modulator:
      gathered = gathered / (levels + 1)
    modulator = layers.PointwiseConv(
      width,
      kernel_init=layers.torch_conv_init,
      bias_init=layers.torch_bias_init(width),
      dtype=self.dtype,
      name="projection_context",
    )(gathered)
    x = query * modulator
    if self.norm:
      x = _layer_norm(self.dtype, "norm")(x)
    return layers.PointwiseConv(width, kernel_init=_INIT, dtype=self.dtype, name="projection_out")(
      x
    )


def _layer_norm(dtype: Any, name: str) -> layers.LayerNorm:
  return layers.layer_norm(_LAYER_NORM_EPSILON, dtype, name)


def _register_family() -> None:
  imagenet: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
  srf: dict[str, Any] = {"focal_levels": (2,) * 4, "focal_windows": (3,) * 4}
  lrf: dict[str, Any] = {"focal_levels": (3,) * 4, "focal_windows": (3,) * 4}
  wide: dict[str, Any] = {"focal_levels": (3,) * 4, "focal_windows": (5,) * 4}
  four: dict[str, Any] = {"focal_levels": (4,) * 4, "focal_windows": (3,) * 4}
  normalized = four | {"normalize_modulator": True}
  isotropic: dict[str, Any] = {"focal_levels": (3,), "focal_windows": (3,), "patch_size": 16}
  post_norm: dict[str, Any] = {"layer_scale": 1e-4, "post_norm": True}
  overlap: dict[str, Any] = {"conv_embed": True}
  large = {**overlap, **post_norm, "num_classes": 21842}
  huge = {**large, "modulation_norm": True}
  shallow, deep, deeper, deepest = (2, 2, 6, 2), (2, 2, 18, 2), (3, 3, 16, 3), (4, 4, 28, 4)
  code = "microsoft/FocalNet: counts of its code, accuracy of its README"
  paper = "the paper's ablations of the embedding and of depth; the count is of the code"
  no_top1 = (
    "microsoft/FocalNet: counts of its code; released with 21,842 classes, no accuracy given"
  )
  # name, width, depths, further arguments, drop path, input size, parameters, multiply-adds in
  # 10^9, top-1, source
  table: tuple[tuple[Any, ...], ...] = (
    ("tiny_srf", 96, shallow, srf, 0.2, 224, 28427116, 4.403, 82.1, code),
    ("tiny_lrf", 96, shallow, lrf, 0.2, 224, 28647928, 4.475, 82.3, code),
    ("small_srf", 96, deep, srf, 0.3, 224, 49891216, 8.599, 83.4, code),
    ("small_lrf", 96, deep, lrf, 0.3, 224, 50342440, 8.715, 83.5, code),
    ("base_srf", 128, deep, srf, 0.5, 224, 88148144, 15.241, 83.7, code),
    ("base_lrf", 128, deep, lrf, 0.5, 224, 88749768, 15.397, 83.9, code),
    ("tiny_srf_overlap", 96, shallow, srf | overlap, 0.2, 224, 30371980, 4.4, 82.4, paper),
    ("small_srf_overlap", 96, deep, srf | overlap, 0.3, 224, 51836080, 8.6, 83.4, paper),
    ("base_srf_overlap", 128, deep, srf | overlap, 0.5, 224, 91601456, 15.3, 84.0, paper),
    ("tiny_srf_deep", 64, deeper, srf | overlap, 0.2, 224, 25142451, 4.0, 82.7, paper),
    ("small_srf_deep", 64, deepest, srf | overlap, 0.3, 224, 38159968, 6.4, 83.5, paper),
    ("base_srf_deep", 96, deepest, srf | overlap, 0.5, 224, 85090144, 14.3, 84.1, paper),
    ("large_fl3", 192, deep, wide | large, 0.5, 384, 239134898, 104.90, None, no_top1),
    ("large_fl4", 192, deep, normalized | large, 0.5, 384, 239315402, 105.04, None, no_top1),
    ("xlarge_fl3", 256, deep, wide | large, 0.5, 384, 408787378, 185.40, None, no_top1),
    ("xlarge_fl4", 256, deep, four | large, 0.5, 384, 409028042, 185.58, None, no_top1),
    ("huge_fl3", 352, deep, lrf | huge, 0.5, 224, 745276338, 118.12, None, no_top1),
    ("huge_fl4", 352, deep, four | huge, 0.5, 224, 747989578, 118.82, None, no_top1),
    ("tiny_iso", 192, (12,), isotropic, 0.2, 224, 5880280, 1.109, 74.1, code),
    ("small_iso", 384, (12,), isotropic, 0.2, 224, 22376344, 4.299, 80.9, code),
    ("base_iso", 768, (12,), isotropic | post_norm, 0.2, 224, 87237400, 16.921, 82.4, code),
  )
  for name, width, depths, arguments, drop_path, size, parameters, giga, top1, source in table:
    register(
      f"focalnet_{name}",
      FocalNet,
      {"embed_dim": width, "depths": depths, "drop_path_rate": drop_path, **arguments},
      preprocessing=Preprocessing(
        image_size=size, crop_ratio=0.875, interpolation="bicubic", **imagenet
      ),
      published=Published(
        parameters=parameters, multiply_adds=round(giga * 1e9), top1=top1, source=source
      ),
    )


_register_family()
