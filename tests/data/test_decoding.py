"""What decoders read, and what they refuse; resizing against Pillow, pixel by pixel."""

import io
import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from hybrid_vit.data import decoding, resizing
from hybrid_vit.data.decoding import DECODERS, CorruptPictureError, decode_picture
from hybrid_vit.data.resizing import FILTERS, resize_image, resize_nearest
from tests.data.pictures import encoded, photo

both = pytest.mark.parametrize("decoder", DECODERS)


def file_of(picture, format_name="PNG", **settings):
  buffer = io.BytesIO()
  picture.save(buffer, format_name, **settings)
  return buffer.getvalue()


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "GIF", "TIFF"])
def test_decode_is_pils_and_opencv_is_close(format_name):
  raw = encoded(photo(1, 75, 101), format_name)
  expected = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))
  np.testing.assert_array_equal(decode_picture(raw), expected)
  difference = np.abs(decode_picture(raw, "opencv").astype(int) - expected)
  # Versions of the JPEG library differ a little; every other format says what its pixels are.
  assert difference.max() <= (8 if format_name == "JPEG" else 0)
  assert difference.mean() < 0.5


def test_opencv_reads_what_it_reads_fast(monkeypatch):
  grey = np.full((200, 300, 3), 128, np.uint8)
  monkeypatch.setattr(decoding.cv2, "imdecode", lambda raw, flags: grey)
  for format_name in ("JPEG", "PNG", "WEBP"):
    assert (decode_picture(encoded(photo(4, 200, 300), format_name), "opencv") == 128).all()
  for format_name in ("GIF", "TIFF"):
    assert not (decode_picture(encoded(photo(4, 200, 300), format_name), "opencv") == 128).all()


@pytest.mark.parametrize("divisor", [1, 2, 4, 8])
def test_opencv_needs_no_help_with_a_jpeg(monkeypatch, divisor):
  raw = encoded(photo(4, 203, 301))
  expected = decode_picture(raw, "pil", divisor)
  monkeypatch.setattr(decoding, "_by_pil", None)
  image = decode_picture(raw, "opencv", divisor)
  assert image.shape == expected.shape
  assert np.abs(image.astype(int) - expected).mean() < 0.5


RGB = Image.fromarray(photo(2))
GREY = np.asarray(RGB.convert("L"))
GREY16 = GREY.astype(np.uint16) * 256 + np.arange(60, dtype=np.uint16) * 4
TRANSPARENT = RGB.convert("RGBA")
TRANSPARENT.putalpha(Image.fromarray(np.arange(2400, dtype=np.uint8).reshape(40, 60)))
PALETTE = RGB.convert("P", palette=Image.Palette.ADAPTIVE)
TURNED = [
  RGB.transpose(way) for way in (Image.Transpose.ROTATE_180, Image.Transpose.FLIP_LEFT_RIGHT)
]


def rgb16(extension):
  wide = np.asarray(RGB)[..., ::-1].astype(np.uint16) * 256 + 200
  return cv2.imencode(extension, np.ascontiguousarray(wide))[1].tobytes()


def three(grey):
  return np.repeat(np.asarray(grey)[..., None], 3, -1)


