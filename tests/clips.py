"""A two-tower model so small that it is compiled in a second, and its directory of weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_vit import checkpoints
from hybrid_vit.models.clip_systems import make_clip
from hybrid_vit.models.registry import Preprocessing
from hybrid_vit.weights.stored_clip import load_clip

IMAGE = "vit_base_patch16_clip_224"
SMALL_VIT = {"width": 16, "depth": 1, "num_heads": 2, "patch_size": 8, "position_size": 2}
SMALL_TEXT = {"width": 16, "depth": 1, "num_heads": 2, "context_length": 12}
PREPARED = Preprocessing(16, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)


def small_clip(seed=0, size=8):
  """(CLIP, its variables as NumPy arrays)."""
  model = make_clip(
    IMAGE,
    "clip_vit_b16",
    embedding_size=size,
    image_arguments=SMALL_VIT,
    text_arguments=SMALL_TEXT,
  )
  images, tokens = jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 12), jnp.int32)
  variables = jax.jit(model.init)(jax.random.key(seed), images, tokens)
  return model, jax.tree.map(np.array, {"batch_stats": {}, **variables})


def write_small_clip(directory, seed=0, **metadata):
  """Writes an export as a training does, and loads it."""
  model, variables = small_clip(seed)
  checkpoints.export(
    directory,
    variables,
    {
      "name": IMAGE,
      "arguments": SMALL_VIT,
      "preprocessing": dataclasses.asdict(PREPARED),
      "task": "contrastive",
      "task_settings": {},
      "text_tower": "clip_vit_b16",
      "text_arguments": SMALL_TEXT,
      "embedding_size": model.image.num_classes,
      "max_scale": 100.0,
      "loss": "softmax",
      **metadata,
    },
  )
  return load_clip(directory)
