"""Captions of a scene at several qualities, from the objects as they were drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
  from hybrid_vit.data.scenes import SceneObject

# Exact: true, of all objects, with a part of their attributes each. Of the main object alone; what
# web pages have beside pictures; an exact one's words in another order; attributes replaced by
# wrong ones; and an exact one that is at a set rate one of the last three kinds instead.
QUALITIES = ("exact", "short", "alt", "shuffled", "wrong", "noisy")
# How many captions of a quality an example has.
_SEVERAL = {"exact": 3, "noisy": 3}
_SHOPS = ("free download", "buy online", "hd wallpaper", "best price", "stock photo", "clip art")
_NAMES = ("IMG", "DSC", "image", "photo", "pic", "scan")
_STARTS = ("", "", "a picture of ", "there is ", "this shows ")


def scene_captions(
  objects: Sequence[SceneObject], noise: float, rng: np.random.Generator
) -> dict[str, list[str]]:
  """{quality: captions}.

  Args:
    objects: that can be seen, the main one first.
    noise: the part of "noisy" captions that are bad.
    rng: draws all of it.
  """
  true = [true_caption(objects, rng) for _ in range(_SEVERAL["exact"])]
  found = {
    "exact": true,
    "short": [f"a {objects[0].color} {objects[0].shape}"],
    "alt": [_alt(objects[0], rng)],
    "shuffled": [shuffled(true[0], rng)],
    "wrong": [wrong_caption(objects, rng)],
  }
  found["noisy"] = [_noisy(caption, objects, noise, rng) for caption in true]
  return {quality: found[quality] for quality in QUALITIES}


def pick(rng: np.random.Generator, names: Sequence[str]) -> str:
  """One of some names."""
  return names[int(rng.integers(len(names)))]


def true_caption(objects: Sequence[SceneObject], rng: np.random.Generator) -> str:
  """One sentence of every object: color and shape always, the rest as often as not."""
  main, others = objects[0], objects[1:]
  start = pick(rng, _STARTS)
  text = f"{start}{describe(main, rng)}" + (f" {_where(main)}" if rng.random() < 0.5 else "")
  if not others:
    return text
  clauses = []
  for other in others:
    relation = _relation(main, other) if rng.random() < 0.5 else _where(other)
    clauses.append(f"{describe(other, rng)} {relation}")
  joined = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} and {clauses[-1]}"
  return f"{text}, with {joined}"


def describe(one: SceneObject, rng: np.random.Generator) -> str:
  """ "a large striped red circle", of which size and texture may be left out."""
  words = [one.size] if rng.random() < 0.5 else []
  words += [one.texture] if one.texture != "plain" and rng.random() < 0.5 else []
  return " ".join(("a", *words, one.color, one.shape))


def shuffled(caption: str, rng: np.random.Generator) -> str:
  """The same words in another order."""
  words = caption.replace(",", "").split()
  return " ".join(words[i] for i in rng.permutation(len(words)))


def wrong_caption(objects: Sequence[SceneObject], rng: np.random.Generator) -> str:
  """A true one of other objects: each has another colour, shape and texture in its place."""
  # It draws the scenes whose captions stand here.
  from hybrid_vit.data.scenes import COLORS, SHAPES, TEXTURES

  def other(known: Sequence[str], one: str) -> str:
    return pick(rng, [name for name in known if name != one])

  changed = [
    dataclasses.replace(
      one,
      color=other(list(COLORS), one.color),
      shape=other(list(SHAPES), one.shape),
      texture=other(TEXTURES, one.texture),
    )
    for one in objects
  ]
  return true_caption(changed, rng)


def _noisy(
  caption: str, objects: Sequence[SceneObject], noise: float, rng: np.random.Generator
) -> str:
  if rng.random() >= noise:
    return caption
  kind = rng.integers(3)
  if kind == 0:
    return shuffled(caption, rng)
  return wrong_caption(objects, rng) if kind == 1 else _alt(objects[0], rng)


def _alt(main: SceneObject, rng: np.random.Generator) -> str:
  number = int(rng.integers(10, 10_000))
  kind = rng.integers(4)
  if kind == 0:
    return f"{pick(rng, _NAMES)}_{number:04d}.jpg"
  if kind == 1:
    return f"{main.shape} {pick(rng, _SHOPS)}"
  if kind == 2:
    return f"{main.color} {main.shape} {number} {pick(rng, _SHOPS)}"
  return pick(rng, _SHOPS)


def _where(one: SceneObject) -> str:
  return f"{'in' if one.place == 'center' else 'at'} the {one.place}"


def _relation(main: SceneObject, other: SceneObject) -> str:
  """Where the other one is, seen from the main one, by the larger distance."""
  dx, dy = (b - a for a, b in zip(main.center, other.center))
  if abs(dx) > abs(dy):
    return "to the right of it" if dx > 0 else "to the left of it"
  return "below it" if dy > 0 else "above it"