KINDS = {
  "grey": (file_of(RGB.convert("L")), three(GREY)),
  "grey JPEG": (file_of(RGB.convert("L"), "JPEG", quality=100, subsampling=0), three(GREY)),
  "1 bit": (file_of(RGB.convert("1")), np.asarray(RGB.convert("1").convert("RGB"))),
  "16-bit grey PNG": (file_of(Image.fromarray(GREY16)), three(GREY)),
  "16-bit grey TIFF": (file_of(Image.fromarray(GREY16), "TIFF"), three(GREY)),
  "16-bit grey TIFF, other bytes": (
    file_of(Image.fromarray(GREY16.astype(">u2")), "TIFF"),
    three(GREY),
  ),
  "16-bit grey PGM": (file_of(Image.fromarray(GREY16), "PPM"), three(GREY)),
  "16-bit RGB PNG": (rgb16(".png"), np.asarray(RGB)),
  "32-bit grey TIFF": (file_of(Image.fromarray(GREY16.astype(np.int32)), "TIFF"), three(GREY)),
  "float TIFF": (file_of(Image.fromarray(GREY / np.float32(255)), "TIFF"), three(GREY)),
  "palette": (file_of(PALETTE), np.asarray(PALETTE.convert("RGB"))),
  "palette, one clear": (file_of(PALETTE, transparency=3), np.asarray(PALETTE.convert("RGB"))),
  "palette, all half clear": (
    file_of(PALETTE, transparency=bytes(range(256))),
    np.asarray(PALETTE.convert("RGB")),
  ),
  "RGB, one clear": (file_of(RGB, transparency=(1, 2, 3)), np.asarray(RGB)),
  "RGBA": (file_of(TRANSPARENT), np.asarray(RGB)),
  "RGBA WebP": (file_of(TRANSPARENT, "WEBP", lossless=True, exact=True), np.asarray(RGB)),
  "LA": (file_of(TRANSPARENT.convert("LA")), three(GREY)),
  "CMYK TIFF": (file_of(RGB.convert("CMYK"), "TIFF"), np.asarray(RGB)),
  "GIF": (
    file_of(PALETTE, "GIF", save_all=True, append_images=TURNED),
    np.asarray(PALETTE.convert("RGB")),
  ),
  "WebP, animated": (
    file_of(RGB, "WEBP", lossless=True, save_all=True, append_images=TURNED),
    np.asarray(RGB),
  ),
  "PNG, animated": (file_of(RGB, save_all=True, append_images=TURNED), np.asarray(RGB)),
  "PNG, animated behind a picture of its own": (
    file_of(RGB, save_all=True, default_image=True, append_images=TURNED),
    np.asarray(RGB),
  ),
}


@both
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_picture_is_read_alike(kind, decoder):
  raw, expected = KINDS[kind]
  image = decode_picture(raw, decoder)
  assert image.dtype == np.uint8 and image.shape == (40, 60, 3)
  tolerance = 2 if kind == "grey JPEG" else 0
  assert np.abs(image.astype(int) - expected).max() <= tolerance


def test_cmyk_photos_are_pils():
  raw = file_of(RGB.convert("CMYK"), "JPEG")
  expected = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))
  for decoder in DECODERS:
    np.testing.assert_array_equal(decode_picture(raw, decoder), expected)


@both
@pytest.mark.parametrize(
  ("values", "message"),
  [
    (np.full((4, 4), 70000, np.int32), "from 70000 to 70000; 0 to 65535 was expected"),
    (np.full((4, 4), -1, np.int32), "from -1 to -1"),
    (np.full((4, 4), 255, np.float32), "from 255 to 255; 0 .black. to 1 .white."),
    (np.full((4, 4), -0.5, np.float32), "from -0.5"),
    (np.full((4, 4), np.nan, np.float32), "from nan"),
  ],
)
def test_numbers_without_a_scale_are_refused(values, message, decoder):
  with pytest.raises(CorruptPictureError, match=message):
    decode_picture(file_of(Image.fromarray(values), "TIFF"), decoder)


def chunk(name, data):
  return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, rows):
  """An 8-bit RGB picture that has so many black rows, whatever it says."""
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  pixels = zlib.compress(bytes(rows * (3 * width + 1)), 9)
  return (
    b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
  )


def jpeg(width, height):
  raw = file_of(RGB, "JPEG", progressive=True)
  at = raw.index(b"\xff\xc2") + 5
  return raw[:at] + struct.pack(">HH", height, width) + raw[at + 4 :]


