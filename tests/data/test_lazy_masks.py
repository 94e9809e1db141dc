"""Masks read through the changes of the plane are the moved bitmaps, bit for bit."""

import numpy as np
import pytest

from hybrid_vit.data.errors import CorruptExampleError
from hybrid_vit.data.lazy_masks import LazyMasks, as_lazy
from hybrid_vit.data.mask_encoding import decode_mask, encode_mask
from hybrid_vit.data.transforms import parse_transform
from tests.data.pictures import photo

KINDS = {"image": "image", "masks": "masks", "boxes": "boxes"}
CHAINS = [
  "flip_lr(1.0)",
  "resize((31, 77))",
  "resize((90, 50))|random_crop((40, 30))|flip_lr(1.0)|pad((64, 70))",
  "random_crop(32, padding=8)|resize(50)",
  "random_crop(32, padding=8, mode='reflect')",
  "flip_lr|color_jitter(0.4)|random_resized_crop(48)|center_crop(64)",
]


def masks(count=5, height=40, width=60):
  rng = np.random.default_rng(7)
  coarse = rng.integers(0, 2, (count, height // 4, width // 4)).astype(np.uint8)
  return np.repeat(np.repeat(coarse, 4, 1), 4, 2)


def lazy(bitmaps):
  return LazyMasks(bitmaps.shape[1:], [lambda b=b: encode_mask(b) for b in bitmaps])


@pytest.mark.parametrize("text", CHAINS)
@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_moving_the_bitmaps(text, seed):
  bitmaps = masks()
  out = {}
  for kind, value in {"array": bitmaps, "lazy": lazy(bitmaps), "wrapped": as_lazy(bitmaps)}.items():
    given = {"image": photo(0), "masks": value, "boxes": np.array([[3, 4, 20, 30.0]])}
    out[kind] = parse_transform(text, kinds=KINDS)(given, np.random.default_rng(seed))
    assert out[kind]["masks"].shape == out["array"]["masks"].shape
    np.testing.assert_array_equal(np.asarray(out[kind]["masks"]), out["array"]["masks"])
    np.testing.assert_array_equal(out[kind]["image"], out["array"]["image"])
  found, whole = out["lazy"]["masks"], out["array"]["masks"]
  np.testing.assert_array_equal(found.part(2, 3, 5, 20, 28), whole[2, 3:20, 5:28])
  np.testing.assert_array_equal(decode_mask(found.rle(1)), whole[1] > 0)


def test_rows_are_chosen():
  bitmaps = masks()
  value = lazy(bitmaps)
  for rows in (np.array([3, 0]), np.array([True, False, False, True, True]), slice(1, 3), []):
    rows = np.array(rows, int) if isinstance(rows, list) else rows
    chosen = value[rows]
    assert chosen.shape == bitmaps[rows].shape and len(chosen) == len(bitmaps[rows])
    np.testing.assert_array_equal(np.asarray(chosen), bitmaps[rows])
  assert np.asarray(value[:0]).shape == (0, 40, 60)


def test_nothing_is_read_before_it_is_asked_for():
  def read():
    raise CorruptExampleError("torn")

  value = LazyMasks((40, 60), [read])
  out = parse_transform("flip_lr(1.0)|resize(20)", kinds=KINDS)(
    {"image": photo(0), "masks": value}, np.random.default_rng(0)
  )
  assert out["masks"].shape == (1, 20, 20)
  with pytest.raises(CorruptExampleError, match="torn"):
    np.asarray(out["masks"])


def test_a_mask_of_another_size():
  value = LazyMasks((40, 60), [lambda: np.zeros((40, 61), bool)])
  with pytest.raises(CorruptExampleError, match="mask 0 is 40 x 61 and its picture 40 x 60"):
    np.asarray(value)
