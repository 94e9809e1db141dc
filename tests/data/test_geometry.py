"""Maps, depth, boxes, points and masks of one scene stay with its picture."""

import numpy as np
import pytest

from hybrid_vit.data import transform_registry
from hybrid_vit.data.transforms import (
  OnImages,
  OnPlane,
  Plane,
  parse_transform,
  register_transform,
  transform_signatures,
)
from tests.data.pictures import encoded, photo

KINDS = {
  "image": "image", "right": "image", "classes": "map", "depth": "depth", "boxes": "boxes",
  "points": "points", "masks": "masks", "caption": "text", "label": "value", "name": "host",
}  # fmt: skip
# Of each object: left, top, right, bottom. No two touch.
OBJECTS = np.array([[3, 5, 23, 21], [30, 2, 58, 12], [27, 17, 49, 38], [2, 26, 16, 40]])
COLOURS = np.array([[90, 80, 70], [250, 10, 20], [20, 240, 30], [40, 50, 230], [200, 210, 120]])
HEIGHT, WIDTH = 40, 60


def scene(kinds=KINDS):
  classes = np.zeros((HEIGHT, WIDTH), np.int32)
  for number, (left, top, right, bottom) in enumerate(OBJECTS):
    classes[top:bottom, left:right] = number + 1
  image = COLOURS[classes].astype(np.uint8)
  boxes = OBJECTS.astype(np.float32)
  made = {
    "image": image,
    "right": image[..., ::-1],
    "classes": classes,
    "depth": classes.astype(np.float32) + 0.5,
    "boxes": boxes,
    "points": (boxes[:, :2] + boxes[:, 2:]) / 2,
    "masks": np.stack([classes == n + 1 for n in range(4)]).astype(np.uint8),
    "caption": "four things",
    "label": 3,
    "name": "a.jpg",
  }
  return {name: made[name] for name in kinds}


def run(text, example=None, seed=0, kinds=KINDS):
  example = scene(kinds) if example is None else example
  before = {name: np.array(value) for name, value in example.items()}
  out = parse_transform(text, kinds=kinds)(example, np.random.default_rng(seed))
  for name, value in example.items():  # nothing is changed in place
    np.testing.assert_array_equal(value, before[name])
  return out


def check(out, exact, ignore=255, resizes=1):
  """Everything is where the map says it is; `exact`: the picture is made by the nearest pixel.

  Each of the resizes rounds the edges of the map to whole pixels.
  """
  classes = out["classes"]
  height, width = classes.shape
  shown = classes != ignore
  assert out["image"].shape == out["right"].shape == (height, width, 3)
  np.testing.assert_array_equal(out["right"], out["image"][..., ::-1])
  colours = np.where(shown[..., None], COLOURS[np.where(shown, classes, 0)], 0)
  away = np.abs(out["image"].astype(int) - colours).max(-1)
  if exact:
    assert away.max() == 0
  else:  # but for the blurred edges
    steps = np.ones((height, width), bool)
    padded = np.pad(classes, 3, mode="edge")
    for i in range(7):
      for j in range(7):
        steps &= padded[i : i + height, j : j + width] == classes
    assert steps.mean() > 0.05 and away[steps].max() <= 30
  np.testing.assert_array_equal(out["depth"], np.where(shown, classes + 0.5, 0))
  assert out["depth"].dtype == np.float32 and classes.dtype == np.int32
  assert out["masks"].dtype == np.uint8 and out["masks"].shape == (4, height, width)
  assert out["boxes"].dtype == out["points"].dtype == np.float32
  for number in range(4):
    mask = classes == number + 1
    np.testing.assert_array_equal(out["masks"][number], mask)
    x0, y0, x1, y1 = out["boxes"][number]
    assert 0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height
    if not mask.any():  # it may be there by less than half a pixel
      assert x1 - x0 <= 0.5 * resizes or y1 - y0 <= 0.5 * resizes
      continue
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    edges = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert np.abs(np.array([x0, y0, x1, y1]) - edges).max() <= 0.501 * resizes
    x, y = out["points"][number]
    if 1 <= x < width - 1 and 1 <= y < height - 1:
      assert classes[int(y), int(x)] in (number + 1, ignore)
  assert (out["caption"], out["label"], out["name"]) == ("four things", 3, "a.jpg")


OPERATIONS = [
  "resize(24, {f})",
  "resize((31, 90), {f})",
  "resize_short(17, {f})",
  "resize_short(64, {f})",
  "center_crop(24)",
  "center_crop(50)",
  "center_crop(71)",
  "resize_center_crop(32, 0.875, {f})",
  "resize_center_crop(32, 1.3, {f})",
  "random_resized_crop(32, interpolation={f})",
  "random_resized_crop(20, (0.5, 1.0), interpolation={f})",
  "random_crop(30)",
  "random_crop(30, 8)",
  "flip_lr(1.0)",
  "flip_lr(0.0)",
  "flip_lr|random_resized_crop(40, (0.4, 1.0), interpolation={f})|flip_lr|center_crop(48)",
  "resize_short(64, {f})|random_crop(48)|flip_lr",
  "resize_short(24, {f})|random_crop(60, 30)|resize(40, {f})",
  "center_crop(80)|resize_short(60, {f})|center_crop(50)|flip_lr(1.0)",
  "random_crop(30, 8)|resize(45, {f})|center_crop(64)",
]


