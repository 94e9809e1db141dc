"""First variables: those of `init`, of shapes alone, and traced once."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors

from hybrid_vit.models import layers
from hybrid_vit.models.initialization import initial_variables, variable_shapes
from hybrid_vit.ops.platforms import tracing_for
from tests import small

PICTURE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


def test_they_are_those_of_init_whatever_the_input_holds():
  model = small.ConvNet()
  key = jax.random.key(3)
  expected = jax.jit(lambda key: model.init(key, jnp.zeros(PICTURE.shape), train=False))(key)
  for given in (PICTURE, np.ones(PICTURE.shape, np.float32)):
    found = initial_variables(model, key, given)
    jax.tree.map(np.testing.assert_array_equal, found, dict(expected))
  shapes = variable_shapes(model, PICTURE)
  assert jax.tree.structure(shapes) == jax.tree.structure(dict(expected))
  for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(expected)):
    assert isinstance(shape, jax.ShapeDtypeStruct)
    assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)


class Counting(nn.Module):
  """Appends to a list in each trace."""

  attribute: Any
  width: int = 2

  @nn.compact
  def __call__(self, x, train=False):
    TRACES.append(x.shape)
    return layers.PointwiseConv(self.width, name="conv")(x)


TRACES: list = []


def test_equal_networks_with_inputs_of_one_shape_are_traced_once():
  TRACES.clear()
  x, wider = jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 4, 4, 5))
  for _ in range(2):
    variable_shapes(Counting(()), x)
    initial_variables(Counting(()), jax.random.key(1), x)
    jax.jit(lambda key: initial_variables(Counting(()), key, x))(jax.random.key(2))
  assert TRACES == [(1, 4, 4, 3)]
  assert variable_shapes(Counting(()), wider)["params"]["conv"]["kernel"].shape == (5, 2)
  assert variable_shapes(Counting((), width=7), x)["params"]["conv"]["kernel"].shape == (3, 7)
  assert len(TRACES) == 3
  with tracing_for(("tpu",)):
    variable_shapes(Counting(()), x)
  assert len(TRACES) == 4


def test_what_is_given_out_is_the_callers_own():
  first = variable_shapes(Counting(()), jnp.zeros((1, 4, 4, 3)))
  first["params"].clear()
  assert variable_shapes(Counting(()), jnp.zeros((1, 4, 4, 3)))["params"]


def test_attributes_that_cannot_be_hashed():
  found = initial_variables(Counting([1]), jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
  assert found["params"]["conv"]["kernel"].shape == (3, 2)


def test_an_initializer_is_called_where_there_is_no_parameter_yet():
  calls = []

  def init(key, shape, dtype):
    calls.append(shape)
    return jnp.ones(shape, dtype)

  layer = layers.PointwiseConv(4, kernel_init=init)
  variables = layer.init(jax.random.key(0), jnp.zeros((2, 3)))
  assert calls == [(3, 4)]
  np.testing.assert_array_equal(layer.apply(variables, jnp.ones((2, 3))), np.full((2, 4), 3.0))
  jax.eval_shape(layer.apply, variables, jnp.ones((2, 3)))
  assert calls == [(3, 4)]


@pytest.mark.parametrize(
  ("layer", "leaf"),
  [
    (layers.PointwiseConv(4), "kernel"),
    (layers.Dense(4), "kernel"),
    (layers.DenseGeneral(4), "kernel"),
    (layers.Conv(4, (1, 1)), "kernel"),
    (layers.LayerNorm(1e-6), "scale"),
    (layers.LayerScale(1.0), "gamma"),
  ],
  ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_a_parameter_of_another_shape_is_named(layer, leaf):
  variables = layer.init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)))
  with pytest.raises(errors.ScopeParamShapeError, match=leaf):
    layer.apply(variables, jnp.zeros((1, 2, 2, 5)))
  with pytest.raises(errors.ScopeParamNotFoundError, match=leaf):
    missing = {k: v for k, v in variables["params"].items() if k != leaf}
    layer.apply({"params": {**missing, "other": jnp.zeros(())}}, jnp.zeros((1, 2, 2, 3)))


def test_two_parameters_of_one_name_are_refused():
  class Twice(layers.ShapedParameters, nn.Module):
    @nn.compact
    def __call__(self):
      self.param("a", nn.initializers.ones, (1,), jnp.float32)
      return self.param("a", nn.initializers.ones, (1,), jnp.float32)

  with pytest.raises(errors.NameInUseError):
    Twice().init(jax.random.key(0))
