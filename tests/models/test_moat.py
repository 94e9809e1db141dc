import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from hybrid_vit.models import layers, moat
from hybrid_vit.models.registry import create_model, list_models
from hybrid_vit.weights import keymap_moat
from tests.models import contract
from tests.models.contract import images, run

SMALL = {
  "stem_widths": (8, 8),
  "depths": (1, 1, 2, 1),
  "widths": (8, 16, 32, 32),
  "head_size": 16,
  "position_sizes": (None, None, 3, (2, 3)),
}


def small(**overrides):
  return create_model("tiny_moat_0", 10, **{**SMALL, **overrides})


def small_variables():
  return contract.drawn_variables(small())


@pytest.mark.parametrize("name", list_models("*moat*"))
def test_entries(name):
  contract.check_entry(name, (70, 96))
  model = create_model(name)
  endpoints = contract.traced(model, (70, 96)).endpoints
  blocks = {f"stage{s + 1}_block{b}" for s, n in enumerate(model.depths) for b in range(n)}
  assert set(endpoints) == {"stem", "pre_logits"} | blocks | {f.name for f in model.features}


def test_the_table_of_variants_is_complete():
  sizes = [f"tiny_moat_{i}" for i in range(4)] + [f"moat_{i}" for i in range(5)]
  assert sorted(list_models("*moat*")) == sorted(sizes + [f"{n}_no_pe" for n in sizes])


def test_initial_values():
  variables = jax.device_get(contract.initialize(small(), images(1, 32, 32)))
  for path, value in traverse_util.flatten_dict(variables["params"], sep="/").items():
    leaf = path.rsplit("/", 1)[1]
    if leaf in ("kernel", "position_table"):
      # Four standard errors of a standard deviation.
      assert abs(float(value.std()) / 0.02 - 1.0) < 4 / np.sqrt(2 * value.size), path
    else:
      np.testing.assert_array_equal(value, 1.0 if leaf == "scale" else 0.0, err_msg=path)


@pytest.mark.slow
def test_the_structure():
  # A key's bias adds the same to all logits of a query, which the softmax takes away again.
  contract.check_gradients(small(), dead=("attention/key/bias",))
  contract.check_bfloat16(small)
  contract.check_remat(small)
  contract.check_drop_path(small)
  contract.check_sizes(small(), [(37, 51), (33, 64)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_trains(dtype):
  contract.check_trains(small(dtype=dtype, batch_norm_momentum=0.9))


def test_weights_go_out_and_back():
  contract.check_round_trip(small(), keymap_moat.LAYOUTS["official"])


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


def test_drop_path_ramps_from_zero():
  one, other = (
    run(small(drop_path_rate=0.9), small_variables(), images(4, 32, 32), True, jax.random.key(k))
    for k in (0, 1)
  )
  one, other = one[0][1], other[0][1]
  np.testing.assert_array_equal(one["stage1"], other["stage1"])  # the first block's rate is 0
  assert float(jnp.abs(one["stage4"] - other["stage4"]).max()) > 0.01


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
