"""CLIP: an image and a text tower whose unit-length embeddings meet in a dot product.

Alec Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML
2021, arXiv:2103.00020, section 2.3; apple/ml-mobileclip (`mobileclip/clip.py`) and open_clip
(`CLIP`), which differ in `max_scale` alone.
"""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp


class CLIP(nn.Module):
  """Two towers and a trained scale.

  A call takes images `[B, H, W, 3]` and token ids int `[T, L]`, either of which may be None, and
  returns (image features `[B, D]`, text features `[T, D]`, scale), all float32; features have unit
  length, and scale * image @ text.T are the logits of a contrastive loss.

  Attributes:
    image: a network of the registry whose `num_classes` is D, such as `create_model("mci2")`.
    text: a tower of `text.create_text_tower` whose `embedding_size` is D.
    max_scale: the scale is not above it: 100 in MobileCLIP; None in open_clip, whose training
      clamps the parameter instead.
    initial_scale: where the scale begins.
    initial_bias: where a trained bias of the logits begins ("logit_bias", for SigLIP's loss); None
      for no bias.
  """

  image: nn.Module
  text: nn.Module
  max_scale: float | None = 100.0
  initial_scale: float = 1 / 0.07
  initial_bias: float | None = None

  @nn.compact
  def __call__(
    self, images: jax.Array | None, tokens: jax.Array | None, train: bool = False
  ) -> tuple[jax.Array | None, jax.Array | None, jax.Array]:
    image_features = text_features = None
    if images is not None:
      image_features = _unit_length(self.image(images, train)[0], "image")
    if tokens is not None:
      text_features = _unit_length(self.text(tokens, train)[0], "text")
    if image_features is not None and text_features is not None:
      widths = image_features.shape[-1], text_features.shape[-1]
      if widths[0] != widths[1]:
        raise ValueError(
          f"CLIP: the image's embedding has {widths[0]} numbers, the text's {widths[1]}"
        )
    start = nn.initializers.constant(math.log(self.initial_scale))
    scale = self.scale_of(self.param("logit_scale", start, (), jnp.float32))
    if self.initial_bias is not None:
      self.param("logit_bias", nn.initializers.constant(self.initial_bias), (), jnp.float32)
    return image_features, text_features, scale

  def scale_of(self, logit_scale: jax.Array) -> jax.Array:
    """The trained logarithm → the scale, which is not above `max_scale`.

    There a gradient that leads back below passes and one that leads further up does not, as if the
    parameter itself were clamped after each step (open_clip's training does that).
    """
    if self.max_scale is None:
      return jnp.exp(logit_scale)
    return _clamped_exp(logit_scale, self.max_scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _clamped_exp(x: jax.Array, most: float) -> jax.Array:
  return jnp.minimum(jnp.exp(x), most)


def _clamped_exp_forward(x: jax.Array, most: float) -> tuple[jax.Array, jax.Array]:
  return _clamped_exp(x, most), x


def _clamped_exp_backward(most: float, x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
  # Descent goes against the gradient: where that is positive, downwards.
  passes = (jnp.exp(x) < most) | (cotangent > 0)
  return (jnp.where(passes, cotangent * jnp.minimum(jnp.exp(x), most), 0.0),)


_clamped_exp.defvjp(_clamped_exp_forward, _clamped_exp_backward)


def _unit_length(x: jax.Array | None, tower: str) -> jax.Array:
  """Divides by the length, which is at least 1e-12, as torch does; its gradient is 0 at 0."""
  if x is None:
    raise ValueError(f"CLIP: the {tower} tower has no projection; give it the embedding's width")
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
