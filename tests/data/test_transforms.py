import io
import math

import numpy as np
import pytest
from PIL import Image

from hybrid_vit import recipes
from hybrid_vit.data import transforms
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


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "BMP"])
def test_decode_is_pils_and_opencv_is_close(format_name):
  raw = encoded(photo(1, 75, 101), format_name)
  np.testing.assert_array_equal(run("decode", raw), rgb(raw))
  difference = run("decode", raw, decoder="opencv").astype(int) - rgb(raw)
  assert np.abs(difference).mean() < 0.5 and np.abs(difference).max() <= 8


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
@pytest.mark.parametrize("decoder", transforms.DECODERS)
def test_every_kind_of_picture_becomes_rgb(mode, decoder):
  buffer = io.BytesIO()
  picture = Image.fromarray(photo(2)).convert(mode)
  picture.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
  image = run("decode", buffer.getvalue(), decoder=decoder)
  assert image.shape == (40, 60, 3) and image.dtype == np.uint8
  if mode != "CMYK":  # whose conversion has no one definition
    np.testing.assert_array_equal(image, rgb(buffer.getvalue()))


def test_exif_orientation_is_not_applied():
  exif = Image.Exif()
  exif[0x0112] = 6
  buffer = io.BytesIO()
  Image.fromarray(photo(3)).save(buffer, "JPEG", exif=exif)
  for decoder in transforms.DECODERS:
    assert run("decode", buffer.getvalue(), decoder=decoder).shape == (40, 60, 3)


@pytest.mark.parametrize("decoder", transforms.DECODERS)
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_truncated_pictures_are_corrupt(decoder, format_name, part):
  raw = encoded(photo(4, 200, 300), format_name)
  with pytest.raises(CorruptPictureError):
    run("decode", raw[: int(part * len(raw))], decoder=decoder)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG"])
def test_what_opencv_fills_with_grey_is_corrupt_too(monkeypatch, format_name):
  """Versions before 5 give a whole picture for a part of one."""
  raw = encoded(photo(4, 200, 300), format_name)
  grey = np.full((200, 300, 3), 128, np.uint8)
  monkeypatch.setattr(transforms.cv2, "imdecode", lambda raw, flags: grey)
  assert (run("decode", raw, decoder="opencv") == 128).all()
  with pytest.raises(CorruptPictureError):
    run("decode", raw[:-100], decoder="opencv")


@pytest.mark.parametrize("decoder", transforms.DECODERS)
def test_bytes_that_are_no_picture_are_corrupt(decoder):
  with pytest.raises(CorruptPictureError, match="cannot identify"):
    run("decode", b"<html>not found</html>", decoder=decoder)


@pytest.mark.parametrize("decoder", transforms.DECODERS)
def test_foreign_bytes_after_the_end_do_no_harm(decoder):
  raw = encoded(photo(5))
  np.testing.assert_allclose(run("decode", raw + b"x" * 500, decoder=decoder), rgb(raw), atol=8)


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
  fast = run(text, raw, decoder="opencv")
  assert fast.shape == (56, 56, 3)
  assert np.abs(fast.astype(int) - expected).mean() < 4


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


def test_shrinking_is_antialiased_with_either_decoder():
  stripes = np.zeros((64, 64, 3), np.uint8)
  stripes[:, ::2] = 255
  for decoder in transforms.DECODERS:
    small = run("resize(16, 'bilinear')", stripes, decoder=decoder)
    assert np.abs(small.astype(int) - 127).max() < 20


def test_random_resized_crop_is_a_box_resized(monkeypatch):
  image = photo(9, 50, 70)
  monkeypatch.setattr(transforms, "_random_box", lambda *arguments: (5, 7, 30, 40))
  got = run("random_resized_crop(24)", image)
  expected = Image.fromarray(image[5:35, 7:47]).resize((24, 24), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(got, np.asarray(expected))


def test_random_boxes_have_the_areas_and_aspects_asked_for():
  rng = np.random.default_rng(0)
  boxes = [transforms._random_box(400, 500, (0.08, 0.6), (3 / 4, 4 / 3), rng) for _ in range(3000)]
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
  assert transforms._random_box(*size, scale, (3 / 4, 4 / 3), rng) == box


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
  for decoder in transforms.DECODERS:  # a mirrored view can be worked on
    assert run("flip_lr(1.0)|resize(8)", image, decoder=decoder).shape == (8, 8, 3)


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
    ("resize(__import__('os'))", "malformed node"),
    ("resize(8, sharpness=2)", "it is resize"),
    ("random_resized_crop(8, scale=(0.5, 0.1))", "must be rising pairs"),
    ("randaugment(interpolation='lanczos')", "one of bilinear, bicubic, random"),
    ("color_jitter(0.1, hue=0.6)", "hue at most 0.5"),
    ("random_crop(8, 1, 'wrap')", "mode 'wrap' is not one of"),
  ],
)
def test_errors_name_the_operation(text, message):
  with pytest.raises(ValueError, match=message):
    parse_transform(text)


def test_undecoded_pictures_and_unknown_decoders_are_named():
  with pytest.raises(TypeError, match=r'begin the transform with "decode\|"'):
    run("flip_lr", b"bytes")
  with pytest.raises(ValueError, match="decoder 'tf' is not one of opencv, pil"):
    parse_transform("decode", "tf")
  with pytest.raises(ValueError, match="registered already"):
    transforms.register_transform("decode")(lambda: None)