@pytest.mark.parametrize("text", OPERATIONS)
def test_a_scene_stays_together(text):
  resizes = max(1, text.count("resize"))
  for seed in range(6):
    check(run(text.format(f="'nearest'"), seed=seed), exact=True, resizes=resizes)
  check(run(text.format(f="'bilinear'"), seed=0), exact="{f}" not in text, resizes=resizes)


@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_borders_that_go_on_do_so_in_every_key(mode):
  out = run(f"random_crop(50, 10, '{mode}')", seed=1)
  assert (out["classes"] != 255).all()
  np.testing.assert_array_equal(out["image"], COLOURS[out["classes"]])
  np.testing.assert_array_equal(out["depth"], out["classes"] + 0.5)
  np.testing.assert_array_equal(out["masks"][2], out["classes"] == 3)
  pads = ((10, 10), (10, 10))
  whole = np.pad(scene()["classes"], pads, mode=mode)
  rng = np.random.default_rng(1)
  top, left = int(rng.integers(0, 11)), int(rng.integers(0, 31))
  np.testing.assert_array_equal(out["classes"], whole[top : top + 50, left : left + 50])
  np.testing.assert_array_equal(out["points"], scene()["points"] + [10 - left, 10 - top])


def test_reflected_borders_of_a_resized_picture():
  out = run("resize((20, 30), 'nearest')|random_crop(50, 15, 'reflect')")
  np.testing.assert_array_equal(out["image"], COLOURS[out["classes"]])


def test_moves_in_numbers():
  out = run("flip_lr(1.0)")
  np.testing.assert_array_equal(out["boxes"][0], [60 - 23, 5, 60 - 3, 21])
  np.testing.assert_array_equal(out["points"][0], [60 - 13, 13])
  out = run("resize((20, 120))")
  np.testing.assert_array_equal(out["boxes"][0], [6, 2.5, 46, 10.5])
  np.testing.assert_array_equal(out["points"][0], [26, 6.5])
  # 20 columns go left, 10 rows go on top: the first object loses its left part and its upper one.
  out = run("center_crop(20)")
  np.testing.assert_array_equal(out["boxes"][0], [0, 0, 3, 11])
  np.testing.assert_array_equal(out["points"][0], [-7, 3])
  # Nothing is left of the second and fourth, whose rows stay.
  np.testing.assert_array_equal(out["boxes"][[1, 3]], [[10, 0, 20, 2], [0, 16, 0, 20]])
  out = run("center_crop(64)")
  np.testing.assert_array_equal(out["boxes"][0], [3 + 2, 5 + 12, 23 + 2, 21 + 12])
  assert (out["classes"][:12] == 255).all() and (out["depth"][:12] == 0).all()
  assert (out["image"][:12] == 0).all() and (out["masks"][:, :12] == 0).all()
  # Cut at the border of the crop, not of the picture around it.
  out = run("center_crop(20)|center_crop(40)")
  np.testing.assert_array_equal(out["boxes"][0], [10, 10, 13, 21])


def test_maps_are_padded_with_what_is_asked_for():
  for text in ("center_crop(64, 7)", "resize_center_crop(64, 2.0, 'nearest', ignore=7)"):
    out = run(text)
    assert (out["classes"][0] == 7).all()
    check(out, exact=True, ignore=7)
  out = run("random_crop(70, 15, ignore=7)")
  assert (out["classes"] == 7).any() and not (out["classes"] == 255).any()
  kinds = {"image": "image", "classes": "map"}
  example = {"image": photo(0), "classes": np.zeros((40, 60), np.int8)}
  with pytest.raises(ValueError, match=r"a map of int8 cannot hold 255, .* another `ignore`"):
    run("center_crop(64)", example, kinds=kinds)
  assert run("center_crop(64, 127)", example, kinds=kinds)["classes"][0, 0] == 127
  assert run("center_crop(40)", example, kinds=kinds)["classes"].dtype == np.int8


@pytest.mark.parametrize("text", OPERATIONS)
def test_a_picture_is_the_same_with_and_without_company(text):
  text = text.format(f="'bicubic'")
  for seed in range(3):
    alone = run(text, {"image": scene()["image"]}, seed, kinds=None)["image"]
    np.testing.assert_array_equal(run(text, seed=seed)["image"], alone)


def test_objects_may_be_none():
  example = scene() | {
    "boxes": np.zeros((0, 4), np.float32),
    "points": np.zeros((0, 2), np.float32),
    "masks": np.zeros((0, 40, 60), np.uint8),
  }
  out = run("resize_center_crop(24)|flip_lr(1.0)|random_crop(30, 4)", example)
  assert out["boxes"].shape == (0, 4) and out["points"].shape == (0, 2)
  assert out["masks"].shape == (0, 30, 30)


