import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from hybrid_vit.models import layers, moat
from hybrid_vit.models.registry import create_model, list_models, model_entry

SMALL = {
  "stem_widths": (8, 8),
  "depths": (1, 1, 2, 1),
  "widths": (8, 16, 32, 32),
  "head_size": 16,
  "position_sizes": (None, None, 3, (2, 3)),
}


def small(**overrides):
  return create_model("tiny_moat_0", 10, **{**SMALL, **overrides})


def images(*shape):
  return np.random.default_rng(0).normal(size=(*shape, 3)).astype(np.float32)


@functools.cache
def initial_variables():
  return jax.device_get(jax.jit(small().init)(jax.random.key(0), images(1, 32, 32)))


@functools.cache
def small_variables():
  """Variables whose every number is drawn, so that nothing hides behind zeros and ones."""
  leaves, tree = jax.tree.flatten(initial_variables())
  rng = np.random.default_rng(1)

  def drawn(x):
    # Kernels of variance 1 / fan_in keep the activations' scale.
    noise = rng.normal(size=x.shape).astype(np.float32)
    return noise / np.sqrt(np.prod(x.shape[:-1])) if x.ndim > 1 else x + 0.2 * np.abs(noise)

  return jax.tree.unflatten(tree, [drawn(x) for x in leaves])


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(model, variables, x, train=False, key=None):
  rngs = None if key is None else {"dropout": key}
  if train:
    return model.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"])
  return model.apply(variables, x, train=False)


@pytest.mark.parametrize("name", list_models("*moat*"))
def test_parameters_and_features_of_every_entry(name):
  model, published = create_model(name), model_entry(name).published
  x = jax.ShapeDtypeStruct((2, 70, 96, 3), jnp.float32)
  (logits, endpoints), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  assert sum(p.size for p in jax.tree.leaves(variables["params"])) == published.parameters
  assert logits.shape == (2, 1000)
  assert [f.name for f in model.features] == ["stage1", "stage2", "stage3", "stage4"]
  assert [f.stride for f in model.features] == [4, 8, 16, 32]
  for f in model.features:
    assert endpoints[f.name].shape == (2, -(-70 // f.stride), -(-96 // f.stride), f.channels)
  blocks = {f"stage{s + 1}_block{b}" for s, n in enumerate(model.depths) for b in range(n)}
  stages = {f.name for f in model.features}
  assert set(endpoints) == {"stem", "pre_logits"} | blocks | stages
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))


def test_the_table_of_variants_is_complete():
  sizes = [f"tiny_moat_{i}" for i in range(4)] + [f"moat_{i}" for i in range(5)]
  assert sorted(list_models("*moat*")) == sorted(sizes + [f"{n}_no_pe" for n in sizes])


def test_initial_values():
  for path, value in traverse_util.flatten_dict(initial_variables()["params"], sep="/").items():
    leaf = path.rsplit("/", 1)[1]
    if leaf in ("kernel", "position_table"):
      # Four standard errors of a standard deviation.
      assert abs(float(value.std()) / 0.02 - 1.0) < 4 / np.sqrt(2 * value.size), path
    else:
      np.testing.assert_array_equal(value, 1.0 if leaf == "scale" else 0.0, err_msg=path)


def test_every_parameter_gets_a_gradient():
  model, variables, x = small(), small_variables(), images(2, 48, 64)

  @jax.jit
  def gradient(params):
    def loss(params):
      logits, _ = model.apply({**variables, "params": params}, x, train=False)
      return jnp.sum(logits * jnp.cos(jnp.arange(20.0)).reshape(2, 10))

    return jax.grad(loss)(params)

  for path, g in traverse_util.flatten_dict(gradient(variables["params"]), sep="/").items():
    largest = float(jnp.abs(g).max())
    assert np.isfinite(largest), path
    if path.endswith("attention/key/bias"):
      # It adds the same number to all logits of a query, which the softmax takes away again.
      assert largest < 1e-4, path
    else:
      assert largest > 1e-4, path


@pytest.mark.parametrize("train", [False, True])
def test_recomputing_blocks_changes_nothing(train):
  x, key = images(2, 32, 32), jax.random.key(3)
  answers = []
  for remat in (False, True):
    model = small(remat=remat, drop_path_rate=0.5)
    shapes = jax.eval_shape(model.init, key, x)
    assert jax.tree.structure(shapes) == jax.tree.structure(small_variables())
    answers.append(run(model, small_variables(), x, train, key))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), *answers)


