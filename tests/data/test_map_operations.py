"""Operations on photos with maps and depth, against their definitions."""

import colorsys

import numpy as np
import pytest

from hybrid_vit.data import photometric
from hybrid_vit.data.transforms import parse_transform
from tests.data.pictures import encoded, photo

KINDS = {"image": "image", "map": "map", "depth": "depth"}


def example(height=40, width=60, high=5):
  rng = np.random.default_rng(3)
  classes = np.repeat(
    np.repeat(rng.integers(0, high, (height // 4 + 1, width // 4 + 1)), 4, 0), 4, 1
  )
  classes = classes[:height, :width]
  return {
    "image": photo(1, height, width),
    "map": classes.astype(np.int32),
    "depth": (classes + 0.5).astype(np.float32),
  }


def run(text, given=None, seed=0):
  given = example() if given is None else given
  return parse_transform(text, kinds=KINDS)(given, np.random.default_rng(seed))


def generator():
  return np.random.default_rng(0)


def test_maps_and_depth_under_other_names():
  millimetres = np.array([[0, 1500], [250, 2000]], np.uint16)
  labels = np.array([[0, 3], [255, 1]], np.uint8)
  given = {
    "image": np.zeros((2, 2, 3), np.uint8),
    "mask": encoded(labels, "PNG"),
    "far": encoded(millimetres, "PNG"),
  }
  text = "decode_map('mask')|decode_depth('far', 1000.0)|flip_lr(1.0)"
  for case in (given, {**given, "mask": labels[..., None], "far": millimetres[..., None]}):
    out = run(text, case)
    np.testing.assert_array_equal(out["map"], [[3, 0], [1, 255]])
    np.testing.assert_allclose(out["depth"], [[1.5, 0], [2.0, 0.25]])
    assert out["map"].dtype == np.int32 and out["depth"].dtype == np.float32
  with pytest.raises(ValueError, match="no 'masks'; they have: far, image, mask"):
    run("decode_map('masks')", given)
  with pytest.raises(ValueError, match="0 keys of kind 'map'"):
    parse_transform("decode_map('mask')")


# (height, width), scale, ratio, what mmcv's rescale_size gives: the smaller of the two factors.
@pytest.mark.parametrize(
  ("size", "scale", "ratio", "want"),
  [
    ((512, 683), (2048, 512), 1.0, (512, 683)),
    ((300, 400), (2048, 512), 1.0, (512, 683)),  # 400 * 512 / 300 = 682.67
    ((300, 400), (2048, 512), 0.5, (256, 341)),
    ((100, 1000), (2048, 512), 1.0, (205, 2048)),  # the long side limits it: 204.8
    ((40, 60), (64, 64), 1.0, (43, 64)),  # 42.67
  ],
)
def test_resize_range(size, scale, ratio, want):
  out = run(f"resize_range({scale}, ({ratio}, {ratio}))", example(*size))
  assert {out[name].shape[:2] for name in KINDS} == {want}
  np.testing.assert_array_equal(out["depth"], out["map"] + 0.5)


def test_resize_range_draws_within_the_ratio():
  sides = [
    run("resize_range((400, 40), (0.5, 2.0))", seed=seed)["map"].shape[0] for seed in range(60)
  ]
  assert 20 <= min(sides) < 30 and 70 < max(sides) <= 80


def test_crops_hold_no_class_too_much():
  classes = np.zeros((40, 60), np.int32)
  classes[:, 40:] = 1
  classes[:, 58:] = 255
  given = {**example(), "map": classes}

  def shares(text):
    for seed in range(40):
      found = run(text, given, seed)["map"]
      counts = np.bincount(found[found != 255], minlength=2)
      yield counts.max() / counts.sum()

  assert sum(share >= 0.75 for share in shares("random_crop_map(32, 1.0)")) > 12
  assert sum(share >= 0.75 for share in shares("random_crop_map(32)")) < 2


def test_the_try_that_counts_is_the_first_good_one():
  classes = np.zeros((40, 60), np.int32)
  classes[:, 30:] = 1
  rng = np.random.default_rng(5)
  while True:
    top, left = int(rng.integers(0, 25)), int(rng.integers(0, 45))
    part = classes[top : top + 16, left : left + 16]
    if 0.25 < part.mean() < 0.75:
      break
  given = {**example(), "map": classes}
  out = run("random_crop_map(16)", given, 5)
  np.testing.assert_array_equal(out["image"], given["image"][top : top + 16, left : left + 16])
  np.testing.assert_array_equal(out["map"], part)


def test_a_smaller_picture_keeps_its_side_and_is_padded():
  out = run("random_crop_map((48, 20))|pad(48)")
  assert out["image"].shape == (48, 48, 3) and out["map"].shape == out["depth"].shape == (48, 48)
  assert (out["image"][40:] == (124, 116, 104)).all() and (
    out["image"][:, 20:] == (124, 116, 104)
  ).all()
  assert (out["map"][40:] == 255).all() and (out["depth"][:, 20:] == 0).all()
  assert (out["map"][:40, :20] < 5).all()


def test_padding_behind_a_resize_keeps_its_colour():
  out = run("resize((20, 30))|pad(40, fill=(1, 2, 3), ignore=9)")
  assert (out["image"][20:] == (1, 2, 3)).all() and (out["map"][:, 30:] == 9).all()
  larger = run("pad(8)")
  assert larger["image"].shape == (40, 60, 3)


def test_fixed_crops():
  given = example()
  out = run("crop_box(5, 7, 20, 50)", given)
  np.testing.assert_array_equal(out["depth"], given["depth"][5:20, 7:50])
  kitti = example(376, 1244)
  np.testing.assert_array_equal(
    run("crop_bottom((352, 1216))", kitti)["map"], kitti["map"][24:, 14:1230]
  )


def test_random_crop_of_two_sides():
  assert run("random_crop((16, 30))")["depth"].shape == (16, 30)


def test_reduce_zero_label():
  given = {**example(), "map": np.array([[0, 1, 2, 150, 255]], np.uint8)}
  out = run("reduce_zero_label", given)
  np.testing.assert_array_equal(out["map"], [[255, 0, 1, 149, 255]])
  assert out["map"].dtype == np.uint8 and out["depth"] is given["depth"]


class Draws:
  """A generator that gives what is said: `random`, `uniform` and `integers` in their order."""

  def __init__(self, *values):
    self.values = list(values)

  def random(self):
    return self.values.pop(0)

  def uniform(self, low, high):
    assert low <= self.values[0] <= high
    return self.values.pop(0)

  def integers(self, low, high):
    assert low <= self.values[0] < high
    return self.values.pop(0)


def distorted(image, *draws):
  rng = Draws(*draws)
  out = photometric.distort(image, 32, (0.5, 1.5), (0.5, 1.5), 18, rng)
  assert not rng.values
  return out


def test_photometric_distortion_step_by_step():
  image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
  no, yes = 0.9, 0.1
  np.testing.assert_array_equal(distorted(image, no, no, no, no, no), image)
  brighter = np.clip(image.astype(np.float32) + 10.5, 0, 255).astype(np.uint8)
  np.testing.assert_array_equal(distorted(image, yes, 10.5, no, no, no, no), brighter)
  stronger = np.clip(image.astype(np.float32) * 1.5, 0, 255).astype(np.uint8)
  np.testing.assert_array_equal(distorted(image, no, no, yes, 1.5, no, no), stronger)
  # Contrast comes last where "last" is drawn.
  both = np.clip(brighter.astype(np.float32) * 0.5, 0, 255).astype(np.uint8)
  np.testing.assert_array_equal(distorted(image, yes, 10.5, yes, no, no, yes, 0.5), both)


def test_saturation_and_hue_turn_about_the_grey_axis():
  image = np.random.default_rng(1).integers(0, 256, (20, 20, 3), dtype=np.uint8)
  paler = distorted(image, 0.9, 0.9, 0.9, 0.1, 0.5, 0.9)
  turned = distorted(image, 0.9, 0.9, 0.9, 0.9, 0.1, 15)
  for i in range(20):
    h, s, v = colorsys.rgb_to_hsv(*(image[i, i] / 255))
    want = np.array(colorsys.hsv_to_rgb(h, s / 2, v)) * 255
    np.testing.assert_allclose(paler[i, i], want, atol=5)
    want = np.array(colorsys.hsv_to_rgb((h + 15 / 180) % 1, s, v)) * 255
    np.testing.assert_allclose(turned[i, i], want, atol=9)  # hue has 180 steps


def test_colours_of_the_depth_pipelines():
  image = np.random.default_rng(2).integers(0, 256, (8, 9, 3), dtype=np.uint8)
  out = photometric.brightness_contrast(image, 0.2, 0.2, Draws(0.1, -0.1))
  want = np.clip(image.astype(np.float64) * 1.1 - 25.5, 0, 255)
  np.testing.assert_allclose(out, want, atol=1)
  np.testing.assert_allclose(photometric.gamma(image, 1.2), 255 * (image / 255.0) ** 1.2, atol=1)
  grey = np.full((2, 2, 3), 100, np.uint8)
  shifted = photometric.hue_saturation_value(grey, (20, 30, 20), Draws(0.0, 0.0, 15.0))
  np.testing.assert_array_equal(shifted, grey + 15)
  for name in ("brightness_contrast", "random_gamma", "hue_saturation_value"):
    text = f"{name}(probability=0.0)"
    np.testing.assert_array_equal(run(text)["image"], example()["image"])
    changed = run(f"{name}(probability=1.0)")["image"]
    assert (changed != example()["image"]).any() and changed.dtype == np.uint8


def test_cut_depth_shows_whole_metres_in_a_strip():
  given = example()
  rng = np.random.default_rng(4)
  rng.random()
  a, b = rng.random(2)
  left = int(a * 60)
  right = left + int(max((60 - a * 60) * b * 0.75, 1))
  out = run("cut_depth(1.0)", given, 4)
  strip = np.repeat(given["map"][:, left:right, None], 3, -1)  # depth is the class and a half
  np.testing.assert_array_equal(out["image"][:, left:right], strip)
  np.testing.assert_array_equal(out["image"][:, :left], given["image"][:, :left])
  np.testing.assert_array_equal(out["image"][:, right:], given["image"][:, right:])
  np.testing.assert_array_equal(given["image"], example()["image"])  # not in place
  assert run("cut_depth(0.0)", given) is given


PIPELINE = (
  "resize_range((160, 40))|random_crop_map(32)|flip_lr|photometric_distortion|pad(32)|"
  "brightness_contrast|random_gamma|hue_saturation_value|cut_depth"
)


def test_what_is_drawn_follows_from_the_generator_alone():
  one, other, third = (run(PIPELINE, seed=seed) for seed in (7, 7, 8))
  for name in KINDS:
    assert one[name].shape[:2] == (32, 32)
    np.testing.assert_array_equal(one[name], other[name])
  assert (one["image"] != third["image"]).any()
  inside = one["map"] != 255
  np.testing.assert_array_equal(one["depth"][inside], one["map"][inside] + 0.5)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("resize_range((0, 5))", "scale is"),
    ("resize_range((5, 5), (2.0, 1.0))", "ratio is"),
    ("random_crop_map(8, 1.5)", r"category_max_ratio is 1.5; a number in \[0, 1\]"),
    ("pad(8, fill=(1, 2))", "fill is"),
    ("crop_box(5, 0, 5, 9)", "bottom is 5; a whole number of at least 6"),
    ("photometric_distortion(contrast=(2, 1))", "contrast is"),
  ],
)
def test_wrong_arguments(text, message):
  with pytest.raises(ValueError, match=message):
    parse_transform(text)


@pytest.mark.parametrize(
  ("text", "error", "message"),
  [
    ("crop_box(0, 0, 41, 9)", ValueError, "of a picture of 40 x 60"),
    ("crop_bottom((352, 1216))", ValueError, "of a picture of 40 x 60"),
    ("normalize(0.5, 0.5)|photometric_distortion", TypeError, "put normalize last"),
  ],
)
def test_wrong_pictures(text, error, message):
  with pytest.raises(error, match=message):
    for seed in range(8):
      run(text, seed=seed)


@pytest.mark.parametrize("text", ["random_crop_map(8)", "cut_depth(1.0)"])
def test_what_needs_a_map_says_so(text):
  with pytest.raises(ValueError, match="the example has none"):
    run(text, {"image": photo(0)})
