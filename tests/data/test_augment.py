"""Levels, draws and pixels against timm's definitions, whose numbers stand here as tables."""

import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from hybrid_vit.data import augment
from hybrid_vit.data.transforms import parse_transform
from tests.data.pictures import photo

GREY = (124, 116, 104)


def picture(seed=0):
  return Image.fromarray(photo(seed))


def pixels(image):
  return np.asarray(image).astype(int)


class Draws:
  """A generator whose uniform draws are given; integers give 0."""

  def __init__(self, value):
    self.value = value

  def random(self):
    return self.value

  def integers(self, *arguments):
    return 0


def apply(name, level, draw=0.9, **settings):
  return pixels(augment.apply_operation(name, picture(), level, Draws(draw), **settings))


@pytest.mark.parametrize(
  ("level", "plain", "increasing", "paper"),
  [(0, 0, 4, 4), (2.4, 0, 4, 4), (5, 2, 2, 6), (9, 3, 1, 7), (10, 4, 0, 8), (15, 6, -2, 10)],
)
def test_posterize_bits(level, plain, increasing, paper):
  def kept(bits):
    mask = 0 if bits <= 0 else 255 if bits >= 8 else (0xFF << (8 - bits)) & 0xFF
    return pixels(picture()) & mask

  np.testing.assert_array_equal(apply("posterize", level), kept(plain))
  np.testing.assert_array_equal(apply("posterize", level, increasing=True), kept(increasing))
  np.testing.assert_array_equal(apply("posterize", level, paper_posterize=True), kept(paper))


@pytest.mark.parametrize(
  ("level", "threshold", "addend"), [(0, 0, 0), (5, 128, 55), (9, 230, 99), (15, 256, 128)]
)
def test_solarize_thresholds(level, threshold, addend):
  image = pixels(picture())
  for value, settings in ((threshold, {}), (256 - threshold, {"increasing": True})):
    expected = np.where(image < value, image, 255 - image)
    np.testing.assert_array_equal(apply("solarize", level, **settings), expected)
  expected = np.where(image < 128, np.minimum(image + addend, 255), image)
  np.testing.assert_array_equal(apply("solarize_add", level), expected)


@pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
def test_enhancement_factors(name):
  enhance = getattr(ImageEnhance, name.capitalize())(picture()).enhance
  for level in (0, 4, 9, 10):
    np.testing.assert_array_equal(apply(name, level), pixels(enhance(0.1 + 0.18 * level)))
    up, down = 1 + 0.09 * level, max(0.1, 1 - 0.09 * level)
    np.testing.assert_array_equal(apply(name, level, 0.9, increasing=True), pixels(enhance(up)))
    np.testing.assert_array_equal(apply(name, level, 0.1, increasing=True), pixels(enhance(down)))
  # Beyond the scale the factor stays at 0.1.
  np.testing.assert_array_equal(apply(name, 15, 0.1, increasing=True), pixels(enhance(0.1)))


def test_levels_mean_nothing_to_three_operations():
  for name, function in (
    ("auto_contrast", ImageOps.autocontrast),
    ("equalize", ImageOps.equalize),
    ("invert", ImageOps.invert),
  ):
    for level in (0, 7):
      np.testing.assert_array_equal(apply(name, level), pixels(function(picture())))


@pytest.mark.parametrize("draw", [0.1, 0.9])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_geometry(draw, interpolation):
  sign = -1 if draw < 0.5 else 1
  resample = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[
    interpolation
  ]
  settings = {"draw": draw, "interpolation": interpolation, "fill": GREY}
  expected = picture().rotate(sign * 27.0, resample=resample, fillcolor=GREY)
  np.testing.assert_array_equal(apply("rotate", 9, **settings), pixels(expected))
  for name, matrix in (
    ("shear_x", (1, sign * 0.27, 0, 0, 1, 0)),
    ("shear_y", (1, 0, 0, sign * 0.27, 1, 0)),
    ("translate_x", (1, 0, sign * 0.405 * 60, 0, 1, 0)),
    ("translate_y", (1, 0, 0, 0, 1, sign * 0.405 * 40)),
  ):
    expected = picture().transform(
      (60, 40), Image.Transform.AFFINE, matrix, resample=resample, fillcolor=GREY
    )
    np.testing.assert_array_equal(apply(name, 9, **settings), pixels(expected))


