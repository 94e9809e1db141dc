"""Mixup and CutMix against a plain transcription of timm's rules, and their statistics."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_vit.data.mixing import mix_batch, smooth_one_hot

BATCH, HEIGHT, WIDTH, CLASSES = 6, 10, 7, 5
BOTH = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "probability": 1.0, "switch_probability": 0.5}


def example(dtype=np.float32):
  generator = np.random.default_rng(0)
  images = generator.normal(size=(BATCH, HEIGHT, WIDTH, 3)).astype(np.float32)
  labels = smooth_one_hot(jnp.arange(BATCH) % CLASSES, CLASSES, 0.1)
  return jnp.asarray(images, dtype), labels


def timm_box(height, width, lam, centre_y, centre_x):
  ratio = np.sqrt(1 - lam)
  cut_h, cut_w = int(height * ratio), int(width * ratio)
  top = np.clip(centre_y - cut_h // 2, 0, height)
  bottom = np.clip(centre_y + cut_h // 2, 0, height)
  left = np.clip(centre_x - cut_w // 2, 0, width)
  right = np.clip(centre_x + cut_w // 2, 0, width)
  return top, bottom, left, right, 1.0 - (bottom - top) * (right - left) / (height * width)


def timm_mix(images, labels, lams, use_cutmix, centres):
  """Row by row, as timm's `_mix_elem`; the same numbers in every row give `_mix_batch`."""
  mixed, targets = images.copy(), labels.copy()
  for i in range(len(images)):
    j, lam = len(images) - 1 - i, lams[i]
    if use_cutmix[i]:
      top, bottom, left, right, lam = timm_box(HEIGHT, WIDTH, lam, *centres[i])
      mixed[i, top:bottom, left:right] = images[j, top:bottom, left:right]
    else:
      mixed[i] = images[i] * lam + images[j] * (1 - lam)
    targets[i] = labels[i] * lam + labels[j] * (1 - lam)
  return mixed, targets


def fix_draws(monkeypatch, lams, switches, centres):
  """Replaces the random draws by given ones, in the order of rows and columns for the centre."""
  centres = np.asarray(centres)
  monkeypatch.setattr(jax.random, "beta", lambda key, a, b, shape: jnp.asarray(lams[: shape[0]]))
  monkeypatch.setattr(
    jax.random, "uniform", lambda key, shape: jnp.asarray(switches[: shape[0]], jnp.float32)
  )

  def randint(key, shape, low, high):
    assert low == 0
    column = {HEIGHT: 0, WIDTH: 1}[high]
    return jnp.asarray(centres[: shape[0], column])

  monkeypatch.setattr(jax.random, "randint", randint)


# 0.75 and 0.19 have whole-numbered or far from whole cut sizes in both float32 and float64.
LAMS = np.array([0.75, 0.19, 0.5, 0.01, 0.93, 0.6], np.float32)
CENTRES = [(0, 0), (9, 6), (5, 3), (4, 2), (2, 6), (7, 0)]


def test_elem_mode_follows_timm_row_by_row(monkeypatch):
  images, labels = example()
  # The draw decides both: below 0.5 is CutMix, and all are below the probability of 1.
  switches = [0.1, 0.9, 0.2, 0.3, 0.8, 0.4]
  fix_draws(monkeypatch, LAMS, switches, CENTRES)
  mixed, targets = mix_batch(jax.random.key(0), images, labels, mode="elem", **BOTH)
  expected = timm_mix(
    np.asarray(images), np.asarray(labels), LAMS, np.array(switches) < 0.5, CENTRES
  )
  np.testing.assert_allclose(mixed, expected[0], atol=1e-6)
  np.testing.assert_allclose(targets, expected[1], atol=1e-6)


@pytest.mark.parametrize("switch", [0.1, 0.9])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_batch_mode_follows_timm(monkeypatch, switch, row):
  images, labels = example()
  fix_draws(monkeypatch, LAMS[row:], [switch], CENTRES[row:])
  mixed, targets = mix_batch(jax.random.key(0), images, labels, **BOTH)
  expected = timm_mix(
    np.asarray(images),
    np.asarray(labels),
    [LAMS[row]] * BATCH,
    [switch < 0.5] * BATCH,
    [CENTRES[row]] * BATCH,
  )
  np.testing.assert_allclose(mixed, expected[0], atol=1e-6)
  np.testing.assert_allclose(targets, expected[1], atol=1e-6)