def test_recomputing_blocks_stores_less():
  x = images(2, 32, 32)

  def stored(remat):
    model = small(remat=remat)
    _, pull = jax.eval_shape(
      lambda p: jax.vjp(lambda p: model.apply({**small_variables(), "params": p}, x)[0], p),
      small_variables()["params"],
    )
    return sum(leaf.size for leaf in jax.tree.leaves(pull))

  assert stored(True) < 0.5 * stored(False)


def test_bfloat16_keeps_parameters_and_logits_in_float32():
  x = images(2, 48, 40)
  model = small(dtype="bfloat16")
  (logits, endpoints), new = run(model, small_variables(), x, True, jax.random.key(0))
  assert logits.dtype == jnp.float32
  assert all(v.dtype == jnp.bfloat16 for k, v in endpoints.items() if k != "pre_logits")
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(new))
  assert all(bool(jnp.isfinite(v.astype(jnp.float32)).all()) for v in endpoints.values())
  shapes = jax.eval_shape(model.init, jax.random.key(0), x)
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(shapes))
  (exact, _), _ = run(small(), small_variables(), x, True, jax.random.key(0))
  assert float(jnp.abs(logits - exact).max()) < 0.1 * float(jnp.abs(exact).max())


def test_softmax_is_float32_in_bfloat16():
  model = small(dtype="bfloat16")
  text = str(jax.make_jaxpr(lambda v, x: model.apply(v, x))(small_variables(), images(1, 32, 32)))
  exponentials = [line for line in text.splitlines() if "= exp " in line or "= exp[" in line]
  assert exponentials and all("f32" in line for line in exponentials)


def test_grouped_batch_norm_is_each_group_alone():
  x = images(4, 32, 32)
  key = jax.random.key(0)
  (logits, _), new = run(small(batch_norm_groups=2), small_variables(), x, True, key)
  halves = [run(small(), small_variables(), part, True, key) for part in (x[:2], x[2:])]
  alone = np.concatenate([h[0][0] for h in halves])
  np.testing.assert_allclose(logits, alone, rtol=1e-4, atol=1e-4 * np.abs(alone).max())
  average = jax.tree.map(lambda a, b: (a + b) / 2, *(h[1] for h in halves))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), new, average)


def test_drop_path_is_a_function_of_the_key_and_ramps_from_zero():
  x = images(4, 32, 32)
  model = small(drop_path_rate=0.9)
  one, again, other = (
    run(model, small_variables(), x, True, jax.random.key(k))[0][1] for k in (0, 0, 1)
  )
  jax.tree.map(np.testing.assert_array_equal, one, again)
  np.testing.assert_array_equal(one["stage1"], other["stage1"])  # the first block's rate is 0
  assert float(jnp.abs(one["stage4"] - other["stage4"]).max()) > 0.01
  with pytest.raises(Exception, match="dropout"):
    model.apply(small_variables(), x, train=True, mutable=["batch_stats"])


@pytest.mark.parametrize("size", [(37, 51), (33, 64)])
def test_odd_and_non_square_inputs(size):
  logits, endpoints = run(small(), small_variables(), images(1, *size))
  assert logits.shape == (1, 10) and bool(jnp.isfinite(logits).all())
  for f in small().features:
    expected = (1, -(-size[0] // f.stride), -(-size[1] // f.stride), f.channels)
    assert endpoints[f.name].shape == expected


def test_a_small_network_without_strides():
  model = small(stem_stride=1, strides=(1, 2, 2, 1))
  assert [f.stride for f in model.features] == [1, 2, 4, 4]
  x = images(2, 16, 16)
  _, endpoints = jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0]
  assert [endpoints[f.name].shape[1] for f in model.features] == [16, 8, 4, 4]


def test_without_a_classifier():
  variables = small_variables()
  model = small().clone(num_classes=0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), images(1, 32, 32))
  assert set(variables["params"]) - set(shapes["params"]) == {"head", "head_norm"}
  params = {k: v for k, v in variables["params"].items() if not k.startswith("head")}
  logits, endpoints = run(model, {**variables, "params": params}, images(1, 32, 32))
  assert logits is None
  np.testing.assert_allclose(endpoints["pre_logits"], endpoints["stage4"].mean((1, 2)), rtol=1e-5)


def attention(window, **settings):
  settings = {"pad_windows": True, "position_size": (3, 3), **settings}
  return moat.Attention(head_size=4, window=window, dtype=jnp.float32, **settings)