def test_a_shift_uncovers_the_fill():
  image = apply("translate_x", 10, draw=0.9, fill=(1, 2, 3))
  assert (image[:, 40:] == (1, 2, 3)).all()
  np.testing.assert_array_equal(image[:, :33], pixels(picture())[:, 27:])


def test_magnitudes():
  rng = np.random.default_rng(0)
  normal = np.array([augment.draw_magnitude(9, 0.5, 10, rng) for _ in range(4000)])
  inside = normal[normal < 10]
  assert normal.max() == 10 and abs(np.median(normal) - 9) < 0.05
  assert abs((normal == 10).mean() - 0.0228) < 0.01  # two deviations above the mean
  assert abs(np.percentile(inside, 16) - 8.5) < 0.08
  uniform = np.array([augment.draw_magnitude(8, math.inf, 10, rng) for _ in range(4000)])
  assert uniform.max() <= 8 and abs(uniform.mean() - 4) < 0.15 and abs(uniform.std() - 2.31) < 0.1
  assert augment.draw_magnitude(15, 0, 10, rng) == 10
  assert augment.draw_magnitude(15, 0, 30, rng) == 15


def record_operations(monkeypatch):
  calls = []

  def apply_operation(name, image, level, rng, **settings):
    calls.append((name, level, settings))
    return image

  monkeypatch.setattr(augment, "apply_operation", apply_operation)
  return calls


def test_randaugment_draws_operations_and_lets_chance_decide(monkeypatch):
  calls = record_operations(monkeypatch)
  policy = parse_transform("randaugment(3, 9, magnitude_std=0.5, increasing=True)")
  rng = np.random.default_rng(0)
  for _ in range(2000):
    policy({"image": photo(0)}, rng)
  assert abs(len(calls) - 3000) < 150  # each of the three with a probability of a half
  counts = {name: sum(call[0] == name for call in calls) for name in augment.OPERATIONS}
  assert len(counts) == 15 and min(counts.values()) > 150 and max(counts.values()) < 250
  assert all(call[2]["increasing"] and call[2]["interpolation"] == "bicubic" for call in calls)
  assert abs(np.median([call[1] for call in calls]) - 9) < 0.05
  calls.clear()
  always = parse_transform("randaugment(2, 7, magnitude_std=101, probability=1.0)")
  for _ in range(500):
    always({"image": photo(0)}, rng)
  assert len(calls) == 1000 and not calls[0][2]["increasing"]
  assert abs(np.mean([call[1] for call in calls]) - 3.5) < 0.3  # a deviation above 100 is uniform
  assert len({call[1] for call in calls}) > 900


def test_the_arguments_of_a_policy_reach_its_operations(monkeypatch):
  calls = record_operations(monkeypatch)
  rng = np.random.default_rng(0)
  fill = "interpolation='random', fill=(1, 2, 3)"
  parse_transform(f"randaugment(4, 15, magnitude_max=30.0, probability=1.0, {fill})")(
    {"image": photo(0)}, rng
  )
  assert [level for _, level, _ in calls] == [15] * 4
  for _ in range(20):
    parse_transform(f"autoaugment({fill})")({"image": photo(0)}, rng)
  assert len(calls) > 10
  for _, _, settings in calls:
    assert settings["interpolation"] == "random" and settings["fill"] == (1, 2, 3)