@pytest.mark.parametrize("mode", ["batch", "elem"])
@pytest.mark.parametrize(
  ("mixup_alpha", "cutmix_alpha", "switch_probability", "alpha", "cutmix"),
  [
    (0.25, 0.75, 0.0, 0.25, False),
    (0.25, 0.75, 1.0, 0.75, True),
    (0.75, 0.25, 0.0, 0.75, False),
    (0.75, 0.25, 1.0, 0.25, True),
    (0.25, 0.0, 1.0, 0.25, False),
    (0.0, 0.25, 0.0, 0.25, True),
  ],
)
def test_each_of_the_two_draws_from_its_own_alpha(
  monkeypatch, mode, mixup_alpha, cutmix_alpha, switch_probability, alpha, cutmix
):
  def beta(key, a, b, shape):
    assert a == b
    return jnp.full(shape, a)

  monkeypatch.setattr(jax.random, "beta", beta)
  monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.full(shape, 0.5))
  monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: jnp.full(shape, 4))
  images = jnp.broadcast_to(jnp.arange(4.0)[:, None, None, None], (4, 8, 8, 1))
  mixed, targets = mix_batch(
    jax.random.key(0),
    images,
    jnp.eye(4),
    mixup_alpha=mixup_alpha,
    cutmix_alpha=cutmix_alpha,
    probability=1.0,
    switch_probability=switch_probability,
    mode=mode,
  )
  # A box of 8 * sqrt(1 - alpha), rounded down to whole and even, lies in the middle.
  side = {0.25: 6, 0.75: 4}[alpha]
  kept = 1 - side**2 / 64 if cutmix else alpha
  np.testing.assert_allclose(np.diagonal(targets), kept)
  expected = np.full((8, 8), 3 * (1 - alpha))
  if cutmix:
    expected = np.zeros((8, 8))
    expected[4 - side // 2 : 4 + side // 2, 4 - side // 2 : 4 + side // 2] = 3
  np.testing.assert_allclose(mixed[0, ..., 0], expected)


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_no_two_draws_share_a_key(monkeypatch, mode):
  images, labels = example()
  used = []

  def recorded(draw):
    def recording(key, *arguments, **settings):
      used.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
      return draw(key, *arguments, **settings)

    return recording

  for name in ("uniform", "beta", "randint"):
    monkeypatch.setattr(jax.random, name, recorded(getattr(jax.random, name)))
  mix_batch(jax.random.key(0), images, labels, mode=mode, **BOTH)
  assert len(used) >= 6 and len(set(used)) == len(used)


def kept_parts(mode, draws=2000, **arguments):
  """The part of its own label that row 0 keeps, over many keys."""
  images = jnp.zeros((4, 32, 32, 1))
  labels = jnp.eye(4)

  @jax.jit
  @jax.vmap
  def part(key):
    return mix_batch(key, images, labels, mode=mode, **arguments)[1]

  return np.diagonal(np.asarray(part(jax.random.split(jax.random.key(1), draws))), axis1=1, axis2=2)


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_mixup_part_is_beta_distributed(mode):
  parts = kept_parts(
    mode, mixup_alpha=0.8, cutmix_alpha=0.0, probability=1.0, switch_probability=0.5
  )
  # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)).
  assert abs(parts[:, 0].mean() - 0.5) < 0.03
  assert abs(parts[:, 0].var() - 1 / (4 * 2.6)) < 0.01
  same_in_all_rows = np.all(parts == parts[:, :1], axis=1).mean()
  assert same_in_all_rows == (1.0 if mode == "batch" else 0.0)


def test_probability_and_switch_are_shares_of_the_draws():
  parts = kept_parts(
    "elem", mixup_alpha=1.0, cutmix_alpha=1.0, probability=0.25, switch_probability=0.5
  )
  assert abs((parts == 1.0).mean() - 0.75) < 0.03
  # CutMix' parts are multiples of a pixel's area, 1/1024; Mixup's practically never are.
  mixed = parts[parts != 1.0]
  is_cutmix = np.abs(mixed * 1024 - np.round(mixed * 1024)) < 1e-3
  assert abs(is_cutmix.mean() - 0.5) < 0.05


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_cutmix_label_weight_is_the_area_that_was_pasted(mode):
  # Row i shows the value i everywhere, so that the pasted part can be counted.
  images = jnp.broadcast_to(jnp.arange(4.0)[:, None, None, None], (4, 20, 30, 1))
  for seed in range(5):
    mixed, targets = mix_batch(
      jax.random.key(seed),
      images,
      jnp.eye(4),
      mixup_alpha=0.0,
      cutmix_alpha=1.0,
      probability=1.0,
      switch_probability=0.0,
      mode=mode,
    )
    for i in range(4):
      own = np.mean(np.asarray(mixed[i]) == i)
      np.testing.assert_allclose(targets[i, i], own, atol=1e-6)
      np.testing.assert_allclose(targets[i, 3 - i], 1 - own, atol=1e-6)


def test_nothing_is_mixed_without_probability_or_alphas():
  images, labels = example()
  for change in ({"probability": 0.0}, {"mixup_alpha": 0.0, "cutmix_alpha": 0.0}):
    mixed, targets = mix_batch(jax.random.key(0), images, labels, **(BOTH | change))
    np.testing.assert_array_equal(mixed, images)
    np.testing.assert_array_equal(targets, labels)


def test_types_are_kept_and_half_precision_pictures_mix_in_float32():
  images, labels = example(jnp.bfloat16)
  mixed, targets = mix_batch(jax.random.key(3), images, labels, **BOTH)
  reference, _ = mix_batch(jax.random.key(3), images.astype(jnp.float32), labels, **BOTH)
  assert mixed.dtype == jnp.bfloat16 and targets.dtype == jnp.float32
  np.testing.assert_array_equal(mixed, reference.astype(jnp.bfloat16))


def test_split_over_devices_equals_one_device():
  """In a process of its own: the number of simulated devices is fixed when JAX starts."""
  program = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from hybrid_vit.data.mixing import mix_batch
mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
rows = NamedSharding(mesh, P("data"))
images = jax.random.normal(jax.random.key(5), (8, 12, 12, 3))
labels = jnp.eye(8)
for mode in ("batch", "elem"):
  def mix(key, images, labels):
    return mix_batch(key, images, labels, mixup_alpha=0.8, cutmix_alpha=1.0,
                     probability=1.0, switch_probability=0.5, mode=mode)
  whole = jax.jit(mix)(jax.random.key(2), images, labels)
  split = jax.jit(mix, out_shardings=rows)(
    jax.random.key(2), jax.device_put(images, rows), jax.device_put(labels, rows))
  assert split[0].sharding.is_equivalent_to(rows, 4) and not split[0].is_fully_replicated
  for a, b in zip(whole, split):
    np.testing.assert_allclose(a, b, atol=1e-6)
print("equal")
"""
  environment = dict(
    os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=4"
  )
  result = subprocess.run(
    [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
  )
  assert result.stdout.strip() == "equal", result.stderr


def test_smoothed_labels_have_timms_values():
  labels = smooth_one_hot(jnp.array([2, 0]), 4, 0.1)
  np.testing.assert_allclose(
    labels, [[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]], atol=1e-7
  )
  assert labels.dtype == jnp.float32
  np.testing.assert_array_equal(smooth_one_hot(jnp.array([1]), 3, 0.0), [[0, 1, 0]])
  with pytest.raises(ValueError, match=r"label_smoothing is 1\.0"):
    smooth_one_hot(jnp.array([1]), 3, 1.0)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"mode": "pair"}, "one of batch, elem"),
    ({"mixup_alpha": -1.0}, "mixup_alpha is -1.0"),
    ({"switch_probability": 1.5}, "switch_probability is 1.5"),
  ],
)
def test_wrong_settings_are_named(change, message):
  images, labels = example()
  with pytest.raises(ValueError, match=message):
    mix_batch(jax.random.key(0), images, labels, **(BOTH | change))


def test_wrong_arrays_are_named():
  images, labels = example()
  with pytest.raises(ValueError, match="uint8"):
    mix_batch(jax.random.key(0), images.astype(jnp.uint8), labels, **BOTH)
  with pytest.raises(ValueError, match="smooth_one_hot"):
    mix_batch(jax.random.key(0), images, jnp.arange(BATCH), **BOTH)
