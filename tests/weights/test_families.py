import functools
import re

import jax
import numpy as np
import pytest
from flax import traverse_util

from hybrid_vit.models.registry import create_model, model_entry
from hybrid_vit.weights import families, readers
from tests import golden

MOAT = "tiny_moat_0"


@pytest.fixture
def only_moat(monkeypatch):
  """Few networks to look through: those of every family take long to trace."""
  names = ["tiny_moat_0", "tiny_moat_0_no_pe", "tiny_moat_1"]
  monkeypatch.setattr(families, "families", lambda: {"hybrid_vit.models.moat": names})


def made_variables(architecture, num_classes=None):
  """Numbers by rule for every variable of the whole network; nothing is computed."""
  shapes = families._shapes(architecture, num_classes, ())
  made = {path: golden.tensor(path, shape.shape, "tf") for path, shape in shapes.items()}
  variables = traverse_util.unflatten_dict(made, sep="/")
  return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def smallest_of_each_family():
  """The network of the fewest parameters of each family of the registry that has a key map.

  Those of two towers are in `test_clip_weights.py`.
  """
  size = lambda name: model_entry(name).published.parameters or np.inf  # noqa: E731
  found = {k: names for k, names in families.families().items() if not k.endswith(".clip")}
  return [min(names, key=size) for names in found.values()]


def cases():
  return [(name, layout) for name in smallest_of_each_family() for layout in families.layouts(name)]


@functools.lru_cache(maxsize=2)
def moat_file():
  """The checkpoint of MOAT, as the authors would have it."""
  return families.export_checkpoint(made_variables(MOAT), MOAT, create_model(MOAT))


def test_every_family_has_an_official_layout_first():
  for name in smallest_of_each_family():
    assert next(iter(families.layouts(name))) == "official", name


@pytest.mark.parametrize(("architecture", "layout"), cases())
def test_import_of_an_export_is_the_identity(architecture, layout):
  variables, model = made_variables(architecture), create_model(architecture)
  file = families.export_checkpoint(variables, architecture, model, layout)
  back = families.import_checkpoint(file, architecture, layout=layout)
  jax.tree.map(np.testing.assert_array_equal, back.variables, variables)
  leaves = len(jax.tree.leaves(variables))
  assert len(back.report.loaded) == leaves and not back.report.initialised
  assert not back.report.unused
  # The layout is found from the names; one that equals another is as good.
  found = families.import_checkpoint(file, architecture)
  jax.tree.map(np.testing.assert_array_equal, found.variables, variables)
  assert found.num_classes == model.num_classes


def test_counters_and_constants_stand_in_an_export():
  for name, layout in cases():
    model = create_model(name)
    shapes = traverse_util.unflatten_dict(families._shapes(name, None, ()), sep="/")
    variables = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    file = families.export_checkpoint(variables, name, model, layout)
    means = [key for key in file if key.endswith("running_mean")]
    counters = [key for key in file if key.endswith("num_batches_tracked")]
    assert len(means) == len(counters), (name, layout)
    assert all(file[key].dtype == np.int64 and file[key].shape == () for key in counters)
    constants = families.layouts(name)[layout].constants(model)
    assert set(constants) <= set(file), (name, layout)


def test_the_architecture_is_known_from_names_and_shapes(only_moat):
  assert families.identify(moat_file()) == ([MOAT], "hybrid_vit.models.moat")
  assert families.identify({"a": np.zeros(2)}) == ([], "")
  narrow = {name: value[..., :1] for name, value in moat_file().items()}
  assert families.identify(narrow) == ([], "hybrid_vit.models.moat")
  headless = {k: v for k, v in moat_file().items() if "head" not in k and "final" not in k}
  assert families.identify(headless)[0] == [MOAT]


@pytest.mark.slow
def test_every_family_is_told_from_the_others():
  for name in smallest_of_each_family():
    file = families.export_checkpoint(made_variables(name), name, create_model(name))
    found, family = families.identify(file)
    assert family == model_entry(name).module_class.__module__, (name, family)
    assert name in found, (name, found)
    # All of them have the same variables; only their pictures differ.
    for other in found:
      assert families._shapes(other, None, ()) == families._shapes(name, None, ()), (name, other)


