"""Objects drawn over photos: colours, outlines, and what is left out."""

import numpy as np
import pytest
from PIL import Image

from hybrid_vit.data.lazy_masks import as_lazy
from hybrid_vit.data.palettes import spread_palette
from hybrid_vit.data.sources import create_source
from hybrid_vit.detection_plots import Shown, overlay_masks, plot_detections

PALETTE = spread_palette(8)
NAMES = tuple(f"class {i}" for i in range(8))


@pytest.fixture(scope="module")
def scene():
  return create_source("scenes:size=96", "train")[0]


def shown(scene, **more):
  return Shown(scene["boxes"], scene["box_labels"], **more)


def pixels(png, colour):
  return (np.asarray(Image.open(png).convert("RGB")) == colour).all(-1).sum()


def test_boxes_masks_and_scores(tmp_path, scene):
  path = tmp_path / "new" / "found.png"
  given = [scene["image"]], [shown(scene)], NAMES, PALETTE, path
  plot_detections(*given)
  alone = Image.open(path).size
  boxes_only = [pixels(path, PALETTE[label]) for label in scene["box_labels"]]
  assert min(boxes_only) > 100
  truth = shown(scene, masks=as_lazy(scene["masks"]))
  scores = np.linspace(0.9, 0.5, len(scene["boxes"]))
  plot_detections(
    [scene["image"]], [truth._replace(scores=scores)], NAMES, PALETTE, path, truths=[truth]
  )
  assert Image.open(path).size[0] > 1.9 * alone[0]
  assert all(
    pixels(path, PALETTE[label]) > count for label, count in zip(scene["box_labels"], boxes_only)
  )


def test_low_scores_are_not_drawn(tmp_path, scene):
  path = tmp_path / "found.png"
  scores = np.full(len(scene["boxes"]), 0.2)
  given = [scene["image"]], [shown(scene, scores=scores)], NAMES, PALETTE, path
  plot_detections(*given)
  assert not any(pixels(path, PALETTE[label]) for label in scene["box_labels"])
  plot_detections(*given, min_score=0.2)
  assert all(pixels(path, PALETTE[label]) for label in scene["box_labels"])


def test_overlay_has_an_outline_and_the_smaller_mask_on_top():
  photo = np.full((20, 20, 3), 100, np.uint8)
  masks = np.zeros((2, 20, 20), np.uint8)
  masks[0, 8:12, 8:12] = 1
  masks[1, 2:18, 2:18] = 1
  out = overlay_masks(photo, masks, np.array([0, 1]), PALETTE)
  np.testing.assert_array_equal(out[0, 0], photo[0, 0])
  np.testing.assert_array_equal(out[2, 2], PALETTE[1])
  np.testing.assert_array_equal(out[8, 8], PALETTE[0])
  below = 100 + 0.5 * (PALETTE[1].astype(float) - 100)
  np.testing.assert_array_equal(out[5, 5], np.round(below))
  np.testing.assert_array_equal(out[9, 9], np.round(below + 0.5 * (PALETTE[0] - below)))
  np.testing.assert_array_equal(
    overlay_masks(photo / 255, as_lazy(masks), np.array([0, 1]), PALETTE), out
  )


def test_a_thousand_objects_none_and_long_names(tmp_path, scene):
  path = tmp_path / "found.png"
  corners = np.random.default_rng(0).uniform(0, 90, (1000, 2))
  many = Shown(np.concatenate([corners, corners + 5], 1), np.zeros(1000, int), np.full(1000, 0.9))
  none = Shown(np.zeros((0, 4)), np.zeros(0, int), masks=np.zeros((0, 96, 96), np.uint8))
  names = ("an exceedingly long name of a class $x_1$",) * 8
  crowd = shown(scene, crowd=np.ones(len(scene["boxes"]), bool))
  photos = [scene["image"], scene["image"] / 255]
  plot_detections(photos, [many, none], names, PALETTE, path, truths=[none, crowd])
  assert Image.open(path).size[1] > 1000


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(predicted=[]), "1 photos and 0 predictions"),
    (dict(truths=[]), "1 photos and 0 truths"),
    (dict(names=("a",)), "1 names of classes and 8 colours"),
    (dict(labels=np.full(4, 8)), "label 8 has no name; 0 to 7 have"),
    (dict(scores=np.ones(1)), "prediction: 1 scores and 4 labels"),
    (dict(masks=np.zeros((4, 96, 95))), "the photo is 96 x 96 and the masks of the prediction"),
  ],
)
def test_refused(tmp_path, scene, change, message):
  assert len(scene["boxes"]) == 4
  one = shown(scene)._replace(**{k: v for k, v in change.items() if k in Shown._fields})
  given = dict(predicted=[one], names=NAMES, palette=PALETTE, truths=None)
  given |= {key: value for key, value in change.items() if key in given}
  with pytest.raises(ValueError, match=message):
    plot_detections([scene["image"]], png=tmp_path / "x.png", **given)
  assert not (tmp_path / "x.png").exists()
