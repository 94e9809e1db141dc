import io
import math
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from hybrid_vit import recipes
from hybrid_vit.data import operations, transforms
from hybrid_vit.data.transforms import CorruptPictureError, parse_transform
from hybrid_vit.models.registry import Preprocessing
from tests.data.pictures import encoded, photo

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def run(text, image, seed=0, decoder="pil"):
  return parse_transform(text, decoder)({"image": image, "label": 3}, np.random.default_rng(seed))[
    "image"
  ]


def rgb(raw):
  return np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))


def evaluation_by_torchvision(picture, size, crop_ratio, interpolation):
  """Resize(floor(size / crop_ratio)) and CenterCrop(size), step by step."""
  short = math.floor(size / crop_ratio)
  width, height = picture.size
  long = int(short * max(width, height) / min(width, height))
  width, height = (short, long) if width <= height else (long, short)
  picture = picture.resize((width, height), FILTERS[interpolation])
  top, left = round((height - size) / 2.0), round((width - size) / 2.0)
  return np.asarray(picture.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("crop_ratio", [0.875, 0.95, 1.0])
@pytest.mark.parametrize("size", [(75, 101), (101, 75), (64, 64), (30, 47)])
def test_evaluation_is_torchvisions_pixel_by_pixel(interpolation, crop_ratio, size):
  image = photo(6, *size)
  text = recipes.eval_transform(
    Preprocessing(56, crop_ratio, interpolation, (0.5,) * 3, (0.5,) * 3)
  )
  raw = encoded(image, "PNG")
  expected = evaluation_by_torchvision(Image.fromarray(image), 56, crop_ratio, interpolation)
  np.testing.assert_array_equal(run(text, raw), expected)
  np.testing.assert_array_equal(run(text, raw, decoder="opencv"), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_squash_is_one_resize(interpolation):
  image = photo(7, 75, 101)
  preprocessing = Preprocessing(48, 1.0, interpolation, (0.5,) * 3, (0.5,) * 3, resize="squash")
  got = run(recipes.eval_transform(preprocessing), encoded(image, "PNG"))
  expected = np.asarray(Image.fromarray(image).resize((48, 48), FILTERS[interpolation]))
  np.testing.assert_array_equal(got, expected)


def test_the_usual_evaluation_in_numbers():
  # 375 x 500 → 256 x 341; of the 117 columns too many 58 go left (half to even).
  image = np.zeros((256, 341, 3), np.uint8)
  image[:, 58] = 200
  crop = run("center_crop(224)", image)
  assert (crop[:, 0] == 200).all() and (crop[:, 1:] == 0).all()
  assert run("resize_short(256)", photo(8, 375, 500)).shape == (256, 341, 3)
  assert run("resize_short(256)", photo(8, 500, 375)).shape == (341, 256, 3)
  assert run("resize((20, 30))", photo(8)).shape == (20, 30, 3)


def test_center_crop_pads_what_is_too_small():
  padded = run("center_crop(6)", np.full((3, 8, 3), 9, np.uint8))
  assert padded.shape == (6, 6, 3)
  assert (padded[1:4] == 9).all() and padded.sum() == 3 * 6 * 3 * 9


def test_random_resized_crop_is_a_box_resized(monkeypatch):
  image = photo(9, 50, 70)
  monkeypatch.setattr(operations, "random_box", lambda *arguments: (5, 7, 30, 40))
  got = run("random_resized_crop(24)", image)
  expected = Image.fromarray(image[5:35, 7:47]).resize((24, 24), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(got, np.asarray(expected))


def test_random_boxes_have_the_areas_and_aspects_asked_for():
  rng = np.random.default_rng(0)
  boxes = [operations.random_box(400, 500, (0.08, 0.6), (3 / 4, 4 / 3), rng) for _ in range(3000)]
  top, left, height, width = np.array(boxes).T
  assert (top >= 0).all() and (left >= 0).all()
  assert (top + height <= 400).all() and (left + width <= 500).all()
  area = height * width / 200_000
  assert 0.079 < area.min() < 0.09 and 0.58 < area.max() < 0.602
  assert abs(area.mean() - 0.34) < 0.02  # uniform in the area
  aspect = np.log(width / height)
  assert abs(aspect.min() + math.log(4 / 3)) < 0.02 and abs(aspect.max() - math.log(4 / 3)) < 0.02
  assert abs(aspect.mean()) < 0.02  # uniform in the logarithm
  assert top.min() == 0 and (top + height).max() == 400


@pytest.mark.parametrize(
  ("size", "box"),
  [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10)), ((30, 33), (0, 0, 30, 33))],
)
def test_boxes_that_never_fit_fall_back_to_the_middle(size, box):
  scale = (0.9, 1.0) if size[0] != 30 else (2.0, 2.0)
  rng = np.random.default_rng(0)
  assert operations.random_box(*size, scale, (3 / 4, 4 / 3), rng) == box


def test_the_middle_has_a_pixel_at_least():
  rng = np.random.default_rng(0)
  assert operations.random_box(1000, 1, (1.0, 1.0), (3, 4), rng) == (499, 0, 1, 1)
  assert operations.random_box(1, 1000, (1.0, 1.0), (0.2, 0.25), rng) == (0, 499, 1, 1)


def test_random_crop_reaches_every_place_of_the_padded_picture():
  image = np.arange(1, 17, dtype=np.uint8).reshape(4, 4, 1).repeat(3, -1)
  padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
  places = {padded[i : i + 4, j : j + 4].tobytes() for i in range(3) for j in range(3)}
  assert {run("random_crop(4, 1)", image, seed).tobytes() for seed in range(200)} == places
  assert run("random_crop(4, 2, 'reflect')", image).min() > 0
  with pytest.raises(ValueError, match="resize it first"):
    run("random_crop(9)", image)


def test_flip_mirrors_half_of_the_time():
  image = photo(10)
  flipped = [np.array_equal(run("flip_lr", image, seed), image[:, ::-1]) for seed in range(400)]
  assert 160 < sum(flipped) < 240
  np.testing.assert_array_equal(run("flip_lr(1.0)", image), image[:, ::-1])
  np.testing.assert_array_equal(run("flip_lr(0.0)", image), image)
  assert run("flip_lr(1.0)|resize(8)", image).shape == (8, 8, 3)  # a view can be worked on


def test_normalize():
  image = photo(11)
  got = run("normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))", image)
  expected = (image / 255.0 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  assert got.dtype == np.float32
  np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_transform_is_its_string_and_its_generator():
  text = (
    "decode|random_resized_crop(24)|flip_lr|randaugment(2, 9, magnitude_std=0.5)|"
    "color_jitter(0.4, 0.4, 0.4, 0.1)|random_erasing(1.0)"
  )
  raw = encoded(photo(12))
  np.testing.assert_array_equal(run(text, raw, 5), run(text, raw, 5))
  assert not np.array_equal(run(text, raw, 5), run(text, raw, 6))
  example = parse_transform(text)({"image": raw, "label": 3, "more": 1}, np.random.default_rng(0))
  assert example["label"] == 3 and example["more"] == 1


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("decode|flip_lf", r"unknown transform 'flip_lf'; did you mean flip_lr\(probability=0.5\)"),
    ("decode||flip_lr", "empty operation between its bars"),
    ("resize(", "cannot be read: name"),
    ("os.remove('x')", "cannot be read: name"),
    ("resize(__import__('os'))", r"__import__\('os'\) is not a number, a string or a tuple"),
    ("resize({image_size})", r"\{image_size\} is not a number"),
    ("resize(8, sharpness=2)", "there is no argument 'sharpness'; it is resize"),
    ("resize(8, interpolate='bicubic')", "did you mean 'interpolation'"),
    ("resize(**{'size': 8})", "there is no argument None"),
    ("resize()", "it missing 1 required positional argument: 'size'; it is resize"),
    ("decode('pil')", "positional argument.*; it is decode"),
    ("decode(decoder='pil')", "there is no argument 'decoder'; it is decode"),
  ],
)
def test_what_cannot_be_called_is_named(text, message):
  with pytest.raises(ValueError, match=message):
    parse_transform(text)


