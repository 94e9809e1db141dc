"""SegFormer's Mix Transformer by transformers' tensor names, for goldens that have one inside.

Enze Xie et al., "SegFormer", NeurIPS 2021, arXiv:2105.15203, section 3.1.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_EPSILON = 1e-5


def mix_transformer(
  images: np.ndarray,
  weights: Mapping[str, np.ndarray],
  *,
  depths: Sequence[int],
  strides: Sequence[int],
  num_heads: Sequence[int],
  reductions: Sequence[int],
) -> list[jax.Array]:
  """Images `[B, H, W, 3]` → a normalised map `[B, h, w, C]` of each stage, the finest first.

  Args:
    images: the pictures.
    weights: below the encoder's own name: "patch_embeddings.0.proj.weight" ….
    depths: blocks of each stage.
    strides: of each stage's patch embedding.
    num_heads: of each stage's attention.
    reductions: of keys and values on each side.
  """

  def norm(x, name):
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x - mean).mean(-1, keepdims=True)
    y = (x - mean) / jnp.sqrt(variance + _EPSILON)
    return y * weights[f"{name}.weight"] + weights[f"{name}.bias"]

  def dense(x, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

  def conv(x, name, stride, pad, groups=1):
    kernel = weights[f"{name}.weight"].transpose(2, 3, 1, 0)
    y = lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      ((pad, pad), (pad, pad)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )
    return y + weights[f"{name}.bias"]

  def attention(x, name, heads, reduction):
    batch, rows, columns, channels = x.shape
    source = x
    if reduction > 1:
      source = norm(conv(x, f"{name}.self.sr", reduction, 0), f"{name}.self.layer_norm")
    query, key, value = (
      dense(y, f"{name}.self.{part}").reshape(batch, -1, heads, channels // heads)
      for y, part in ((x, "query"), (source, "key"), (source, "value"))
    )
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(channels // heads)
    y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), value)
    return dense(y.reshape(batch, rows, columns, channels), f"{name}.output.dense")

  def mlp(x, name):
    y = dense(x, f"{name}.dense1")
    y = conv(y, f"{name}.dwconv.dwconv", 1, 1, groups=y.shape[-1])
    return dense(jax.nn.gelu(y, approximate=False), f"{name}.dense2")

  x, maps = jnp.asarray(images), []
  for i, depth in enumerate(depths):
    name = f"patch_embeddings.{i}"
    pad = weights[f"{name}.proj.weight"].shape[-1] // 2
    x = norm(conv(x, f"{name}.proj", strides[i], pad), f"{name}.layer_norm")
    for j in range(depth):
      block = f"block.{i}.{j}"
      y = norm(x, f"{block}.layer_norm_1")
      x = x + attention(y, f"{block}.attention", num_heads[i], reductions[i])
      x = x + mlp(norm(x, f"{block}.layer_norm_2"), f"{block}.mlp")
    x = norm(x, f"layer_norm.{i}")
    maps.append(x)
  return maps
