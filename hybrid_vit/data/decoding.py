"""Encoded pictures → uint8 RGB, by either decoder and by one set of rules.

PIL and the rules of `_as_rgb` decide; OpenCV, the faster one, reads only the formats in which its
pixels are the same.
"""

from __future__ import annotations

import io
import struct

import cv2
import numpy as np
from PIL import Image

from hybrid_vit.data.errors import CorruptExampleError

DECODERS = ("opencv", "pil")

# Of a picture; OpenCV has the same limit. A header that says more is taken for a damaged one.
MAX_PIXELS = 2**30
# As many as a byte of the file can hold: deflate packs 1,032 bytes of 8 one-bit pixels into one,
# JPEG spends a bit on each 8 x 8 block of one of its components, which may be sampled 4 x 1.
# A header that says more lies.
_MOST_PIXELS_A_BYTE = {"PNG": 1032 * 8, "JPEG": 64 * 8 * 4}

# OpenCV's flags by what they divide the sides by.
_REDUCED = {
  2: cv2.IMREAD_REDUCED_COLOR_2,
  4: cv2.IMREAD_REDUCED_COLOR_4,
  8: cv2.IMREAD_REDUCED_COLOR_8,
}

# The loader's threads are the parallelism; OpenCV's own would fight them.
cv2.setNumThreads(0)
# PIL's own limit is for web servers and refuses photos of 180 megapixels.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


class CorruptPictureError(CorruptExampleError):
  """Bytes that are no picture, only part of one, or one that cannot be worked on."""


def decode_picture(encoded: bytes, decoder: str = "pil", divisor: int = 1) -> np.ndarray:
  """The picture in a file, uint8 RGB `[H, W, 3]`.

  Of 16 bits a channel the upper 8 are kept, transparency is dropped, of an animation the first
  picture is taken, and orientation tags are not applied. Floating-point pictures run from 0 (black)
  to 1 (white).

  Args:
    encoded: the file's bytes: JPEG, PNG, WebP, BMP, PPM, GIF, TIFF and what else PIL reads.
    decoder: one of `DECODERS`. "opencv" is the faster one for JPEG, PNG and WebP; the pixels are
      PIL's.
    divisor: 1, or 2, 4 or 8 for a JPEG of which `jpeg_size` tells the size: its sides are divided
      by it, rounded up, by leaving out frequencies.

  Raises:
    CorruptPictureError: no picture, a part of one, or more than `MAX_PIXELS`; also where the
      header says more than the file can hold. Nothing is allocated for these.
    ValueError: an unknown decoder.
  """
  if decoder not in DECODERS:
    raise ValueError(f"decoder {decoder!r} is not one of {', '.join(DECODERS)}")
  header = _header(encoded)
  if header is not None:
    _check_size(header[0], header[1], header[2], len(encoded))
  if decoder == "opencv" and _is_for_opencv(encoded, header):
    image = _by_opencv(encoded, divisor)
    if image is not None:
      return image
  return _by_pil(encoded, divisor)


def jpeg_size(encoded: bytes) -> tuple[int, int] | None:
  """(height, width) by the header of a JPEG that is grey or has three colours; None for others.

  Raises:
    CorruptPictureError: see `decode_picture`.
  """
  header = _header(encoded)
  if header is None or header[0] != "JPEG" or header[3] not in (1, 3):
    return None
  _check_size("JPEG", header[1], header[2], len(encoded))
  return (header[2], header[1]) if header[1] and header[2] else None


def _by_opencv(encoded: bytes, divisor: int) -> np.ndarray | None:
  flags = cv2.IMREAD_COLOR_RGB if divisor == 1 else _REDUCED[divisor]
  try:
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags | cv2.IMREAD_IGNORE_ORIENTATION)
  except cv2.error:  # PIL says what is wrong with it.
    return None
  # There is no reduced RGB.
  return image if image is None or divisor == 1 else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _by_pil(encoded: bytes, divisor: int) -> np.ndarray:
  try:
    with Image.open(io.BytesIO(encoded)) as picture:
      _check_size(picture.format or "", picture.width, picture.height, len(encoded))
      if divisor > 1:
        picture.draft(picture.mode, (picture.width // divisor, picture.height // divisor))
      return _as_rgb(picture)
  except CorruptPictureError:
    raise
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    message = f"its header says more than the {MAX_PIXELS:,} pixels that are read"
    raise CorruptPictureError(message) from error
  except Exception as error:  # PIL's plugins raise whatever their formats bring up.
    raise CorruptPictureError(str(error) or type(error).__name__) from error


def _as_rgb(picture: Image.Image) -> np.ndarray:
  if picture.mode == "RGB":
    return np.asarray(picture)
  if picture.mode == "I" or picture.mode.startswith("I;16"):
    values = np.asarray(picture)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
      raise CorruptPictureError(f"whole numbers from {low} to {high}; 0 to 65535 was expected")
    grey = (values >> 8).astype(np.uint8)
  elif picture.mode == "F":
    values = np.asarray(picture)
    if not (values.min() >= 0 and values.max() <= 1):
      raise CorruptPictureError(
        f"floating-point numbers from {values.min():g} to {values.max():g}; 0 (black) to 1 (white) "
        "was expected"
      )
    grey = np.round(values * 255).astype(np.uint8)
  else:
    picture.info.pop("transparency", None)  # PIL would warn that it is lost
    return np.asarray(picture.convert("RGB"))
  return np.repeat(grey[..., None], 3, axis=-1)


def _check_size(format_name: str, width: int, height: int, length: int) -> None:
  size = f"its header says {width:,} x {height:,}"
  if width * height > MAX_PIXELS:
    raise CorruptPictureError(f"{size}, more than the {MAX_PIXELS:,} pixels that are read")
  most = _MOST_PIXELS_A_BYTE.get(format_name)
  if most is not None and width * height > most * length:
    raise CorruptPictureError(f"{size}, for which {length:,} bytes are too few")


def _is_for_opencv(encoded: bytes, header: tuple[str, int, int, int] | None) -> bool:
  """Whether it is whole and of a kind that OpenCV reads as PIL does.

  OpenCV may fill what is missing with grey without a word; PIL decides what is not clear from here:
  it refuses a truncated picture and reads one with foreign bytes after its end. It also converts
  CMYK in another way and takes another picture of an animation for the first.
  """
  if header is None:
    return encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP"
  format_name, _, _, components = header
  if format_name == "JPEG":
    return components in (1, 3) and b"\xff\xd9" in encoded[-64:]
  return b"IEND" in encoded[-64:] and b"acTL" not in encoded[: encoded.find(b"IDAT") + 1]


def _header(encoded: bytes) -> tuple[str, int, int, int] | None:
  """(format, width, height, components or 0) of a PNG or JPEG whose header can be read."""
  if encoded[:8] == b"\x89PNG\r\n\x1a\n" and encoded[12:16] == b"IHDR" and len(encoded) > 24:
    width, height = struct.unpack_from(">II", encoded, 16)
    return "PNG", width, height, 0
  if encoded[:2] != b"\xff\xd8":
    return None
  at = 2
  while at + 10 <= len(encoded) and encoded[at] == 0xFF:
    marker = encoded[at + 1]
    if marker == 0xFF:  # fill byte
      at += 1
    elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # without a length
      at += 2
    elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
      height, width, components = struct.unpack_from(">HHB", encoded, at + 5)
      return "JPEG", width, height, components
    elif marker in (0xD9, 0xDA):  # the end, or the pixels, before any size
      return None
    else:
      at += 2 + struct.unpack_from(">H", encoded, at + 2)[0]
  return None