WHOLE = "a whole number of at least"


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("resize(0)", r"size is 0; a whole number from 1 or \(height, width\)"),
    ("resize(True)", "size is True"),
    ("resize((8, -1))", r"size is \(8, -1\)"),
    ("resize((8, 8, 8))", r"size is \(8, 8, 8\)"),
    ("resize('88')", "size is '88'"),
    ("resize(8, 'lanczos')", "interpolation 'lanczos' is not one of nearest, bilinear, bicubic"),
    ("resize_short(8.5)", f"size is 8.5; {WHOLE} 1"),
    ("resize_short(8, 3)", "interpolation 3 is not one of"),
    ("center_crop('8')", f"size is '8'; {WHOLE} 1"),
    ("center_crop(8, -1)", f"ignore is -1; {WHOLE} 0"),
    ("resize_center_crop((8, 8))", rf"size is \(8, 8\); {WHOLE} 1"),
    ("resize_center_crop(8, 0)", "crop_ratio is 0; a number above 0"),
    ("resize_center_crop(8, 9)", "crop_ratio 9 leaves no pixel of 8"),
    ("resize_center_crop(8, interpolation=None)", "interpolation None is not one of"),
    ("resize_center_crop(8, ignore=2.0)", f"ignore is 2.0; {WHOLE} 0"),
    ("random_resized_crop(0)", f"size is 0; {WHOLE} 1 was expected"),
    ("random_resized_crop(8, scale=(0.5, 0.1))", r"scale is \(0.5, 0.1\); a rising pair"),
    ("random_resized_crop(8, scale=0.5)", "scale is 0.5; a rising pair"),
    ("random_resized_crop(8, ratio=(0, 1))", r"ratio is \(0, 1\); a rising pair"),
    ("random_resized_crop(8, ratio=(1, 1e999))", "finite numbers"),
    ("random_resized_crop(8, ratio='12')", "ratio is '12'; a rising pair"),
    ("random_resized_crop(8, interpolation='x')", "interpolation 'x' is not one of"),
    ("random_crop(-8)", "size is -8; a whole number from 1"),
    ("random_crop(8, -1)", f"padding is -1; {WHOLE} 0"),
    ("random_crop(8, 1, 'wrap')", "mode 'wrap' is not one of constant, reflect, edge"),
    ("random_crop(8, ignore='x')", "ignore is 'x'"),
    ("flip_lr(1.5)", r"probability is 1.5; a number in \[0, 1\]"),
    ("flip_lr('always')", "probability is 'always'"),
    ("color_jitter(-0.1)", "brightness is -0.1; a number of at least 0"),
    ("color_jitter(0.1, contrast=1e999)", "contrast is inf"),
    ("color_jitter(0.1, saturation='0.1')", "saturation is '0.1'"),
    ("color_jitter(0.1, hue=0.6)", r"hue is 0.6; a number in \[0, 0.5\]"),
    ("randaugment(-1)", f"num_layers is -1; {WHOLE} 0"),
    ("randaugment(2, -9)", "magnitude is -9"),
    (
      "randaugment(2, 9, 'infinite')",
      "magnitude_std is 'infinite'; a number of at least 0 or 'inf'",
    ),
    ("randaugment(2, 9, -1)", "magnitude_std is -1"),
    ("randaugment(increasing=1)", "increasing is 1; True or False"),
    ("randaugment(probability=2)", "probability is 2"),
    ("randaugment(magnitude_max=0)", "magnitude_max is 0; a number above 0"),
    ("randaugment(interpolation='lanczos')", "one of bilinear, bicubic, random"),
    ("randaugment(fill=(1, 2))", r"fill is \(1, 2\); \(red, green, blue\)"),
    ("randaugment(fill=(1, 2, 256))", "fill is"),
    ("autoaugment('x')", "magnitude_std is 'x'"),
    ("autoaugment(0, 'nearest')", "one of bilinear, bicubic, random"),
    ("autoaugment(fill=0)", "fill is 0"),
    ("random_erasing(-0.1)", "probability is -0.1"),
    ("random_erasing(0.1, (0.5, 1.1))", "area is .* at most 1,"),
    ("random_erasing(0.1, aspect=(2, 1))", "aspect is"),
    ("normalize(0.5, 0)", "std is 0; numbers above 0"),
    ("normalize((0.5, 0.5), 1)", "mean is .*one for each of 3 channels"),
    ("normalize('a', 1)", "mean is 'a'"),
    ("normalize(0.5, (1, 1, '1'))", "std is"),
  ],
)
def test_a_bad_argument_is_named_before_the_first_picture(text, message):
  name = text.partition("(")[0]
  with pytest.raises(ValueError, match=rf"transform ['\"]{name}.*{message}.*it is {name}\("):
    parse_transform(f"decode|{text}|flip_lr")


