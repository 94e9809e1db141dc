"""CLIP's text towers: the plain causal transformer and MobileCLIP's three.

Alec Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML
2021, arXiv:2103.00020; Pavan Kumar Anasosalu Vasu et al., "MobileCLIP", CVPR 2024,
arXiv:2311.17049, section 3. Follows apple/ml-mobileclip (`mobileclip/text_encoder.py`) and
open_clip, with these differences: weights begin as open_clip's, but for the linear layers' normal
0.02 (the authors' released code leaves the projection uninitialised), and a tower is made by
`create_text_tower`, not by the registry, whose models answer pictures.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybrid_vit.models import layers, mobileone
from hybrid_vit.models.blocks import apply_blocks
from hybrid_vit.models.positions import resize_sequence
from hybrid_vit.models.vit import EncoderBlock

# Name of the tower to (attributes, parameters counted from the authors' code).
TEXT_TOWERS: dict[str, tuple[dict[str, Any], int]] = {
  "mobileclip_s0": ({"depth": 4, "causal": False, "mixer_blocks": True}, 42441216),
  "mobileclip_s1": ({"causal": False}, 63428096),
  "mobileclip_s2": ({"causal": False}, 63428096),
  "mobileclip_b": ({"causal": True}, 63428096),
  "clip_vit_b16": ({"causal": True}, 63428096),
}


def create_text_tower(name: str, **overrides: Any) -> "TextTransformer":
  """Builds a tower of `TEXT_TOWERS`.

  Args:
    name: of the tower.
    **overrides: attributes that replace the tower's own.

  Raises:
    ValueError: for an unknown name.
  """
  if name not in TEXT_TOWERS:
    raise ValueError(f"no text tower is named {name!r}; there are: {', '.join(TEXT_TOWERS)}")
  return TextTransformer(**{**TEXT_TOWERS[name][0], **overrides})


class TextTransformer(nn.Module):
  """A transformer over token ids whose answer is at the end token.

  A call takes ids int `[B, L]` and returns the embedding `[B, embedding_size]` in float32, not
  normalised (None when `embedding_size` is 0), and the endpoints: "block0" and so on `[B, L, C]`,
  "final_norm" `[B, L, C]` and "pre_logits" `[B, C]`, the place of each row's largest id, which is
  the end token's (the first, were there several). Padding is attended to, as in the authors' code.

  Attributes:
    causal: a token attends to itself and those before it.
    vocabulary_size: number of ids.
    context_length: for which the position table is made; another length takes it resized.
    width: channels of a token.
    depth: blocks of attention.
    num_heads: of attention; one number, or one for each of the `depth` blocks.
    embedding_size: width of the projection; 0 for none.
    positions: add the position table.
    mixer_blocks: a convolutional block before and one after the others (MobileCLIP-S0).
    mixer_kernel_size: of those, along the tokens.
    mlp_ratio: hidden width of the MLPs over the width, rounded up to a multiple of 16; one number,
      or one for each of the `depth` blocks.
    activation: "gelu" (exact) or "quick_gelu" (OpenAI's CLIP weights).
    layer_norm_epsilon: of every layer norm.
    layer_scale: where the convolutional blocks' scales begin; None for no scales.
    reparameterized: convolutional blocks are merged, see `mobileone.reparameterize`.
    batch_norm_momentum: of the running statistics.
    batch_norm_groups: groups of the batch with batch norm statistics of their own.
    remat: recompute each block in the backward pass instead of storing its inside.
    scan_blocks: equal blocks as the turns of a loop, see `models/blocks.py`.
    dtype: of the computation; parameters, softmax and norm statistics are float32.
  """

  causal: bool
  vocabulary_size: int = 49408
  context_length: int = 77
  width: int = 512
  depth: int = 12
  num_heads: int | tuple[int, ...] = 8
  embedding_size: int = 512
  positions: bool = True
  mixer_blocks: bool = False
  mixer_kernel_size: int = 11
  mlp_ratio: float | tuple[float, ...] = 4.0
  activation: str = "gelu"
  layer_norm_epsilon: float = 1e-5
  layer_scale: float | None = 1e-5
  reparameterized: bool = False
  batch_norm_momentum: float = 0.9
  batch_norm_groups: int = 1
  remat: bool = False
  scan_blocks: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, tokens: jax.Array, train: bool = False
  ) -> tuple[jax.Array | None, dict[str, jax.Array]]:
    heads, ratios = self._per_block("num_heads"), self._per_block("mlp_ratio")
    for number in heads:
      if self.width % number:
        raise ValueError(f"TextTransformer: {number} heads do not divide the width {self.width}")
    normal = nn.initializers.normal
    shape = (self.vocabulary_size, self.width)
    embedding = self.param("token_embedding", normal(0.02), shape, jnp.float32)
    x = embedding[tokens].astype(self.dtype)
    if self.positions:
      shape = (self.context_length, self.width)
      positions = self.param("position_sequence", normal(0.01), shape, jnp.float32)
      x = x + resize_sequence(positions, tokens.shape[1]).astype(self.dtype)

    endpoints = {}
    first = int(self.mixer_blocks)
    if self.mixer_blocks:
      x = endpoints["block0"] = self._mixer(x, "block0", train)
    blocks = [
      {
        "num_heads": number,
        "hidden": math.ceil(self.width * ratio / 16) * 16,
        "activation": self.activation,
        "layer_norm_epsilon": self.layer_norm_epsilon,
        "drop_path_rate": 0.0,
        "causal": self.causal,
        "dtype": self.dtype,
      }
      for number, ratio in zip(heads, ratios)
    ]
    x, outputs = apply_blocks(self, EncoderBlock, "block", blocks, x, train, first=first)
    endpoints |= outputs
    if self.mixer_blocks:
      name = f"block{first + self.depth}"
      x = endpoints[name] = self._mixer(x, name, train)
    x = layers.layer_norm(self.layer_norm_epsilon, self.dtype, "final_norm")(x)
    endpoints["final_norm"] = x
    x = x[jnp.arange(len(tokens)), tokens.argmax(-1)].astype(jnp.float32)
    endpoints["pre_logits"] = x
    if not self.embedding_size:
      return None, endpoints
    init = normal(self.width**-0.5)
    head = nn.Dense(self.embedding_size, False, jnp.float32, kernel_init=init, name="head")
    return head(x), endpoints

  def _per_block(self, name: str) -> tuple[Any, ...]:
    value = getattr(self, name)
    values = value if isinstance(value, tuple) else (value,) * self.depth
    if len(values) != self.depth:
      raise ValueError(
        f"TextTransformer: depth is {self.depth} but {name} has {len(values)} values: {values}"
      )
    return values

  def _mixer(self, x: jax.Array, name: str, train: bool) -> jax.Array:
    block = mobileone.RepMixerBlock
    block = nn.remat(block, static_argnums=(2,)) if self.remat else block
    options = mobileone.Options(
      self.reparameterized, self.batch_norm_momentum, self.batch_norm_groups, self.dtype
    )
    kernel = (1, self.mixer_kernel_size)
    # A map of one row. Its MLP has the ratio 4 whatever the others have, as in the authors' code.
    y = block(4.0, kernel, kernel, self.layer_scale, 0.0, options, name=name)(x[:, None], train)
    return y[:, 0]
