"""A network, a task and batches so small that a training step compiles in a second or two."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit.config import Config
from hybrid_vit.models import layers
from hybrid_vit.optimizers import make_optimizer
from hybrid_vit.tasks.classification import Classification


class ConvNet(nn.Module):
  """A convolution with batch norm, drop path, two dense layers."""

  num_classes: int = 10
  width: int = 64
  groups: int = 1
  drop_path_rate: float = 0.0
  dtype: str = "float32"

  @nn.compact
  def __call__(self, images, train=False):
    # No bias before a norm: it would move by the noise of a gradient that is 0.
    conv = functools.partial(nn.Conv, strides=2, padding="SAME", use_bias=False, dtype=self.dtype)
    x = conv(8, (3, 3), name="conv")(images)
    x = layers.BatchNorm(1e-3, 0.9, num_groups=self.groups, dtype=self.dtype, name="norm")(x, train)
    x = layers.DropPath(self.drop_path_rate)(layers.gelu(x), train)
    endpoints = {"stem": x}
    x = nn.Dense(self.width, dtype=self.dtype, name="hidden")(x.reshape(len(x), -1))
    endpoints["hidden"] = x
    logits = nn.Dense(self.num_classes, dtype="float32", name="head")(layers.gelu(x))
    return logits, endpoints


def make_task(label_smoothing=0.0, **arguments):
  return Classification(
    model=ConvNet(**arguments),
    num_classes=arguments.get("num_classes", 10),
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    label_smoothing=label_smoothing,
  )


def make_batch(size=16, seed=0):
  """uint8 pictures of 8 x 8."""
  rng = np.random.default_rng(seed)
  return {
    "image": rng.integers(0, 256, (size, 8, 8, 3), np.uint8),
    "label": rng.integers(0, 10, size).astype(np.int32),
    "index": np.arange(size, dtype=np.int32) + 100 * seed,
  }


def adamw(task):
  """AdamW at a constant rate of 0.01, its moments beside the parameters."""
  shapes = jax.eval_shape(lambda key: task.init(key, make_batch()), jax.random.key(0))
  fields = Config({"name": "adamw", "weight_decay": 0.1, "gradient_clip_norm": 1.0}, "optimizer")
  return make_optimizer(fields, shapes["params"], schedule)


def schedule(step):
  return jnp.full_like(jnp.asarray(step, jnp.float32), 0.01)