@both
@pytest.mark.parametrize(
  ("raw", "message"),
  [
    (png(40_000, 40_000, 1), "40,000 x 40,000, more than the 1,073,741,824 pixels"),
    (png(30_000, 30_000, 1), "30,000 x 30,000, for which .* bytes are too few"),
    (jpeg(60_000, 60_000), "60,000 x 60,000, more than"),
    (jpeg(30_000, 30_000), "30,000 x 30,000, for which"),
    (b"BM" + struct.pack("<IIIIiiHHIIIIII", 58, 0, 54, 40, 60000, 60000, 1, 24, 0, 4, 0, 0, 0, 0)
     + bytes(4), "says more than the 1,073,741,824 pixels"),
    (b"P6 40000 40000 255 " + bytes(100), "more than the 1,073,741,824 pixels"),
  ],
  ids=["PNG", "short PNG", "JPEG", "short JPEG", "BMP", "PPM"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_header_that_says_too_much_is_corrupt_and_costs_nothing(raw, message, decoder):
  tracemalloc.start()
  with pytest.raises(CorruptPictureError, match=message):
    decode_picture(raw, decoder)
  assert tracemalloc.get_traced_memory()[1] < 5e6
  tracemalloc.stop()


@both
def test_a_large_picture_that_is_there_is_read(monkeypatch, decoder):
  """As many pixels a byte as a PNG can have, and more than PIL allows by itself."""
  raw = file_of(Image.new("1", (14_000, 14_000)), compress_level=9)
  # Its 600 MB are made of nothing here.
  monkeypatch.setattr(decoding, "_as_rgb", lambda picture: np.empty((*picture.size, 3), np.uint8))
  monkeypatch.setattr(
    decoding.cv2, "imdecode", lambda raw, flags: np.empty((14_000, 14_000, 3), np.uint8)
  )
  monkeypatch.setattr(decoding.cv2, "cvtColor", lambda image, code: image)
  assert decode_picture(raw, decoder).shape == (14_000, 14_000, 3)


def test_what_opencv_refuses_is_left_to_pil(monkeypatch):
  def refuse(raw, flags):
    raise cv2.error("pixels <= CV_IO_MAX_IMAGE_PIXELS")

  monkeypatch.setattr(decoding.cv2, "imdecode", refuse)
  np.testing.assert_array_equal(decode_picture(file_of(RGB), "opencv"), np.asarray(RGB))


def test_headers_of_jpegs_are_found_behind_what_stands_before():
  exif = Image.Exif()
  exif[0x010E] = "x" * 3000
  raw = file_of(RGB, "JPEG", exif=exif, comment=b"y" * 500)
  padded = raw[:2] + b"\xff\x01\xff" + raw[2:]  # a marker without length, a fill byte
  for data in (raw, padded):
    assert decoding._header(data) == ("JPEG", 60, 40, 3)
  assert decoding._header(file_of(RGB.convert("CMYK"), "JPEG"))[3] == 4
  for cut in range(0, len(raw), 37):
    assert decoding._header(raw[:cut]) in (None, ("JPEG", 60, 40, 3))


@both
def test_exif_orientation_is_not_applied(decoder):
  exif = Image.Exif()
  exif[0x0112] = 6
  for format_name in ("JPEG", "PNG", "WEBP"):
    raw = file_of(Image.fromarray(photo(3)), format_name, exif=exif)
    assert decode_picture(raw, decoder).shape == (40, 60, 3)


@both
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_truncated_pictures_are_corrupt(decoder, format_name, part):
  raw = encoded(photo(4, 200, 300), format_name)
  with pytest.raises(CorruptPictureError):
    decode_picture(raw[: int(part * len(raw))], decoder)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG"])
def test_what_opencv_fills_with_grey_is_corrupt_too(monkeypatch, format_name):
  """Versions before 5 give a whole picture for a part of one."""
  raw = encoded(photo(4, 200, 300), format_name)
  grey = np.full((200, 300, 3), 128, np.uint8)
  monkeypatch.setattr(decoding.cv2, "imdecode", lambda raw, flags: grey)
  assert (decode_picture(raw, "opencv") == 128).all()
  with pytest.raises(CorruptPictureError):
    decode_picture(raw[:-100], "opencv")


@both
def test_bytes_that_are_no_picture_are_corrupt(decoder):
  with pytest.raises(CorruptPictureError, match="cannot identify"):
    decode_picture(b"<html>not found</html>", decoder)


@both
def test_foreign_bytes_after_the_end_do_no_harm(decoder):
  raw = encoded(photo(5))
  np.testing.assert_allclose(decode_picture(raw + b"x" * 500, decoder), decode_picture(raw), atol=8)


def test_an_unknown_decoder_is_named():
  with pytest.raises(ValueError, match="decoder 'tf' is not one of opencv, pil"):
    decode_picture(file_of(RGB), "tf")


STRIPES = np.zeros((160, 401, 3), np.uint8)
STRIPES[:, ::2] = 255
SIZES = [(160, 401), (401, 160), (300, 300), (90, 100), (9, 700), (224, 500), (500, 224), (1, 1)]


def by_pillow(image, size, interpolation):
  resample = Image.Resampling[interpolation.upper()]
  return np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size[::-1], resample))


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", SIZES)
def test_resizing_is_pillows_to_the_bit(size, interpolation):
  noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
  for target in ((224, 224), (37, 224), (501, 90)):
    np.testing.assert_array_equal(
      resize_image(noise, target, interpolation), by_pillow(noise, target, interpolation)
    )
  if size == STRIPES.shape[:2]:
    got = resize_image(STRIPES, (224, 224), interpolation)
    np.testing.assert_array_equal(got, by_pillow(STRIPES, (224, 224), interpolation))


