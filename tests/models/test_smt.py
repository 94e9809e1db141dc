import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from hybrid_vit.models import smt
from hybrid_vit.models.registry import create_model, list_models, model_entry
from hybrid_vit.weights import convert, families, keymap_smt
from tests.models import contract

SMALL = {
  "depths": (1, 2, 1),
  "widths": (8, 16, 16),
  "block_types": ("modulation", "hybrid", "attention"),
  "modulation_heads": (2, 2, None),
  "attention_heads": (None, 2, 4),
  "mlp_ratios": (2.0, 2.0, 2.0),
}
OFFICIAL = keymap_smt.LAYOUTS["official"]


def small(**overrides):
  return create_model("smt_t", **{"num_classes": 10, **SMALL, **overrides})


def test_the_table_of_variants_is_complete():
  sizes = ["smt_t", "smt_s", "smt_b", "smt_l", "smt_l_22k", "smt_l_22k_ft_224", "smt_l_22k_ft_384"]
  assert sorted(list_models("smt*")) == sorted(sizes)


@pytest.mark.parametrize("name", list_models("smt*"))
def test_parameters_and_pyramid(name):
  contract.check_entry(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_models("smt*"))
def test_multiply_adds(name):
  published = model_entry(name).published.multiply_adds
  counted = contract.multiply_adds(name)
  assert abs(counted - published) < 6e5, (counted, published)


def test_small_with_one_block_less():
  """The README's 21M and 4.7 G are nearer to this one; the sheet of the counts has both."""
  model = create_model("smt_s", depths=(3, 4, 18, 1))
  x = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
  assert sum(p.size for p in jax.tree.leaves(params)) == 20432808


def test_initial_values():
  model = small(widths=(32, 64, 64), layer_scale=1e-4, expand_ratio=3)
  variables = contract.initialize(model, contract.images(1, 32, 32))
  for path, value in traverse_util.flatten_dict(variables["params"], sep="/").items():
    module, leaf = path.rsplit("/", 2)[-2:]
    if leaf != "kernel":
      expected = {"scale": 1.0, "gamma": 1e-4, "bias": 0.0}[leaf]
      np.testing.assert_allclose(value, expected, err_msg=path)
      continue
    if value.ndim == 4 and value.shape[2] == 1:  # depthwise
      std = np.sqrt(2.0) / value.shape[0]
    elif value.ndim == 4:
      std = np.sqrt(2.0 / (value.shape[0] ** 2 * value.shape[-1]))
    else:
      std = {"expand": np.sqrt(2.0 / 6), "shrink": np.sqrt(2.0 / value.shape[-1])}.get(module, 0.02)
    assert abs(float(value.std()) / std - 1.0) < 4 / np.sqrt(2 * value.size), path


def test_every_parameter_gets_a_gradient():
  contract.check_gradients(small(layer_scale=0.5), (32, 48))


def test_recomputing_blocks_changes_nothing():
  contract.check_remat(small)


def test_bfloat16():
  contract.check_bfloat16(small)


def test_drop_path():
  contract.check_drop_path(small)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_trains(dtype):
  model = small(depths=(1, 0, 1), drop_path_rate=0.0, dtype=dtype)
  contract.check_trains(model, rate=1e-2)


def test_weights_go_out_and_come_back():
  contract.check_round_trip(small(layer_scale=1e-4), OFFICIAL)


def test_odd_and_non_square_sizes():
  contract.check_sizes(small(), [(35, 64)])
  x = jax.ShapeDtypeStruct((1, 70, 90, 3), jnp.float32)
  model = create_model("smt_t")
  _, endpoints = jax.eval_shape(model.init_with_output, jax.random.key(0), x)[0]
  sizes = [endpoints[f"stage{i}"].shape[1:3] for i in (1, 2, 3, 4)]
  assert sizes == [(17, 22), (9, 11), (5, 6), (3, 3)]


def test_stages_modulate_attend_or_do_both_in_turn():
  model = small(depths=(1, 3, 1))
  params = jax.eval_shape(model.init, jax.random.key(0), contract.images(1, 32, 32))["params"]
  kinds = {
    name: ("attention" if "attention" in block else "modulation")
    for name, block in params.items()
    if "_block" in name
  }
  assert kinds == {
    "stage1_block0": "modulation",
    "stage2_block0": "modulation",
    "stage2_block1": "attention",
    "stage2_block2": "modulation",
    "stage3_block0": "attention",
  }
  modulation = params["stage2_block0"]["modulation"]
  assert [modulation[f"scale_conv_{i}"]["kernel"].shape for i in (0, 1)] == [
    (3, 3, 1, 8),
    (5, 5, 1, 8),
  ]
  without = jax.eval_shape(
    small(qkv_bias=False).init, jax.random.key(0), contract.images(1, 32, 32)
  )["params"]
  assert "bias" not in without["stage2_block1"]["attention"]["key_value"]
  assert "bias" not in without["stage2_block0"]["modulation"]["scales"]
  assert "bias" in without["stage2_block0"]["modulation"]["out"]


