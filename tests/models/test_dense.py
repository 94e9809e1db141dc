"""Every registered network as a backbone of dense tasks: shapes, counts, layers; small ones run."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.interpreters import partial_eval

from hybrid_vit.models.dense import dense_arguments, enlarged_windows
from hybrid_vit.models.depth import layer_depths
from hybrid_vit.models.registry import create_model, list_models, model_entry
from hybrid_vit.tools.summarize import count_multiply_adds, count_parameters
from hybrid_vit.weights import families
from hybrid_vit.weights.transfer import transfer
from tests.models import contract


def family(name):
  return model_entry(name).module_class.__name__


def dense(name, image_size=512, **overrides):
  return create_model(name, num_classes=0, **{**dense_arguments(name, image_size), **overrides})


@functools.cache
def shapes(model, size):
  """(endpoints, variables); entries that differ in drop path alone are traced once."""
  x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  (logits, endpoints), variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
  assert logits is None
  return endpoints, variables


def still(name, **overrides):
  return dense(name, drop_path_rate=0.0, **overrides)


def alike():
  """Names of the registry by their dense form: those that differ in drop path alone together."""
  found = {}
  for name in list_models():
    found.setdefault(still(name), []).append(name)
  return list(found.values())


ALIKE = alike()


def flat(tree):
  return traverse_util.flatten_dict(dict(tree), sep="/")


def sides(name, n, strides):
  """Cells along a side of n pixels: rounded up, but for families that the module names."""
  if family(name) in ("ConvNeXt", "RevCol", "PVT"):
    return [n // stride for stride in strides]
  if family(name) in ("CvT", "CSWin", "SMT"):
    cells = [(n + 1) // 4]
    while len(cells) < len(strides):
      cells.append(-(-cells[-1] // 2))
    return cells
  return [-(-n // stride) for stride in strides]


@pytest.mark.parametrize("names", ALIKE, ids=lambda names: names[0])
def test_backbone(names):
  """Shapes of all maps, exact counts, and what the parameters are and are not."""
  model = still(names[0])
  strides = [f.stride for f in model.features]
  plain = {"VisionTransformer": [16] * 4, "CvT": [4, 8, 16]}.get(family(names[0]), [4, 8, 16, 32])
  assert strides == ([16] if names[0].endswith("_iso") else plain)
  endpoints, variables = shapes(model, (512, 512))
  check_maps(names[0], model, (512, 512), [endpoints[f.name] for f in model.features])
  program, maps = traced_maps(model, variables, (333, 501))
  check_maps(names[0], model, (333, 501), maps)
  for name in names:
    assert count_parameters(variables["params"]) == without_classifier(name)
  check_nothing_is_a_classifiers(names[0], variables)
  check_layers(names[0], flat(variables["params"]))
  check_all_are_read(names[0], variables, program)


def check_maps(name, model, size, maps):
  rows, columns = (sides(name, n, [f.stride for f in model.features]) for n in size)
  expected = [(1, *side, f.channels) for *side, f in zip(rows, columns, model.features)]
  assert [m.shape for m in maps] == expected


def traced_maps(model, variables, size):
  """The program from (variables, images) to the maps of the features, and their shapes."""

  def maps(variables, x):
    endpoints = model.apply(variables, x, train=False)[1]
    return [endpoints[f.name] for f in model.features]

  x = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
  program, out = jax.make_jaxpr(maps, return_shape=True)(variables, x)
  return program.jaxpr, out


def check_nothing_is_a_classifiers(name, variables):
  for path in flat(variables["params"]):
    scope = path.split("/")[0]
    assert not scope.startswith(("head", "decoder", "auxiliary", "distillation_head")), path
    assert scope != "norm", path


def check_layers(name, paths):
  """Each parameter's is known; a norm of an output lies with its stage's last block."""
  layers = layer_depths(paths)
  assert set(layers.values()) == set(range(max(layers.values()) + 1))
  if family(name) == "RevCol":
    return
  found = (re.match(r"stage(\d+)_block(\d+)/", path) for path in paths)
  blocks = {(int(m[1]), int(m[2])): layers[m.string] for m in found if m}
  assert max(layers.values()) == len(blocks)
  for path in paths:
    if m := re.match(r"stage(\d+)_norm/", path):
      assert layers[path] == max(n for (stage, _), n in blocks.items() if stage == int(m[1]))


def check_all_are_read(name, variables, program):
  _, used = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
  # The picture is the last input.
  paths = flat(jax.tree.unflatten(jax.tree.structure(variables), used[:-1])["params"])
  unread = {path for path, is_used in paths.items() if not is_used}
  # The authors' first column has gains too, and no maps before it.
  gains = {f"column0/alpha{i}" for i in range(4)} if family(name) == "RevCol" else set()
  assert unread == gains


def without_classifier(name):
  """The published count less what only a classifier reads, plus what the dense form adds."""
  entry, whole, model = model_entry(name), create_model(name), dense(name)
  kind, classes, last = family(name), whole.num_classes, whole.features[-1].channels
  widths = [f.channels for f in whole.features]
  biased = getattr(whole, "head_bias", True)
  count = entry.published.parameters - classes * (last + biased)
  if kind in ("Swin", "ConvNeXt", "FocalNet", "L2ViT", "CSWin"):
    return count - 2 * last + 2 * sum(widths)
  if kind in ("MOAT", "CvT"):
    return count - 2 * last
  if kind == "PVT":
    return count - 3 * last  # the norm, the class token
  if kind == "RevCol":
    cells = whole.num_columns * sum(n * w for n, w in zip(whole.depths, whole.widths))
    return count - 2 * last + cells * (model.kernel_size**2 - whole.kernel_size**2)
  if kind == "MCi":
    variables = jax.eval_shape(whole.init, jax.random.key(0), contract.images(1, 64, 64))
    count += classes * last  # as wide as the convolution's output, not as the last stage
    return (
      count
      - classes * int(last * whole.head_expansion)
      - count_parameters(variables["params"]["head_conv"])
    )
  if kind == "VisionTransformer":
    heads = classes * (last + 1) * whole.distillation_token
    return count - heads - 2 * last + last * (32**2 - whole.position_size**2)
  assert kind in ("SMT", "ResNet")
  return count


@pytest.mark.parametrize(
  ("name", "overrides", "published"),
  [
    # Whole systems, counted with mmsegmentation and mmdetection, less their heads' exact counts.
    ("swin_tiny", {}, 59941862 - 31497366 - 923798),
    ("swin_tiny", {"output_norms": (2, 3, 4)}, 38458606 - 4474880 - 6463220),
    # MAE's UPerNet; its backbone has layer scales and tables of relative positions besides.
    (
      "deit_base_patch16_224",
      {},
      163877228 - 67963542 - 1808534 - 7081728 - 12 * (2 * 768 + 12 * (63**2 + 3)),
    ),
  ],
)
def test_counts_of_whole_systems(name, overrides, published):
  found = count_parameters(shapes(still(name, **overrides), (512, 512))[1]["params"])
  assert found == published


# Four stages each, as small as may be.
SMALL = {
  "tiny_moat_0": {
    "stem_widths": (8, 8), "depths": (1, 1, 2, 1), "widths": (8, 16, 32, 32), "head_size": 16,
  },
  "cvt_13": {"widths": (8, 16, 24), "depths": (1, 1, 2), "num_heads": (1, 2, 3)},
  "focalnet_tiny_srf_overlap": {"embed_dim": 8, "depths": (1, 1, 2, 1)},
  "focalnet_tiny_iso": {"embed_dim": 16, "depths": (2,)},
  "smt_t": {
    "depths": (1, 1, 2, 1), "widths": (8, 16, 16, 32), "modulation_heads": (2, 2, 2, None),
    "attention_heads": (None, None, 2, 4), "mlp_ratios": (2.0,) * 4,
  },
  "l2vit_tiny": {"widths": (8, 16, 16, 32), "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4)},
  "revcol_tiny": {"widths": (8, 12, 16, 20), "depths": (1, 1, 1, 1), "num_columns": 2},
  "mci0": {"depths": (1, 1, 1, 1), "widths": (8, 16, 32, 32)},
  "deit_tiny_distilled_patch16_224": {"width": 24, "depth": 6, "num_heads": 3},
  "vit_b16": {"width": 24, "depth": 6, "num_heads": 3},
  "swin_tiny": {"width": 8, "depths": (1, 2, 2, 2), "num_heads": (1, 2, 2, 4)},
  "convnext_tiny": {"widths": (8, 16, 16, 32), "depths": (1, 1, 2, 1)},
  "resnet50": {"stem_width": 8, "widths": (16, 24, 32, 40), "depths": (1, 1, 1, 1)},
  "pvt_tiny": {
    "widths": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "image_size": 64,
    "mlp_ratios": (2,) * 4, "reduction_ratios": (4, 2, 1, 1),
  },
  "cswin_tiny": {"width": 8, "depths": (1, 1, 2, 1), "num_heads": (2, 2, 4, 4)},
}  # fmt: skip


def test_no_family_is_left_out():
  assert {family(name) for name in list_models()} == {family(name) for name in SMALL}


def small(name, **overrides):
  arguments = dense_arguments(name, 64)
  if "output_blocks" in arguments:
    arguments["output_blocks"] = (1, 2, 3, 5)
  return create_model(
    name, num_classes=0, **{**arguments, "drop_path_rate": 0.0, **SMALL[name], **overrides}
  )


def pyramid(model, variables, x):
  endpoints = contract.run(model, variables, x)[1]
  return [np.asarray(endpoints[f.name]) for f in model.features]


@pytest.mark.parametrize("name", SMALL)
def test_a_picture_answers_alone_as_in_a_batch(name):
  model = small(name)
  variables, x = contract.drawn_variables(model, (64, 96)), contract.images(2, 64, 96)
  for whole, alone in zip(pyramid(model, variables, x), pyramid(model, variables, x[1:])):
    assert np.isfinite(whole).all() and whole.std() > 1e-3
    np.testing.assert_allclose(whole[1:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["swin_tiny", "deit_tiny_distilled_patch16_224"])
def test_recomputing_blocks_changes_no_map(name):
  x = contract.images(1, 64, 96)
  variables = contract.drawn_variables(small(name), (64, 96))
  for plain, remat in zip(*(pyramid(small(name, remat=r), variables, x) for r in (False, True))):
    np.testing.assert_allclose(plain, remat, rtol=1e-5, atol=1e-5)


EPSILON = {"swin_tiny": 1e-5, "convnext_tiny": 1e-6, "cswin_tiny": 1e-5, "l2vit_tiny": 1e-5,
           "focalnet_tiny_srf_overlap": 1e-5}  # fmt: skip


@pytest.mark.parametrize("name", EPSILON)
def test_norms_of_the_outputs_stand_beside_the_trunk(name):
  model = small(name, output_norms=(4, 2))
  assert [f.name for f in model.features] == ["stage2_norm", "stage4_norm"]
  assert [f.stride for f in model.features] == [8, 32]
  x = contract.images(1, 64, 64)
  variables = jax.device_get(contract.drawn_variables(model, (64, 64)))
  assert {k for k in variables["params"] if k.startswith("stage") and k.endswith("_norm")} == {
    "stage2_norm",
    "stage4_norm",
  }
  _, endpoints = contract.run(model, variables, x)
  y = np.asarray(endpoints["stage2"])
  y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + EPSILON[name])
  norm = variables["params"]["stage2_norm"]
  np.testing.assert_allclose(
    endpoints["stage2_norm"], y * norm["scale"] + norm["bias"], rtol=1e-3, atol=1e-3
  )
  # Nothing else reads them, and without a classifier the last map is pooled as it is.
  kept = {k: v for k, v in variables["params"].items() if k not in ("stage2_norm", "stage4_norm")}
  plain = small(name, output_norms=(1,))
  kept["stage1_norm"] = {k: np.zeros(8, np.float32) for k in ("scale", "bias")}
  _, without = contract.run(plain, {**variables, "params": kept}, x)
  for end in ("stage4", "pre_logits"):
    np.testing.assert_allclose(endpoints[end], without[end], rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(
    endpoints["pre_logits"], np.asarray(endpoints["stage4"]).mean((1, 2)), rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize("name", EPSILON)
def test_weights_of_the_authors_dense_backbones(name):
  model = small(name)
  layout = families.layouts(name)["official"]
  contract.check_round_trip(model, layout, (64, 64))
  first = 1 if name.startswith("cswin") else 0
  key_map = layout.key_map(model)
  for stage in range(4):
    expected = f"norm{stage + first}.weight"
    assert key_map(f"params/stage{stage + 1}_norm/scale").name == expected


def test_names_of_the_norms_in_other_libraries():
  for name in ("swin_tiny", "convnext_tiny"):
    layouts, path = families.layouts(name), "params/stage3_norm/bias"
    theirs = layouts["transformers"].key_map(small(name))(path).name
    assert theirs == "hidden_states_norms.stage3.bias"
    with pytest.raises(ValueError, match="has no variable"):
      layouts["timm"].key_map(small(name))(path)


@pytest.mark.parametrize("name", SMALL)
def test_classification_begins_dense_training(name):
  """Everything is taken over but what the dense form adds, and the trunk answers as before."""
  dense_model = small(name)
  theirs = {
    "focalnet_tiny_srf_overlap": {"stem_padding": 3, "pad_maps": True},
    "tiny_moat_0": {"pool_size": 3},
  }.get(name, {})
  whole = create_model(name, 5, drop_path_rate=0.0, **{**SMALL[name], **theirs})
  side = 64 if whole.features[0].stride == 4 else 224
  source = contract.drawn_variables(whole, (side, side))
  variables, report = transfer(source, contract.drawn_variables(dense_model, (64, 64)))
  added = {entry.split(" ")[0].split("/")[1] for entry in report.initialised}
  assert added == {f.name for f in dense_model.features if f.name.endswith("_norm")}
  left = {entry.split("/")[1] for entry in report.unused}
  assert left <= {"head", "head_norm", "norm", "head_conv", "class_token", "distillation_head"}
  if side != 64:  # Positions are resized: other numbers by intent.
    return
  if name in ("pvt_tiny", "swin_tiny"):  # No class token there; windows that do not shrink.
    return
  x = contract.images(1, 64, 64)
  old, new = (contract.run(m, v, x)[1] for m, v in ((whole, source), (dense_model, variables)))
  for feature in whole.features:
    np.testing.assert_allclose(new[feature.name], old[feature.name], rtol=1e-4, atol=1e-4)


def test_positions_of_a_vit_are_those_of_the_size():
  assert dense_arguments("vit_b16", 640)["position_size"] == 40
  assert dense_arguments("deit_base_patch16_384", 500)["position_size"] == 32
  assert dense_arguments("deit_tiny_patch16_224", 512)["output_blocks"] == (3, 5, 7, 11)


def test_blocks_of_a_vit():
  model = small("deit_tiny_distilled_patch16_224")
  assert [f.name for f in model.features] == [f"stage1_block{i}" for i in (1, 2, 3, 5)]
  x = contract.images(1, 64, 96)
  variables = contract.drawn_variables(model, (64, 96))
  assert not any(k.startswith("head") for k in variables["params"])
  # Zeros at the right and the bottom fill the last patches.
  padded = np.pad(x[:, :50, :90], ((0, 0), (0, 14), (0, 6), (0, 0)))
  for ours, theirs in zip(
    pyramid(model, variables, x[:, :50, :90]), pyramid(model, variables, padded)
  ):
    np.testing.assert_array_equal(ours, theirs)
  # With a classifier the last norm is there, and answers as without chosen blocks.
  both = [
    create_model("deit_tiny_patch16_224", 5, width=24, depth=6, num_heads=3, output_blocks=blocks)
    for blocks in ((), (2,))
  ]
  variables = contract.drawn_variables(both[0], (224, 224))
  x = contract.images(1, 224, 224)
  first, second = (contract.run(m, variables, x) for m in both)
  np.testing.assert_array_equal(first[0], second[0])
  np.testing.assert_array_equal(first[1]["head_norm"], second[1]["head_norm"])
  assert both[0].clone(num_classes=0).features[0].name == "stage1"
  with pytest.raises(ValueError, match="output_blocks names block 6; the blocks are 0 to 5"):
    shapes(both[0].clone(output_blocks=(6,)), (224, 224))


def test_the_largest_revcol_has_kernels_of_seven():
  assert dense("revcol_huge").kernel_size == 7 and dense("revcol_xlarge").kernel_size == 3
  arguments = {**SMALL["revcol_tiny"], "bottom_to_top": True, "layer_scale_init": 1.0}
  models = [create_model("revcol_tiny", 0, kernel_size=k, **arguments) for k in (3, 7)]
  source = contract.drawn_variables(models[0], (64, 96))
  variables, report = transfer(source, contract.drawn_variables(models[1], (64, 96)))
  path = "params/column1/level2/block0/depthwise_conv/kernel"
  assert f"{path} (zeros around 3x3)" in report.loaded
  kernel = flat(variables)[path]
  assert kernel.shape == (7, 7, 1, 16)
  np.testing.assert_array_equal(kernel[2:-2, 2:-2], flat(source)[path])
  x = contract.images(1, 64, 96)
  for old, new in zip(pyramid(models[0], source, x), pyramid(models[1], variables, x)):
    np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-4)
  # The way back would cut what was trained.
  with pytest.raises(ValueError, match="another shape"):
    transfer(variables, source)


def test_windows_of_swin_stay_whole():
  """A map smaller than a window answers as the same map with zeros up to the window."""
  model = small("swin_tiny", window_size=8)
  variables = contract.drawn_variables(model, (64, 64))
  assert model.shrink_windows is False
  stage4 = contract.run(model, variables, contract.images(1, 64, 64))[1]["stage4"]
  shrunk = model.clone(shrink_windows=True)
  other = contract.run(shrunk, variables, contract.images(1, 64, 64))[1]["stage4"]
  assert np.abs(np.asarray(stage4) - np.asarray(other)).max() > 1e-2
  # Where every map is larger than a window both are one.
  large = contract.images(1, 288, 320)
  for a, b in zip(pyramid(model, variables, large), pyramid(shrunk, variables, large)):
    np.testing.assert_array_equal(a, b)


def test_enlarged_windows():
  assert enlarged_windows("focalnet_tiny_lrf") == (9, 9, 9, 9)
  assert enlarged_windows("focalnet_tiny_srf", (11, 9, 9, 7)) == (11, 9, 9, 7)
  assert enlarged_windows("focalnet_small_iso") == (9,)
  for first, message in ((8, "a kernel of 8"), (1, "a kernel of 1"), ((9, 9), "has 4 stages")):
    with pytest.raises(ValueError, match=message):
      enlarged_windows("focalnet_tiny_srf", first)
  with pytest.raises(ValueError, match="swin_tiny is a Swin; a FocalNet is expected"):
    enlarged_windows("swin_tiny")
  with pytest.raises(ValueError, match="image_size is 0"):
    dense_arguments("swin_tiny", 0)


def multiply_adds(model, side):
  _, variables = shapes(model, (64, 64))
  x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  return count_multiply_adds(functools.partial(model.apply, train=False), variables, x)


def growth(model, sides):
  counts = [multiply_adds(model, side) for side in sides]
  return [b / a for a, b in itertools.pairwise(counts)]


def test_multiply_adds_are_linear_in_pixels():
  doubled, of_windows = (512, 1024, 2048), (448, 896, 1792)
  np.testing.assert_allclose(growth(still("focalnet_tiny_lrf"), doubled), 4.0, rtol=0.01)
  # Windows of 7 and 14 divide all maps of the second sizes; else padding counts too, less and less.
  linear, windowed = still("l2vit_tiny"), still("tiny_moat_0", window_sizes=(None, None, 14, 14))
  for model, least in ((linear, 3.9), (windowed, 3.4)):
    np.testing.assert_allclose(growth(model, of_windows), 4.0, rtol=0.01)
    first, second = growth(model, doubled)
    assert least < first < second < 4.0
  for ratio in growth(still("tiny_moat_0"), doubled):
    assert ratio > 4.5


def test_moat_reads_large_pictures_in_windows():
  assert dense_arguments("moat_0", 641) == {"pool_size": 3, "window_sizes": (None,) * 4}
  assert dense_arguments("moat_0", 1344)["window_sizes"] == (None, None, 14, 14)
