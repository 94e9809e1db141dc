"""MIM-Depth-Estimation's decoder against the authors' answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.heads.layers import Deconv
from hybrid_vit.heads.mim_depth import MIMDepth
from hybrid_vit.tools.summarize import count_parameters
from hybrid_vit.weights.keymap_heads import part_key_map
from hybrid_vit.weights.keymap_heads_depth import mim_depth_layout
from tests import golden
from tests.heads.depth_checks import assert_gradient, assert_round_trip, captured
from tests.heads.pyramids import levels, noise, with_golden_weights


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision("float32"):
    yield


def test_as_the_authors():
  description, expected = golden.load("dense/mim_depth", "mim_depth_3x4")
  arguments = description["arguments"]
  (feature,) = levels((arguments["in_channels"],), strides=(32,))
  head = MIMDepth(
    (feature,),
    max_depth=arguments["max_depth"],
    num_filters=tuple(arguments["num_filters"]),
    kernels=tuple(arguments["deconv_kernels"]),
    channels=arguments["embed_dim"],
  )
  weights, maps = golden.weights(description), {feature.name: golden.image(description)}
  key_map = mim_depth_layout(head).key_map(head)
  variables = with_golden_weights(head, key_map, weights, maps)
  depth, noted = jax.jit(lambda v, x: head.apply(v, x, mutable=["intermediates"]))(variables, maps)
  golden.assert_matches(
    expected,
    {"decoder": captured(noted)["decoded"], "depth": depth[:, ::2, ::2]},
    # Depths lie 54 deviations from zero: float32's last place is 4.7e-6 of one, and how a processor
    # orders its sums moves a result by three of them.
    tolerance=2e-5,
  )
  assert_round_trip(variables, key_map, weights)
  assert_round_trip(variables, part_key_map(head, "official"), weights)
  # Theirs are counted with the running statistics.
  assert count_parameters(variables) == description["parameter_count"]


@pytest.mark.parametrize(("stride", "convolutions"), [(32, 3), (16, 2), (8, 1), (4, 0)])
def test_the_stride_says_how_many_convolutions(stride, convolutions):
  features = levels((16,), strides=(stride,))
  shapes, variables = _shapes(MIMDepth(features), noise(features, (64, 96)))
  assert shapes == (2, 64, 96, 1)
  found = [name for name in variables["params"] if name.startswith("deconv")]
  assert sum("norm" not in name for name in found) == convolutions


def test_published_sizes():
  features = levels((1024,), strides=(32,))
  variables = _shapes(MIMDepth(features), noise(features, (64, 64)))[1]
  deconvs = 1024 * 32 * 4 + 2 * 32 * 32 * 4 + 3 * 2 * 32
  convs = (32 * 9 + 1) * 128 + 2 * 128 + (128 * 9 + 1) * 128 + 128 * 9 + 1
  assert count_parameters(variables["params"]) == deconvs + convs


@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_each_kernel_doubles_odd_maps_and_learns(kernel):
  features = levels((6, 16), strides=(4, 16))
  maps = noise(features, (80, 112))
  head = MIMDepth(features, max_depth=80.0, num_filters=(4, 6), kernels=(kernel, kernel))
  # Batch norm takes the convolution's bias away again.
  depth = assert_gradient(head, maps, may_vanish=("conv/bias",))
  assert depth.shape == (2, 80, 112, 1)
  assert (depth > 0).all()
  assert (depth < 80).all()


@pytest.mark.parametrize(("kernel", "padding", "more"), [(2, 0, 0), (3, 1, 1), (4, 1, 0)])
def test_transposed_convolutions_scatter(kernel, padding, more):
  x = np.random.default_rng(0).standard_normal((1, 3, 4, 2)).astype(np.float32)
  deconv = Deconv(3, kernel, 2, padding, more, use_bias=False)
  variables = deconv.init(jax.random.key(0), x)
  weights = np.asarray(variables["params"]["kernel"])
  # Enough room for what output_padding adds, too.
  whole = np.zeros((2 * 3 + kernel, 2 * 4 + kernel, 3))
  for i in range(3):
    for j in range(4):
      part = np.einsum("i,klio->klo", x[0, i, j], weights)
      whole[2 * i : 2 * i + kernel, 2 * j : 2 * j + kernel] += part
  expected = whole[padding : padding + 6, padding : padding + 8]
  np.testing.assert_allclose(deconv.apply(variables, x)[0], expected, atol=1e-5)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"kernels": (2, 5)}, "a kernel of 5; 2, 3 or 4"),
    ({"num_filters": (8, 8), "kernels": (2,)}, "num_filters has 2 values .* and kernels 1 values"),
    ({"num_outputs": 3}, "gives one map of depth; num_outputs is 3"),
    ({"max_depth": 0.0}, "max_depth is 0.0; metres above 0"),
  ],
)
def test_bad_arguments_are_told(arguments, message):
  features = levels((16,), strides=(16,))
  with pytest.raises(ValueError, match=message):
    _shapes(MIMDepth(features, **arguments), noise(features, (32, 32)))


def _shapes(head, maps):
  maps = {name: jnp.asarray(x) for name, x in maps.items()}
  answer, variables = jax.eval_shape(lambda x: head.init_with_output(jax.random.key(0), x), maps)
  return answer.shape, variables
