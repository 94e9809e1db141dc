"""Blocks as the turns of a loop: the same network, the same gradients, and a shorter program."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.models import layers
from hybrid_vit.models.registry import create_model
from hybrid_vit.models.text import TextTransformer
from tests.models import contract, test_cvt, test_l2vit

# Name, arguments of a small one with rows of equal blocks, and the turns of its loops.
NETWORKS = {
  "vit": ("deit_small_patch16_224", {"width": 24, "depth": 3, "num_heads": 3}, [3]),
  # Every third block looks at the whole map, as in ViTDet.
  "windows": (
    "deit_small_patch16_224",
    {
      "width": 24,
      "depth": 7,
      "num_heads": 3,
      "window_size": 2,
      "global_blocks": (2, 5),
      "class_token": False,
      "pool": "mean",
    },
    [2],
  ),
  "convnext": (
    "convnext_tiny",
    {"widths": (8, 12), "depths": (1, 3), "layer_scale_init": 1.0},
    [3],
  ),
  "swin": (
    "swin_tiny",
    {"width": 8, "depths": (2, 4), "num_heads": (1, 2), "window_size": 2},
    [2],
  ),
  "moat": (
    "tiny_moat_0",
    {
      "widths": (8, 16),
      "depths": (3, 3),
      "block_types": ("mbconv", "moat"),
      "strides": (2, 2),
      "window_sizes": (None, None),
      "position_sizes": (None, 4),
      "stem_widths": (8, 8),
      "head_size": 8,
    },
    [2, 2],
  ),
  "smt": (
    "smt_t",
    {
      "depths": (2, 4),
      "widths": (8, 16),
      "block_types": ("modulation", "hybrid"),
      "modulation_heads": (4, 4),
      "attention_heads": (None, 2),
      "mlp_ratios": (2, 2),
    },
    [2, 2],
  ),
  "focalnet": (
    "focalnet_tiny_srf",
    {"embed_dim": 8, "depths": (1, 3), "focal_levels": (2, 2), "focal_windows": (3, 3)},
    [3],
  ),
  "cvt": ("cvt_13", {**test_cvt.SMALL, "depths": (1, 3)}, [3]),
  "l2vit": ("l2vit_tiny", {**test_l2vit.SMALL, "depths": (2, 4)}, [2]),
  "mci": (
    "mci0",
    {
      "depths": (2, 3),
      "widths": (16, 32),
      "mlp_ratios": (2, 2),
      "token_mixers": ("repmixer", "attention"),
      "downsamples": (True, True),
      "se_downsamples": (False, True),
      "position_kernel_sizes": (None, 3),
      "mlp_kernel_size": 3,
      "layer_scale": 0.5,
    },
    [2, 3],
  ),
  "pvt": (
    "pvt_tiny",
    {
      "widths": (8, 16),
      "depths": (1, 3),
      "num_heads": (1, 2),
      "mlp_ratios": (2, 2),
      "patch_sizes": (4, 2),
      "image_size": 64,
      "reduction_ratios": (2, 1),
    },
    [3],
  ),
  "cswin": (
    "cswin_tiny",
    {"width": 8, "depths": (2, 1), "num_heads": (2, 2), "stripe_widths": (2, 2)},
    [2],
  ),
  "resnet": ("resnet50", {"stem_width": 8, "widths": (16, 24), "depths": (1, 3)}, [2]),
  "revcol": (
    "revcol_tiny",
    {"widths": (8, 12, 16, 20), "depths": (1, 1, 1, 1), "num_columns": 4, "layer_scale_init": 1.0},
    [3],
  ),
}


def answers(model, variables, x, key):
  """(logits, endpoints, new statistics, gradient) in training, and the turns of the loops."""

  def loss(params):
    (logits, endpoints), new = model.apply(
      {**variables, "params": params}, x, train=True, rngs={"dropout": key}, mutable=["batch_stats"]
    )
    value = jnp.sum(logits * jnp.cos(jnp.arange(float(logits.size))).reshape(logits.shape))
    return value, (logits, endpoints, new)

  def step(params):
    gradient, out = jax.grad(loss, has_aux=True)(params)
    return *out, gradient

  program = jax.make_jaxpr(loss)(variables["params"])
  turns = [e.params["length"] for e in program.eqns if e.primitive.name == "scan"]
  return jax.device_get(jax.jit(step)(variables["params"])), turns


@pytest.mark.parametrize("name", NETWORKS)
def test_a_loop_is_the_same_network(name):
  registered, arguments, turns = NETWORKS[name]
  model = create_model(registered, 10, **{"drop_path_rate": 0.0, **arguments})
  variables, x = contract.drawn_variables(model, (64, 64)), contract.images(2, 64, 64)
  scanned = model.clone(scan_blocks=True)
  shapes = jax.eval_shape(scanned.init, jax.random.key(0), x)
  assert jax.tree.structure(shapes) == jax.tree.structure(variables)
  expected, none = answers(model, variables, x, jax.random.key(0))
  found, of_loops = answers(scanned, variables, x, jax.random.key(0))
  assert none == [] and of_loops == turns
  assert found[1].keys() == expected[1].keys()

  check_near(found, expected)


def test_blocks_of_a_text_tower():
  settings = {"vocabulary_size": 11, "context_length": 8, "width": 16, "num_heads": 2}
  ratios = (2.0, 2.0, 2.0, 3.0)  # the last one is of another kind
  model = TextTransformer(
    causal=True, embedding_size=6, depth=4, mlp_ratio=ratios, mixer_blocks=True, **settings
  )
  tokens = jnp.asarray(np.random.default_rng(0).integers(0, 11, (3, 8)))
  variables = jax.jit(model.init)(jax.random.key(0), tokens)
  scanned = model.clone(scan_blocks=True)
  program = jax.make_jaxpr(lambda v, t: scanned.apply(v, t)[0])(variables, tokens)
  assert [e.params["length"] for e in program.eqns if e.primitive.name == "scan"] == [3]
  expected, found = (jax.jit(m.apply)(variables, tokens) for m in (model, scanned))
  assert found[1].keys() == expected[1].keys()
  check_near(jax.device_get(found), jax.device_get(expected))


def small(**overrides):
  registered, arguments, _ = NETWORKS["convnext"]
  return create_model(registered, 10, **{"drop_path_rate": 0.0, **arguments, **overrides})


def test_bfloat16():
  variables, x = contract.drawn_variables(small(), (64, 64)), contract.images(2, 64, 64)
  expected, found = (
    contract.run(small(dtype=jnp.bfloat16, drop_path_rate=0.1, scan_blocks=scan), variables, x)
    for scan in (False, True)
  )
  types = [jax.tree.map(lambda leaf: leaf.dtype, answer) for answer in (expected, found)]
  assert types[0] == types[1]
  np.testing.assert_allclose(found[0], expected[0], rtol=0.05, atol=0.05)


def test_drop_path_in_a_loop():
  variables, x = contract.drawn_variables(small(), (64, 64)), contract.images(4, 64, 64)
  model = small(drop_path_rate=0.9, scan_blocks=True)
  contract.check_drop_path(functools.partial(small, scan_blocks=True), (64, 64))
  # Recomputed under the same key: the same masks in both passes, and the same answer.
  answer, recomputed = (
    answers(m, variables, x, jax.random.key(0))[0] for m in (model, model.clone(remat=True))
  )
  check_near(recomputed, answer)
  # Every block draws masks of its own.
  outputs = [np.asarray(answer[1][f"stage2_block{i}"]) for i in range(3)]
  dropped = [(a == b).all((1, 2, 3)) for a, b in itertools.pairwise(outputs)]
  assert not (dropped[0] == dropped[1]).all() and np.any(dropped)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_rate_that_is_an_array(dtype):
  x = jnp.ones((256, 3), dtype)

  def apply(rate):
    layer = layers.DropPath(rate, parent=None)
    return layer.apply({}, x, True, rngs={"dropout": jax.random.key(0)})

  found = jax.jit(apply)(jnp.float32(0.25))
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, apply(0.25))
  assert 160 < int((found[:, 0] > 0).sum()) < 224


def check_near(found, expected):
  def check(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max() + 1e-6)

  jax.tree.map(check, found, expected)
