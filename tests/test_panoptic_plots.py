"""Drawn segments: colours of classes and shades of things, and what cannot be drawn."""

import numpy as np
import pytest
from PIL import Image

from hybrid_vit.mask_inference import PanopticPicture
from hybrid_vit.panoptic_plots import overlay_segments, plot_panoptic
from hybrid_vit.tasks.mask2former_inference import Segment

PALETTE = np.array([[250, 0, 0], [0, 0, 250]], np.uint8)
NAMES = ("sky", "bird $x$")


def _picture(size=(40, 60)):
  ids = np.ones(size, np.int32)
  ids[:10, :10] = 0
  ids[20:30, 5:15], ids[20:30, 30:45] = 2, 3
  found = (Segment(1, 0, False), Segment(2, 1, True), Segment(3, 1, True))
  return PanopticPicture(ids, found)


def test_segments_have_their_classes_colours():
  photo = np.full((40, 60, 3), 100, np.uint8)
  out = overlay_segments(photo, _picture(), PALETTE)
  assert (out[0, 0] == 100).all()
  sky, one, other = (out[place].astype(int) for place in ((35, 55), (25, 10), (25, 37)))
  assert sky[0] > sky[2] and one[2] > one[0]
  # Two of a class are told apart.
  assert np.abs(one - other).max() > 15


def test_a_drawing_is_written(tmp_path):
  photo = np.full((40, 60, 3), 100, np.uint8)
  empty = PanopticPicture(np.zeros((40, 60), np.int32), ())
  plot_panoptic(
    [photo, photo], [_picture(), empty], NAMES, PALETTE, tmp_path / "a.png",
    truths=[_picture(), _picture()],
  )  # fmt: skip
  plot_panoptic([photo], [_picture()], NAMES, PALETTE, tmp_path / "b.png")
  wide, narrow = (Image.open(tmp_path / name).size[0] for name in ("a.png", "b.png"))
  assert wide > 1.4 * narrow


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"photos": []}, "0 photos and 1 predictions"),
    ({"truths": []}, "1 photos and 0 truths"),
    ({"names": NAMES[:1]}, "1 names of classes and 2 colours"),
    ({"names": NAMES[:1], "palette": PALETTE[:1]}, "class 1 has no name; 0 to 0 have"),
    ({"predicted": [_picture((40, 61))]}, "40 x 60 and the map of the prediction 40 x 61"),
  ],
)
def test_what_cannot_be_drawn_is_told(change, message, tmp_path):
  fields = {
    "photos": [np.zeros((40, 60, 3), np.uint8)],
    "predicted": [_picture()],
    "names": NAMES,
    "palette": PALETTE,
    **change,
  }
  with pytest.raises(ValueError, match=message):
    plot_panoptic(**fields, png=tmp_path / "c.png")
