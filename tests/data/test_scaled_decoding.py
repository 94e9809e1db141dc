"""JPEGs decoded at a part of their size: the same draws and region, pixels within a bound."""

import io

import numpy as np
import pytest
from PIL import Image

from hybrid_vit.data import scaled_decoding
from hybrid_vit.data.decoding import CorruptPictureError, decode_picture, jpeg_size
from hybrid_vit.data.transforms import parse_transform
from tests.data.pictures import encoded

KINDS = {"image": "image", "boxes": "boxes"}


def smooth(height=397, width=603):
  """Waves of some twenty pixels, as a JPEG of 4:2:0."""
  y, x = np.mgrid[:height, :width]
  waves = [np.sin(x / a + y / b) * 100 + 128 for a, b in ((9, 23), (31, 11), (17, 40))]
  buffer = io.BytesIO()
  Image.fromarray(np.stack(waves, -1).astype(np.uint8)).save(buffer, "JPEG", quality=92)
  return buffer.getvalue()


RAW = smooth()


def run(text, raw=RAW, seed=0, decoder="opencv", **others):
  rng = np.random.default_rng(seed)
  example = parse_transform(text, decoder, KINDS)({"image": raw, **others}, rng)
  return example, rng.random()


@pytest.fixture
def divisors(monkeypatch):
  found = []
  whole = scaled_decoding.decode_picture

  def watched(raw, decoder, divisor):
    found.append(divisor)
    return whole(raw, decoder, divisor)

  monkeypatch.setattr(scaled_decoding, "decode_picture", watched)
  return found


@pytest.mark.parametrize("decoder", ["opencv", "pil"])
@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
def test_decoders_at_a_part_of_the_size(decoder, divisor):
  image = decode_picture(RAW, decoder, divisor)
  assert image.shape == (-(-397 // divisor), -(-603 // divisor), 3)
  rows, columns = (n // divisor * divisor for n in (397, 603))
  blocks = decode_picture(RAW)[:rows, :columns].reshape(rows // divisor, divisor, -1, divisor, 3)
  mean = blocks.mean((1, 3))
  assert np.abs(image[: len(mean), : mean.shape[1]] - mean).mean() < 2.5


@pytest.mark.parametrize(
  ("text", "seeds"),
  [
    ("random_resized_crop(32)|flip_lr", range(6)),
    ("random_resized_crop(48, (0.3, 1.0), interpolation='bilinear')", range(3)),
    ("resize_center_crop(56)", range(1)),
    ("resize((40, 60))|random_crop(32)", range(2)),
    ("center_crop(300)|resize(30)", range(1)),
    ("resize_short(64)|center_crop(100)", range(1)),  # a black border
  ],
)
@pytest.mark.parametrize("decoder", ["opencv", "pil"])
def test_the_same_region_within_a_few_grey_levels(divisors, text, seeds, decoder):
  boxes = np.array([[50, 60, 300, 200]], np.float32)
  for seed in seeds:
    one, next_draw = run(f"decode|{text}", seed=seed, decoder=decoder, boxes=boxes)
    two, scaled_draw = run(f"decode(scaled=True)|{text}", seed=seed, decoder=decoder, boxes=boxes)
    assert scaled_draw == next_draw
    np.testing.assert_array_equal(one["boxes"], two["boxes"])
    assert two["image"].dtype == np.uint8 and two["image"].shape == one["image"].shape
    difference = np.abs(one["image"].astype(int) - two["image"])
    assert difference.mean() < 2.5, (text, seed)
    # A region half a pixel aside shows in the waves' flanks.
    signed = one["image"].astype(int) - two["image"]
    assert abs(signed.mean()) < 0.7
  assert max(divisors) > 1


def test_a_region_a_pixel_aside_would_be_noticed():
  one = run("decode|resize_center_crop(56)")[0]["image"].astype(int)
  aside = run("decode(scaled=True)|resize_center_crop(58)")[0]["image"][1:-1, 2:].astype(int)
  assert np.abs(one - aside).mean() > 2.5


@pytest.mark.parametrize(
  ("text", "divisor"),
  [
    ("resize((50, 76))", 4), ("resize((49, 75))", 8), ("resize((198, 301))", 2), ("resize(199)", 1),
    ("center_crop(160)|resize(40)", 4), ("center_crop(160)|resize(41)", 2),
    ("random_crop(64)|resize(64)", 1), ("random_crop(500, 60)|resize(20)", 1),
    ("resize(8, interpolation='nearest')", 1), ("center_crop(8)", 1), ("flip_lr(1.0)|resize(8)", 1),
  ],
)  # fmt: skip
def test_how_far_down(divisors, text, divisor):
  scaled = run(f"decode(scaled=True)|{text}")[0]["image"]
  assert divisors == [divisor]
  if divisor == 1:  # as it would be without the switch, to the bit
    np.testing.assert_array_equal(scaled, run(f"decode|{text}")[0]["image"])


def test_what_is_no_jpeg_of_three_colours_is_decoded_whole(divisors):
  picture = decode_picture(RAW)
  for raw in (encoded(picture, "PNG"), picture):
    one, two = (run(f"decode{a}|resize(30)", raw)[0]["image"] for a in ("", "(scaled=True)"))
    np.testing.assert_array_equal(one, two)
  assert divisors == [1]
  buffer = io.BytesIO()
  Image.fromarray(picture).convert("CMYK").save(buffer, "JPEG")
  assert jpeg_size(buffer.getvalue()) is None and jpeg_size(b"\xff\xd8") is None
  grey = io.BytesIO()
  Image.fromarray(picture).convert("L").save(grey, "JPEG")
  image = run("decode(scaled=True)|resize(30)", grey.getvalue())[0]["image"]
  assert divisors == [1, 8] and (image[..., 0] == image[..., 1]).all()


def test_damaged_ones_are_corrupt_as_ever():
  for text in ("random_resized_crop(8)", "resize(390)"):
    with pytest.raises(CorruptPictureError):
      run(f"decode(scaled=True)|{text}", RAW[: len(RAW) // 2])


@pytest.mark.parametrize("text", ["decode(scaled=True)", "decode(scaled=True)|color_jitter(0.4)"])
def test_an_operation_on_the_plane_must_follow(text):
  with pytest.raises(ValueError, match="random_resized_crop, and none comes next"):
    parse_transform(text)


def test_the_switch_is_a_switch():
  with pytest.raises(ValueError, match=r"scaled is 2; True or False was expected"):
    parse_transform("decode(scaled=2)|resize(8)")
