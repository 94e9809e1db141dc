"""GLPN's decoder against transformers' answers, its encoder rebuilt for the test."""

import jax
import numpy as np
import pytest

from hybrid_vit.heads.glpn import GLPN
from hybrid_vit.tasks.depth_losses import silog
from hybrid_vit.weights.keymap_heads_depth import glpn_layout
from tests import golden
from tests.heads.depth_checks import assert_gradient, assert_round_trip, captured
from tests.heads.mix_transformer import mix_transformer
from tests.heads.pyramids import levels, noise, with_golden_weights


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision("float32"):
    yield


def test_as_transformers():
  description, expected = golden.load("dense/glpn", "glpn_64x96")
  arguments = description["arguments"]
  weights = golden.weights(description)
  encoder = "glpn.encoder."
  of_encoder = {
    k.removeprefix(encoder): weights.pop(k) for k in list(weights) if k.startswith(encoder)
  }
  found = jax.jit(
    lambda x: mix_transformer(
      x,
      of_encoder,
      depths=arguments["depths"],
      strides=arguments["strides"],
      num_heads=arguments["num_attention_heads"],
      reductions=arguments["sr_ratios"],
    )
  )(golden.image(description))
  features = levels(arguments["hidden_sizes"])
  maps = {feature.name: x for feature, x in zip(features, found)}
  head = GLPN(features, max_depth=arguments["max_depth"], channels=arguments["decoder_hidden_size"])
  key_map = glpn_layout(head).key_map(head)
  variables = with_golden_weights(head, key_map, weights, maps)
  depth, noted = jax.jit(lambda v, x: head.apply(v, x, mutable=["intermediates"]))(variables, maps)
  noted = captured(noted)
  seed, size = description["input"]["seed"], depth.shape[:3]
  truth = np.random.RandomState(seed + 1).rand(*size).astype(np.float32) * 9 + 0.5
  truth[:, :6] = 0
  loss = silog(depth[..., 0], truth, weight=0.5)
  np.testing.assert_allclose(loss, expected.pop("loss"), rtol=1e-5)
  golden.assert_matches(
    expected,
    {
      **{f"feature{i}": x for i, x in enumerate(found)},
      **{f"decoder{i}": noted[f"stage{i}"] for i in range(4)},
      "depth": depth[:, ::2, ::2, 0],
    },
  )
  assert_round_trip(variables, key_map, weights)


def test_odd_maps_and_gradient():
  # The finest map has as many channels as the decoder: no convolution of it.
  features = levels((8, 6, 10, 12))
  head = GLPN(features, max_depth=80.0, channels=8)
  maps = noise(features, (57, 75))
  # Batch norm takes the convolution's bias away again.
  depth = assert_gradient(head, maps, may_vanish=("fusion_conv0/bias", "fusion_conv1/bias"))
  assert depth.shape == (2, 60, 76, 1)
  assert (depth > 0).all()
  assert (depth < 80).all()
  names = jax.eval_shape(lambda: head.init(jax.random.key(0), maps))["params"]
  assert [f"stage{i}_conv" in names for i in range(4)] == [True, True, True, False]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"channels": 7}, "channels is 7; an even number"),
    ({"num_outputs": 2}, "gives one map of depth; num_outputs is 2"),
  ],
)
def test_bad_arguments_are_told(arguments, message):
  features = levels((4, 6))
  maps = noise(features, (32, 32))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: GLPN(features, **arguments).init(jax.random.key(0), maps))
