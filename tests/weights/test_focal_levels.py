import numpy as np
import pytest
from flax import traverse_util

from hybrid_vit.models import focalnet
from hybrid_vit.weights.focal_levels import fit_focal_levels
from hybrid_vit.weights.transfer import transfer
from tests.models import contract


def network(levels, windows):
  return focalnet.FocalNet(
    embed_dim=8, depths=(1, 1), num_classes=4, focal_levels=levels, focal_windows=windows
  )


SMALL = network((2, 2), (3, 3))
PREFIX = "params/stage1_block0/modulation/"


def flat(variables):
  return traverse_util.flatten_dict(dict(variables), sep="/")


def test_larger_kernels_change_no_answer():
  source, larger = contract.drawn_variables(SMALL), network((2, 2), (7, 5))
  variables, report = transfer(source, contract.drawn_variables(larger))
  x = contract.images(2, 32, 48)
  before, after = contract.run(SMALL, source, x)[0], contract.run(larger, variables, x)[0]
  np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
  kernel = flat(variables)[PREFIX + "focal_conv_1/kernel"]
  assert kernel.shape[:2] == (9, 9)
  np.testing.assert_array_equal(kernel[2:-2, 2:-2], flat(source)[PREFIX + "focal_conv_1/kernel"])
  assert f"{PREFIX}focal_conv_1/kernel (zeros around 5x5)" in report.loaded
  assert not report.initialised and not report.unused


def test_smaller_kernels_keep_the_middle():
  larger = network((2, 2), (7, 7))
  source = contract.drawn_variables(larger)
  variables, report = transfer(source, contract.drawn_variables(SMALL))
  path = PREFIX + "focal_conv_0/kernel"
  np.testing.assert_array_equal(flat(variables)[path], flat(source)[path][2:-2, 2:-2])
  assert f"{path} (the middle of 7x7)" in report.loaded


def test_an_added_level_is_new_and_behind_a_gate_of_zero():
  source, target = (
    contract.drawn_variables(SMALL),
    contract.drawn_variables(network((3, 2), (3, 3))),
  )
  variables, report = transfer(source, target)
  new, old = flat(variables), flat(source)
  added = PREFIX + "focal_conv_2/kernel"
  np.testing.assert_array_equal(new[added], flat(target)[added])
  assert report.initialised == (f"{added} (an added level, behind a gate of zero)",)
  for leaf in ("kernel", "bias"):
    path = f"{PREFIX}projection_in/{leaf}"
    # Query and context of 8 channels each, then a gate for each level; the mean's stays last.
    np.testing.assert_array_equal(new[path][..., :18], old[path][..., :18])
    np.testing.assert_array_equal(new[path][..., 18], 0.0)
    np.testing.assert_array_equal(new[path][..., 19], old[path][..., 18])
  second = "params/stage2_block0/modulation/projection_in/kernel"
  np.testing.assert_array_equal(new[second], old[second])


def test_levels_are_not_taken_away():
  source = contract.drawn_variables(network((3, 3), (3, 3)))
  with pytest.raises(ValueError, match=r"another shape.*projection_in"):
    transfer(source, contract.drawn_variables(SMALL))


def test_other_leaves_pass_through():
  leaf = np.zeros((3, 3, 1, 4), np.float32)
  source = {"params/stem/conv/kernel": leaf, PREFIX + "projection_in/kernel": leaf}
  fitted, changes, new = fit_focal_levels(
    source, {"params/stem/conv/kernel": np.zeros((5, 5, 1, 4))}
  )
  assert fitted == source and not changes and not new
  # The same name is a trunk's norm elsewhere, and that has to be there.
  assert not fit_focal_levels({"params/head/bias": leaf}, {"params/stage1_norm/scale": leaf})[2]


def test_norms_of_the_outputs_begin_anew():
  source, dense = contract.drawn_variables(SMALL), SMALL.clone(num_classes=0, output_norms=(2,))
  variables, report = transfer(source, contract.drawn_variables(dense))
  assert set(report.initialised) == {
    f"params/stage2_norm/{leaf} (a norm of the outputs)" for leaf in ("scale", "bias")
  }
  assert {name.split("/")[1] for name in report.unused} == {"head", "head_norm"}
  x = contract.images(1, 32, 32)
  before, after = (
    contract.run(model, v, x)[1]["stage2"] for model, v in ((SMALL, source), (dense, variables))
  )
  np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6)
