"""Convolution as products: outputs and both gradients as XLA's, and what is left to XLA."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.models import layers
from hybrid_vit.ops.convolution import conv_general_dilated
from tests.ops.forms import outputs_and_gradients, traced_for

NHWC = ("NHWC", "HWIO", "NHWC")
# kernel, strides, padding, dilation: overlapping ones, patches, 1x1 ones, and a stride that leaves
# cells over.
CASES = [
  ((3, 3), (1, 1), "SAME", None),
  ((3, 3), (2, 2), "SAME", (1, 1)),
  ((7, 7), (2, 2), ((3, 3), (3, 3)), None),
  ((3, 3), (1, 1), ((2, 2), (2, 2)), (2, 2)),
  ((3, 2), (2, 1), ((1, 0), (0, 2)), (1, 3)),
  ((2, 2), (2, 2), "VALID", None),
  ((4, 4), (4, 4), "VALID", None),
  ((2, 3), (2, 3), ((0, 0), (0, 0)), None),
  ((2, 2), (2, 2), ((1, 1), (0, 0)), None),
  ((2, 2), (2, 2), "VALID", (2, 2)),
  ((1, 1), (1, 1), "SAME", None),
  ((1, 1), (2, 2), "VALID", None),
  ((1, 1), (1, 1), ((1, 1), (1, 1)), None),
]


def both_forms(x, kernel, strides, padding, dilation):
  fixed = functools.partial(
    conv_general_dilated, window_strides=strides, padding=padding, rhs_dilation=dilation,
    dimension_numbers=NHWC,
  )  # fmt: skip
  forms = [functools.partial(fixed, form=form) for form in ("reference", "products")]
  return outputs_and_gradients(forms, x, kernel)


def inputs(kernel_size, channels=5, dtype=jnp.float32):
  x = jax.random.normal(jax.random.key(0), (2, 13, 10, channels), dtype)
  kernel = jax.random.normal(jax.random.key(1), (*kernel_size, channels, 6), dtype)
  return x, kernel


# 130 channels: products of each kernel position by itself.
@pytest.mark.parametrize("channels", [3, 130])
@pytest.mark.parametrize(("kernel_size", "strides", "padding", "dilation"), CASES)
def test_products_are_the_convolution(kernel_size, strides, padding, dilation, channels):
  forms = both_forms(*inputs(kernel_size, channels), strides, padding, dilation)
  for reference, products in zip(*forms):
    assert products.shape == reference.shape and products.dtype == reference.dtype
    np.testing.assert_allclose(products, reference, atol=1e-5 * np.abs(reference).max())


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[10]])
def test_products_in_bfloat16(case):
  kernel_size, *rest = case
  x, kernel = inputs(kernel_size, dtype=jnp.bfloat16)
  exact, _ = both_forms(x.astype(jnp.float32), kernel.astype(jnp.float32), *rest)
  _, products = both_forms(x, kernel, *rest)
  for found, expected in zip(products, exact):
    assert found.dtype == jnp.bfloat16
    difference = np.abs(np.asarray(found, np.float32) - expected).max()
    assert difference < 2**-7 * np.abs(expected).max()


@pytest.mark.parametrize(("platform", "products"), [("cpu", True), ("tpu", False), ("gpu", False)])
def test_products_are_for_cpus(platform, products):
  x, kernel = inputs((3, 3))
  convolve = functools.partial(
    conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=NHWC
  )
  with traced_for(platform):
    traced = str(jax.make_jaxpr(convolve)(x, kernel))
  assert ("custom_vjp" in traced) == products


@pytest.mark.parametrize(
  "options",
  [
    {"feature_group_count": 5},
    {"lhs_dilation": (2, 2)},
    {"precision": jax.lax.Precision.HIGHEST},
    {"dimension_numbers": ("NHWC", "OIHW", "NHWC")},
    {"dimension_numbers": None},
  ],
)
def test_what_is_left_to_the_library(options):
  x = jax.random.normal(jax.random.key(0), (2, 5, 5, 5))
  # Square in all that a layout may turn, so that each of them reads it.
  kernel = jax.random.normal(jax.random.key(1), (5, 5, 5, 5))
  if options.get("feature_group_count"):
    kernel = kernel[:, :, :1]
  options = {"dimension_numbers": NHWC, **options}
  pads = ((1, 1), (2, 2))
  found = conv_general_dilated(x, kernel, (1, 1), pads, **options, form="products")
  expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, **options)
  np.testing.assert_array_equal(found, expected)


def test_a_form_that_is_none():
  with pytest.raises(ValueError, match="unknown form 'winograd'; known: reference, products"):
    conv_general_dilated(*inputs((3, 3)), (1, 1), "SAME", form="winograd")


def test_the_layer_is_flax_s():
  """The same parameters by the same key, and the same answer; of a picture without a batch."""
  x = jax.random.normal(jax.random.key(0), (9, 8, 3))
  for strides, padding in ((1, "SAME"), (2, ((1, 1), (0, 2)))):
    ours, flax_s = (
      make(7, (3, 3), strides=strides, padding=padding) for make in (layers.Conv, nn.Conv)
    )
    variables = ours.init(jax.random.key(1), x)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, variables, flax_s.init(jax.random.key(1), x)))
    np.testing.assert_allclose(ours.apply(variables, x), flax_s.apply(variables, x), atol=1e-5)