def test_the_nearest_pixel_is_pillows_for_any_pair_of_sides():
  rng = np.random.default_rng(0)
  for before, after in rng.integers(1, 600, (400, 2)):
    line = np.arange(before, dtype=np.int32)[None]
    expected = np.asarray(Image.fromarray(line).resize((int(after), 1), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(resize_nearest(line, (1, int(after))), expected)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", [(9, 700), (700, 9), (40, 2000), (300, 310), (800, 8000)])
def test_a_part_is_the_wholes(size, interpolation):
  noise = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
  scale = 64 / min(size)
  whole = int(size[0] * scale), int(size[1] * scale)
  expected = by_pillow(noise, whole, interpolation).astype(int)
  different = 0
  for down in (0.0, 0.5, 1.0):
    for right in (0.0, 0.37, 1.0):
      top, left = round(down * (whole[0] - 48)), round(right * (whole[1] - 50))
      got = resize_image(noise, whole, interpolation, (top, left, 48, 50))
      difference = np.abs(got - expected[top : top + 48, left : left + 50])
      assert got.shape == (48, 50, 3) and difference.max() <= (0 if size == (300, 310) else 1)
      different += (difference > 0).sum()
  assert different < 0.002 * 9 * 48 * 50 * 3


def test_only_what_grows_beyond_reason_is_refused():
  resizing._check_growth((10_000, 10_000), (9_000, 9_000), 90_000_000)
  with pytest.raises(CorruptPictureError, match="too long and thin"):
    resizing._check_growth((9_000, 9_000), (9_100, 9_100), 82_810_000)
  thin = np.zeros((1, 2**20, 3), np.uint8)
  with pytest.raises(CorruptPictureError, match="to be resized to 32 x 33,554,432"):
    resize_image(thin, (32, 2**25), "nearest", (0, 0, 32, 32))
  assert resize_image(thin, (32, 2**25), "bicubic", (0, 2**24, 32, 32)).shape == (32, 32, 3)


def test_pictures_of_other_channels_and_types():
  noise = np.random.default_rng(2).random((20, 30, 4), np.float32)
  got = resize_image(noise, (8, 9), "bilinear")
  assert got.shape == (8, 9, 4) and got.dtype == np.float32
  for i in range(4):
    np.testing.assert_array_equal(got[..., i], by_pillow(noise[..., i], (8, 9), "bilinear"))
  grey = (noise[..., :1] * 255).astype(np.uint8)
  np.testing.assert_array_equal(
    resize_image(grey, (8, 9), "bicubic")[..., 0], by_pillow(grey[..., 0], (8, 9), "bicubic")
  )
  with pytest.raises(TypeError, match="pictures of int64 cannot be resized; uint8 or float32"):
    resize_image(noise.astype(np.int64), (8, 9), "bicubic")
