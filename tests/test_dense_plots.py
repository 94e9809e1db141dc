"""Maps and depth as files and drawn: they read back, and show what is wrong."""

import numpy as np
import pytest
from PIL import Image

from hybrid_vit.data.map_reading import read_depth, read_labels
from hybrid_vit.data.palettes import spread_palette
from hybrid_vit.data.sources import create_source
from hybrid_vit.dense_plots import (
  overlay,
  plot_depth,
  plot_segmentation,
  save_depth,
  save_map,
)

PALETTE = spread_palette(9)


@pytest.fixture(scope="module")
def scene():
  source = create_source("scenes", "train")
  return source[3] | {"names": source.info["map_class_names"]}


def pixels(png, colour):
  return (np.asarray(Image.open(png).convert("RGB")) == colour).all(-1).sum()


def test_maps_read_back_in_their_colours(tmp_path, scene):
  labels = scene["map"].copy()
  labels[:5] = 255
  path = tmp_path / "new" / "map.png"
  save_map(labels, PALETTE, path)
  np.testing.assert_array_equal(read_labels(path.read_bytes(), "map.png"), labels)
  seen = np.asarray(Image.open(path).convert("RGB"))
  np.testing.assert_array_equal(seen[5:], PALETTE[labels[5:]])
  assert (seen[:5] == 0).all()


@pytest.mark.parametrize("scale", [1000.0, 256.0])
def test_depth_reads_back(tmp_path, scene, scale):
  path = tmp_path / "depth.png"
  save_depth(scene["depth"], path, scale)
  found = read_depth(path.read_bytes(), "depth.png", scale)
  np.testing.assert_allclose(found, scene["depth"], atol=0.51 / scale)


@pytest.mark.parametrize("depth", [-1.0, 66.0, np.nan, np.inf])
def test_depth_that_does_not_fit(tmp_path, depth):
  with pytest.raises(ValueError, match=r"0 to 65.535 m fit into 16 bits at 1000 units"):
    save_depth(np.full((2, 2), depth), tmp_path / "depth.png")
  assert not (tmp_path / "depth.png").exists()


def test_overlay_mixes_grey_and_the_classs_colour():
  photo = np.full((1, 2, 3), (30, 60, 90), np.uint8)
  out = overlay(photo, np.array([[1, 255]]), np.array([(0, 0, 0), (200, 100, 0)]))
  np.testing.assert_array_equal(out[0, 0], np.round(0.4 * 60 + 0.6 * np.array([200, 100, 0])))
  np.testing.assert_array_equal(out[0, 1], np.round(0.4 * 60 + 0.6 * np.array([128] * 3)))
  np.testing.assert_array_equal(
    overlay(photo / 255, np.array([[1, 255]]), PALETTE)[0, 1], out[0, 1]
  )


def test_segmentation_shows_what_is_wrong(tmp_path, scene):
  path = tmp_path / "seg.png"
  truth = scene["map"].copy()
  truth[:8] = 255
  wrong = (192, 28, 28)
  given = scene["image"], truth, scene["names"], PALETTE, path
  plot_segmentation(*given, truth=truth)
  assert not pixels(path, wrong) and pixels(path, (214, 230, 214)) > 50_000
  assert pixels(path, (128, 128, 128)) > 10_000
  plot_segmentation(scene["image"], (scene["map"] + 1) % 9, scene["names"], PALETTE, path, truth)
  assert pixels(path, wrong) > 10_000
  plot_segmentation(*given)
  alone = Image.open(path).size
  plot_segmentation(*given, truth=truth)
  assert Image.open(path).size[0] > 1.5 * alone[0]


def test_depth_shows_what_was_not_measured(tmp_path, scene):
  path = tmp_path / "depth.png"
  truth = scene["depth"].copy()
  plot_depth(scene["image"], truth, path, truth)
  assert pixels(path, (128, 128, 128)) < 500
  truth[:20] = 0
  plot_depth(scene["image"], scene["depth"], path, truth)
  assert pixels(path, (128, 128, 128)) > 50_000
  plot_depth(scene["image"], scene["depth"], path)
  plot_depth(scene["image"], scene["depth"], path, np.zeros_like(truth))  # nothing measured


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(predicted=np.full((64, 64), 9)), "label 9 has no colour; 0 to 8 have"),
    (dict(predicted=np.zeros((64, 63), int)), "the photo is 64 x 64 and the prediction"),
    (dict(truth=np.zeros((63, 64), int)), "the photo is 64 x 64 and the truth"),
    (dict(names=("a",)), "1 names of classes and 9 colours"),
  ],
)
def test_refused(tmp_path, scene, change, message):
  given = dict(predicted=scene["map"], names=scene["names"], palette=PALETTE, truth=scene["map"])
  with pytest.raises(ValueError, match=message):
    plot_segmentation(scene["image"], png=tmp_path / "x.png", **{**given, **change})
  assert not (tmp_path / "x.png").exists()