def test_keys_that_are_not_there_and_pictureless_examples():
  some = {name: scene()[name] for name in ("image", "boxes")}
  assert set(run("center_crop(24)", some)) == {"image", "boxes"}
  only = {name: scene()[name] for name in ("classes", "points")}
  assert run("center_crop(24)", only)["classes"].shape == (24, 24)
  with pytest.raises(ValueError, match=r"the example has none of 'image'.*; it has: label"):
    run("center_crop(24)", {"label": 1})
  with pytest.raises(ValueError, match="the example has none of 'image', 'right'; it has: classes"):
    run("three_augment", only | {"points": 0})


def test_sizes_that_differ_are_named():
  example = scene() | {"depth": np.zeros((20, 30), np.float32)}
  with pytest.raises(ValueError, match=r"'image' is 40 x 60 and 'depth' 20 x 30; .* one size"):
    run("center_crop(24)", example)
  example = scene() | {"masks": np.zeros((40, 60, 2), np.uint8)}
  with pytest.raises(ValueError, match="'image' is 40 x 60 and 'masks' 60 x 2"):
    run("center_crop(24)", example)
  with pytest.raises(TypeError, match="'classes' is bytes, not decoded: its source decodes it"):
    run("center_crop(24)", scene() | {"classes": b"png"})


COLOUR_OPERATIONS = [
  "color_jitter(0.4, 0.4, 0.4, 0.1)",
  "three_augment",
  "random_erasing(1.0)",
  "normalize(0.5, 0.5)",
]


@pytest.mark.parametrize("text", COLOUR_OPERATIONS)
def test_colours_change_in_pictures_alone_and_alike(text):
  pictures = {"image": photo(1), "right": photo(1)}
  out = run(text, scene() | pictures, seed=3)
  assert not np.array_equal(out["image"], photo(1))
  np.testing.assert_array_equal(out["image"], out["right"])
  for name in set(KINDS) - set(pictures):
    np.testing.assert_array_equal(out[name], scene()[name])
  # The second picture takes no further draws: what comes behind is the same as without it.
  alone = run(f"{text}|random_crop(30)", {"image": photo(1)}, seed=3, kinds=None)["image"]
  both = run(f"{text}|random_crop(30)", scene() | pictures, seed=3)
  np.testing.assert_array_equal(both["image"], alone)


@pytest.mark.parametrize("name", ["randaugment", "autoaugment"])
def test_what_moves_pictures_alone_is_refused_beside_maps(name):
  for key, kind in KINDS.items():
    kinds = {"image": "image", key: kind}
    if kind in ("map", "depth", "boxes", "points", "masks"):
      with pytest.raises(ValueError, match=rf"{name}.*, and '{key}' \({kind}\) cannot follow"):
        parse_transform(f"decode|{name}|flip_lr", kinds=kinds)
    else:
      parse_transform(f"decode|{name}|flip_lr", kinds=kinds)


def test_an_unknown_kind_is_named():
  with pytest.raises(ValueError, match="kind 'picture' of 'left' is not one of image, map"):
    parse_transform("decode", kinds={"left": "picture"})


def test_every_picture_is_decoded_and_nothing_else():
  raw = encoded(photo(1), "PNG")
  out = run("decode", {"image": raw, "right": photo(2), "name": raw})
  np.testing.assert_array_equal(out["image"], photo(1))
  np.testing.assert_array_equal(out["right"], photo(2))
  assert out["name"] == raw


@pytest.fixture
def registered(monkeypatch):
  """What a test registers is gone behind it."""
  monkeypatch.setattr(transform_registry, "REGISTRY", transform_registry.REGISTRY)
  names = set(transform_registry.REGISTRY)
  yield
  for name in set(transform_registry.REGISTRY) - names:
    del transform_registry.REGISTRY[name]


class QuarterTurn(Plane):
  def image(self, image):
    return np.rot90(image)

  def map(self, values, fill):
    return np.rot90(values)

  def points(self, points):
    return np.stack([points[:, 1], self.size[0] - points[:, 0]], axis=1)


@pytest.mark.usefixtures("registered")
def test_an_operation_from_outside_moves_every_key():
  @register_transform("quarter_turn")
  def quarter_turn(probability: float = 1.0) -> OnPlane:
    return OnPlane(
      lambda height, width, rng: QuarterTurn((width, height)) if rng.random() < probability else []
    )

  @register_transform("brighter")
  def brighter(by: int) -> OnImages:
    return OnImages(lambda image, rng: image + np.uint8(by))

  @register_transform("named")
  def named(*, kinds, decoder):
    return lambda example, rng: {**example, "name": f"{decoder} {len(kinds)}"}

  check(run("quarter_turn"), exact=True)
  check(run("resize_short(64, 'nearest')|quarter_turn|center_crop(50)|quarter_turn"), exact=True)
  assert run("quarter_turn(0.0)|center_crop(90)")["image"].shape == (90, 90, 3)
  np.testing.assert_array_equal(run("brighter(5)")["image"], scene()["image"] + 5)
  assert run("named")["name"] == "opencv 10"
  assert transform_signatures()["named"] == "named()"
