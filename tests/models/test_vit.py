"""ViT: exact counts, the structure's promises, positions, and the layouts of its weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.models import positions, vit
from hybrid_vit.models.registry import list_models, model_entry
from hybrid_vit.weights import keymap_vit
from hybrid_vit.weights.transfer import transfer
from tests.models import contract

# Parameters are in the registry; multiply-adds are counted here at each one's own size.
MULTIPLY_ADDS = {
  "deit_tiny_patch16_224": 1253683200,
  "deit_small_patch16_224": 4598882304,
  "deit_base_patch16_224": 17563828224,
  "deit_base_patch16_384": 55484350464,
  "deit_tiny_distilled_patch16_224": 1261003776,
  "deit_small_distilled_patch16_224": 4624140288,
  "deit_base_distilled_patch16_224": 17656811520,
  "deit_base_distilled_patch16_384": 55591342080,
  "vit_base_patch16_224": 17563828224,
  "vit_base_patch16_gap_224": 17471649792,
  "vit_base_patch16_clip_224": 17563453440,
  "vit_b16": 17707960320,
}
MOBILECLIP = {"stem": "convolutions", "positions": "sequence", "head_bias": False}
CLIP = {"stem_bias": False, "pre_norm": True, "activation": "quick_gelu", "head_bias": False}
MEAN = {"class_token": False, "pool": "mean"}
MAE = {"pool": "mean", "pool_before_norm": True}
DISTILLED = {"distillation_token": True}


def small(**overrides):
  settings = {"width": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "position_size": 4}
  if overrides.get("stem") == "convolutions":
    settings |= {"patch_size": 16, "position_size": 2}
  return vit.VisionTransformer(**{"num_classes": 10, **settings, **overrides})


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_entries(name):
  contract.check_entry(name, (224, 160))
  counted, published = contract.multiply_adds(name), model_entry(name).published.multiply_adds
  assert counted == MULTIPLY_ADDS[name] and abs(counted / published - 1) < 0.01


def test_no_variant_is_missing():
  assert sorted(list_models("deit_*") + list_models("vit_*")) == sorted(MULTIPLY_ADDS)


@pytest.mark.parametrize("form", [{}, MEAN, MOBILECLIP, CLIP, MAE, DISTILLED])
def test_gradients_and_sizes(form):
  # A key's bias adds the same number to all logits of a query; it lies in the fused bias.
  contract.check_gradients(small(**form), (32, 48))
  contract.check_sizes(small(**form), [(48, 32), (16, 64)])


@pytest.mark.slow
@pytest.mark.parametrize("form", [{}, MOBILECLIP])
def test_the_structure(form):
  def make(**overrides):
    return small(**form, **overrides)

  contract.check_bfloat16(make)
  contract.check_remat(functools.partial(make, depth=4), (64, 64))
  contract.check_drop_path(make)
  for dtype in (jnp.float32, jnp.bfloat16):
    contract.check_trains(make(dtype=dtype), steps=40, rate=4e-3)


@pytest.mark.parametrize("layout", keymap_vit.LAYOUTS)
@pytest.mark.parametrize("form", [{}, MEAN, MOBILECLIP, CLIP, MAE, DISTILLED])
def test_weights_go_out_and_back(layout, form):
  model, layout_of = small(**form), keymap_vit.LAYOUTS[layout]
  if layout == "transformers" and form in (MOBILECLIP, MAE):
    with pytest.raises(ValueError, match="transformers has no such VisionTransformer"):
      layout_of.key_map(model)
  else:
    contract.check_round_trip(model, layout_of)


def test_names_of_each_library():
  def names(layout, **form):
    key_map = keymap_vit.LAYOUTS[layout].key_map(small(**form))
    paths = ("params/stage1_block1/qkv/kernel", "params/head/kernel", "params/head_norm/scale")
    return [name for path in paths for name in key_map(path).names]

  assert names("timm", **MAE) == ["blocks.1.attn.qkv.weight", "head.weight", "fc_norm.weight"]
  key_map = keymap_vit.LAYOUTS["official"].key_map(small(**DISTILLED))
  distilled = ("params/distillation_token", "params/distillation_head/bias")
  assert [key_map(path).names for path in distilled] == [("dist_token",), ("head_dist.bias",)]
  assert names("official", **CLIP) == [
    "visual.transformer.resblocks.1.attn.in_proj_weight",
    "visual.proj",
    "visual.ln_post.weight",
  ]
  assert names("official", **MOBILECLIP) == [
    "transformer.1.pre_norm_mha.1.qkv_proj.weight",
    "classifier.proj",
    "post_transformer_norm.weight",
  ]
  older = keymap_vit.LAYOUTS["transformers"].rename("vit.layers.1.attention.k_proj.weight")
  assert older == "vit.encoder.layer.1.attention.attention.key.weight"
  assert older in names("transformers")


def test_a_grid_of_positions_is_read_between_the_old_ones():
  # The numbers 0 1 2 3 down each column; the edges are held.
  line = jnp.arange(4.0)[:, None].repeat(4, 1).reshape(16, 1)
  table = jnp.concatenate([jnp.full((1, 1), 9.0), line])
  resized = np.asarray(positions.resize_grid(table, (4, 4), (8, 3)))
  assert resized[0] == 9.0
  grid = resized[1:].reshape(8, 3)
  np.testing.assert_allclose(grid, grid[:, :1].repeat(3, 1), atol=1e-6)
  # A quarter on from 1: 1 + 0.296875, by torch's a = -0.75; by the usual -0.5, 1.25.
  np.testing.assert_allclose(grid[3:5, 0], [1.296875, 1.703125], atol=1e-6)
  np.testing.assert_allclose(grid[:, 0] + grid[::-1, 0], 3.0, atol=1e-5)
  np.testing.assert_array_equal(positions.resize_grid(table, (4, 4), (4, 4)), table)


def test_a_sequence_of_positions_is_read_between_the_old_ones():
  resized = positions.resize_sequence(jnp.arange(4.0)[:, None], 8)[:, 0]
  np.testing.assert_allclose(resized, [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])


def test_the_convolutional_stem_cuts_off_what_fills_no_patch():
  x = jax.ShapeDtypeStruct((1, 45, 66, 3), jnp.float32)
  (_, endpoints), _ = jax.eval_shape(small(**MOBILECLIP).init_with_output, jax.random.key(0), x)
  assert endpoints["stem"].shape == (1, 2, 4, 24)


def test_a_distillation_token_has_a_head_and_a_position_of_its_own():
  model, x = small(**DISTILLED), contract.images(2, 32, 32)
  variables = contract.drawn_variables(model)
  assert variables["params"]["position_embedding"].shape == (2 + 16, 24)
  logits, endpoints = contract.run(model, variables, x)
  for name, head in (("", "head"), ("distillation_", "distillation_head")):
    token = endpoints[f"head_norm_{name}token"]
    layer = variables["params"][head]
    of_head = token @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(
      endpoints[f"{name or 'class_'}logits"], of_head, rtol=1e-4, atol=1e-4
    )
  mean = (endpoints["class_logits"] + endpoints["distillation_logits"]) / 2
  np.testing.assert_allclose(logits, mean, rtol=1e-6)
  # Behind the class token's position come the second token's, then the patches'.
  table = variables["params"]["position_embedding"].at[1].add(1.0)
  moved = {"params": {**variables["params"], "position_embedding": table}}
  _, other = contract.run(model.clone(depth=0), moved, x)
  _, before = contract.run(model.clone(depth=0), variables, x)
  np.testing.assert_array_equal(other["stage1"], before["stage1"])
  np.testing.assert_array_equal(other["stage1_token"], before["stage1_token"])
  moves = other["stage1_distillation_token"] - before["stage1_distillation_token"]
  np.testing.assert_allclose(moves, 1.0, rtol=1e-5)


def test_only_the_kept_patches_are_seen_in_their_order():
  model, x = small(class_token=False, pool="mean", depth=1), contract.images(2, 32, 32)
  variables = contract.drawn_variables(model)
  kept = jnp.asarray([[3, 0, 9], [1, 2, 15]])
  _, some = model.apply(variables, x, kept=kept)
  assert some["stage1"].shape == (2, 3, 24)
  everything = jnp.arange(16)[None].repeat(2, 0)
  _, whole = contract.run(model, variables, x)
  _, all_kept = model.apply(variables, x, kept=everything[:, ::-1])
  np.testing.assert_allclose(
    all_kept["stage1"][:, ::-1], whole["stage1"].reshape(2, 16, 24), rtol=1e-4, atol=1e-4
  )
  # What is hidden has no part in it.
  hidden = jnp.asarray(x).at[0, 8:16, 8:16].set(7.0)
  np.testing.assert_array_equal(
    some["stage1"], model.apply(variables, hidden, kept=kept)[1]["stage1"]
  )


def test_without_a_head():
  x = contract.images(1, 32, 32)
  params = jax.eval_shape(small(num_classes=0).init, jax.random.key(0), x)["params"]
  assert "head" not in params and "head_norm" in params
  logits, endpoints = small(num_classes=0).apply(contract.drawn_variables(small()), x)
  assert logits is None and endpoints["pre_logits"].shape == (1, 24)


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"num_heads": 5}, "5 heads do not divide the width 24"),
    ({"pool": "max"}, "pool is 'max'; it is one of"),
    ({"class_token": False}, "pool='token' needs class_token=True"),
    ({**DISTILLED, "pool": "mean"}, "distillation_token=True needs pool='token'"),
    ({"stem": "convolutions", "patch_size": 8}, "stem has patches of 16, not 8"),
    ({"patch_size": 5}, "picture of 32x48 is not whole patches of 5x5"),
  ],
)
def test_errors_say_what_is_wrong(overrides, message):
  x = jax.ShapeDtypeStruct((1, 32, 48, 3), jnp.float32)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(small(**overrides).init, jax.random.key(0), x)


def test_positions_move_to_another_size():
  def variables(position_size):
    model = small(position_size=position_size, num_classes=0)
    x = contract.images(1, 8 * position_size, 8 * position_size)
    return contract.drawn_variables(model, x.shape[1:3])

  source, target = variables(3), variables(4)
  moved, report = transfer(source, target)
  table = source["params"]["position_embedding"]
  expected = positions.resize_grid(table, (3, 3), (4, 4))
  np.testing.assert_array_equal(moved["params"]["position_embedding"], expected)
  assert any("(resized from (10, 24) to (17, 24))" in name for name in report.loaded)
  with pytest.raises(
    ValueError, match="positions of 10 and 13 tokens are not those of two squares"
  ):
    positions.resize_square_grid(table, 13)
