"""Maps of whole pictures against the protocol written out in NumPy, with a small stand-in network.

The stand-in sees its neighbours and where it is in its input, so that windows, mirror images and
sizes all show in what it answers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_vit import map_inference
from hybrid_vit.data.resizing import resize_image
from hybrid_vit.data.transforms import parse_transform
from hybrid_vit.map_inference import InferenceSettings, MapInference, windows

_CLASSES = 4
_MIXING = np.random.default_rng(0).standard_normal((3, _CLASSES)).astype(np.float32) / 64


def _answers(images, xp, mixing=_MIXING):
  """`[N, h, w, 3]` → `[N, ceil(h / 4), ceil(w / 4), K]`: each fourth pixel, its neighbour."""
  x = images.astype(np.float32)
  shifted = xp.concatenate([x[:, :, 1:], x[:, :, -1:]], axis=2)
  y = (x - 0.5 * shifted)[:, ::4, ::4] @ mixing
  rows, columns = (xp.arange(n, dtype=np.float32) for n in y.shape[1:3])
  return y + 0.02 * rows[:, None, None] - 0.03 * columns[:, None] * np.arange(_CLASSES)


def _network(variables, images):
  with jax.default_matmul_precision("float32"):
    return _answers(images, jnp, variables["mixing"])


def _pointwise(variables, images):
  return (images.astype(jnp.float32) / 32) @ jnp.asarray(_MIXING * 32)


_VARIABLES = {"mixing": _MIXING}


def _photo(height, width, seed=1):
  """Smooth, as antialiasing must not matter, with some noise."""
  rng = np.random.default_rng(seed)
  coarse = rng.uniform(0, 255, (5, 6, 3)).astype(np.uint8)
  smooth = resize_image(coarse, (height, width), "bilinear").astype(int)
  return np.clip(smooth + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


def _line(values, new, align_corners):
  """`[old, …]` → `[new, …]`, cell by cell."""
  old, out = len(values), []
  for i in range(new):
    if align_corners:
      at = i * (old - 1) / (new - 1) if new > 1 else 0.0
    else:
      at = max((i + 0.5) * old / new - 0.5, 0.0)
    low = min(int(at), old - 1)
    high = min(low + 1, old - 1)
    out.append(values[low] + (at - low) * (values[high] - values[low]))
  return np.stack(out)


def _resized(values, size, align_corners):
  rows = _line(values.astype(np.float64), size[0], align_corners)
  return np.moveaxis(_line(np.moveaxis(rows, 1, 0), size[1], align_corners), 0, 1)


def _softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def _seen(image, settings):
  """Answers of the stand-in at the size of a resized picture, by the protocol."""
  corners = settings.align_corners
  height, width = image.shape[:2]
  if settings.mode == "whole":
    return _resized(_answers(image[None], np)[0], (height, width), corners)
  (crop_h, crop_w), (stride_h, stride_w) = settings.crop, settings.stride
  total, count = np.zeros((height, width, _CLASSES)), np.zeros((height, width, 1))
  down = max(height - crop_h + stride_h - 1, 0) // stride_h + 1
  across = max(width - crop_w + stride_w - 1, 0) // stride_w + 1
  for i in range(down):
    for j in range(across):
      bottom, right = min(i * stride_h + crop_h, height), min(j * stride_w + crop_w, width)
      top, left = max(bottom - crop_h, 0), max(right - crop_w, 0)
      part = image[top:bottom, left:right]
      answer = _answers(part[None], np)[0]
      total[top:bottom, left:right] += _resized(answer, part.shape[:2], corners)
      count[top:bottom, left:right] += 1
  assert count.min() == 1
  return total / count


def _expected(image, settings, softmax=True):
  found = []
  for ratio in settings.ratios:
    seen = resize_image(image, settings.input_size(image.shape[:2], ratio), settings.interpolation)
    for flipped in (False, True) if settings.flip else (False,):
      answer = _seen(seen[:, ::-1] if flipped else seen, settings)
      answer = answer[:, ::-1] if flipped else answer
      answer = _resized(answer, image.shape[:2], settings.align_corners)
      found.append(_softmax(answer) if softmax else answer)
  return np.mean(found, axis=0)


_CASES = {
  "whole": InferenceSettings(),
  "fitted": InferenceSettings(scale=(120, 60)),
  "rounded_up": InferenceSettings(scale=(120, 60), size_divisor=32),
  "fixed": InferenceSettings(size=(48, 80)),
  "aligned": InferenceSettings(size=(49, 81), align_corners=True, flip=True),
  "windows": InferenceSettings(mode="slide", crop=(32, 40), stride=(20, 24)),
  "aligned_windows": InferenceSettings(
    mode="slide", scale=(120, 60), crop=(33, 41), stride=(20, 24), align_corners=True
  ),
  "fitted_windows": InferenceSettings(
    mode="slide", scale=(160, 64), crop=(32, 32), stride=(21, 21), window_batch=3
  ),
  "flipped": InferenceSettings(scale=(120, 60), flip=True),
  "scales": InferenceSettings(scale=(120, 60), ratios=(0.5, 1.0, 1.75), flip=True),
  "scales_of_windows": InferenceSettings(
    mode="slide", scale=(120, 60), crop=(32, 32), stride=(21, 21), ratios=(0.75, 1.25), flip=True
  ),
  # Lower than the window, and narrower.
  "smaller": InferenceSettings(mode="slide", crop=(96, 64), stride=(64, 43)),
  "far_smaller": InferenceSettings(mode="slide", crop=(512, 512), stride=(341, 341)),
}


@pytest.mark.parametrize("name", _CASES)
def test_protocol(name):
  settings, image = _CASES[name], _photo(70, 101)
  inference = MapInference(_network, settings, softmax=True)
  values = inference.values(_VARIABLES, image)
  assert values.shape == (70, 101, _CLASSES) and values.dtype == np.float32
  expected = _expected(image, settings)
  np.testing.assert_allclose(values, expected, atol=2e-5)
  classes = inference.classes(_VARIABLES, image)
  assert classes.shape == (70, 101) and classes.dtype == np.int32
  # Where the two likeliest are not as good as one.
  best = np.sort(expected, axis=-1)
  clear = best[..., -1] - best[..., -2] > 1e-4
  assert clear.mean() > 0.99
  np.testing.assert_array_equal(classes[clear], expected.argmax(-1)[clear])
  assert len(np.unique(classes)) > 1


@pytest.mark.parametrize("name", ["whole", "scales_of_windows"])
def test_answers_that_are_no_classes_are_averaged_as_they_are(name):
  settings, image = _CASES[name], _photo(70, 101)
  values = MapInference(_network, settings, softmax=False).values(_VARIABLES, image)
  np.testing.assert_allclose(values, _expected(image, settings, softmax=False), atol=1e-4)


def test_one_channel():
  settings = InferenceSettings(size=(64, 64), flip=True)
  image = _photo(40, 30)
  values = MapInference(lambda v, x: _network(v, x)[..., :1], settings, softmax=False).values(
    _VARIABLES, image
  )
  assert values.shape == (40, 30, 1)
  np.testing.assert_allclose(values, _expected(image, settings, softmax=False)[..., :1], atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (64, 64), (129, 5)])
@pytest.mark.parametrize("name", ["fitted", "windows", "aligned"])
def test_any_size(name, size):
  settings, image = _CASES[name], _photo(*size)
  values = MapInference(_network, settings, softmax=True).values(_VARIABLES, image)
  np.testing.assert_allclose(values, _expected(image, settings), atol=2e-5)


def test_windows_of_a_pointwise_network_are_the_whole():
  image = _photo(70, 101)
  whole = MapInference(_pointwise, InferenceSettings(), softmax=True).values({}, image)
  for stride in ((32, 40), (7, 40)):
    settings = InferenceSettings(mode="slide", crop=(32, 40), stride=stride)
    slid = MapInference(_pointwise, settings, softmax=True).values({}, image)
    np.testing.assert_allclose(slid, whole, atol=1e-6)


def test_flips_make_mirror_images_alike():
  settings = InferenceSettings(scale=(120, 60), flip=True)
  inference, image = MapInference(_network, settings, softmax=True), _photo(64, 101)
  # Pillow's rounding of a resized mirror image may differ by a grey level.
  there, back = inference.values(_VARIABLES, image), inference.values(_VARIABLES, image[:, ::-1])
  np.testing.assert_allclose(there, back[:, ::-1], atol=2e-2)
  once = MapInference(_network, InferenceSettings(scale=(120, 60)), softmax=True)
  plain, turned = once.values(_VARIABLES, image), once.values(_VARIABLES, image[:, ::-1])
  assert np.abs(plain - turned[:, ::-1]).max() > 0.1


@pytest.mark.parametrize("batch", [8, 5])
def test_windows_over_several_devices(batch):
  settings = dataclasses.replace(_CASES["windows"], window_batch=batch)
  image = _photo(70, 101)
  mesh = Mesh(np.array(jax.devices()), ("data",))
  assert mesh.size == 8
  seen = []

  def network(variables, images):
    jax.debug.inspect_array_sharding(images, callback=seen.append)
    return _network(variables, images)

  placed = jax.device_put(_VARIABLES, NamedSharding(mesh, PartitionSpec()))
  inference = MapInference(network, settings, softmax=True)
  found = inference.values(placed, image)
  np.testing.assert_allclose(found, _expected(image, settings), atol=2e-5)
  assert seen[0].is_fully_replicated == (batch == 5)
  np.testing.assert_array_equal(inference.classes(placed, image), found.argmax(-1))


def test_programs_are_few():
  traced = []

  def network(variables, images):
    traced.append(images.shape)
    return _network(variables, images)

  settings = InferenceSettings(mode="slide", crop=(32, 32), stride=(21, 21), window_batch=4)
  inference = MapInference(network, settings, softmax=True)
  sizes = [(64, 80), (71, 90), (33, 47), (128, 128), (64, 80)]
  for size in sizes:
    inference.classes(_VARIABLES, _photo(*size))
  # Whatever the number of windows and the size of the picture.
  assert traced == [(4, 32, 32, 3)]

  traced.clear()
  inference = MapInference(network, InferenceSettings(size=(64, 64), flip=True), softmax=True)
  jax.clear_caches()
  for size in [(64, 80), (200, 90), (33, 128), (500, 70)]:
    inference.classes(_VARIABLES, _photo(*size))
  assert traced == [(1, 64, 64, 3)]
  # All widths from 65 to 128 share the last step, whatever the height; mirror images, too.
  assert map_inference._strip._cache_size() == 1


def _tiling(size, crop, stride):
  covered = np.zeros(size, int)
  for top, left in windows(size, crop, stride):
    assert min(top, left) >= 0
    covered[top : top + crop[0], left : left + crop[1]] += 1
    if size[0] >= crop[0]:
      assert top + crop[0] <= size[0]
    if size[1] >= crop[1]:
      assert left + crop[1] <= size[1]
  return covered


def test_windows_cover_everything():
  for length in range(1, 30):
    for crop in range(1, 9):
      for stride in range(1, crop + 1):
        covered = _tiling((length, 30 - length), (crop, 8), (stride, 5))
        assert covered.min() >= 1


def test_windows_of_the_recipes():
  # 512 x 683: two windows across, the last at the right edge.
  assert windows((512, 683), (512, 512), (341, 341)) == [(0, 0), (0, 171)]
  assert windows((512, 512), (512, 512), (341, 341)) == [(0, 0)]
  # The two windows of full height of NYU Depth v2.
  assert windows((480, 640), (480, 480), (480, 160)) == [(0, 0), (0, 160)]
  assert windows((100, 100), (512, 512), (341, 341)) == [(0, 0)]


@pytest.mark.parametrize("size", [(480, 640), (683, 512), (101, 997), (333, 500), (1, 900)])
def test_pictures_fit_as_in_the_transform_of_training(size):
  settings = InferenceSettings(scale=(2048, 512))
  transform = parse_transform("resize_range((2048, 512), (1, 1))", kinds={"image": "image"})
  example = transform({"image": np.zeros((*size, 3), np.uint8)}, np.random.default_rng(0))
  assert settings.input_size(size) == example["image"].shape[:2]


def test_input_sizes():
  fitted = InferenceSettings(scale=(2048, 512))
  assert fitted.input_size((683, 512)) == (683, 512)
  assert fitted.input_size((480, 640)) == (512, 683)
  assert fitted.input_size((100, 1000)) == (205, 2048)
  # The limits are rounded down before the picture is fitted.
  assert InferenceSettings(scale=(101, 51)).input_size((30, 60), 0.5) == (25, 50)
  aligned = InferenceSettings(scale=(2048, 512), size_divisor=32)
  assert aligned.input_size((480, 640)) == (512, 704)
  assert aligned.input_size((512, 512)) == (512, 512)
  assert InferenceSettings(size=100).input_size((7, 9), 1.5) == (150, 150)
  assert InferenceSettings().input_size((7, 9)) == (7, 9)
  assert InferenceSettings().input_size((7, 9), 2.0) == (14, 18)
  assert InferenceSettings().input_size((1, 1), 0.25) == (1, 1)


@pytest.mark.parametrize(
  ("wrong", "message"),
  [
    (dict(mode="windows"), "mode"),
    (dict(crop=(0, 8)), "crop"),
    (dict(stride=(512, 513)), "stride .* is larger than inference.crop"),
    (dict(ratios=()), "ratios"),
    (dict(ratios=(1.0, 0.0)), "ratios"),
    (dict(scale=(64, 32), size=64), "scale and inference.size"),
    (dict(size_divisor=0), "size_divisor"),
    (dict(window_batch=0), "window_batch"),
    (dict(interpolation="area"), "interpolation"),
  ],
)
def test_settings_that_cannot_be(wrong, message):
  with pytest.raises(ValueError, match=message):
    InferenceSettings(**wrong)