def test_undecoded_pictures_and_unknown_decoders_are_named():
  for operation in ("flip_lr", "three_augment"):
    with pytest.raises(
      TypeError, match=r"'image' is bytes, .* begin the transform with \"decode\|\""
    ):
      run(operation, b"bytes")
  with pytest.raises(ValueError, match="decoder 'tf' is not one of opencv, pil"):
    parse_transform("decode", "tf")
  with pytest.raises(ValueError, match="registered already"):
    transforms.register_transform("decode")(lambda: None)


def test_colours_are_changed_before_they_are_normalised():
  for operation in ("three_augment", "color_jitter(0.1)", "randaugment", "autoaugment"):
    with pytest.raises(TypeError, match="put normalize last"):
      run(f"normalize(0.5, 0.5)|{operation}", photo(0))
  with pytest.raises(TypeError, match="not yet normalised"):
    run("normalize(0.5, 0.5)|normalize(0.5, 0.5)", photo(0))


def test_a_picture_that_resizing_would_make_endless_costs_no_memory():
  image = np.random.default_rng(0).integers(0, 256, (1, 3000, 3), dtype=np.uint8)
  tracemalloc.start()
  cropped = run("resize_center_crop(224)", image)
  np.testing.assert_array_equal(run("resize_short(256)|center_crop(224)", image), cropped)
  assert run("resize_short(256)|random_crop(224)", image.swapaxes(0, 1)).shape == (224, 224, 3)
  assert run("random_resized_crop(224)", image).shape == (224, 224, 3)
  assert run("resize(224)", image).shape == (224, 224, 3)
  for text in ("resize_short(256)", "resize_short(256)|flip_lr", "resize_short(256, 'nearest')"):
    with pytest.raises(CorruptPictureError, match=r"too long and thin .* 256 x 768,000"):
      run(text, image)
  with pytest.raises(CorruptPictureError, match="too long and thin"):  # the first pass of two
    run("resize(4096)", np.zeros((2**20, 1, 3), np.uint8))
  assert tracemalloc.get_traced_memory()[1] < 60e6
  tracemalloc.stop()
  # Of its middle alone the whole can be made.
  middle = Image.fromarray(image[:, 1490:1510]).resize((20 * 256, 256), FILTERS["bicubic"])
  expected = run("center_crop(224)", np.asarray(middle))
  assert np.abs(cropped.astype(int) - expected).max() <= 1 and cropped.std() > 10
