"""The compiled resizing against Pillow's, to the bit."""

import numpy as np
import pytest
from PIL import Image

from hybrid_vit.data import resizing
from hybrid_vit.data.resizing import resize_image
from tests.data.pictures import photo


@pytest.fixture
def compiled():
  pytest.importorskip("numba")
  if resizing._compiled() is None:
    pytest.skip("its bits are known on x86-64 beside Pillow 13 alone")
  return resizing._compiled()


def pillow(image, size, interpolation):
  picture = Image.fromarray(np.ascontiguousarray(image))
  return np.asarray(picture.resize(size[::-1], resizing._FILTERS[interpolation]))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_every_bit_is_pillows(compiled, interpolation):
  rng = np.random.default_rng(0)
  orders = set()
  for number in range(150):
    before, after = rng.integers(1, 160, 2), rng.integers(1, 120, 2)
    # Black and white overshoot, so that what is cut off after each pass shows.
    image = rng.integers(0, 2, (*before, 3), np.uint8) * 255 if number % 2 else photo(1, *before)
    size = int(after[0]), int(after[1])
    order = resizing._columns_first(image.shape[:2], size)
    orders.add(order)
    whole = pillow(image, size, interpolation)
    top, left = (int(rng.integers(0, n)) for n in size)
    height, width = (int(rng.integers(1, n + 1)) for n in (size[0] - top, size[1] - left))
    part = compiled(
      image, size, resizing._SUPPORT[interpolation], (top, left, height, width), order
    )
    message = f"{before} to {size}, {part.shape} at {top}, {left}"
    expected = whole[top : top + height, left : left + width]
    np.testing.assert_array_equal(part, expected, message)
    np.testing.assert_array_equal(resize_image(image, size, interpolation), whole, message)
  assert orders == {True, False}


def test_views_and_read_only_pictures(compiled):
  image = photo(2, 90, 120)
  views = {"a crop": image[5:77, 9:100], "mirrored": image[:, ::-1], "read-only": image.copy()}
  views["read-only"].flags.writeable = False
  for name, view in views.items():
    expected = pillow(view, (40, 50), "bicubic")
    np.testing.assert_array_equal(resize_image(view, (40, 50), "bicubic"), expected, name)


def test_it_is_what_resizes_where_it_is_installed(compiled, monkeypatch):
  asked = []
  monkeypatch.setattr(resizing, "_compiled", lambda: lambda *given: asked.append(given))
  image = photo(3, 60, 80)
  resize_image(image, (30, 40), "bicubic", (3, 4, 20, 25))
  assert asked[0][1:] == ((30, 40), 2, (3, 4, 20, 25), False)
  asked.clear()
  resize_image(image, (60, 80), "bicubic")
  resize_image(image[..., :1], (30, 40), "bicubic")
  resize_image(image.astype(np.float32), (30, 40), "bicubic")
  resize_image(image, (900, 900), "bicubic", (0, 0, 9, 9))
  assert not asked  # nothing to do, grey, floats, and a small part of a large whole are Pillow's


@pytest.mark.parametrize("what", ["another machine", "another Pillow", "a broken numba"])
def test_pillow_resizes_where_it_cannot(monkeypatch, caplog, what):
  if what == "another machine":
    monkeypatch.setattr(resizing.platform, "machine", lambda: "arm64")
  elif what == "another Pillow":
    monkeypatch.setattr(resizing, "_PILLOW", 12)
  else:

    def broken(name):
      raise ImportError("Numba needs another NumPy")

    monkeypatch.setattr(resizing.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(resizing.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(resizing.importlib, "import_module", broken)
  resizing._compiled.cache_clear()
  image = photo(4, 70, 50)
  try:
    assert resizing._compiled() is None
    expected = pillow(image, (20, 30), "bicubic")
    np.testing.assert_array_equal(resize_image(image, (20, 30), "bicubic"), expected)
  finally:
    resizing._compiled.cache_clear()
  assert ("Numba needs another NumPy" in caplog.text) == (what == "a broken numba")
