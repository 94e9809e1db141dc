"""The low-frequency crop and Lanczos's resize against the authors' code and PIL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.low_frequency_crop import (
  lanczos_resize,
  low_frequency_crop,
  low_frequency_crop_reference,
)
from tests import golden


def golden_input(description):
  fields = description["input"]
  return fields["times"] * golden.image(description) + np.float32(fields["plus"])


@pytest.mark.parametrize("name", golden.names("efficienttrain", "freq_crop_*"))
def test_it_is_the_authors_crop(name):
  description, expected = golden.load("efficienttrain", name)
  x = golden_input(description)
  covered = set()
  for band in description["arguments"]["band_width"]:
    size = band // 2 * 2  # the authors round an odd one down
    found = np.asarray(low_frequency_crop(x, size))
    key = f"B{band}"
    if key in expected:
      np.testing.assert_allclose(found, expected[key], atol=2e-6)
      covered.add(key)
      continue
    stats = [found.mean(), found.std(), np.abs(found).max()]
    np.testing.assert_allclose(stats, expected[f"{key}_stats"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[0, :8, :8], expected[f"{key}_corner"], atol=1e-5)
    np.testing.assert_allclose(found[-1, 3::16, 5::16], expected[f"{key}_grid"], atol=1e-5)
    covered |= {f"{key}_stats", f"{key}_corner", f"{key}_grid"}
  assert covered == set(expected)


@pytest.mark.parametrize("size", [2, 10, 16])
def test_the_products_are_the_transforms(size):
  """On a picture that is not square, too, whose mean stays."""
  x = np.random.default_rng(0).standard_normal((2, 16, 24, 3)).astype(np.float32)
  found = low_frequency_crop(x, size)
  np.testing.assert_allclose(found, low_frequency_crop_reference(x, size), atol=2e-6)
  np.testing.assert_allclose(np.mean(found, (1, 2)), np.mean(x, (1, 2)), atol=1e-6)


def test_a_picture_of_that_size_stays():
  x = np.random.default_rng(0).standard_normal((1, 8, 8, 3)).astype(np.float32)
  assert np.array_equal(low_frequency_crop(x, 8), x)
  assert lanczos_resize(np.zeros((1, 8, 8, 3), np.uint8), 8).dtype == jnp.uint8


def test_it_is_products_of_small_real_matrices():
  x = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
  text = str(jax.make_jaxpr(lambda x: low_frequency_crop(x, 24))(x))
  assert "fft" not in text and "complex" not in text and text.count("dot_general") <= 5


def test_lanczos_is_pils():
  """A rounding apart in a few pixels: PIL's weights are whole numbers of 22 bits."""
  description, expected = golden.load("efficienttrain", "lanczos_224")
  x = np.clip(np.round(127.5 + 50 * golden.image(description)), 0, 255).astype(np.uint8)
  for key, answer in expected.items():
    found = lanczos_resize(x, int(key[1:]))
    assert found.dtype == jnp.uint8 and found.shape == (1, *answer.shape)
    difference = np.abs(np.asarray(found[0], int) - answer)
    assert difference.max() <= 1 and np.mean(difference > 0) < 1e-3


def test_lanczos_of_floats_is_not_rounded():
  x = np.random.default_rng(0).uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
  found = np.asarray(lanczos_resize(x, 20))
  expected = jax.image.resize(x, (1, 20, 20, 3), "lanczos3", antialias=True)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("shrink", [low_frequency_crop, lanczos_resize])
@pytest.mark.parametrize(("shape", "size"), [((1, 8, 6, 3), 8), ((1, 8, 8, 3), 0), ((8, 8, 3), 4)])
def test_what_cannot_be_is_named(shrink, shape, size):
  with pytest.raises(ValueError, match="expected"):
    shrink(np.zeros(shape, np.float32), size)


def test_an_odd_size_has_no_low_frequency_crop():
  with pytest.raises(ValueError, match="of 7 pixels: an even number"):
    low_frequency_crop(np.zeros((1, 8, 8, 3), np.float32), 7)
