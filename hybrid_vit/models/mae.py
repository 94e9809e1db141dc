"""What masked autoencoding adds to a network: patches, masks, positions, decoders.

Kaiming He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv:2111.06377
(facebookresearch/mae): the blocks see the visible patches only, a narrower transformer rebuilds the
rest. Zhenda Xie et al., "SimMIM", CVPR 2022, arXiv:2111.09886: a network of any kind sees the whole
picture with a trained patch in the masked places, and one linear layer rebuilds.

Differences: all linear layers begin normal with 0.02 (MAE's: Xavier's uniform); SimMIM's trained
patch replaces embeddings behind the stem and is of one cell of that map, ours replaces pixels.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.models import layers
from hybrid_vit.models.blocks import apply_blocks
from hybrid_vit.models.vit import EncoderBlock

_INIT = nn.initializers.normal(0.02)
_LAYER_NORM_EPSILON = 1e-6


class Masking(NamedTuple):
  """Which of L patches are hidden.

  Attributes:
    kept: int32 `[B, K]`, the visible ones in a random order.
    restore: int32 `[B, L]`, the place of each patch where the visible ones come first.
    mask: float32 `[B, L]`, 1 for hidden.
  """

  kept: jax.Array
  restore: jax.Array
  mask: jax.Array


def mask_by_noise(noise: jax.Array, ratio: float) -> Masking:
  """Hides the patches with the largest noise `[B, L]`, in each row as many.

  Raises:
    ValueError: see `visible_patches`.
  """
  count = visible_patches(noise.shape[1], ratio)
  order = jnp.argsort(noise, axis=1).astype(jnp.int32)
  restore = jnp.argsort(order, axis=1).astype(jnp.int32)
  return Masking(order[:, :count], restore, (restore >= count).astype(jnp.float32))


def visible_patches(length: int, ratio: float) -> int:
  """How many of `length` patches a mask leaves.

  Raises:
    ValueError: a ratio that leaves nothing visible, or hides nothing.
  """
  # 100 * (1 - 0.9) shall be 10.
  count = int(length * (1.0 - ratio) + 1e-6)
  if not 0 < count < length:
    raise ValueError(
      f"a mask ratio of {ratio:g} leaves {count} of {length} patches visible: choose another one, "
      "larger pictures or smaller patches"
    )
  return count


def patchify(images: jax.Array, size: int) -> jax.Array:
  """`[B, H, W, C]` → `[B, L, size * size * C]`: patches and, in each, pixels row by row.

  Raises:
    ValueError: the picture is not whole patches.
  """
  batch, height, width, channels = images.shape
  if height % size or width % size:
    raise ValueError(
      f"masked autoencoding: a picture of {height}x{width} is not whole patches of {size}x{size}; "
      "resize it"
    )
  x = images.reshape(batch, height // size, size, width // size, size, channels)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)


def unpatchify(patches: jax.Array, grid: tuple[int, int], size: int) -> jax.Array:
  """The inverse of `patchify`, for `grid` = (rows, columns) of patches."""
  x = patches.reshape(patches.shape[0], *grid, size, size, -1)
  x = x.transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(patches.shape[0], grid[0] * size, grid[1] * size, -1)


def sincos_positions(
  width: int, grid: tuple[int, int], tokens: int = 0, made: tuple[int, int] | None = None
) -> np.ndarray:
  """Fixed positions float32 `[tokens + rows * columns, width]`, zeros for the tokens before.

  The first half of a row tells the column, the second the row, each by sines, then cosines, of
  frequencies from 1 down to 1/10000.

  Args:
    width: of a row.
    grid: (rows, columns).
    tokens: rows of zeros before.
    made: the grid in whose units places are told, so that a place of the picture has the same
      position at any size; None for `grid`.

  Raises:
    ValueError: a width that is no multiple of 4.
  """
  if width % 4:
    raise ValueError(f"sine positions need a width that is a multiple of 4, not {width}")
  frequencies = 10000.0 ** -(np.arange(width // 4) / (width / 4))
  # Centres of the cells: i + 0.5 of n is at (i + 0.5) / n.
  sides = [(np.arange(n) + 0.5) * (m / n) - 0.5 for n, m in zip(grid, made or grid)]
  rows, columns = np.meshgrid(*sides, indexing="ij")
  parts = [np.zeros((grid[0] * grid[1], 0))]
  for place in (columns, rows):
    angles = place.reshape(-1, 1) * frequencies
    parts += [np.sin(angles), np.cos(angles)]
  table = np.concatenate(parts, axis=1)
  return np.concatenate([np.zeros((tokens, width)), table]).astype(np.float32)


class Decoder(nn.Module):
  """MAE's decoder: a transformer over all patches, a trained token in the hidden ones' places.

  Attributes:
    outputs: numbers of a patch.
    positions: (rows, columns) of the full size, see `sincos_positions`; None for the picture's own.
    width: of a token.
    depth: number of blocks.
    num_heads: of attention.
    remat: recompute each block in the backward pass.
    scan_blocks: equal blocks as the turns of a loop, see `models/blocks.py`.
    dtype: of the computation.
  """

  outputs: int
  positions: tuple[int, int] | None = None
  width: int = 512
  depth: int = 8
  num_heads: int = 16
  remat: bool = False
  scan_blocks: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self,
    patches: jax.Array,
    token: jax.Array | None,
    restore: jax.Array,
    grid: tuple[int, int],
    train: bool,
  ) -> jax.Array:
    """Rebuilds all patches.

    Args:
      patches: `[B, K, C]`, the encoder's of the visible patches.
      token: `[B, C]`, its class token, which the blocks see too; None for none.
      restore: see `Masking`.
      grid: (rows, columns) of patches.
      train: passed on.

    Returns:
      float32 `[B, L, outputs]`.
    """
    batch, length = restore.shape
    before = 0 if token is None else 1
    x = patches if token is None else jnp.concatenate([token[:, None], patches], axis=1)
    x = layers.PointwiseConv(self.width, kernel_init=_INIT, dtype=self.dtype, name="embed")(x)
    mask_token = self.param("mask_token", _INIT, (self.width,), jnp.float32).astype(self.dtype)
    hidden = jnp.broadcast_to(mask_token, (batch, length - patches.shape[1], self.width))
    all_patches = jnp.concatenate([x[:, before:], hidden], axis=1)
    all_patches = jnp.take_along_axis(all_patches, restore[..., None], axis=1)
    x = jnp.concatenate([x[:, :before], all_patches], axis=1)
    x = x + jnp.asarray(sincos_positions(self.width, grid, before, self.positions), self.dtype)
    block = {
      "num_heads": self.num_heads,
      "hidden": 4 * self.width,
      "activation": "gelu",
      "layer_norm_epsilon": _LAYER_NORM_EPSILON,
      "drop_path_rate": 0.0,
      "causal": False,
      "dtype": self.dtype,
    }
    x, _ = apply_blocks(self, EncoderBlock, "block", [block] * self.depth, x, train)
    x = layers.layer_norm(_LAYER_NORM_EPSILON, self.dtype, "norm")(x)
    x = nn.Dense(self.outputs, kernel_init=_INIT, dtype=jnp.float32, name="prediction")(x)
    return x[:, before:]


class DenseDecoder(nn.Module):
  """For networks that see whole pictures: a trained patch for the hidden places, a linear layer.

  Attributes:
    outputs: numbers of a patch.
    patch_size: side of a patch in pixels.
  """

  outputs: int
  patch_size: int

  def setup(self) -> None:
    shape = (self.patch_size, self.patch_size, 3)
    self.mask_token = self.param("mask_token", _INIT, shape, jnp.float32)
    self.prediction = nn.Dense(self.outputs, kernel_init=_INIT, dtype=jnp.float32)

  def hide(self, images: jax.Array, mask: jax.Array) -> jax.Array:
    """Images `[B, H, W, 3]` whose masked patches are replaced; mask `[B, rows, columns]`."""
    hidden = jnp.repeat(jnp.repeat(mask, self.patch_size, 1), self.patch_size, 2)[..., None] > 0
    token = jnp.tile(self.mask_token, (*mask.shape[1:], 1)).astype(images.dtype)
    return jnp.where(hidden, token, images)

  def __call__(self, features: jax.Array) -> jax.Array:
    """The network's last map `[B, rows, columns, C]` → float32 `[B, L, outputs]`."""
    x = features.astype(jnp.float32)
    return self.prediction(x.reshape(x.shape[0], -1, x.shape[-1]))