def test_a_group_holds_one_channel_of_every_head():
  """Channel g of each head goes to group g, and groups are expanded by themselves."""
  layer = smt.GroupedPointwiseConv(4, 3, jnp.float32)
  heads = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(np.float32)  # head, group, cell
  x = jnp.asarray(heads.transpose(2, 0, 1).reshape(1, 1, 5, 8))  # head by head all the groups
  params = layer.init(jax.random.key(0), x)["params"]
  params = {"kernel": params["kernel"], "bias": jnp.arange(12.0)}
  kernel = np.asarray(params["kernel"])
  out = np.asarray(layer.apply({"params": params}, x))[0, 0]
  for group in range(4):
    columns = slice(3 * group, 3 * group + 3)
    expected = heads[:, group].T @ kernel[:, columns] + np.arange(12.0)[columns]
    np.testing.assert_allclose(out[:, columns], expected, rtol=1e-5, atol=1e-6)


def test_grouped_batch_norm_is_each_group_alone():
  x = np.random.default_rng(0).normal(size=(4, 3, 4, 8)).astype(np.float32)

  def modulate(x, groups):
    layer = smt.ScaleAwareModulation(2, 2, True, 0.9, groups, jnp.float32)
    variables = layer.init(jax.random.key(0), x, train=False)
    return layer.apply(variables, x, train=True, mutable=["batch_stats"])

  out, new = modulate(x, 2)
  halves = [modulate(part, 1) for part in (x[:2], x[2:])]
  alone = np.concatenate([h[0] for h in halves])
  np.testing.assert_allclose(out, alone, rtol=1e-4, atol=1e-4 * np.abs(alone).max())
  assert float(jnp.abs(out - modulate(x, 1)[0]).max()) > 1e-3 * float(jnp.abs(out).max())
  average = jax.tree.map(lambda a, b: (a + b) / 2, *(h[1] for h in halves))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), new, average)


def test_the_logits_scale_can_be_given():
  x, variables = contract.images(1, 32, 32), contract.drawn_variables(small())
  # Stages 2 and 3 attend with heads of 8 and 4 channels.
  given = contract.run(small(qk_scale=8**-0.5), variables, x)[1]
  usual = contract.run(small(), variables, x)[1]
  np.testing.assert_array_equal(given["stage2"], usual["stage2"])
  assert float(jnp.abs(given["stage3"] - usual["stage3"]).max()) > 1e-3


def test_both_spellings_of_the_values_convolution_and_prefixes():
  model = small()
  variables = jax.device_get(contract.drawn_variables(model))
  official = convert.export_weights(variables, OFFICIAL.key_map(model))
  detection = {f"backbone.{k}".replace("local_conv.", "dw_conv."): v for k, v in official.items()}
  assert "backbone.block2.1.attn.dw_conv.weight" in detection
  assert "backbone.block2.0.attn.local_conv_1.weight" in detection
  assert {OFFICIAL.rename(k) for k in detection} == set(official)
  assert {OFFICIAL.rename(k) for k in official} == set(official)


@pytest.mark.slow
def test_the_last_depth_is_read_from_a_checkpoint():
  def checkpoint(name, **arguments):
    model = create_model(name, **arguments)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    # Zeros that share their memory: only names and shapes matter.
    zeros = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes)
    return convert.export_weights(zeros, OFFICIAL.key_map(model))

  shorter = checkpoint("smt_s", depths=(3, 4, 18, 1))
  found = families.import_checkpoint(shorter, "smt_s")
  assert found.arguments == {"depths": (3, 4, 18, 1)} and not found.report.unused
  assert families.identify(shorter)[0] == ["smt_s"]
  assert families.import_checkpoint(checkpoint("smt_s"), "smt_s").arguments == {}
  # Other depths are another network's, which is an error as ever.
  with pytest.raises(ValueError, match="--arch=smt_t"):
    families.import_checkpoint(checkpoint("smt_t"), "smt_s")


def test_an_unknown_variable_has_no_name():
  with pytest.raises(ValueError, match="SMT has no variable"):
    keymap_smt.official_key("params/stage1_block0/attention/position_table")


@pytest.mark.parametrize(
  ("overrides", "size", "message"),
  [
    ({"widths": (8, 16)}, 32, "depths names 3 stages but widths has 2 values"),
    ({"block_types": ("modulation", "conv", "attention")}, 32, "'conv'; known: modulation"),
    ({"attention_heads": (None, 3, 4)}, 32, "attention_heads of stage 2.*is 3.*width 16"),
    ({"modulation_heads": (2, None, None)}, 32, "modulation_heads of stage 2.*is None"),
    ({"stem_kernel": 5}, 32, "stem_kernel is 3 or 7, not 5"),
    ({}, 2, "at least 3 x 3 cells, not 2 x 2"),
  ],
)
def test_errors_say_what_is_wrong(overrides, size, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(small(**overrides).init, jax.random.key(0), contract.images(1, size, size))
