"""Deformable attention: the authors' answers and gradients; both forms are one function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.heads.deformable import DeformableAttention, cell_centres
from hybrid_vit.ops import deformable_attention as op
from hybrid_vit.weights import torch_keys
from tests import golden
from tests.heads.pyramids import with_golden_weights

_RULES = [
  ("offsets", "sampling_offsets", torch_keys.dense),
  ("weights", "attention_weights", torch_keys.dense),
  ("value", "value_proj", torch_keys.dense),
  ("out", "output_proj", torch_keys.dense),
]
_SHAPES = ((3, 5), (1, 2))


@pytest.fixture(autouse=True)
def _exact():
  with jax.default_matmul_precision("float32"):
    yield


def _key_map(path):
  return torch_keys.by_rules(_RULES, path.removeprefix("params/"), "DeformableAttention")


@pytest.mark.parametrize("name", golden.names("dense/ms_deform_attn"))
def test_as_the_authors(name):
  description, expected = golden.load("dense/ms_deform_attn", name)
  a = description["arguments"]
  shapes = tuple(map(tuple, a["spatial_shapes"]))
  query, value = (golden.image({"input": description["input"][k]})[0] for k in ("query", "value"))
  factor = golden.image(
    {"input": {"shape": (1, *query.shape), "seed": description["input"]["query"]["seed"] + 3}}
  )[0]
  reference = expected.pop("reference_points")
  padding = np.zeros(value.shape[:2], bool)
  padding[1, -3:] = True
  weights = golden.weights(description)
  for method in op.METHODS:
    module = DeformableAttention(
      a["d_model"], a["n_heads"], a["n_levels"], a["n_points"], method=method
    )
    bound = _Bound(module, shapes)
    variables = with_golden_weights(bound, _key_map, weights, query, reference, value, padding)

    @jax.jit
    def run(query, value, bound=bound, variables=variables):
      out, back = jax.vjp(
        lambda q, v: bound.apply(variables, q, reference, v, padding), query, value
      )
      return out, *back(jnp.asarray(factor))

    found = dict(zip(("output", "grad_query", "grad_value"), run(query, value)))
    golden.assert_matches(expected, found)


class _Bound:
  """A module whose maps are fixed, since sizes are no arrays."""

  def __init__(self, module, shapes):
    self.module, self.shapes = module, shapes

  def init(self, key, query, reference, value, padding):
    return self.module.init(key, query, reference, value, self.shapes, padding)

  def apply(self, variables, query, reference, value, padding):
    return self.module.apply(variables, query, reference, value, self.shapes, padding)


def _draws(queries=7):
  rng = np.random.default_rng(0)
  value = rng.standard_normal((2, 17, 3, 4), np.float32)
  locations = rng.uniform(-0.5, 1.5, (2, queries, 3, 2, 4, 2)).astype(np.float32)
  weights = rng.standard_normal((2, queries, 3, 2, 4), np.float32)
  return value, locations, weights


def _by_hand(value, locations, weights):
  out = np.zeros((2, locations.shape[1], 3, 4))
  for place in np.ndindex(weights.shape):
    b, q, m, level, _ = place
    height, width = _SHAPES[level]
    cells = value[b, 15 * level :][: height * width, m].reshape(height, width, -1)
    x, y = locations[place] * (width, height) - 0.5
    for i in range(height):
      for j in range(width):
        part = max(0.0, 1 - abs(y - i)) * max(0.0, 1 - abs(x - j))
        out[b, q, m] += weights[place] * part * cells[i, j]
  return out


def test_both_forms_are_the_definition(monkeypatch):
  value, locations, weights = _draws()
  # Exactly on a border, on a centre, and far outside.
  locations[0, 0, 0, 0] = [[0, 0], [1, 1], [0.5, 0.5], [1e12, -1e12]]
  expected = _by_hand(value, locations, weights)
  monkeypatch.setattr(op, "_ROW_NUMBERS", 2 * 3 * 17 * 3)  # three queries at once
  for method in op.METHODS:
    found = op.deformable_attention(value, _SHAPES, locations, weights, method=method)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_both_forms_have_one_gradient(monkeypatch):
  monkeypatch.setattr(op, "_ROW_NUMBERS", 2 * 3 * 17 * 3)

  def gradient(method):
    def loss(*x):
      out = op.deformable_attention(x[0], _SHAPES, *x[1:], method=method)
      return jnp.sum(jnp.sin(out))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*_draws())

  for one, other in zip(gradient("gather"), gradient("product")):
    assert np.abs(one).max() > 0
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_half_precision_is_kept_out_of_the_places():
  value, locations, weights = _draws()
  exact = op.deformable_attention(value, _SHAPES, locations, weights)
  for method in op.METHODS:
    half = op.deformable_attention(
      value.astype(jnp.bfloat16), _SHAPES, locations, weights, method=method
    )
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), exact, atol=0.05)


def test_initial_places():
  module = DeformableAttention(16, num_heads=4, num_levels=2, num_points=2)
  x = jnp.zeros((1, 17, 16))
  params = module.init(jax.random.key(0), x, cell_centres(_SHAPES), x, _SHAPES)["params"]
  grid = params["offsets"]["bias"].reshape(4, 2, 2, 2)
  for level in range(2):
    directions = [[1, 0], [0, 1], [-1, 0], [0, -1]]
    np.testing.assert_allclose(grid[:, level, 0], directions, atol=1e-6)
    np.testing.assert_allclose(grid[:, level, 1], 2 * np.array(directions), atol=1e-6)
  assert not params["weights"]["kernel"].any()
  np.testing.assert_allclose(cell_centres(_SHAPES)[0, [0, 14, 16], 1], [[0.1, 1 / 6], [0.9, 5 / 6],
                                                                        [0.75, 0.5]])  # fmt: skip


def test_wrong_arguments_are_told():
  value, locations, weights = _draws()
  with pytest.raises(ValueError, match="17 tokens, and maps of 3 x 5 have 15"):
    op.deformable_attention(value, _SHAPES[:1], locations, weights)
  with pytest.raises(ValueError, match="one of gather, product"):
    op.deformable_attention(value, _SHAPES, locations, weights, method="loop")
  with pytest.raises(ValueError, match="do not belong to weights"):
    op.deformable_attention(value, _SHAPES, locations, weights[..., :2])
  x, centres = jnp.zeros((1, 17, 16)), cell_centres(_SHAPES)
  module = DeformableAttention(16, num_heads=3, num_levels=2)
  with pytest.raises(ValueError, match="3 heads do not divide a width of 16"):
    module.init(jax.random.key(0), x, centres, x, _SHAPES)
  with pytest.raises(ValueError, match="made for 4 maps; spatial_shapes names 2"):
    DeformableAttention(16).init(jax.random.key(0), x, centres, x, _SHAPES)
  with pytest.raises(ValueError, match="reference points have 3 numbers"):
    DeformableAttention(16, num_levels=2).init(
      jax.random.key(0), x, jnp.zeros((1, 17, 2, 3)), x, _SHAPES
    )