@pytest.mark.parametrize("other", ["tiny_moat_1", "tiny_moat_0_no_pe"])
def test_a_wrong_architecture_is_told_the_right_one(other, only_moat):
  with pytest.raises(ValueError, match=f"--arch={MOAT}$") as caught:
    families.import_checkpoint(moat_file(), other)
  message = str(caught.value)
  assert message.startswith(f"{other}, layout 'official': the checkpoint does not fit the model")
  assert len(message.splitlines()) < 16


def test_names_of_no_architecture(only_moat):
  weights = {"encoder.weight": np.zeros((2, 2), np.float32)}
  with pytest.raises(ValueError, match=r"encoder\.weight\nThese names are of no registered"):
    families.import_checkpoint(weights, MOAT)


@pytest.mark.parametrize("change", ["missing", "surplus", "shape", "rank"])
def test_every_difference_is_named(change, only_moat):
  weights = dict(moat_file())
  name = "moat/block_02_01/depthwise_conv/depthwise_kernel"
  kernel = weights.pop(name)
  if change == "surplus":
    weights |= {name: kernel, "moat/more": np.zeros(3)}
  elif change == "shape":
    weights[name] = kernel[:2]
  elif change == "rank":
    weights[name] = kernel[0, 0, 0, 0]
  named = "moat/more" if change == "surplus" else name
  with pytest.raises(ValueError, match=rf"1 differences\n.*{re.escape(named)}"):
    families.import_checkpoint(weights, MOAT)


def test_index_tables_and_counters_are_ignored():
  weights = {**moat_file(), "global_step": np.array(5), "optimizer/m/moat/stem": np.zeros(2)}
  assert not families.import_checkpoint(weights, MOAT).report.unused


def test_the_head_is_as_wide_as_the_files():
  variables = made_variables(MOAT, 12)
  file = families.export_checkpoint(variables, MOAT, create_model(MOAT, 12))
  back = families.import_checkpoint(file, MOAT)
  assert back.num_classes == 12
  jax.tree.map(np.testing.assert_array_equal, back.variables, variables)


def test_a_head_of_another_width_begins_anew():
  back = families.import_checkpoint(moat_file(), MOAT, num_classes=7)
  head = back.variables["params"]["head"]
  assert head["kernel"].shape == (256, 7)
  assert 0.015 < head["kernel"].std() < 0.025  # MOAT's initialisation, not zeros
  assert set(back.report.initialised) == {"params/head/kernel", "params/head/bias"}
  assert "(256, 1000)" in back.report.initialised["params/head/kernel"]


def test_the_head_can_be_left_out_or_be_absent():
  head = {k for k in moat_file() if "head" in k or "final_layer_norm" in k}
  without = families.import_checkpoint(moat_file(), MOAT, num_classes=0)
  assert set(without.report.unused) == head and without.num_classes == 0
  file = {k: v for k, v in moat_file().items() if k not in head}
  absent = families.import_checkpoint(file, MOAT)
  jax.tree.map(np.testing.assert_array_equal, absent.variables, without.variables)
  anew = families.import_checkpoint(file, MOAT, num_classes=3)
  assert len(anew.report.initialised) == 4 and anew.num_classes == 3


def test_unknown_layouts_are_errors():
  for call in (
    lambda: families.import_checkpoint(moat_file(), MOAT, layout="onnx"),
    lambda: families.export_checkpoint(made_variables(MOAT), MOAT, create_model(MOAT), "onnx"),
  ):
    with pytest.raises(ValueError, match="no layout 'onnx'; it has: official"):
      call()


def test_the_file_of_an_export_reads_back(tmp_path):
  readers.write_safetensors(tmp_path / "moat.safetensors", moat_file(), {})
  found = readers.read_checkpoint(tmp_path / "moat.safetensors").weights
  assert set(found) == set(moat_file())
  for name, value in moat_file().items():
    np.testing.assert_array_equal(found[name], value)
