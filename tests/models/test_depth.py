"""The layer of each parameter, on all families: counts, ends and the parts between blocks."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import pytest

from hybrid_vit.config import Config
from hybrid_vit.heads.dense_model import create_dense_model
from hybrid_vit.models.dense import dense_arguments
from hybrid_vit.models.depth import layer_depths
from hybrid_vit.models.registry import create_model, list_models, model_entry
from hybrid_vit.optimizers import learning_rate_factors


@functools.cache
def parameters(name, **arguments):
  size = model_entry(name).preprocessing.image_size
  model = create_model(name, **arguments)
  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  init = functools.partial(model.init, train=False)
  return jax.eval_shape(init, jax.random.key(0), image)["params"]


def depths(name, **arguments):
  return layer_depths(flax.traverse_util.flatten_dict(parameters(name, **arguments), sep="/"))


# One of each module class, and the sum of its blocks.
FAMILIES = {
  "tiny_moat_0": 14, "cvt_13": 13, "focalnet_tiny_srf": 12, "focalnet_tiny_iso": 12, "smt_t": 13,
  "l2vit_tiny": 12, "mci0": 20, "deit_tiny_patch16_224": 12, "swin_tiny": 12, "convnext_tiny": 18,
  "resnet50": 16, "pvt_tiny": 8, "cswin_tiny": 25,
}  # fmt: skip


def test_no_family_is_left_out():
  classes = {model_entry(name).module_class for name in list_models()}
  here = {model_entry(name).module_class for name in (*FAMILIES, "revcol_tiny")}
  assert classes == here


@pytest.mark.parametrize("name", FAMILIES)
def test_a_block_is_a_layer(name):
  found = depths(name)
  assert set(found.values()) == set(range(FAMILIES[name] + 2))
  assert {found[path] for path in found if path.startswith("head/")} == {FAMILIES[name] + 1}
  assert {found[path] for path in found if path.startswith("stem/")} == {0}
  blocks = sorted({path.split("/")[0] for path in found if "_block" in path}, key=_order)
  for number, block in enumerate(blocks, start=1):
    assert {found[path] for path in found if path.startswith(f"{block}/")} == {number}


def _order(block):
  stage, _, number = block.partition("_block")
  return stage, int(number)


def test_what_leads_into_a_stage_goes_with_its_first_block():
  assert depths("convnext_tiny")["stage3_downsample/conv/kernel"] == 7
  assert depths("swin_tiny")["stage2_merging/norm/scale"] == 3
  assert depths("cvt_13")["stage3_embed/class_token"] == 4
  assert depths("mci0")["stage4_position/position_conv/bias"] == 19
  assert depths("smt_t")["stage2_norm/scale"] == 4
  assert depths("cswin_tiny")["merge3/conv/kernel"] == 25
  found = depths("pvt_tiny")
  assert found["merge1/norm/scale"] == 3 and found["position_embedding2"] == 3
  assert found["position_embedding1"] == 0 and found["class_token"] == 7
  found = depths("deit_tiny_patch16_224")
  assert found["class_token"] == found["position_embedding"] == 0


def test_revcol_lies_on_a_grid():
  """Its code: d[b][0] = b, d[0][c] = c, else min(d[b][c - 1], d[b - 1][c]) + 1; ids are 1 more."""
  levels, columns = (2, 2, 4, 2), 4
  found = depths("revcol_tiny", intermediate_supervision=True)
  grid = [[0] * columns for _ in range(sum(levels))]
  for b in range(sum(levels)):
    for c in range(columns):
      grid[b][c] = b + c if not b or not c else min(grid[b][c - 1], grid[b - 1][c]) + 1
  b = 0
  for level, blocks in enumerate(levels):
    for i in range(blocks):
      for c in range(columns):
        part = f"column{c}/level{level}/block{i}/"
        assert {found[path] for path in found if path.startswith(part)} == {grid[b][c] + 1}
      b += 1
  deepest = grid[-1][-1]
  assert deepest == 12 and found["head/kernel"] == found["auxiliary_head0/norm/scale"] == 14
  assert {d for path, d in found.items() if path.startswith("decoder")} == {14}
  assert found["column3/alpha2"] == grid[0][3] + 1 and found["stem/conv/kernel"] == 0
  # A fusion goes with its level's first block, which is number 4 of the column here.
  part = "column2/level2/up/"
  assert {d for path, d in found.items() if path.startswith(part)} == {grid[4][2] + 1}


def test_rates_follow_the_depth():
  fields = Config({"layer_decay": {"rate": 0.5}}, "config.optimizer")
  factors = learning_rate_factors(fields, parameters("pvt_tiny"))
  assert factors["head"]["kernel"] == 1.0 and factors["norm"]["scale"] == 1.0
  assert factors["stage4_block1"]["norm1"]["scale"] == 0.5
  assert factors["stem"]["norm"]["scale"] == 0.5**9


def test_a_network_of_other_names_is_told_so():
  with pytest.raises(
    ValueError, match=r"how deep parameter 'body/kernel' lies is not known.*layers"
  ):
    layer_depths(["stem/kernel", "stage1_block0/kernel", "body/kernel", "head/kernel"])


@pytest.mark.parametrize("name", ["swin_tiny", "vit_b16", "revcol_tiny"])
def test_a_decoder_lies_as_deep_as_the_head(name):
  arguments = dense_arguments(name, 64)
  backbone = create_model(name, num_classes=0, **arguments)
  model = create_dense_model(
    backbone, 5, head={"name": "upernet", "channels": 8}, auxiliary={"name": "fcn", "channels": 8}
  )
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  params = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), images)["params"]
  found = layer_depths(flax.traverse_util.flatten_dict(params, sep="/"))
  own = {p.removeprefix("backbone/"): d for p, d in found.items() if p.startswith("backbone/")}
  alone = layer_depths([*own, "head/kernel"])
  last = alone.pop("head/kernel")
  assert own == alone and last == max(found.values())
  beside = {depth for path, depth in found.items() if not path.startswith("backbone/")}
  assert beside == {last}
  # The norms beside the trunk go with the last block of their stage.
  if name == "swin_tiny":
    assert found["backbone/stage1_norm/scale"] == 2 and found["backbone/stage4_norm/bias"] == 12
  fields = {"name": "adamw", "layer_decay": {"rate": 0.5}}
  factors = learning_rate_factors(Config(fields), params)
  rates = flax.traverse_util.flatten_dict(factors, sep="/")
  assert rates["head/classifier/kernel"] == 1.0
  assert rates["auxiliary_head/classifier/bias"] == 1.0
