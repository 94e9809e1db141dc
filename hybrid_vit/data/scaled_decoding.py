"""JPEGs that are decoded at a half, a quarter or an eighth, where a crop is that much too large.

A decoder leaves out the higher frequencies of each block of 8 x 8 pixels, and most of its work with
them. The size is read from the header, so that operations on the plane draw what they always do;
what they drew is then applied to the smaller picture, in fractions of its pixels. The result
differs from that of the whole picture: see `decode` of `hybrid_vit.data.operations`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hybrid_vit.data.decoding import decode_picture, jpeg_size
from hybrid_vit.data.geometry import Crop, OnPlaneLater, Plane, Resize, ResizedCrop, Size, merged
from hybrid_vit.data.resizing import resize_box

_DIVISORS = (8, 4, 2)


class ScaledPicture(OnPlaneLater):
  """A JPEG that is decoded when what is wanted of it is known.

  Args:
    encoded: the file's bytes.
    decoder: see `decode_picture`.
    size: (height, width) of the whole picture.
    planes: what has been done to it, in order.
  """

  def __init__(self, encoded: bytes, decoder: str, size: Size, planes: Sequence[Plane] = ()):
    self._encoded, self._decoder = encoded, decoder
    self._before, self._planes = size, list(planes)

  @property
  def shape(self) -> tuple[int, int, int]:
    """(height, width, 3) now."""
    return (*(self._planes[-1].size if self._planes else self._before), 3)

  def moved(self, plane: Plane) -> ScaledPicture:
    """The picture after a change of its plane."""
    return ScaledPicture(self._encoded, self._decoder, self._before, [*self._planes, plane])

  def decoded(self) -> np.ndarray:
    """The picture, uint8 RGB `[height, width, 3]`.

    Raises:
      CorruptPictureError: see `decode_picture`.
    """
    planes: Sequence[Plane] = merged(self._planes)
    top, left, height, width, rest = self._cropped(planes)
    resize = rest[0] if rest else None
    divisor = 1
    if isinstance(resize, Resize | ResizedCrop) and resize.interpolation != "nearest":
      whole = resize.whole if isinstance(resize, ResizedCrop) else resize.size
      divisor = _divisor((height, width), whole)
    image = decode_picture(self._encoded, self._decoder, divisor)
    if divisor > 1:
      assert isinstance(resize, Resize | ResizedCrop)
      box = left / divisor, top / divisor, (left + width) / divisor, (top + height) / divisor
      image = resize_box(image, whole, resize.interpolation, box)
      if isinstance(resize, ResizedCrop):
        image = Crop(resize.size, whole, resize.top, resize.left).image(image)
      planes = rest[1:]
    for plane in planes:
      image = plane.image(image)
    return image

  def _cropped(self, planes: Sequence[Plane]) -> tuple[int, int, int, int, Sequence[Plane]]:
    """(top, left, height, width) of the crop that comes first, and what follows."""
    height, width = self._before
    crop = planes[0] if planes else None
    if not isinstance(crop, Crop):
      return 0, 0, height, width, planes
    inside = 0 <= crop.top <= height - crop.size[0] and 0 <= crop.left <= width - crop.size[1]
    # One that reaches beyond the border is made of the whole picture.
    return crop.top, crop.left, *crop.size, planes[1:] if inside else ()


def scaled_picture(encoded: bytes, decoder: str) -> ScaledPicture | np.ndarray:
  """A JPEG to be decoded later, or a picture of another format, decoded whole."""
  size = jpeg_size(encoded)
  if size is None:
    return decode_picture(encoded, decoder, 1)
  return ScaledPicture(encoded, decoder, size)


def _divisor(before: Size, after: Size) -> int:
  """By how much the sides can be divided and stay no shorter than they are wanted."""
  for divisor in _DIVISORS:
    if before[0] >= divisor * after[0] and before[1] >= divisor * after[1]:
      return divisor
  return 1