def attend_plainly(params, x, window):
  """Attention of real cells only, window by window, in numpy: the definition of masking."""
  rows, columns = window
  height, width = x.shape[:2]
  table = params["position_table"]
  table = layers.resize_relative_table(table, (2 * rows - 1, 2 * columns - 1))
  bias = np.asarray(layers.relative_position_bias(table, window))
  out = np.zeros_like(x)
  for top in range(0, height, rows):
    for left in range(0, width, columns):
      cells = [
        (r, c)
        for r in range(top, min(top + rows, height))
        for c in range(left, min(left + columns, width))
      ]
      places = np.array([(r - top) * columns + c - left for r, c in cells])
      tokens = np.stack([x[cell] for cell in cells])
      q, k, v = (
        np.einsum("tc,chd->htd", tokens, params[n]["kernel"]) + params[n]["bias"][:, None]
        for n in ("query", "key", "value")
      )
      logits = q @ k.swapaxes(1, 2) / 2.0 + bias[:, places][:, :, places]
      weights = np.exp(logits - logits.max(-1, keepdims=True))
      weights /= weights.sum(-1, keepdims=True)
      y = np.einsum("htd,hdc->tc", weights @ v, params["out"]["kernel"]) + params["out"]["bias"]
      for cell, value in zip(cells, y):
        out[cell] = value
  return out


@pytest.mark.parametrize("window", [(3, 4), (2, 2), (5, 6), (8, 3), (9, 9)])
def test_padded_windows_attend_to_real_cells_only(window):
  x = np.random.default_rng(0).normal(size=(2, 5, 6, 8)).astype(np.float32)
  layer = attention(window)
  params = layer.init(jax.random.key(0), x)["params"]
  params = jax.tree.map(lambda p: p + 0.3 * jax.random.normal(jax.random.key(1), p.shape), params)
  out = layer.apply({"params": params}, x)
  expected = np.stack([attend_plainly(jax.device_get(params), one, window) for one in x])
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_padding_of_windows_can_be_refused():
  x = images(1, 5, 6)[..., :1].repeat(8, -1)
  with pytest.raises(ValueError, match="window of 3x4 does not divide a map of 5x6"):
    attention((3, 4), pad_windows=False).init(jax.random.key(0), x)


def test_the_last_block_of_a_stage_can_attend_globally():
  x = images(1, 64, 64)
  moved = x.copy()
  moved[:, :16, :16] += 1.0  # the first window of stage 3 alone, but for the convolutions' reach
  far = []
  for last in (False, True):
    # Without squeeze-and-excitation, whose mean over the map reaches everywhere.
    windows = {"window_sizes": (None, None, 1, 1), "global_attention_at_end": last}
    model = small(se_ratio=None, **windows)
    ends = [run(model, small_variables(), v)[1]["stage3"] for v in (x, moved)]
    far.append(float(jnp.abs(ends[0] - ends[1])[0, -1, -1].max()))
  assert far[0] < 1e-5 < 1e-3 < far[1]


def test_the_position_bias_is_live():
  x = images(1, 64, 64)
  before, _ = run(small(), small_variables(), x)
  params = traverse_util.flatten_dict(small_variables()["params"])
  changed = {
    k: v + (jnp.arange(v.size).reshape(v.shape) % 3 if k[-1] == "position_table" else 0.0)
    for k, v in params.items()
  }
  after, _ = run(small(), {**small_variables(), "params": traverse_util.unflatten_dict(changed)}, x)
  assert float(jnp.abs(after - before).max()) > 1e-3
  shapes = jax.eval_shape(small(position_bias=False).init, jax.random.key(0), x)
  assert not any("position_table" in k for k in traverse_util.flatten_dict(shapes["params"]))


def test_the_shortcut_pool_is_two_or_three():
  x = images(1, 33, 32)
  two, three = (run(small(pool_size=p), small_variables(), x)[0] for p in (2, 3))
  assert float(jnp.abs(two - three).max()) > 1e-3


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"widths": (8, 16)}, "depths names 4 stages but widths has 2 values"),
    ({"block_types": ("mbconv", "conv", "moat", "moat")}, "'conv'; a stage is 'mbconv' or 'moat'"),
    ({"head_size": 12}, "head_size 12 does not divide the width 32 of stage 3"),
    ({"position_sizes": (None,) * 4}, "no size for stage 3"),
  ],
)
def test_errors_say_what_is_wrong(overrides, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(small(**overrides).init, jax.random.key(0), images(1, 32, 32))
