"""Scenes: a function of their number; maps, masks, boxes, depth and captions agree."""

import numpy as np
import pytest

from hybrid_vit.data.scene_captions import QUALITIES
from hybrid_vit.data.scenes import (
  COLORS,
  SHAPES,
  TEXTURES,
  SceneSource,
  class_names,
  draw_scene,
  held_out,
  render,
)
from hybrid_vit.data.sources import create_source

SOURCE = SceneSource(size=48, objects=4)


def same(a, b):
  return all(
    a[k] == b[k] if isinstance(a[k], dict | int) else np.array_equal(a[k], b[k]) for k in a
  )


def test_a_scene_follows_from_its_number():
  other = create_source("scenes:size=48,objects=4", "train")
  assert len(other) == 20_000 and len(create_source("scenes:count=7", "test")) == 7
  assert len(create_source("scenes", "validation[:10%]")) == 100
  for index in (0, 17, 19_999):
    assert same(SOURCE[index], other[index])
  first = SOURCE[0]
  for changed in (
    SOURCE[1],
    SceneSource("validation", size=48)[0],
    SceneSource(size=48, seed=1)[0],
  ):
    assert not np.array_equal(first["image"], changed["image"])


@pytest.mark.parametrize("size", [31, 64])
def test_maps_masks_boxes_and_depth_agree(size):
  source = SceneSource("test", size=size, objects=5)
  several = 0
  for index in range(60):
    scene = source[index]
    masks, boxes, labels = scene["masks"], scene["boxes"], scene["box_labels"]
    assert scene["image"].shape == (size, size, 3) and scene["image"].dtype == np.uint8
    assert len(masks) == len(boxes) == len(labels)
    # What is visible belongs to one object at most; the map is made of the same parts.
    assert masks.sum(0).max() <= 1
    classes = np.zeros((size, size), np.int32)
    for mask, label in zip(masks, labels):
      assert mask.any()
      classes[mask > 0] = 1 + label
    np.testing.assert_array_equal(classes, scene["map"])
    for mask, (x0, y0, x1, y1) in zip(masks, boxes):
      inside = mask[int(y0) : int(y1), int(x0) : int(x1)]
      assert inside.sum() == mask.sum()
      edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
      assert all(edge.any() for edge in edges)
    # Objects are nearer than the background, the main one nearest.
    depth = scene["depth"]
    assert depth.min() > 0 and depth.dtype == np.float32
    if len(masks) > 1:
      several += 1
      assert depth[masks[0] > 0].max() < min(depth[m > 0].min() for m in masks[1:]) + 0.7
    assert depth[masks.any(0)].max() < 4.5 < depth[scene["map"] == 0].max()
  assert several > 20


def test_a_shape_is_as_large_as_its_formula_says():
  """Areas in radii: pixels counted at 400 px against the closed forms."""
  expected = {
    "circle": np.pi * 0.95**2,
    "square": 1.7**2,
    "ring": np.pi * (1.0 - 0.5**2),
    "cross": 2 * (2.0 * 0.66) - 0.66**2,
    "triangle": 3 * np.sqrt(3) * 0.55**2,
    "diamond": 2 * (0.66 * np.hypot(1.35, 1)) ** 2 / 1.35,
  }
  v, u = np.mgrid[-1.5:1.5:400j, -1.5:1.5:400j]
  for shape, area in expected.items():
    assert (SHAPES[shape](u, v) < 0).mean() * 9 == pytest.approx(area, rel=0.02), shape
  for shape, distance in SHAPES.items():
    inside = distance(u, v) < 0
    assert 0.3 < inside.mean() * 9 < 3.0, shape
    assert not inside[np.hypot(u, v) > 1.205].any(), shape


def test_the_picture_has_the_colors_of_its_objects():
  nearest = 0
  rng = np.random.default_rng(0)
  for _ in range(80):
    (one,) = draw_scene(rng, 1, "all")
    scene = render([one], 64, rng)
    mean = scene["image"][scene["masks"][0] > 0].mean(0)
    # Textures darken, so that hue counts: the direction of the color.
    unit = {n: np.array(c) / np.linalg.norm(c) for n, c in COLORS.items()}
    nearest += max(unit, key=lambda n, m=mean: unit[n] @ m / np.linalg.norm(m)) == one.color
  assert nearest >= 76


def test_captions_say_what_is_there():
  for index in range(60):
    scene = SOURCE[index]
    captions = scene["captions"]
    assert tuple(captions) == QUALITIES
    color, shape = class_names()[scene["label"]].split(" ")
    assert captions["short"] == [f"a {color} {shape}"]
    shapes = [list(SHAPES)[label] for label in scene["box_labels"]]
    assert shapes[0] == shape
    for caption in captions["exact"]:
      words = caption.replace(",", " ").split()
      assert sorted(w for w in words if w in SHAPES) == sorted(shapes)
      assert next(w for w in words if w in COLORS) == color
    words = sorted(captions["exact"][0].replace(",", "").split())
    assert sorted(captions["shuffled"][0].split()) == words
    wrong = captions["wrong"][0].split()
    assert next(w for w in wrong if w.strip(",") in SHAPES).strip(",") != shape
    assert next(w for w in wrong if w in COLORS) != color


def test_a_caption_without_noise_is_true_and_noise_comes_at_its_rate():
  for noise, least, most in ((0.0, 0, 0), (1.0, 100, 100), (0.4, 28, 52)):
    source = SceneSource(size=16, noise=noise)
    bad = 0
    for index in range(100):
      captions = source[index]["captions"]
      bad += captions["noisy"][0] != captions["exact"][0]
    # A shuffled caption of few words may by chance be the same.
    assert least - 3 * (noise == 1) <= bad <= most


def test_held_out_pairs_are_in_no_training_scene():
  pairs = [(s, c) for s in SHAPES for c in COLORS if held_out(s, c)]
  assert len(pairs) == 8 == len({s for s, _ in pairs}) == len({c for _, c in pairs})
  rng = np.random.default_rng(0)
  seen = set()
  for _ in range(3000):
    seen |= {(one.shape, one.color) for one in draw_scene(rng, 4, "seen")}
  assert len(seen) == 56 and not seen & set(pairs)
  mains = [draw_scene(rng, 3, "held_out") for _ in range(300)]
  assert {(scene[0].shape, scene[0].color) for scene in mains} == set(pairs)
  assert not {(o.shape, o.color) for scene in mains for o in scene[1:]} & set(pairs)
  names = {
    class_names()[SceneSource("test", combinations="held_out")[i]["label"]] for i in range(9)
  }
  assert names <= {f"{c} {s}" for s, c in pairs}
  assert {one.texture for scene in mains for one in scene} == set(TEXTURES)


@pytest.mark.parametrize(
  ("spec", "split", "message"),
  [
    ("scenes:sise=64", "train", "'sise=64' is none of its arguments; there are size, count"),
    ("scenes:size=big", "train", "size is 'big'; a number was expected"),
    ("scenes:size=6.5", "train", "size is '6.5'; a number was expected"),
    ("scenes:size=8", "train", "size is 8; 16 to 4096 was expected"),
    ("scenes:noise=2", "train", "noise is 2; 0 to 1 was expected"),
    ("scenes:combinations=new", "train", "combinations is 'new'; one of seen, held_out, all"),
    ("scenes", "all", "scenes has train, validation and test"),
  ],
)
def test_bad_arguments_are_named(spec, split, message):
  with pytest.raises(ValueError, match=message):
    create_source(spec, split)