# The policy as the paper's table lists it: operation, probability in tenths, level.
PAPER_POLICY = """
P48 R69 | S65 A65 | E88 E63 | P67 P66 | E47 S24 | E44 R88 | S63 E67 | P85 E02 | R23 S68 | E68 P46 |
R88 C40 | R49 E62 | E-7 E88 | I64 E08 | C64 N08 | R88 C02 | C88 S87 | H47 I68 | X65 E09 | C40 E63 |
E47 S24 | S65 A65 | I64 E08 | C64 N08 | E88 E63
"""
LETTERS = {
  "P": "posterize", "R": "rotate", "S": "solarize", "A": "auto_contrast", "E": "equalize",
  "C": "color", "I": "invert", "N": "contrast", "H": "sharpness", "X": "shear_x",
}  # fmt: skip
# A 0 stands for a probability of 1, a dash for none.
TENTHS = {"0": 1.0, "-": 0.0} | {str(i): i / 10 for i in range(1, 10)}


def test_autoaugments_policy_is_the_papers():
  expected = [
    tuple(
      (LETTERS[name], TENTHS[probability], int(level)) for name, probability, level in pair.split()
    )
    for pair in PAPER_POLICY.split("|")
  ]
  assert expected == [tuple(pair) for pair in augment._IMAGENET_POLICY]


def test_autoaugment_follows_its_policy(monkeypatch):
  calls = record_operations(monkeypatch)
  rng = np.random.default_rng(0)
  policy = augment.AutoAugment()
  for _ in range(5000):
    policy(photo(0), rng)
  pairs = augment._IMAGENET_POLICY
  assert len(pairs) == 25
  expected = sum(p for pair in pairs for _, p, _ in pair) / 25
  assert abs(len(calls) / 5000 - expected) < 0.03
  share = sum(name == "posterize" for name, _, _ in calls) / 5000
  assert abs(share - (0.4 + 0.6 + 0.6 + 0.8 + 0.4) / 25) < 0.02
  assert all(settings["paper_posterize"] for _, _, settings in calls)
  assert {level for name, level, _ in calls if name == "rotate"} == {2 + 1, 8, 9}
  calls.clear()
  noisy = parse_transform("autoaugment(0.5)")
  for _ in range(50):
    noisy({"image": photo(0)}, rng)
  assert any(level != int(level) for _, level, _ in calls)


def test_three_augment_is_one_of_three():
  image = photo(3)
  grey = np.asarray(ImageOps.grayscale(Image.fromarray(image)))
  seen = {"grey": 0, "solarized": 0, "blurred": 0}
  softest = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(2.0)))
  for seed in range(300):
    got = augment.three_augment(image, np.random.default_rng(seed))
    if np.array_equal(got, np.repeat(grey[..., None], 3, -1)):
      seen["grey"] += 1
    elif np.array_equal(got, np.where(image < 128, image, 255 - image)):
      seen["solarized"] += 1
    else:
      seen["blurred"] += 1
      change = np.abs(got.astype(int) - image).mean()
      assert change <= np.abs(softest.astype(int) - image).mean() + 0.1
  assert min(seen.values()) > 70


def test_three_augments_choices_and_radius():
  class Chosen(Draws):
    def integers(self, *arguments):
      return self.value

    def uniform(self, low, high):
      assert (low, high) == (0.1, 2.0)
      return 1.3

  image = photo(3)
  got = augment.three_augment(image, Chosen(1))
  np.testing.assert_array_equal(got, np.where(image < 128, image, 255 - image))
  blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.3))
  np.testing.assert_array_equal(augment.three_augment(image, Chosen(2)), np.asarray(blurred))


