"""One photo, asked of weights of any kind: classes, texts, a map, objects, depth, and heat maps.

Answers are plain values, for a page or a notebook to show; programs are compiled at the first photo
and kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from hybrid_vit.class_prediction import (
  Texts,
  check_classifier,
  class_index,
  class_probabilities,
  embedded_texts,
  likeliest,
)
from hybrid_vit.data.classes import names_or_numbers
from hybrid_vit.data.palettes import spread_palette
from hybrid_vit.heat_map_plots import overlay_heat
from hybrid_vit.heat_maps import OF_ENDPOINTS, HeatMapper
from hybrid_vit.object_prediction import MIN_SCORE, PredictedObjects
from hybrid_vit.object_prediction import class_names as object_names
from hybrid_vit.panoptic_plots import segment_shades
from hybrid_vit.panoptic_prediction import PredictedSegments
from hybrid_vit.photos import read_photos
from hybrid_vit.stored_models import StoredModel, described, image_network, load_model
from hybrid_vit.stored_predictions import ASKED
from hybrid_vit.stored_tasks import StoredTask
from hybrid_vit.tasks.detection import as_shown
from hybrid_vit.weights.stored import StoredNetwork, class_names
from hybrid_vit.weights.stored_clip import StoredClip

# Longest side of a picture that is shown, in pixels; larger ones are shown smaller.
_LARGEST = 1280
_MOST_REGIONS = 30


@dataclasses.dataclass(frozen=True)
class Region:
  """A part of the photo that has a name.

  Attributes:
    place: bool `[H, W]` of the answer's picture, or a box (x0, y0, x1, y1) in its pixels.
    name: for people.
    colour: red, green, blue, 0 to 255.
  """

  place: np.ndarray | tuple[int, int, int, int]
  name: str
  colour: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Answer:
  """What was found in one photo.

  Attributes:
    lines: for people.
    probabilities: of classes or texts by name, the likeliest first; {} where there are none.
    picture: uint8 `[H, W, 3]`, what is shown beside or below the regions; None for none.
    regions: over the picture.
  """

  lines: tuple[str, ...]
  probabilities: Mapping[str, float] = dataclasses.field(default_factory=dict)
  picture: np.ndarray | None = None
  regions: tuple[Region, ...] = ()


class PhotoModel:
  """Weights that photos can be asked of."""

  def __init__(self, stored: StoredModel, place: str):
    """Takes what `stored_models.load_model` gave, and where it lay."""
    self.stored, self.place = stored, place
    self.mapper = HeatMapper(image_network(stored))

  @classmethod
  def load(cls, place: str) -> PhotoModel:
    """Raises what `stored_models.load_model` does."""
    return cls(load_model(place), place)

  @property
  def name(self) -> str:
    """Network, task and place in a line."""
    return f"{described(self.stored)} ({self.place})"

  @property
  def has_texts(self) -> bool:
    """Whether its classes are texts of one's own."""
    return isinstance(self.stored, StoredClip)

  @property
  def has_scores(self) -> bool:
    """Whether it finds objects, of which those below a score are left out."""
    return isinstance(self.stored, StoredTask) and ASKED[self.stored.name].has_scores

  @functools.cached_property
  def class_names(self) -> tuple[str, ...]:
    """Of a classifier; () for others."""
    classes = isinstance(self.stored, StoredNetwork) and "grad_cam" in self.methods
    return class_names(self.mapper.network) if classes else ()

  @property
  def methods(self) -> tuple[str, ...]:
    """Heat maps that there are."""
    own = self.mapper.methods
    return ("grad_cam", *own) if self.has_texts else own

  def answer(
    self, photo: str | Path, *, top: int = 5, texts: str = "", min_score: float = MIN_SCORE
  ) -> Answer:
    """What the weights are for, of one photo.

    Args:
      photo: a file.
      top: how many classes, areas or objects the lines name.
      texts: between commas or on lines of their own; of two towers alone.
      min_score: of objects.

    Raises:
      ValueError: the photo cannot be read (the message says why), or too few texts.
    """
    if isinstance(self.stored, StoredTask):
      return self._dense(self.stored, photo, top, min_score)
    if isinstance(self.stored, StoredClip):
      return self._zero_shot(self.stored, photo, top, texts)
    if not self.class_names:
      return Answer((f"{described(self.stored)}: no classifier, heat maps alone",))
    probabilities = np.asarray(self._classify(self._on_device, self._read(photo)[None]))[0]
    return _of_classes(photo, probabilities, self.class_names, top)

  def heat(
    self,
    photo: str | Path,
    methods: Sequence[str],
    *,
    target: str = "",
    endpoint: str = "",
    texts: str = "",
  ) -> list[tuple[np.ndarray, str]]:
    """(the photo under a heat map, uint8 `[H, W, 3]`; what it is) of each method.

    Args:
      photo: a file.
      methods: of `methods`.
      target: the class of Grad-CAM, a name or a number; "" for the likeliest.
      endpoint: the layer of Grad-CAM and PCA; "" for the usual one.
      texts: classes of two towers, see `answer`.

    Raises:
      ValueError: the photo cannot be read, or there is no such method, class or layer.
    """
    image, made = self._read(photo), []
    for method in methods:
      embedded: Texts | None = None
      if method == "grad_cam" and isinstance(self.stored, StoredClip):
        embedded = embedded_texts(self.stored, texts)
      names = self.class_names if embedded is None else embedded.names
      wanted = class_index(target, names) if target and method == "grad_cam" else None
      (heat,) = self.mapper.maps(
        method,
        [image],
        target=wanted,
        endpoint=(endpoint or None) if method in OF_ENDPOINTS else None,
        texts=embedded,
      )
      made.append((overlay_heat(image, heat), f"{heat.title} · {heat.source}"))
    return made

  def _read(self, photo: str | Path) -> np.ndarray:
    images, skipped = read_photos([photo], self.mapper.network.preprocessing)
    for reason in skipped.values():
      raise ValueError(_unreadable(reason, photo))
    return images[Path(photo)]

  @functools.cached_property
  def _classify(self) -> Any:
    check_classifier(self.mapper.network)
    return class_probabilities(self.mapper.network)

  @property
  def _on_device(self) -> Any:
    return self.mapper.on_device

  def _zero_shot(self, stored: StoredClip, photo: str | Path, top: int, text: str) -> Answer:
    texts = embedded_texts(stored, text)
    if stored.loss == "softmax" and len(texts.names) < 2:
      raise ValueError(
        f"one text ({texts.names[0]}) is always the likeliest; give at least two, such as "
        '"a cat,a dog"'
      )
    images = stored.encode_image(self._read(photo)[None])
    probabilities = stored.probabilities(images, texts.embeddings)[0]
    return _of_classes(photo, probabilities, texts.names, top)

  def _dense(self, stored: StoredTask, photo: str | Path, top: int, min_score: float) -> Answer:
    found, skipped = ASKED[stored.name].predict(stored, [photo], top, min_score)
    for reason in skipped.values():
      raise ValueError(_unreadable(reason, photo))
    (prediction,) = found
    # Whole pixels are left out, so that masks and boxes stay what they are.
    step = -(-max(prediction.image.shape[:2]) // _LARGEST)
    picture = prediction.image
    if step > 1:
      picture = np.asarray(Image.fromarray(picture).reduce(step))
    if stored.name == "depth":
      return Answer(prediction.summary, picture=depth_colours(prediction.values[::step, ::step]))
    regions = _regions(stored, prediction, step)[:_MOST_REGIONS]
    return Answer(prediction.summary, picture=picture, regions=tuple(regions))


def depth_colours(depth: np.ndarray) -> np.ndarray:
  """Metres `[H, W]` as colours, uint8 `[H, W, 3]`: near ones yellow, far ones dark blue.

  The scale goes from the hundredth to the ninety-ninth part of the values.
  """
  low, high = np.percentile(depth, (1, 99))
  shares = np.clip((depth - low) / max(high - low, 1e-6), 0, 1)
  colours = matplotlib.colormaps["viridis_r"](shares)[..., :3]
  return np.round(255 * colours).astype(np.uint8)


def _regions(stored: StoredTask, prediction: Any, step: int) -> list[Region]:
  """Classes, objects or segments of a photo of which every `step`-th pixel is shown."""
  if isinstance(prediction, PredictedObjects):
    return _objects(stored, prediction, step)
  palette = np.array(stored.task.palette, np.uint8)
  names = names_or_numbers(stored.task.map_class_names, stored.task.num_classes)
  if isinstance(prediction, PredictedSegments):
    segments = prediction.picture.segments
    shown = prediction.picture.map[::step, ::step]
    colours = segment_shades(segments, palette)
    parts = [(shown == s.id, names[s.category], c) for s, c in zip(segments, colours)]
  else:
    shown = prediction.values[::step, ::step]
    classes = [c for c in np.unique(shown) if c < len(names)]
    parts = [(shown == c, names[c], palette[c]) for c in classes]
  parts.sort(key=lambda part: -int(part[0].sum()))
  return [
    Region(place, unique, _colour(colour))
    for unique, (place, _, colour) in zip(_numbered([name for _, name, _ in parts]), parts)
  ]


def _objects(stored: StoredTask, prediction: PredictedObjects, step: int) -> list[Region]:
  names, found = object_names(stored), prediction.found
  palette, masks = spread_palette(len(names)), as_shown(found).masks
  regions = []
  for i, label in enumerate(found.labels):
    place: Any = tuple(round(float(x) / step) for x in found.boxes[i])
    if masks is not None:
      place = np.asarray(masks[i])[::step, ::step] > 0
    name = f"{names[label]} {found.scores[i]:.0%}"
    regions.append(Region(place, name, _colour(palette[label])))
  return regions


def _numbered(names: Sequence[str]) -> list[str]:
  """ "person", "person 2" and so on: colours are told apart by names."""
  seen: dict[str, int] = {}
  unique = []
  for name in names:
    seen[name] = seen.get(name, 0) + 1
    unique.append(name if seen[name] == 1 else f"{name} {seen[name]}")
  return unique


def _colour(values: Any) -> tuple[int, int, int]:
  red, green, blue = map(int, values)
  return red, green, blue


def _of_classes(
  photo: str | Path, probabilities: np.ndarray, names: Sequence[str], top: int
) -> Answer:
  found = likeliest(Path(photo), np.zeros((0, 0, 3), np.uint8), probabilities, names, top)
  lines = tuple(f"{p:6.1%}  {name}" for name, p in zip(found.names, found.probabilities))
  return Answer(lines, dict(zip(found.names, found.probabilities)))


def _unreadable(reason: str, photo: str | Path) -> str:
  """Without the path of a copy that its owner does not know."""
  return f"{Path(photo).name} cannot be read: {reason.replace(str(photo), Path(photo).name)}"
