"""What of a dense network may begin anew, and what has to be in the weights."""

import numpy as np
import pytest

from hybrid_vit.models.registry import create_model
from hybrid_vit.weights.dense_forms import fit_dense_form
from hybrid_vit.weights.transfer import transfer
from tests.models import contract


def kernel(side, channels=4):
  return np.ones((side, side, 1, channels), np.float32)


def test_kernels_of_columns_grow_and_no_others():
  column, other = "params/column0/level1/block0/depthwise_conv/kernel", "params/stem/conv/kernel"
  source = {column: kernel(3), other: kernel(3)}
  fitted, changes, new = fit_dense_form(source, {column: kernel(7), other: kernel(7)})
  assert changes == {column: "zeros around 3x3"} and not new
  assert fitted[column].shape == (7, 7, 1, 4) and fitted[column].sum() == kernel(3).sum()
  np.testing.assert_array_equal(fitted[column][2:5, 2:5], kernel(3))
  assert fitted[other] is source[other]


@pytest.mark.parametrize("wanted", [kernel(1), kernel(4), kernel(7, 8)])
def test_kernels_that_do_not_fit_stay(wanted):
  column = "params/column0/level1/block0/depthwise_conv/kernel"
  fitted, changes, _ = fit_dense_form({column: kernel(3)}, {column: wanted})
  assert fitted[column].shape == (3, 3, 1, 4) and not changes


def test_norms_of_a_trunk_have_to_be_there():
  """SMT's have the names of the other families' norms of outputs."""
  model = create_model(
    "smt_t",
    0,
    depths=(1, 1),
    widths=(8, 16),
    block_types=("modulation", "attention"),
    modulation_heads=(2, None),
    attention_heads=(None, 4),
    mlp_ratios=(2.0, 2.0),
  )
  variables = contract.drawn_variables(model)
  params = {k: v for k, v in variables["params"].items() if k != "stage2_norm"}
  with pytest.raises(ValueError, match=r"2 leaves are missing.*stage2_norm"):
    transfer({**variables, "params": params}, variables)


def test_a_sequence_of_positions_is_resized():
  def tower(size):
    return create_model("vit_b16", 0, width=8, depth=1, num_heads=2, position_size=size)

  source, target = (contract.drawn_variables(tower(n), (32, 32)) for n in (2, 4))
  variables, report = transfer(source, target)
  assert "params/position_sequence (resized from (4, 8) to (16, 8))" in report.loaded
  assert variables["params"]["position_sequence"].shape == (16, 8)