def test_color_jitter_is_torchvisions():
  image = photo(4)

  class Fixed(Draws):
    def permutation(self, n):
      return np.array([2, 0, 3, 1])

    def uniform(self, low, high):
      bounds.append((low, high))
      return low + 0.75 * (high - low)

  bounds = []
  got = augment.color_jitter(image, (0.4, 0.2, 1.5, 0.1), Fixed(0))
  assert bounds == [(0.0, 2.5), (0.6, 1.4), (-0.1, 0.1), (0.8, 1.2)]
  expected = ImageEnhance.Color(Image.fromarray(image)).enhance(1.875)
  expected = ImageEnhance.Brightness(expected).enhance(0.6 + 0.75 * 0.8)
  hsv = np.array(expected.convert("HSV"))
  hsv[..., 0] += np.uint8(int((-0.1 + 0.75 * 0.2) * 255))
  expected = Image.fromarray(hsv, "HSV").convert("RGB")
  expected = ImageEnhance.Contrast(expected).enhance(0.8 + 0.75 * 0.4)
  np.testing.assert_array_equal(got, np.asarray(expected))
  np.testing.assert_array_equal(augment.color_jitter(image, (0, 0, 0, 0), Fixed(0)), image)
  turned = augment.turn_hue(Image.fromarray(image), -0.5)
  assert np.abs(pixels(turned) - image).mean() > 10


def test_erasing_is_timms_pixel_mode():
  rng = np.random.default_rng(0)
  image = np.full((60, 80, 3), 7.0, np.float32)
  areas, aspects, values, erased, reached = [], [], [], 0, np.zeros(4, int)
  for _ in range(1500):
    out = augment.erase(image, 0.25, (0.02, 1 / 3), (0.3, 10 / 3), rng)
    box = np.argwhere((out != 7.0).any(-1))
    if not len(box):
      continue
    erased += 1
    (top, left), (bottom, right) = box.min(0), box.max(0) + 1
    height, width = bottom - top, right - left
    reached += [top == 0, left == 0, bottom == 60, right == 80]
    assert height < 60 and width < 80 and len(box) == height * width
    areas.append(height * width / 4800)
    aspects.append(height / width)
    values.append(out[top:bottom, left:right].ravel())
  assert (image == 7.0).all()
  assert abs(erased / 1500 - 0.25) < 0.04
  assert 0.015 < min(areas) < 0.05 and 0.28 < max(areas) < 0.345
  assert min(aspects) < 0.5 and max(aspects) > 2.0
  assert reached.min() > 0
  noise = np.concatenate(values)
  assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_erasing_a_uint8_picture_is_noise_before_normalisation():
  image = np.zeros((64, 64, 3), np.uint8)
  erase = parse_transform("random_erasing(1.0, (0.2, 0.3), (1.0, 1.0))")
  values = []
  for seed in range(50):
    out = erase({"image": image}, np.random.default_rng(seed))["image"]
    assert out.dtype == np.uint8
    values.append(out[(out != 0).any(-1)])
  values = np.concatenate(values) / 255.0
  normal = (values - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  assert np.abs(normal.mean(0)).max() < 0.05
  assert np.abs(normal.std(0) - 0.98).max() < 0.03  # the tails are cut at black and white


def test_the_box_erased_is_as_high_as_asked_and_found_in_ten_tries():
  image = np.zeros((60, 80, 3), np.float32)
  for seed in range(30):
    out = augment.erase(image, 1.0, (0.05, 0.1), (2.0, 3.0), np.random.default_rng(seed))
    box = np.argwhere(out.any(-1))
    height, width = np.ptp(box, axis=0) + 1
    assert 1.7 < height / width < 3.4
  # A third of these does not fit at the first try.
  rngs = (np.random.default_rng(seed) for seed in range(200))
  erased = [augment.erase(image, 1.0, (0.02, 1.0), (0.3, 10 / 3), rng).any() for rng in rngs]
  assert sum(erased) >= 198


def test_noise_in_a_uint8_picture_is_rounded():
  class Mean(Draws):
    def uniform(self, low, high):
      return low

    def standard_normal(self, shape):
      return np.zeros(shape)

  out = augment.erase(np.zeros((64, 64, 3), np.uint8), 1.0, (0.2, 0.3), (1.0, 1.0), Mean(0.0))
  assert (out[0, 0] == (124, 116, 104)).all()
