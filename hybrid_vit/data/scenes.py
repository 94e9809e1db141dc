"""Scenes drawn from their number alone: picture, captions, maps, masks, boxes and depth, exactly.

    scenes                                  20,000 for training, 1,000 held out
    scenes:size=96,count=5000,objects=2     side in pixels, how many, most objects of one
    scenes:noise=0.5                        so often a "noisy" caption is a bad one
    scenes:combinations=held_out            the main object has a pair of shape and colour that no
                                            training scene has: for zero-shot classification

One to four objects (shape, colour, size, texture, place) stand before a background. The first one
is the main object: large, and nearest. Everything follows from (seed, split, index). An example:

    image        uint8 [S, S, 3]
    label        of the main object's pair of colour and shape; the names are in `class_names`
    captions     {quality: [caption, …]}, see `scene_captions`
    map          int32 [S, S], 0 for the background, 1 + number of the shape
    segments     int32 [S, S], 0 for the background, 1, 2 … for each object
    segment_labels  int32 [1 + N], their classes in the map; segment_crowd, none of them
    masks        uint8 [N, S, S], the visible part of each object, the main one first
    boxes        float32 [N, 4], (x0, y0, x1, y1) around it, in pixels
    box_labels   int32 [N], number of the shape
    depth        float32 [S, S], metres

Maps are exact at the centres of pixels; the picture's edges are smooth.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybrid_vit.data.palettes import spread_palette
from hybrid_vit.data.scene_captions import pick, scene_captions
from hybrid_vit.data.segments import panoptic_fields
from hybrid_vit.data.splits import PARTS

COLORS: Mapping[str, tuple[int, int, int]] = {
  "red": (214, 48, 42),
  "green": (60, 168, 66),
  "blue": (52, 92, 214),
  "yellow": (236, 208, 50),
  "purple": (140, 62, 182),
  "orange": (242, 138, 34),
  "turquoise": (54, 196, 190),
  "pink": (242, 142, 186),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
SIZES = ("small", "large")
COMBINATIONS = ("seen", "held_out", "all")
# Radius over the picture's side, of small and of large ones.
_RADII = ((0.09, 0.13), (0.17, 0.22))
# Metres: objects, and the background behind them.
_NEAR, _FAR, _BEHIND = 1.0, 4.0, 6.0
# Less of an object than this part of it, or than so many pixels, is not called visible.
_VISIBLE, _PIXELS = 0.35, 10


@dataclasses.dataclass(frozen=True)
class SceneObject:
  """One object as it was drawn.

  Attributes:
    shape: a key of `SHAPES`.
    color: a key of `COLORS`.
    size: of `SIZES`.
    texture: of `TEXTURES`.
    place: "top left" … "center" … "bottom right".
    center: (x, y) over the side, in [0, 1].
    radius: over the side.
    angle: of rotation, radians.
    distance: of its center from the eye, metres.
  """

  shape: str
  color: str
  size: str
  texture: str
  place: str
  center: tuple[float, float]
  radius: float
  angle: float
  distance: float


class SceneSource:
  """Random access to scenes; see the head of this file.

  Args:
    split: "train", "validation" or "test": other scenes each.
    size: side of the picture in pixels.
    count: how many; None for 20,000 of training and 1,000 of each other split.
    objects: the most in one scene, 1 to 5.
    noise: part of the "noisy" captions that are bad, 0 to 1.
    combinations: which pairs of shape and colour the main object has: "seen" ones, which training
      has by default, "held_out" ones, or "all"; the other objects' are always seen ones, but under
      "all".
    seed: of all.

  Raises:
    ValueError: an argument out of range.
  """

  def __init__(
    self,
    split: str = "train",
    size: int = 64,
    count: int | None = None,
    objects: int = 4,
    noise: float = 0.5,
    combinations: str | None = None,
    seed: int = 0,
  ):
    self._split, self._size, self._seed = split, size, seed
    self._objects, self._noise = objects, noise
    self._count = (20_000 if split == "train" else 1_000) if count is None else count
    self._combinations = combinations or ("seen" if split == "train" else "all")
    if split not in PARTS:
      raise ValueError(f"scenes: split {split!r} is not one of {', '.join(PARTS)}")
    for name, value, least, most in (
      ("size", size, 16, 4096),
      ("count", self._count, 1, 2**31 - 1),
      ("objects", objects, 1, 5),
      ("noise", noise, 0, 1),
      ("seed", seed, 0, 2**31 - 1),
    ):
      if not least <= value <= most:
        raise ValueError(f"scenes: {name} is {value}; {least} to {most} was expected")
    if self._combinations not in COMBINATIONS:
      raise ValueError(
        f"scenes: combinations is {combinations!r}; one of {', '.join(COMBINATIONS)} was expected"
      )
    self.info: dict[str, Any] = {
      "class_names": class_names(),
      "map_class_names": ("background", *SHAPES),
      "palette": spread_palette(1 + len(SHAPES)),
      "thing_classes": tuple(range(1, 1 + len(SHAPES))),
      "object_class_names": tuple(SHAPES),
      "object_palette": spread_palette(1 + len(SHAPES))[1:],
    }

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> dict[str, Any]:
    rng = np.random.default_rng((self._seed, PARTS.index(self._split), index))
    scene = draw_scene(rng, self._objects, self._combinations)
    found = render(scene, self._size, rng)
    kept = [scene[i] for i in found.pop("kept")]
    found["label"] = list(COLORS).index(kept[0].color) * len(SHAPES) + list(SHAPES).index(
      kept[0].shape
    )
    found["captions"] = scene_captions(kept, self._noise, rng)
    return found

  def describe(self, index: int) -> str:
    """See `sources.Source`."""
    return f"scene {index} of {self._split}"


def open_scenes(spec: str, split: str) -> SceneSource:
  """ "scenes:size=96,noise=0.5" → the source.

  Raises:
    ValueError: an argument that there is not, or out of range.
  """
  _, _, rest = spec.partition(":")
  arguments: dict[str, Any] = {}
  known = {"size": int, "count": int, "objects": int, "noise": float, "seed": int}
  for part in filter(None, rest.split(",")):
    name, equals, text = (piece.strip() for piece in part.partition("="))
    if not equals or name not in (*known, "combinations"):
      raise ValueError(
        f"data source {spec!r}: {part!r} is none of its arguments; there are "
        f"{', '.join((*known, 'combinations'))}, as in scenes:size=64,noise=0.5"
      )
    if name == "combinations":
      arguments[name] = text
      continue
    try:
      value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      value = None
    if isinstance(value, bool) or not isinstance(value, int | known[name]):
      raise ValueError(f"data source {spec!r}: {name} is {text!r}; a number was expected")
    arguments[name] = value
  return SceneSource(split, **arguments)


def class_names() -> tuple[str, ...]:
  """ "red circle" and so on: the pairs of the label, colour by colour."""
  return tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)


def held_out(shape: str, color: str) -> bool:
  """Whether a pair is kept from training: one for each shape and each colour."""
  return (3 * list(SHAPES).index(shape) + 1) % len(COLORS) == list(COLORS).index(color)


def draw_scene(
  rng: np.random.Generator, most: int = 4, combinations: str = "seen"
) -> list[SceneObject]:
  """The objects, the main one first, each in a cell of its own of three by three."""
  count = int(rng.integers(1, most + 1))
  cells = rng.permutation(9)[:count]
  objects = []
  for number, cell in enumerate(cells):
    which = combinations if number == 0 or combinations == "all" else "seen"
    while True:
      shape, color = pick(rng, tuple(SHAPES)), pick(rng, tuple(COLORS))
      if which == "all" or held_out(shape, color) == (which == "held_out"):
        break
    large = number == 0 or rng.random() < 0.3
    row, column = divmod(int(cell), 3)
    jitter = rng.uniform(-0.07, 0.07, 2)
    words = (("top", "", "bottom")[row], ("left", "", "right")[column])
    objects.append(
      SceneObject(
        shape=shape,
        color=color,
        size=SIZES[int(large)],
        texture=pick(rng, TEXTURES),
        place=" ".join(filter(None, words)) or "center",
        center=(0.22 + 0.28 * column + jitter[0], 0.22 + 0.28 * row + jitter[1]),
        radius=float(rng.uniform(*_RADII[int(large)])),
        angle=float(rng.uniform(-0.26, 0.26)),
        distance=_NEAR if number == 0 else float(rng.uniform(_NEAR + 0.4, _FAR)),
      )
    )
  return objects


def render(objects: list[SceneObject], size: int, rng: np.random.Generator) -> dict[str, Any]:
  """Picture, maps, masks, boxes and depth; "kept", the numbers of the objects that can be seen.

  Objects of which too little is visible stay in picture and depth, and are background in the other
  maps; the main object, which is nearest, is never one of them.
  """
  x, y = _centers(size)
  depth = _BEHIND + rng.uniform(-1, 1) + rng.uniform(-1, 1) * (x - 0.5) + (0.5 - y)
  picture = _background(size, rng)
  owner = np.full((size, size), -1, np.int32)
  areas = {}
  far_first = sorted(range(len(objects)), key=lambda i: -objects[i].distance)
  for number in far_first:
    one = objects[number]
    # Nothing of a shape is further than 1.2 radii from its center.
    reach = 1.2 * one.radius + 1.0 / size
    part = tuple(
      slice(max(0, int((c - reach) * size)), max(0, int((c + reach) * size) + 1))
      for c in one.center[::-1]
    )
    dx, dy = (x[part] - one.center[0]) / one.radius, (y[part] - one.center[1]) / one.radius
    cos, sin = np.cos(one.angle), np.sin(one.angle)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    # In pixels: negative inside.
    distance = SHAPES[one.shape](u, v) * (one.radius * size)
    coverage = np.clip(0.5 - distance, 0, 1)[..., None]
    picture[part] += coverage * (_paint(one, u, v, rng) - picture[part])
    inside = distance < 0
    owner[part][inside] = number
    areas[number] = int(inside.sum())
    tilt = rng.uniform(-0.2, 0.2, 2)
    slope = one.distance + tilt[0] * dx + tilt[1] * dy
    depth[part] = np.where(inside, slope, depth[part])
  light = 1.0 + rng.uniform(-0.25, 0.25) * (x - 0.5) + rng.uniform(-0.25, 0.25) * (y - 0.5)
  noise = rng.standard_normal(picture.shape, np.float32)
  picture = picture * light[..., None] + 5 * noise
  seen = {i: int((owner == i).sum()) for i in range(len(objects))}
  kept = [i for i in seen if i == 0 or (seen[i] >= _PIXELS and seen[i] >= _VISIBLE * areas[i])]
  masks = np.stack([owner == i for i in kept]).astype(np.uint8)
  labels = np.array([list(SHAPES).index(objects[i].shape) for i in kept], np.int32)
  rows = np.zeros((size, size), np.int32)
  for number, mask in enumerate(masks):
    rows[mask > 0] = 1 + number
  # The background first.
  classes = np.concatenate([np.zeros(1, np.int32), 1 + labels])
  return {
    "image": np.clip(np.round(picture), 0, 255).astype(np.uint8),
    "map": classes[rows],
    **panoptic_fields(rows, classes, np.zeros(len(classes), bool)),
    "masks": masks,
    "boxes": np.stack([_box(mask) for mask in masks]),
    "box_labels": labels,
    "depth": depth.astype(np.float32),
    "kept": kept,
  }


@functools.lru_cache(maxsize=4)
def _centers(size: int) -> tuple[np.ndarray, np.ndarray]:
  places = (np.arange(size) + 0.5) / size
  x, y = np.meshgrid(places, places)
  return x, y


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
  """A gradient between two pale or dark greys of a tint, with soft clouds."""
  x, y = _centers(size)
  base = rng.uniform(40, 215)
  corners = base + rng.uniform(-30, 30, (2, 3))
  way = np.cos(angle := rng.uniform(0, 2 * np.pi)) * x + np.sin(angle) * y
  way = (way - way.min()) / (way.max() - way.min())
  soft = _softening(size)
  clouds = soft @ rng.normal(0, 9, (6, 6)) @ soft.T
  return corners[0] + way[..., None] * (corners[1] - corners[0]) + clouds[..., None]


@functools.lru_cache(maxsize=4)
def _softening(size: int) -> np.ndarray:
  """Linear interpolation of 6 values to `size`, as a matrix `[size, 6]`."""
  at = np.clip((np.arange(size) + 0.5) * 6 / size - 0.5, 0, 5)
  return np.clip(1 - np.abs(at[:, None] - np.arange(6)), 0, 1)


def _paint(one: SceneObject, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """The object's colour everywhere, `[S, S, 3]`, with its texture and a little of chance."""
  color = np.clip(np.array(COLORS[one.color]) + rng.uniform(-16, 16, 3), 0, 255)
  if one.texture == "plain":
    return np.broadcast_to(color, (*u.shape, 3))
  # About four pieces across it: the thinnest that small objects show.
  phase = rng.uniform(0, 2 * np.pi, 2)
  a, b = np.sin(5.5 * u + phase[0]), np.sin(5.5 * v + phase[1])
  # Soft borders, so that nothing is jagged.
  wave = {"striped": a, "checkered": 3 * a * b, "dotted": 2 * (a + b) - 1.2}[one.texture]
  dark = np.clip(0.5 + 1.5 * wave, 0, 1)[..., None]
  return color * (1 - 0.55 * dark)


