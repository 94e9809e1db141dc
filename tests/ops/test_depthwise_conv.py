import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.ops.depthwise_conv import FORMS, default_form, depthwise_conv
from hybrid_vit.tools.summarize import count_multiply_adds
from tests.ops.forms import outputs_and_gradients, traced_for


def both_forms(x, kernel, *, fast="shift_add", **settings):
  forms = [functools.partial(depthwise_conv, form=form, **settings) for form in ("reference", fast)]
  return outputs_and_gradients(forms, x, kernel)


def inputs(size, kernel_size, dtype=jnp.float32):
  x = jax.random.normal(jax.random.key(0), (2, *size, 5), dtype)
  kernel = jax.random.normal(jax.random.key(1), (kernel_size, kernel_size, 1, 5), jnp.float32)
  return x, kernel


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (9, 12), (7, 11)])
def test_forms_agree(kernel_size, stride, size):
  for reference, fast in zip(*both_forms(*inputs(size, kernel_size), stride=stride)):
    np.testing.assert_allclose(fast, reference, atol=1e-5 * np.abs(reference).max())


@pytest.mark.parametrize("padding", ["VALID", ((1, 2), (3, 0)), ((0, 0), (9, 8))])
@pytest.mark.parametrize("stride", [1, (2, 1), 3])
def test_forms_agree_for_every_padding(padding, stride):
  settings = {"padding": padding, "stride": stride}
  for reference, fast in zip(*both_forms(*inputs((9, 8), 5), **settings)):
    assert fast.shape == reference.shape
    np.testing.assert_allclose(fast, reference, atol=1e-5 * np.abs(reference).max())


@pytest.mark.parametrize("kernel_size", [3, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_forms_agree_in_bfloat16(kernel_size, stride):
  x, kernel = inputs((9, 12), kernel_size, jnp.bfloat16)
  kernel = kernel.astype(jnp.bfloat16).astype(jnp.float32)  # the values that both will use
  exact, _ = both_forms(x.astype(jnp.float32), kernel, stride=stride)
  for answers in both_forms(x, kernel, stride=stride):
    assert answers[0].dtype == answers[1].dtype == jnp.bfloat16
    assert answers[2].dtype == jnp.float32
    for a, e in zip(answers, exact):
      a = np.asarray(a, np.float32)
      np.testing.assert_allclose(a, e, atol=2**-7 * np.abs(e).max())


def test_a_broken_kernel_breaks_its_own_channel_alone():
  """The branch that the fast form takes only then, in the output and in the input's gradient."""
  x, kernel = inputs((9, 12), 3)
  for reference, fast in zip(*both_forms(x, kernel.at[:, :, :, 0].set(jnp.nan))):
    np.testing.assert_array_equal(np.isnan(fast), np.isnan(reference))
    np.testing.assert_allclose(fast[..., 1:], reference[..., 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("platform", "form"), [("tpu", "reference"), ("cpu", "shift_add")])
def test_the_form_is_that_of_the_devices_traced_for(platform, form):
  arguments = inputs((9, 12), 3)
  with traced_for(platform):
    assert default_form() == form
    traced = str(jax.make_jaxpr(depthwise_conv)(*arguments))
  assert ("depthwise_conv_shift_add" in traced) == (form == "shift_add")
  assert default_form() == ("shift_add" if jax.default_backend() == "cpu" else "reference")


def test_against_a_plain_sum():
  x = np.arange(2 * 3 * 4 * 1, dtype=np.float32).reshape(2, 3, 4, 1)
  kernel = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32).reshape(2, 2, 1, 1)
  expected = x[:, :-1, :-1] + 2 * x[:, :-1, 1:] + 3 * x[:, 1:, :-1] + 4 * x[:, 1:, 1:]
  for form in FORMS:
    out = depthwise_conv(jnp.asarray(x), jnp.asarray(kernel), padding="VALID", form=form)
    np.testing.assert_array_equal(out, expected)


def test_same_padding_puts_the_odd_cell_after():
  x = jnp.ones((1, 4, 4, 1))
  kernel = jnp.ones((3, 3, 1, 1))
  out = depthwise_conv(x, kernel, stride=2, form="shift_add")
  np.testing.assert_array_equal(out[0, :, :, 0], [[9, 6], [6, 4]])


def test_the_default_form_is_the_fast_one_on_a_cpu():
  assert jax.default_backend() != "cpu" or default_form() == "shift_add"
  x, kernel = inputs((8, 8), 3)
  text = str(jax.make_jaxpr(depthwise_conv)(x, kernel))
  assert ("depthwise_conv_shift_add" in text) == (default_form() == "shift_add")


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    ({"padding": "CIRCULAR"}, "SAME, VALID or explicit pairs, not 'CIRCULAR'"),
    ({"padding": ((-1, 0), (0, 0))}, "must not be negative"),
    ({"form": "quick"}, "unknown form 'quick'; known: reference, shift_add, triton"),
    ({"padding": "VALID", "kernel": (9, 9, 1, 5)}, "smaller than the kernel"),
    ({"kernel": (3, 3, 5, 1)}, r"kernel \[kh, kw, 1, C\]; got"),
  ],
)
def test_errors_say_what_is_wrong(settings, message):
  x, _ = inputs((8, 8), 3)
  kernel = jnp.zeros(settings.pop("kernel", (3, 3, 1, 5)))
  with pytest.raises(ValueError, match=message):
    depthwise_conv(x, kernel, **settings)


