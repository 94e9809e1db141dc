"""The reversible sequence: gradients of plain autodiff, without the activations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.reversible import inverse_errors, plain_sequence, reversible_sequence

WIDTH, TOKENS = 8, 6


def attention(parameters, shared, above, below, key):
  """The first level of a reversible transformer: it looks at the second one's old map."""
  x = _normalised(below[-1]) + shared
  q, k, v = (x @ parameters[name] for name in "qkv")
  weights = jax.nn.softmax(q @ k.swapaxes(1, 2) / np.sqrt(WIDTH))
  return _drop_path(weights @ v, key)


def mlp(parameters, shared, above, below, key):
  """The second level: it looks at the first one's new map."""
  hidden = jax.nn.gelu(_normalised(above[-1]) @ parameters["up"], approximate=False)
  return _drop_path(hidden @ parameters["down"], key)


def _normalised(x):
  x = x - x.mean(-1, keepdims=True)
  return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def _drop_path(x, key):
  return x * jax.random.bernoulli(key, 0.7, (len(x), 1, 1)) / 0.7


def draw(columns, batch=4, gain=1.0):
  """(parameters, gains, shared, maps) of a transformer of so many columns."""
  rng = np.random.default_rng(0)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-2]), jnp.float32)

  square = (WIDTH, WIDTH)
  parameters = [
    (
      {name: normal(*square) for name in "qkv"},
      {"up": normal(WIDTH, 2 * WIDTH), "down": normal(2 * WIDTH, WIDTH)},
    )
    for _ in range(columns)
  ]
  gains = [
    tuple(gain * jnp.asarray(rng.uniform(0.8, 1.2, WIDTH), jnp.float32) for _ in range(2))
    for _ in range(columns)
  ]
  maps = tuple(normal(batch, TOKENS, WIDTH) for _ in range(2))
  return parameters, gains, normal(TOKENS, WIDTH), maps


def gradients(sequence, arguments, taps=(), **options):
  """(loss, gradients of every argument): a loss that sees the last maps and the tapped ones."""
  columns = len(arguments[0])

  @jax.jit
  def run(arguments, key):
    def loss(arguments):
      last, tapped = sequence([(attention, mlp)] * columns, *arguments, key, taps, **options)
      return sum(jnp.sum(jnp.sin(x)) for x in (*last, *tapped))

    return jax.value_and_grad(loss)(arguments)

  return run(arguments, jax.random.key(7))


def deviation(found, expected):
  """The largest of any gradient, relative to its norm."""
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
  return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


def assert_near(found, expected, tolerance):
  assert deviation(found, expected) <= tolerance


@pytest.mark.parametrize("taps", [(), ((0, 1), (2, 0), (4, 1))], ids=["", "tapped"])
@pytest.mark.parametrize("keep_every", [None, 2])
@pytest.mark.parametrize("scan", [False, True])
def test_gradients_are_those_of_plain_autodiff(taps, keep_every, scan):
  arguments = draw(5)
  expected = gradients(plain_sequence, arguments, taps)
  found = gradients(reversible_sequence, arguments, taps, keep_every=keep_every, scan=scan)
  assert_near(found, expected, 1e-4)


def test_kept_maps_begin_the_rounding_afresh():
  """With gains far below 1 little is left of the first maps after some columns."""
  arguments = draw(6, gain=0.4)
  expected = gradients(plain_sequence, arguments)
  kept = deviation(gradients(reversible_sequence, arguments, keep_every=2), expected)
  alone = deviation(gradients(reversible_sequence, arguments), expected)
  # 1.1e-4 on a processor with AMX, less on others.
  assert kept < 2e-4 < 1e-3 < alone
  levels, key = [(attention, mlp)] * 6, jax.random.key(7)
  errors = jax.jit(functools.partial(inverse_errors, levels))(*arguments, key)
  assert errors.shape == (6, 2)
  # The last column's is rounding; towards the first one it grows.
  assert float(errors[-1].max()) < 1e-5 < 1e-4 < float(errors[0].max())
  again = functools.partial(inverse_errors, levels, keep_every=2)
  assert float(jax.jit(again)(*arguments, key).max()) < 0.1 * float(errors.max())


def test_bfloat16_levels_on_a_float32_state():
  arguments = draw(4)

  def low(level, parameters, shared, above, below, key):
    parameters, shared, above, below = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16), (parameters, shared, above, below)
    )
    return level(parameters, shared, above, below, key)

  levels = [tuple(functools.partial(low, level) for level in (attention, mlp))] * 4

  def run(sequence):
    def loss(arguments):
      last, _ = sequence(levels, *arguments, jax.random.key(7))
      assert all(x.dtype == jnp.float32 for x in last)
      return sum(jnp.sum(jnp.sin(x)) for x in last)

    return jax.jit(jax.value_and_grad(loss))(arguments)

  assert_near(run(reversible_sequence), run(plain_sequence), 0.05)


def test_split_over_devices():
  arguments = draw(3, batch=8)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  split = (*arguments[:3], jax.device_put(arguments[3], rows))
  found, expected = (gradients(reversible_sequence, a) for a in (split, arguments))
  assert found[1][3][0].sharding.is_equivalent_to(rows, 3)
  assert_near(jax.device_get(found), jax.device_get(expected), 1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_activations_do_not_grow_with_the_columns(scan):
  """What XLA needs besides arguments and results, at 3 and at 9 columns."""
  reversed_sequence = functools.partial(reversible_sequence, scan=scan)

  def temporary(sequence, columns):
    arguments = jax.eval_shape(lambda: draw(columns, batch=256))

    def loss(arguments):
      last, _ = sequence([(attention, mlp)] * columns, *arguments, jax.random.key(0))
      return sum(jnp.sum(jnp.sin(x)) for x in last)

    compiled = jax.jit(jax.grad(loss)).lower(arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  plain = [temporary(plain_sequence, columns) for columns in (3, 9)]
  reversible = [temporary(reversed_sequence, columns) for columns in (3, 9)]
  assert plain[1] > 2 * plain[0]
  assert reversible[1] < 1.05 * reversible[0] < plain[0]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda p, a, s, m: (p[:1], a, s, m), "2 columns of levels, 1 of parameters, 2 of gains"),
    (
      lambda p, a, s, m: (p, [a[0], a[1][:1]], s, m),
      "column 1 has 2 levels, 2 trees.* and 1 gains",
    ),
    (lambda p, a, s, m: (p, a, s, (m[0], m[1].astype(jnp.bfloat16))), "map 1 is bfloat16"),
  ],
)
def test_errors(change, message):
  arguments = change(*draw(2))
  with pytest.raises(ValueError, match=message):
    reversible_sequence([(attention, mlp)] * 2, *arguments, jax.random.key(0))


def test_options_that_cannot_be():
  levels, key = [(attention, mlp)] * 2, jax.random.key(0)
  with pytest.raises(ValueError, match="keep_every is 0"):
    reversible_sequence(levels, *draw(2), key, keep_every=0)
  with pytest.raises(ValueError, match="columns to be scanned have the same functions"):
    reversible_sequence([(attention, mlp), (mlp, mlp)], *draw(2), key, scan=True)
  with pytest.raises(ValueError, match=r"no map at column 2, level 0, of 2 x 2"):
    reversible_sequence(levels, *draw(2), key, taps=((2, 0),))
