import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import erf

from hybrid_vit.models import layers
from hybrid_vit.ops.platforms import tracing_for


def normalise(x, *, train=True, **settings):
  """(output, new batch statistics) of a batch norm whose scale and shift are not trivial."""
  norm = layers.BatchNorm(epsilon=1e-3, momentum=0.9, **settings)
  variables = norm.init(jax.random.key(0), x, train)
  channels = x.shape[-1]
  params = {"scale": jnp.linspace(0.5, 2.0, channels), "bias": jnp.linspace(-1.0, 1.0, channels)}
  stats = {"mean": jnp.full((channels,), 0.3), "var": jnp.full((channels,), 2.0)}
  assert jax.tree.map(jnp.shape, variables["params"]) == jax.tree.map(jnp.shape, params)
  variables = {"params": params, "batch_stats": stats}
  out, new = norm.apply(variables, x, train, mutable=["batch_stats"])
  return np.asarray(out, np.float64), jax.device_get(new["batch_stats"])


X = np.random.default_rng(0).normal(1.0, 3.0, (8, 5, 3, 4)).astype(np.float32)


@pytest.mark.parametrize("unbiased", [False, True])
def test_batch_norm_in_training(unbiased):
  out, stats = normalise(X, unbiased_variance=unbiased)
  mean, var = X.mean((0, 1, 2)), X.var((0, 1, 2))
  expected = (X - mean) / np.sqrt(var + 1e-3) * np.linspace(0.5, 2.0, 4) + np.linspace(-1, 1, 4)
  np.testing.assert_allclose(out, expected, atol=1e-5)
  n = X.size // 4
  np.testing.assert_allclose(stats["mean"], 0.9 * 0.3 + 0.1 * mean, atol=1e-5)
  kept = var * (n / (n - 1) if unbiased else 1.0)
  np.testing.assert_allclose(stats["var"], 0.9 * 2.0 + 0.1 * kept, rtol=1e-5)


def test_batch_norm_in_evaluation_uses_the_running_figures_and_keeps_them():
  out, stats = normalise(X, train=False, num_groups=3)
  expected = (X - 0.3) / np.sqrt(2.0 + 1e-3) * np.linspace(0.5, 2.0, 4) + np.linspace(-1, 1, 4)
  np.testing.assert_allclose(out, expected, atol=1e-5)
  np.testing.assert_array_equal(stats["mean"], np.float32(0.3))


def test_grouped_batch_norm_is_each_group_alone_and_averages_the_running_figures():
  out, stats = normalise(X, num_groups=4)
  alone = [normalise(part) for part in np.split(X, 4)]
  np.testing.assert_allclose(out, np.concatenate([o for o, _ in alone]), atol=1e-5)
  for name in ("mean", "var"):
    average = np.mean([s[name] for _, s in alone], axis=0)
    np.testing.assert_allclose(stats[name], average, rtol=1e-5)
  assert np.abs(out - normalise(X)[0]).max() > 0.1  # and not the whole batch's


def test_groups_must_divide_the_batch():
  with pytest.raises(ValueError, match="3 groups do not divide a batch of 8"):
    normalise(X, num_groups=3)


def test_batch_norm_statistics_are_float32_in_bfloat16():
  x = jnp.asarray(X, jnp.bfloat16)
  out, stats = normalise(x, dtype=jnp.bfloat16)
  exact, exact_stats = normalise(np.asarray(x, np.float32))
  assert stats["mean"].dtype == np.float32
  np.testing.assert_allclose(stats["mean"], exact_stats["mean"], rtol=1e-6)
  np.testing.assert_allclose(out, exact, atol=2**-7 * np.abs(exact).max())


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
  x = jnp.ones((4000, 2, 3))
  layer = layers.DropPath(0.25)
  apply = jax.jit(lambda key: layer.apply({}, x, True, rngs={"dropout": key}))
  out = np.asarray(apply(jax.random.key(1)))
  kept = out[:, 0, 0] > 0
  np.testing.assert_allclose(out, kept[:, None, None] / 0.75 * np.ones((1, 2, 3)), rtol=1e-6)
  assert abs(kept.mean() - 0.75) < 0.03
  np.testing.assert_array_equal(out, apply(jax.random.key(1)))
  assert (out != np.asarray(apply(jax.random.key(2)))).any()
  np.testing.assert_array_equal(layer.apply({}, x, False), x)
  np.testing.assert_array_equal(layers.DropPath(0.0).apply({}, x, True), x)


