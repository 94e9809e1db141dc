"""CLIP's text towers: exact counts, masks, merging, training, and the layouts of their weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from hybrid_vit.models import text
from hybrid_vit.tools.summarize import count_parameters
from hybrid_vit.weights import convert, keymap_text

TOKENS = np.array([[9, 3, 4, 2, 10, 0, 0, 0], [9, 5, 10, 0, 0, 0, 0, 0]])


def small(**overrides):
  settings = {
    "causal": False,
    "vocabulary_size": 11,
    "context_length": 8,
    "width": 16,
    "depth": 1,
    "num_heads": 2,
    "embedding_size": 6,
    "mixer_kernel_size": 3,
    "layer_scale": 0.5,
  }
  return text.TextTransformer(**{**settings, **overrides})


@functools.cache
def drawn(model):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  return jax.tree.map(lambda x: rng.uniform(0.1, 0.6, x.shape).astype(np.float32), shapes)


@functools.partial(jax.jit, static_argnums=(0,))
def run(model, variables, tokens):
  return model.apply(variables, tokens)


@pytest.mark.parametrize("name", text.TEXT_TOWERS)
def test_parameters_of_every_tower(name):
  model = text.create_text_tower(name)
  tokens = jax.ShapeDtypeStruct((2, 77), jnp.int32)
  (embedding, endpoints), variables = jax.eval_shape(
    model.init_with_output, jax.random.key(0), tokens
  )
  assert count_parameters(variables["params"]) == text.TEXT_TOWERS[name][1]
  assert embedding.shape == (2, 512) and embedding.dtype == jnp.float32
  assert endpoints["final_norm"].shape == (2, 77, 512)


def test_the_answer_is_at_the_first_end_token_and_padding_is_seen():
  for causal in (False, True):
    model = small(causal=causal)
    variables = drawn(model)
    before, endpoints = run(model, variables, TOKENS)
    np.testing.assert_allclose(endpoints["pre_logits"][1], endpoints["final_norm"][1, 2], rtol=1e-6)
    changed = TOKENS.copy()
    changed[1, 5] = 10  # a second end token, in the padding
    after, _ = run(model, variables, changed)
    assert (float(jnp.abs(after - before)[1].max()) > 1e-4) != causal
    changed[1, 0] = 7
    after, _ = run(model, variables, changed)
    assert float(jnp.abs(after - before)[1].max()) > 1e-4


def test_another_length_takes_the_positions_resized():
  model = small()
  long, _ = run(model, drawn(model), np.pad(TOKENS, ((0, 0), (0, 4))))
  short, _ = run(model, drawn(model), TOKENS)
  assert long.shape == short.shape and float(jnp.abs(long - short).max()) > 1e-4


def test_gradients_and_remat():
  def gradient(model):
    def loss(params):
      embedding, _ = model.apply({**drawn(small(mixer_blocks=True)), "params": params}, TOKENS)
      return jnp.sum(embedding * jnp.cos(jnp.arange(12.0)).reshape(2, 6))

    return jax.jit(jax.grad(loss))(drawn(small(mixer_blocks=True))["params"])

  plain, again = (gradient(small(mixer_blocks=True, remat=remat)) for remat in (False, True))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), plain, again)
  for path, g in traverse_util.flatten_dict(plain, sep="/").items():
    assert float(jnp.abs(g).max()) > 1e-7, path


def test_bfloat16_keeps_parameters_and_embedding_in_float32():
  exact, model = small(mixer_blocks=True), small(mixer_blocks=True, dtype=jnp.bfloat16)
  embedding, endpoints = run(model, drawn(exact), TOKENS)
  assert embedding.dtype == jnp.float32
  assert all(v.dtype == jnp.bfloat16 for k, v in endpoints.items() if k != "pre_logits")
  expected, _ = run(exact, drawn(exact), TOKENS)
  assert float(jnp.abs(embedding - expected).max()) < 0.05 * float(jnp.abs(expected).max())
  shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
  assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(shapes))


@pytest.mark.parametrize("layout", keymap_text.LAYOUTS)
@pytest.mark.parametrize("mixer_blocks", [False, True])
def test_weights_go_out_and_back(layout, mixer_blocks):
  model, layout = small(mixer_blocks=mixer_blocks), keymap_text.LAYOUTS[layout]
  if mixer_blocks and layout is not keymap_text.LAYOUTS["official"]:
    with pytest.raises(ValueError, match="only the authors' layout has"):
      layout.key_map(model)
    return
  exported = convert.export_weights(drawn(model), layout.key_map(model))
  back, _ = convert.import_weights(exported, drawn(model), layout.key_map(model))
  jax.tree.map(np.testing.assert_array_equal, back, drawn(model))


def test_errors_say_what_is_wrong():
  with pytest.raises(ValueError, match="no text tower is named 'b'; there are: mobileclip_s0"):
    text.create_text_tower("b")
  with pytest.raises(ValueError, match="3 heads do not divide the width 16"):
    jax.eval_shape(small(num_heads=3).init, jax.random.key(0), TOKENS)
  with pytest.raises(ValueError, match=r"depth is 1 but mlp_ratio has 2 values: \(2.0, 4.0\)"):
    jax.eval_shape(small(mlp_ratio=(2.0, 4.0)).init, jax.random.key(0), TOKENS)
