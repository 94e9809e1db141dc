"""Depthwise convolutions with a multiplier: both forms, by the definition, a TPU's choice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.models import layers
from hybrid_vit.ops import depth_multiplier
from hybrid_vit.ops.depth_multiplier import multiplied_depthwise_conv
from hybrid_vit.tools.summarize import count_multiply_adds
from tests.ops.forms import outputs_and_gradients, traced_for

_RNG = np.random.default_rng(0)
_X = _RNG.normal(size=(2, 7, 8, 3)).astype(np.float32)
_KERNEL = _RNG.normal(size=(5, 5, 1, 6)).astype(np.float32)
_PADS = ((2, 1), (2, 2))


def _forms(**options):
  return [
    lambda x, kernel, form=form: multiplied_depthwise_conv(x, kernel, form=form, **options)
    for form in depth_multiplier.FORMS
  ]


@pytest.mark.parametrize(
  "options", [{"stride": 2, "padding": _PADS}, {"stride": 1, "padding": "SAME"}]
)
def test_the_forms_agree(options):
  repeated, grouped = outputs_and_gradients(_forms(**options), _X, _KERNEL)
  for one, other in zip(repeated, grouped):
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_a_channel_s_results_stand_side_by_side():
  out = multiplied_depthwise_conv(_X, _KERNEL, stride=2, padding=_PADS, form="grouped")
  padded = np.pad(_X, ((0, 0), *_PADS, (0, 0)))
  window = padded[1, 2:7, 4:9]
  for feature in range(6):
    expected = (window[..., feature // 2] * _KERNEL[:, :, 0, feature]).sum()
    np.testing.assert_allclose(out[1, 1, 2, feature], expected, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_and_both_count_the_same():
  for form in _forms(stride=2, padding=_PADS):
    assert form(jnp.asarray(_X, jnp.bfloat16), _KERNEL).dtype == jnp.bfloat16
    assert count_multiply_adds(form, _X, _KERNEL) == 2 * 3 * 4 * 6 * 25


def test_the_layer_takes_what_its_devices_want():
  layer = layers.DepthwiseConv((5, 5), 2, _PADS, True, jax.nn.initializers.ones, multiplier=2)
  variables = jax.eval_shape(layer.init, jax.random.key(0), _X)
  assert {k: v.shape for k, v in variables["params"].items()} == {
    "kernel": (5, 5, 1, 6), "bias": (6,),
  }  # fmt: skip

  def apply(variables):
    return layer.apply(variables, _X)

  with traced_for("tpu"):
    grouped = str(jax.make_jaxpr(apply)(variables))
  with traced_for("gpu"):
    repeated = str(jax.make_jaxpr(apply)(variables))
  assert "feature_group_count=3" in grouped and "feature_group_count=6" in repeated


def test_errors_say_what_would_be_right():
  with pytest.raises(ValueError, match=r"\[kh, kw, 1, m x 3\].*\(5, 5, 1, 5\)"):
    multiplied_depthwise_conv(_X, _KERNEL[..., :5], stride=1, padding="SAME")
  with pytest.raises(ValueError, match="'no'; known: repeated, grouped"):
    multiplied_depthwise_conv(_X, _KERNEL, stride=1, padding="SAME", form="no")