@pytest.mark.parametrize(
  ("values", "window", "expected"),
  [
    (6, 2, [1.5, 3.5, 5.5]),
    (6, 3, [2.0, 4.0, 5.5]),
    (5, 2, [1.5, 3.5, 5.0]),
    (5, 3, [1.5, 3.0, 4.5]),
  ],
)
def test_average_pooling_leaves_padding_out_of_the_mean(values, window, expected):
  x = jnp.arange(1.0, values + 1)
  rows = layers.average_pool_same(
    jnp.broadcast_to(x[:, None], (values, 4))[None, :, :, None], window, 2
  )
  columns = layers.average_pool_same(jnp.broadcast_to(x, (4, values))[None, :, :, None], window, 2)
  np.testing.assert_allclose(rows[0, :, 0, 0], expected, rtol=1e-6)
  np.testing.assert_allclose(columns[0, 0, :, 0], expected, rtol=1e-6)


@pytest.mark.parametrize(("size", "window", "stride"), [((6, 8), 2, 2), ((7, 5), 3, 2)])
def test_average_pooling_is_the_same_on_a_tpu(size, window, stride):
  x = jax.random.normal(jax.random.key(0), (2, *size, 3))
  g = jax.random.normal(jax.random.key(1), layers.average_pool_same(x, window, stride).shape)

  def run(x, platform):
    with tracing_for((platform,)):
      out, pull = jax.vjp(lambda x: layers.average_pool_same(x, window, stride), x)
    return out, *pull(g)

  assert "reduce_window_sum" in str(jax.make_jaxpr(lambda x: run(x, "tpu"))(x))
  for one, other in zip(run(x, "tpu"), run(x, "cpu"), strict=True):
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_gelu_is_the_exact_one():
  x = jnp.linspace(-6.0, 6.0, 101)
  np.testing.assert_allclose(layers.gelu(x), x * (1 + erf(x / np.sqrt(2))) / 2, atol=1e-6)
  assert layers.gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
  ("before", "after"),
  [
    ([0.0, 1, 2, 3, 4], [1 / 3, 2, 11 / 3]),
    ([0.0, 1, 2], [0, 0.4, 1, 1.6, 2]),
    ([5.0, 1, 2], [5, 1, 2]),
  ],
)
def test_tables_are_resized_without_antialiasing(before, after):
  x = jnp.asarray(before)
  n, m = len(before), len(after)
  columns = layers.resize_relative_table(jnp.broadcast_to(x, (2, 3, n)), (3, m))
  rows = layers.resize_relative_table(jnp.broadcast_to(x[:, None], (2, n, 3)), (m, 3))
  np.testing.assert_allclose(columns[1, 2], after, atol=1e-6)
  np.testing.assert_allclose(rows[1, :, 2], after, atol=1e-6)


@pytest.mark.parametrize("window", [(1, 1), (3, 2), (4, 5)])
def test_position_bias_by_definition(window):
  height, width = window
  table = np.random.default_rng(0).normal(size=(2, 2 * height - 1, 2 * width - 1))
  bias = layers.relative_position_bias(jnp.asarray(table, jnp.float32), window)
  expected = np.zeros((2, height * width, height * width), np.float32)
  cells = list(np.ndindex(height, width))
  for q, (query_row, query_column) in enumerate(cells):
    for k, (key_row, key_column) in enumerate(cells):
      row, column = key_row - query_row + height - 1, key_column - query_column + width - 1
      expected[:, q, k] = table[:, row, column]
  np.testing.assert_array_equal(bias, expected)


def test_a_table_of_another_window_is_refused():
  with pytest.raises(ValueError, match="does not belong to a window"):
    layers.relative_position_bias(jnp.zeros((2, 3, 3)), (3, 2))


def test_torch_initial_values_are_uniform_within_the_root_of_the_fan_in():
  kernel = layers.torch_conv_init(jax.random.key(0), (3, 3, 1, 4000), jnp.float32)
  bias = layers.torch_bias_init(25)(jax.random.key(1), (30000,))
  for value, bound in ((kernel, 1 / 3), (bias, 1 / 5)):
    assert 0.999 * bound < float(jnp.abs(value).max()) <= bound * (1 + 1e-6)
    np.testing.assert_allclose(value.std(), bound / np.sqrt(3), rtol=0.02)
