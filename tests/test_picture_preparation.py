"""The preparation within a program, against the transform of evaluations."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL
import pytest

from hybrid_vit import recipes
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.models.registry import Preprocessing
from hybrid_vit.picture_preparation import prepared

SIZES = [(75, 101), (101, 75), (64, 64), (30, 47), (20, 12), (1, 20), (55, 300), (300, 55)]


@pytest.mark.parametrize(
  ("size", "crop_ratio", "interpolation", "resize"),
  [
    (24, 0.875, "bicubic", "crop"),
    (23, 0.9, "bilinear", "crop"),
    (24, 1.0, "nearest", "crop"),
    (25, 1.2, "bicubic", "crop"),  # a black border, 5 pixels of two sides
    (24, 1.0, "bilinear", "squash"),
  ],
)
def test_the_pixels_are_the_evaluations(size, crop_ratio, interpolation, resize):
  preprocessing = Preprocessing(size, crop_ratio, interpolation, (0.5,) * 3, (0.5,) * 3, resize)
  transform = parse_transform(recipes.eval_transform(preprocessing), "pil")
  images = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, h, w, 3"), jnp.uint8)
  program = jax.export.export(jax.jit(lambda x: prepared(x, preprocessing)))(images)
  assert program.out_avals[0].shape[1:] == (size, size, 3)
  rng = np.random.default_rng(0)
  for height, width in SIZES:
    if height > 2 * width and int(PIL.__version__.partition(".")[0]) < 13:
      continue  # another order of passes
    photos = rng.integers(0, 256, (2, height, width, 3), np.uint8)
    found = program.call(photos)
    for photo, seen in zip(photos, found):
      expected = transform({"image": photo}, rng)["image"]
      np.testing.assert_array_equal(seen, expected, f"{height} x {width}")
