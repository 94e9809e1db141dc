"""ViT, DeiT, CLIP's image tower and MobileCLIP's `vit_b16`: plain transformers over patches.

Alexey Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv:2010.11929; Hugo
Touvron et al., "Training data-efficient image transformers", ICML 2021, arXiv:2012.12877. The CLIP
forms follow open_clip (`ViT-B-16`) and apple/ml-mobileclip (`mobileclip/models/vit.py`).
Differences: all linear layers begin normal with 0.02, as DeiT's (MobileCLIP's at torch's default,
uniform of 0.021 at its width). Windows and relative positions, for detection, are ViTDet's
(`models.vitdet`).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.models import layers, positions
from hybrid_vit.models.blocks import apply_blocks
from hybrid_vit.models.registry import FeatureSpec, Preprocessing, Published, register
from hybrid_vit.models.vitdet import RELATIVE_TABLES, Reach, check_reach, relative_bias

_INIT = nn.initializers.normal(0.02)
_BATCH_NORM_EPSILON = 1e-5

ACTIVATIONS = {"gelu": layers.gelu, "quick_gelu": layers.quick_gelu}


class VisionTransformer(nn.Module):
  """A plain vision transformer with its classifier or projection.

  A call takes images `[B, H, W, 3]` and returns logits `[B, num_classes]` in float32 (None when
  `num_classes` is 0) and the endpoints. Maps are `[B, h, w, C]` without the class token, which is
  beside each as "…_token" `[B, C]`: "stem" (patches, no token), "pre_norm" where there is one,
  "stage1_block0" and so on, "stage1" (the last block), "head_norm" (after the last norm), and
  "pre_logits" `[B, C]` in float32. Heights and widths are multiples of the patch, or padded to
  them (`pad_maps`); with the convolutional stem any size is taken and what does not fill a patch
  is cut off.

  With a distillation token (arXiv:2012.12877, section 4) the maps have a "…_distillation_token" too
  and the logits are the mean of two heads', "class_logits" and "distillation_logits" among the
  endpoints. A call with `kept` `[B, K]`, int32, shows the blocks those patches only, in that order
  (MAE's encoder, arXiv:2111.06377): the maps behind the stem are `[B, K, C]` then.

  Attributes:
    width: channels of a token.
    depth: number of blocks.
    num_heads: of attention.
    num_classes: number of classes, or width of CLIP's projection; 0 for none.
    patch_size: side of a patch.
    position_size: (rows, columns) or one number, the map for which the position table is made;
      other maps take the table resized.
    mlp_ratio: hidden width of the MLPs over the width.
    stem: "patch", one convolution, or "convolutions", MobileCLIP's three of stride 4, 2, 2.
    stem_bias: of the patch convolution.
    class_token: a trained token before the patches.
    distillation_token: a second one behind it, with a head of its own that learns from a teacher.
    pool: what the head takes: "token", or "mean" over the patches.
    pool_before_norm: pool first and normalise after, as MAE's fine-tuning does.
    positions: "grid", for the class token too, resized in two dimensions (bicubic), or "sequence",
      for the patches only, resized along the flattened sequence (linear), as in MobileCLIP.
    output_blocks: numbers of the blocks, from 0, whose maps `features` names; () for the last one.
      Where there are some and no classifier, there is no last norm: "pre_logits" is pooled from
      the last block. For dense tasks.
    pad_maps: pad images at the right and the bottom to whole patches, as dense tasks do.
    window_size: side of the windows in which blocks attend, see `models.vitdet`; 0 for none.
    global_blocks: numbers of the blocks that attend globally all the same.
    relative_size: side of the maps that global blocks' tables of relative positions are made for;
      the other blocks' are then made for their windows. 0 for none at all.
    pre_norm: a layer norm before the blocks, as in CLIP.
    activation: "gelu" (exact) or "quick_gelu" (OpenAI's CLIP weights).
    layer_norm_epsilon: of every layer norm.
    head_bias: of the head; False for CLIP's projection.
    drop_path_rate: of the last block; the ramp begins at 0.
    batch_norm_momentum: of the convolutional stem's running statistics.
    batch_norm_groups: groups of the batch with batch norm statistics of their own.
    remat: recompute each block in the backward pass instead of storing its inside.
    scan_blocks: equal blocks as the turns of a loop, see `models/blocks.py`.
    dtype: of the computation; parameters, softmax and norm statistics are float32.
  """

  width: int
  depth: int
  num_heads: int
  num_classes: int = 1000
  patch_size: int = 16
  position_size: tuple[int, int] | int = 14
  mlp_ratio: float = 4.0
  stem: str = "patch"
  stem_bias: bool = True
  class_token: bool = True
  distillation_token: bool = False
  pool: str = "token"
  pool_before_norm: bool = False
  positions: str = "grid"
  output_blocks: tuple[int, ...] = ()
  pad_maps: bool = False
  window_size: int = 0
  global_blocks: tuple[int, ...] = ()
  relative_size: int = 0
  pre_norm: bool = False
  activation: str = "gelu"
  layer_norm_epsilon: float = 1e-6
  head_bias: bool = True
  drop_path_rate: float = 0.0
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  remat: bool = False
  scan_blocks: bool = False
  dtype: Any = jnp.float32

  @property
  def features(self) -> tuple[FeatureSpec, ...]:
    """The last block's map, or those of `output_blocks`, all of one stride."""
    names = [f"stage1_block{i}" for i in sorted(self.output_blocks)] or ["stage1"]
    return tuple(FeatureSpec(name, self.patch_size, self.width) for name in names)

  def at_size(self, size: int, made_for: int) -> dict[str, Any]:
    """Arguments of the same network for square pictures of another size: its position table's."""
    if positions.pair(self.position_size) != (made_for // self.patch_size,) * 2:
      return {}
    return {"position_size": size // self.patch_size}

  @property
  def takes_kept(self) -> bool:
    """Whether a call may say which patches the blocks see."""
    plain = not self.window_size and not self.relative_size
    return plain and self.stem == "patch" and self.positions == "grid"

  @nn.compact
  def __call__(
    self, images: jax.Array, train: bool = False, kept: jax.Array | None = None
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    x = images.astype(self.dtype)
    if self.pad_maps:
      rows, columns = (-n % self.patch_size for n in images.shape[1:3])
      x = jnp.pad(x, ((0, 0), (0, rows), (0, columns), (0, 0)))
    self._check(x.shape[1:3])
    endpoints = {}
    x = self._stem(x, train)
    batch, rows, columns, width = x.shape
    endpoints["stem"] = x
    tokens = self._with_positions(x.reshape(batch, rows * columns, width), (rows, columns))
    prefix = tokens.shape[1] - rows * columns
    if kept is not None:
      patches = jnp.take_along_axis(tokens[:, prefix:], kept[..., None], axis=1)
      tokens = jnp.concatenate([tokens[:, :prefix], patches], axis=1)

    def record(name: str, tokens: jax.Array) -> None:
      patches = tokens[:, prefix:]
      endpoints[name] = (
        patches if kept is not None else patches.reshape(batch, rows, columns, width)
      )
      if prefix:
        endpoints[f"{name}_token"] = tokens[:, 0]
      if prefix == 2:
        endpoints[f"{name}_distillation_token"] = tokens[:, 1]

    if self.pre_norm:
      tokens = layers.layer_norm(self.layer_norm_epsilon, self.dtype, "pre_norm")(tokens)
      record("pre_norm", tokens)
    (rates,) = layers.linear_drop_path_rates(self.drop_path_rate, (self.depth,))
    blocks = [
      {
        "num_heads": self.num_heads,
        "hidden": int(width * self.mlp_ratio),
        "activation": self.activation,
        "layer_norm_epsilon": self.layer_norm_epsilon,
        "drop_path_rate": rates[i],
        "causal": False,
        "reach": self._reach(i, (rows, columns)),
        "dtype": self.dtype,
      }
      for i in range(self.depth)
    ]
    tokens, outputs = apply_blocks(self, EncoderBlock, "stage1_block", blocks, tokens, train)
    for name, output in outputs.items():
      record(name, output)
    record("stage1", tokens)

    has_norm = bool(self.num_classes or not self.output_blocks)
    head_norm = layers.layer_norm(self.layer_norm_epsilon, self.dtype, "head_norm")
    if has_norm and not self.pool_before_norm:
      tokens = head_norm(tokens)
      record("head_norm", tokens)
    if self.pool == "token":
      x = tokens[:, 0].astype(jnp.float32)
    else:
      x = tokens[:, prefix:].mean(1, dtype=jnp.float32)
    if has_norm and self.pool_before_norm:
      x = head_norm(x).astype(jnp.float32)
    endpoints["pre_logits"] = x
    logits = None
    if self.num_classes:
      logits = self._head(x, "head")
      if self.distillation_token:
        endpoints["class_logits"] = logits
        of_teacher = self._head(tokens[:, 1].astype(jnp.float32), "distillation_head")
        endpoints["distillation_logits"] = of_teacher
        logits = (logits + of_teacher) / 2
    return logits, endpoints

  def _reach(self, block: int, grid: tuple[int, int]) -> Reach | None:
    if not self.window_size and not self.relative_size:
      return None
    window = 0 if block in self.global_blocks else self.window_size
    return Reach(grid, window, self.relative_size and (window or self.relative_size))

  def _head(self, x: jax.Array, name: str) -> jax.Array:
    # Float32 throughout: it is small, and logits are promised in float32.
    return nn.Dense(
      self.num_classes,
      use_bias=self.head_bias,
      kernel_init=_INIT if self.head_bias else nn.initializers.normal(x.shape[-1] ** -0.5),
      dtype=jnp.float32,
      name=name,
    )(x)

  def _stem(self, x: jax.Array, train: bool) -> jax.Array:
    if self.stem == "convolutions":
      return ConvStem(
        self.width, self.batch_norm_momentum, self.batch_norm_groups, self.dtype, name="stem"
      )(x, train)
    size = (self.patch_size, self.patch_size)
    return layers.Conv(
      self.width,
      size,
      strides=size,
      padding="VALID",
      use_bias=self.stem_bias,
      kernel_init=layers.torch_conv_init,
      bias_init=layers.torch_bias_init(self.patch_size**2 * x.shape[-1]),
      dtype=self.dtype,
      name="stem",
    )(x)

  def _with_positions(self, tokens: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Patches `[B, N, C]` with positions, after the tokens that the network has besides."""
    batch, _, width = tokens.shape
    made = positions.pair(self.position_size)
    names = ["class_token"] * self.class_token + ["distillation_token"] * self.distillation_token
    on_tokens = len(names) if self.positions == "grid" else 0
    std = 0.02 if self.positions == "grid" and not self.pre_norm else width**-0.5
    name = "position_embedding" if self.positions == "grid" else "position_sequence"
    shape = (made[0] * made[1] + on_tokens, width)
    table = self.param(name, nn.initializers.normal(std), shape, jnp.float32)
    if self.positions == "sequence":
      table = positions.resize_sequence(table, size[0] * size[1])
    else:
      table = positions.resize_grid(table, made, size)
    table = table.astype(self.dtype)
    tokens = tokens + table[on_tokens:]
    init = nn.initializers.normal(width**-0.5 if self.pre_norm else 0.02)
    before = []
    for i, name in enumerate(names):
      token = self.param(name, init, (width,), jnp.float32).astype(self.dtype)
      token = token + table[i] if on_tokens else token
      before.append(jnp.broadcast_to(token, (batch, 1, width)))
    return jnp.concatenate([*before, tokens], axis=1) if before else tokens

  def _check(self, size: tuple[int, ...]) -> None:
    check_reach(self)
    known: dict[str, tuple[str, ...]] = {
      "stem": ("patch", "convolutions"),
      "pool": ("token", "mean"),
      "positions": ("grid", "sequence"),
      "activation": tuple(ACTIVATIONS),
    }
    for name, values in known.items():
      if getattr(self, name) not in values:
        raise ValueError(
          f"VisionTransformer: {name} is {getattr(self, name)!r}; it is one of {values}"
        )
    if self.pool == "token" and not self.class_token:
      raise ValueError("VisionTransformer: pool='token' needs class_token=True")
    if self.distillation_token and (self.pool != "token" or self.positions != "grid"):
      raise ValueError(
        "VisionTransformer: distillation_token=True needs pool='token' and positions='grid'"
      )
    if self.width % self.num_heads:
      raise ValueError(
        f"VisionTransformer: {self.num_heads} heads do not divide the width {self.width}"
      )
    if self.stem == "convolutions" and self.patch_size != 16:
      raise ValueError(
        f"VisionTransformer: the convolutional stem has patches of 16, not {self.patch_size}"
      )
    if self.stem == "patch" and any(n % self.patch_size for n in size):
      raise ValueError(
        f"VisionTransformer: a picture of {size[0]}x{size[1]} is not whole patches of "
        f"{self.patch_size}x{self.patch_size}; resize it, or give pad_maps=True"
      )
    absent = [i for i in self.output_blocks if not 0 <= i < self.depth]
    if absent:
      raise ValueError(
        f"VisionTransformer: output_blocks names block {absent[0]}; the blocks are 0 to "
        f"{self.depth - 1}"
      )


class ConvStem(nn.Module):
  """4x4 of stride 4, 2x2 and 2x2 of stride 2; batch norm and GELU after the first two."""

  width: int
  batch_norm_momentum: float
  batch_norm_groups: int
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    narrow = max(32, self.width // 4)
    # The authors' padding of (4 - 1) // 2 on both sides: the first patch begins outside.
    for i, (width, size, pad) in enumerate(((narrow, 4, 1), (narrow, 2, 0), (self.width, 2, 0))):
      x = layers.Conv(
        width,
        (size, size),
        strides=size,
        padding=((pad, pad), (pad, pad)),
        use_bias=i == 2,
        kernel_init=layers.torch_conv_init,
        bias_init=layers.torch_bias_init(size**2 * x.shape[-1]),
        dtype=self.dtype,
        name=f"conv_{i}",
      )(x)
      if i < 2:
        x = layers.batch_norm(
          self, epsilon=_BATCH_NORM_EPSILON, unbiased_variance=True, name=f"norm_{i}"
        )(x, train)
        x = layers.gelu(x)
    return x


class EncoderBlock(nn.Module):
  """Attention, then an MLP, each after a layer norm and residual; CLIP's text towers have it too.

  Attributes:
    num_heads: of attention.
    hidden: width of the MLP.
    activation: see `VisionTransformer`.
    layer_norm_epsilon: of both norms.
    drop_path_rate: of both branches.
    causal: a token attends to itself and those before it.
    reach: what the cells of a map attend to; None for all tokens.
    dtype: of the computation.
  """

  num_heads: int
  hidden: int
  activation: str
  layer_norm_epsilon: float
  drop_path_rate: float
  causal: bool
  dtype: Any
  reach: Reach | None = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """`[B, N, C]` to the same shape."""
    y = layers.layer_norm(self.layer_norm_epsilon, self.dtype, "attention_norm")(x)
    y = self._attention(y)
    x = x + layers.DropPath(self.drop_path_rate, name="attention_drop_path")(y, train)
    y = layers.layer_norm(self.layer_norm_epsilon, self.dtype, "mlp_norm")(x)
    y = ACTIVATIONS[self.activation](self._dense(self.hidden, "fc1")(y))
    y = self._dense(x.shape[-1], "fc2")(y)
    return x + layers.DropPath(self.drop_path_rate, name="mlp_drop_path")(y, train)

  def _attention(self, x: jax.Array) -> jax.Array:
    x = self.reach.split(x) if self.reach else x
    length, channels = x.shape[-2:]
    head_size = channels // self.num_heads
    query, key, value = layers.split_heads(self._dense(3 * channels, "qkv")(x), 3, self.num_heads)
    bias = None
    if self.causal:
      before = np.tril(np.ones((length, length), bool))
      bias = jnp.where(before, 0.0, -jnp.inf).astype(jnp.float32)
    if self.reach and self.reach.relative_size:
      shape = (2 * self.reach.relative_size - 1, head_size)
      zeros = nn.initializers.zeros
      rows, columns = (self.param(name, zeros, shape, jnp.float32) for name in RELATIVE_TABLES)
      bias = relative_bias(query, rows, columns, self.reach.size)
    if self.reach is None:
      layers.sow_attention(self, query, key, scale=head_size**-0.5, bias=bias)
    y = layers.dot_product_attention(query, key, value, scale=head_size**-0.5, bias=bias)
    y = self._dense(channels, "proj")(y.reshape(x.shape))
    return self.reach.join(y) if self.reach else y

  def _dense(self, features: int, name: str) -> layers.PointwiseConv:
    return layers.PointwiseConv(features, kernel_init=_INIT, dtype=self.dtype, name=name)


def _register_family() -> None:
  imagenet = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
  symmetric = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
  openai = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
  }
  unit = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
  tiny, small = ({"width": 64 * n, "depth": 12, "num_heads": n} for n in (3, 6))
  base = {"width": 768, "depth": 12, "num_heads": 12}
  base_at_384 = {**base, "position_size": 24}
  clip = {"num_classes": 512, "layer_norm_epsilon": 1e-5, "head_bias": False}
  mobileclip = {**base, **clip, "stem": "convolutions", "positions": "sequence"}
  # DeiT's evaluation resizes by 256 / 224 at every size.
  deit, timm_crop, whole = (0.875, "bicubic"), (0.9, "bicubic"), (1.0, "bicubic")
  deit_source = "facebookresearch/deit README; multiply-adds from timm's benchmark tables"
  # name, arguments, input size, crop and filter, statistics, parameters, multiply-adds, top-1
  table: tuple[tuple[Any, ...], ...] = (
    ("deit_tiny_patch16_224", tiny, 224, deit, imagenet, 5717416, 1.26e9, 72.2, deit_source),
    ("deit_small_patch16_224", small, 224, deit, imagenet, 22050664, 4.61e9, 79.9, deit_source),
    ("deit_base_patch16_224", base, 224, deit, imagenet, 86567656, 17.58e9, 81.8, deit_source),
    (
      "deit_base_patch16_384",
      base_at_384,
      384,
      deit,
      imagenet,
      86859496,
      55.54e9,
      82.9,
      deit_source,
    ),
    (
      "vit_base_patch16_224",
      base,
      224,
      timm_crop,
      symmetric,
      86567656,
      17.58e9,
      84.5,
      "timm's tables: augreg_in21k_ft_in1k",
    ),
    (
      "vit_base_patch16_gap_224",
      {**base, "class_token": False, "pool": "mean"},
      224,
      timm_crop,
      imagenet,
      86566120,
      17.49e9,
      None,
      "timm's tables; no ImageNet-1K weights",
    ),
    (
      "vit_base_patch16_clip_224",
      {**base, **clip, "stem_bias": False, "pre_norm": True},
      224,
      whole,
      openai,
      86192640,
      17.57e9,
      73.5,
      "open_clip ViT-B-16: parameters counted, multiply-adds from its profile table (half of the "
      "FLOPs), zero-shot top-1 of its DataComp-XL weights",
    ),
    (
      "vit_b16",
      mobileclip,
      224,
      (1.0, "bilinear"),
      unit,
      86348544,
      17.73e9,
      76.8,
      "apple/ml-mobileclip: parameters counted, zero-shot top-1 of MobileCLIP-B from its README; "
      "multiply-adds from timm's benchmark tables",
    ),
  )
  # Distilled: name, arguments, size, parameters, multiply-adds, top-1.
  distilled: tuple[tuple[Any, ...], ...] = (
    ("deit_tiny_distilled_patch16_224", tiny, 224, 5910800, 1.27e9, 74.5),
    ("deit_small_distilled_patch16_224", small, 224, 22436432, 4.63e9, 81.2),
    ("deit_base_distilled_patch16_224", base, 224, 87338192, 17.68e9, 83.4),
    ("deit_base_distilled_patch16_384", base_at_384, 384, 87630032, 55.65e9, 85.2),
  )
  table += tuple(
    (name, {**a, "distillation_token": True}, size, deit, imagenet, *figures, deit_source)
    for name, a, size, *figures in distilled
  )
  for name, arguments, size, (crop, kind), stats, parameters, multiply_adds, top1, source in table:
    register(
      name,
      VisionTransformer,
      arguments,
      preprocessing=Preprocessing(size, crop, kind, **stats),
      published=Published(parameters, multiply_adds, top1, source),
    )


_register_family()