def _box(mask: np.ndarray) -> np.ndarray:
  rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
  return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def _polygon(u: np.ndarray, v: np.ndarray, sides: int, inner: float) -> np.ndarray:
  normals = -np.pi / 2 + np.pi + 2 * np.pi * np.arange(sides) / sides
  return np.maximum.reduce([np.cos(a) * u + np.sin(a) * v for a in normals]) - inner


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  """Five points: the nearest edge, all sectors folded into half of one."""
  half, outer, inner = np.pi / 5, 1.15, 0.5
  angle = np.abs((np.arctan2(u, -v) + half) % (2 * half) - half)
  radius = np.hypot(u, v)
  px, py = radius * np.cos(angle), radius * np.sin(angle)
  ex, ey = inner * np.cos(half) - outer, inner * np.sin(half)
  return ((px - outer) * ey - py * ex) / np.hypot(ex, ey)


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
  a, b = np.abs(u), np.abs(v)
  return np.minimum(np.maximum(a - 1.0, b - 0.33), np.maximum(b - 1.0, a - 0.33))


# Below 0 inside, in radii; right near the edge, where it matters.
SHAPES: Mapping[str, Any] = {
  "circle": lambda u, v: np.hypot(u, v) - 0.95,
  "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.85,
  "triangle": lambda u, v: _polygon(u, v, 3, 0.55),
  "star": _star,
  "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.25,
  "cross": _cross,
  "diamond": lambda u, v: (np.abs(1.35 * u) + np.abs(v)) / np.hypot(1.35, 1) - 0.66,
  "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 1.0, 0.85 - np.hypot(u - 0.5, v)),
}