@pytest.mark.parametrize(
  ("size", "channels", "kernel_size", "stride", "padding"),
  [
    ((9, 20), 5, 3, 1, "SAME"),
    ((5, 16), 40, 7, 1, "SAME"),
    ((9, 12), 5, 5, 2, "SAME"),
    ((9, 8), 5, 5, 3, ((1, 2), (3, 0))),
    ((9, 8), 5, 4, (2, 1), ((0, 0), (9, 8))),
    ((9, 8), 5, 5, 1, "VALID"),
  ],
)
def test_the_kernels_for_gpus_interpreted(size, channels, kernel_size, stride, padding):
  """Maps that fill no tile, one exactly and several; more rows than programs, and fewer."""
  x = jax.random.normal(jax.random.key(0), (8, *size, channels))
  kernel = jax.random.normal(jax.random.key(1), (kernel_size, kernel_size, 1, channels))
  answers = both_forms(x, kernel, fast="triton", stride=stride, padding=padding)
  for reference, fast in zip(*answers):
    assert fast.shape == reference.shape
    np.testing.assert_allclose(fast, reference, atol=1e-5 * np.abs(reference).max())


def test_the_kernels_for_gpus_in_bfloat16():
  x, kernel = inputs((9, 12), 3, jnp.bfloat16)
  kernel = kernel.astype(jnp.bfloat16).astype(jnp.float32)
  exact, _ = both_forms(x.astype(jnp.float32), kernel)
  _, fast = both_forms(x, kernel, fast="triton")
  assert [a.dtype for a in fast] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
  for answer, expected in zip(fast, exact):
    answer = np.asarray(answer, np.float32)
    np.testing.assert_allclose(answer, expected, atol=2**-7 * np.abs(expected).max())


@pytest.mark.parametrize(("stride", "kernels"), [(1, 3), (2, 2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernels_for_gpus_are_taken_by_triton(stride, kernels, dtype):
  """Down to Triton's own program; what compiles that needs the GPU's libraries."""
  device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 1, platform="gpu")
  mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)
  shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((2, 14, 14, 40), (5, 5, 1, 40))]

  def train(x, kernel):
    out, pull = jax.vjp(functools.partial(depthwise_conv, stride=stride, form="triton"), x, kernel)
    return out, pull(out)

  with jax.sharding.use_abstract_mesh(mesh):
    lowered = jax.jit(train).trace(*shapes).lower(lowering_platforms=("cuda",))
  assert lowered.as_text().count("xla.gpu.triton(") == kernels


def test_the_kernels_for_gpus_are_counted():
  arguments = inputs((8, 8), 3)
  counts = [
    count_multiply_adds(functools.partial(depthwise_conv, form=form), *arguments) for form in FORMS
  ]
  assert len(set(counts)) == 1 and counts[0] > 0


def test_the_kernels_for_gpus_are_for_no_tpu():
  arguments = inputs((8, 8), 3)
  with traced_for("tpu"), pytest.raises(ValueError, match="'triton' is for GPUs, not for 'tpu'"):
    jax.make_jaxpr(functools.partial(depthwise_conv, form="triton"))(*arguments)
