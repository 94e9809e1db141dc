"""Pillow's resizing on the device, against Pillow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import PIL
import pytest
from PIL import Image

from hybrid_vit.data.resizing import nearest_indices
from hybrid_vit.ops.pillow_resize import FILTERS, resize_like_pillow
from hybrid_vit.ops.platforms import tracing_for
from tests.data.pictures import photo

# (before, after): smaller, larger, one side of each, odd ones, a pixel wide, from one pixel, tall.
SIZES = [
  ((75, 101), (31, 42)),
  ((30, 47), (64, 64)),
  ((20, 90), (45, 33)),
  ((101, 75), (100, 75)),
  ((200, 100), (60, 40)),
  ((160, 100), (60, 40)),
  ((1, 300), (7, 24)),
  ((300, 1), (24, 5)),
  ((1, 1), (9, 4)),
  ((640, 21), (40, 30)),
  ((13, 700), (13, 1)),
]
# What a single program of open sizes is asked: H, W, height, width, top, left.
OPEN = [(75, 101, 37, 50, 5, 9), (41, 30, 64, 47, 30, 20), (400, 17, 90, 16, -6, -4)]


def pillow(image, size, interpolation):
  picture = Image.fromarray(image)
  return np.asarray(picture.resize(size[::-1], Image.Resampling[interpolation.upper()]))


def columns_first(before, after):
  return before[0] - after[0] > 2 * max(before[1] - after[1], 0)


def known(before, after):
  """Earlier Pillows begin with the lines always."""
  return int(PIL.__version__.partition(".")[0]) >= 13 or not columns_first(before, after)


def black_and_white(seed, height, width):
  """What overshoots, so that the cut behind each pass shows."""
  return np.random.default_rng(seed).integers(0, 2, (height, width, 3), np.uint8) * 255


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("interpolation", FILTERS)
def test_every_bit_is_pillows(interpolation, platform):
  assert {columns_first(*sides) for sides in SIZES} == {True, False}
  for before, after in SIZES:
    if not known(before, after):
      continue
    images = np.stack([photo(1, *before), black_and_white(2, *before)])
    with tracing_for((platform,)):
      resize = jax.jit(
        functools.partial(resize_like_pillow, whole=after, interpolation=interpolation)
      )
      found = np.asarray(resize(images))
    assert found.dtype == np.uint8
    for image, resized in zip(images, found):
      expected = pillow(image, after, interpolation)
      np.testing.assert_array_equal(resized, expected, f"{before} to {after}")


@pytest.mark.parametrize("interpolation", FILTERS)
def test_a_part_of_it_in_a_program_of_open_sizes(interpolation):
  height, width = 20, 24

  def part(images, whole, corner):
    whole, corner = (whole[0], whole[1]), (corner[0], corner[1])
    return resize_like_pillow(images, whole, interpolation, corner, (height, width))

  pair = jax.ShapeDtypeStruct((2,), jnp.int32)
  images = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, h, w, 3"), jnp.uint8)
  with tracing_for(("cpu", "tpu")):
    program = jax.export.export(jax.jit(part), platforms=["cpu", "tpu"])(images, pair, pair)
  for h, w, high, wide, top, left in OPEN:
    if not known((h, w), (high, wide)):
      continue
    image = black_and_white(h, h, w)
    found = program.call(image[None], jnp.array([high, wide]), jnp.array([top, left]))[0]
    around = np.zeros((high + 2 * height, wide + 2 * width, 3), np.uint8)
    around[height:-height, width:-width] = pillow(image, (high, wide), interpolation)
    expected = around[height + top :, width + left :][:height, :width]
    np.testing.assert_array_equal(found, expected, f"{h} x {w}")


def test_the_nearest_pixel_falls_as_in_the_loop_of_the_data():
  for before, after in [(10, 4), (7, 49), (1000, 333), (3, 2), (91, 182)]:
    ramp = np.arange(before, dtype=np.int64)
    image = np.stack([ramp % 256, ramp // 256, ramp * 0], -1).astype(np.uint8)[None, None]
    resize = jax.jit(
      functools.partial(resize_like_pillow, whole=(1, after), interpolation=FILTERS[0])
    )
    found = np.asarray(resize(image))[0, 0].astype(np.int64)
    places = nearest_indices(before, after)
    np.testing.assert_array_equal(found[:, 0] + 256 * found[:, 1], places, f"{before}, {after}")


def test_factors_of_the_products_are_exact_in_bfloat16(monkeypatch):
  einsum = jnp.einsum

  def rounded(equation, *factors):
    return einsum(equation, *(x.astype(jnp.bfloat16).astype(jnp.float32) for x in factors))

  monkeypatch.setattr(jnp, "einsum", rounded)
  image, size = black_and_white(3, 70, 90) | photo(4, 70, 90), (31, 140)
  with tracing_for(("tpu",)):
    found = jax.jit(lambda x: resize_like_pillow(x, size, "bicubic"))(image[None])
  np.testing.assert_array_equal(found[0], pillow(image, size, "bicubic"))


def test_what_is_refused():
  images = jnp.zeros((1, 4, 4, 3), jnp.uint8)
  for arguments, message in [
    ((images[0], (2, 2), "bicubic"), r"uint8 \[4, 4, 3\]; uint8 \[B, H, W, C\] was expected"),
    ((images * 1.0, (2, 2), "bicubic"), r"pictures of float32"),
    ((images, (2, 2), "lanczos"), "'lanczos'; nearest, bilinear, bicubic are known"),
    ((images, (jnp.int32(2), 2), "bicubic"), "give `size`"),
  ]:
    with pytest.raises(ValueError, match=message):
      resize_like_pillow(*arguments)
