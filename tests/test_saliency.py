"""Arithmetic of heat maps against numbers by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit import saliency


def test_grad_cam_by_hand():
  # Two channels on a map of 1 x 2; the gradients' means are 1 and -3.
  activations = jnp.array([[[[2.0, 1.0], [4.0, 0.5]]]])
  gradients = jnp.array([[[[0.0, -2.0], [2.0, -4.0]]]])
  found = saliency.grad_cam(activations, gradients)
  # 1 * 2 - 3 * 1 < 0 and 1 * 4 - 3 * 0.5.
  np.testing.assert_allclose(found, [[[0.0, 2.5]]])
  half = saliency.grad_cam(activations.astype(jnp.bfloat16), gradients.astype(jnp.bfloat16))
  assert half.dtype == jnp.float32


WEIGHTS = np.array(
  [
    [[0.5, 0.25, 0.25], [0.0, 1.0, 0.0], [0.2, 0.2, 0.6]],
    [[0.1, 0.15, 0.75], [0.0, 0.0, 1.0], [0.4, 0.4, 0.2]],
  ],
  np.float32,
)[None]


def test_attention_of_the_first_token_and_attention_received():
  np.testing.assert_allclose(saliency.token_attention(WEIGHTS), [[0.3, 0.2, 0.5]], rtol=1e-6)
  np.testing.assert_allclose(
    saliency.received_attention(WEIGHTS), [[0.2, 2 / 6, 2.8 / 6]], rtol=1e-6
  )


def test_rollout_by_hand():
  first = np.array([[[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]]], np.float32)
  second = np.array([[[[0.0, 1.0], [0.0, 1.0]]]], np.float32)
  # Means of the heads are [[.5, .5], [1, 0]] and [[0, 1], [0, 1]], half of each the identity:
  # [[.75, .25], [.5, .5]], then [[.5, .5], [0, 1]] of that.
  found = saliency.attention_rollout([first, second])
  np.testing.assert_allclose(found, [[[0.625, 0.375], [0.5, 0.5]]])


def test_rollout_needs_equally_many_tokens():
  narrow = np.ones((1, 1, 2, 2), np.float32)
  for blocks in ([], [narrow, np.ones((1, 1, 3, 3))], [np.ones((1, 1, 4, 1))]):
    with pytest.raises(ValueError, match=r"blocks of equally many tokens; found"):
      saliency.attention_rollout(blocks)


def test_magnitude_is_the_length_of_each_vector():
  np.testing.assert_allclose(
    saliency.magnitude(jnp.array([[[[3.0, -4.0], [0.0, 0.0]]]])), [[[5, 0]]]
  )


def test_principal_components_are_the_directions_of_most_variance():
  rng = np.random.default_rng(0)
  # Uncorrelated coordinates of falling size along three known directions of five channels.
  coordinates = np.linalg.qr(np.c_[np.ones(24), rng.normal(size=(24, 3))])[0][:, 1:]
  directions = np.linalg.qr(rng.normal(size=(5, 3)))[0]
  directions *= np.sign(directions[np.abs(directions).argmax(0), np.arange(3)])
  cells = coordinates @ np.diag([9.0, 3.0, 1.0]) @ directions.T + 7.0
  first, second = cells[:12].reshape(3, 4, 5), cells[12:].reshape(2, 6, 5)
  found = saliency.principal_components([first, second])
  assert [x.shape for x in found] == [(3, 4, 3), (2, 6, 3)]
  low, high = coordinates.min(0), coordinates.max(0)
  expected = (coordinates - low) / (high - low)
  np.testing.assert_allclose(found[0].reshape(-1, 3), expected[:12], atol=1e-5)
  np.testing.assert_allclose(found[1].reshape(-1, 3), expected[12:], atol=1e-5)


def test_what_does_not_differ_has_no_component():
  (found,) = saliency.principal_components([np.full((2, 3, 4), 0.1, np.float32)])
  np.testing.assert_array_equal(found, np.zeros((2, 3, 3)))
  # One direction alone: the others are rounding.
  line = np.arange(6.0).reshape(2, 3, 1) * np.array([0.3, -0.4, 0.5, 0.0])
  (found,) = saliency.principal_components([line])
  np.testing.assert_allclose(found[..., 0].ravel(), np.arange(6) / 5, atol=1e-6)
  np.testing.assert_array_equal(found[..., 1:], 0)
  with pytest.raises(ValueError, match="one number of channels was expected"):
    saliency.principal_components([np.ones((1, 1, 2)), np.ones((1, 1, 3))])


def test_maps_are_resized_by_half_pixel_centres():
  found = saliency.resize_map(np.array([[0.0, 4.0]]), (1, 4))
  np.testing.assert_allclose(found, [[0, 1, 3, 4]], atol=1e-6)
  colours = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
  np.testing.assert_allclose(saliency.resize_map(colours, (2, 2)), colours)
