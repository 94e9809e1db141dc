"""From a picture of any size to its segments, by a network that predicts a class and a mask each.

A picture is seen on a canvas (`canvas_inference`). Its masks are brought to the size of the canvas,
cut to the picture and brought to the original's size, bilinear, as `restore_size` does for a batch;
here by one matrix for each axis, so that nothing is compiled for a picture's size, and of large
photos one mask at a time, so that those of any size fit in memory. Classes of all pixels are made
on the device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from hybrid_vit.box_inference import Objects
from hybrid_vit.canvas_inference import Size
from hybrid_vit.data.mask_encoding import encode_mask
from hybrid_vit.mask_rules import MASK2FORMER, MaskRules

# Named here, too: what is in this file is made of them.
from hybrid_vit.mask_rules import InstanceInferenceSettings as InstanceInferenceSettings
from hybrid_vit.mask_rules import PanopticInferenceSettings as PanopticInferenceSettings
from hybrid_vit.ops.resize import bilinear_matrix
from hybrid_vit.tasks.mask2former_inference import Segment

# Rows of a map of classes that are made at once; its columns are padded to a multiple of these.
_STRIP = 64
# Numbers of all masks of a picture that are kept in memory together: 256 MB.
_AT_ONCE = 2**26


@dataclasses.dataclass(frozen=True)
class PanopticPicture:
  """The segments of one picture, of which none overlap.

  Attributes:
    map: int32 `[H, W]` of ids, 0 for none.
    segments: by id, from 1.
  """

  map: np.ndarray
  segments: tuple[Segment, ...]


class MaskInference:
  """Segments of pictures by one network; compiled programs are kept."""

  def __init__(
    self,
    answers: Callable[[Any, jax.Array], Mapping[str, jax.Array]],
    settings: InstanceInferenceSettings,
    fill: tuple[int, int, int],
    rules: MaskRules = MASK2FORMER,
  ):
    """
    Args:
      answers: pure, `(variables, images uint8 [B, H, W, 3]) → {"class_logits" [B, Q, K + 1],
        "mask_logits" [B, Q, h, w]}`.
      settings: how; for `panoptic` the rules' `panoptic_settings`.
      fill: colour of the padding.
      rules: of the head.
    """
    self.settings = settings
    self._rules = rules
    self._answers = jax.jit(answers)
    self._fill = np.array(fill, np.uint8)

  def answer(self, variables: Any, image: np.ndarray) -> MaskAnswer:
    """uint8 `[H, W, 3]` → what the network says of it, from which all else is made."""
    canvas, seen = self.settings.place(image, self._fill)
    found = self._answers(variables, canvas)
    classes, masks = jax.device_get((found["class_logits"][0], found["mask_logits"][0]))
    restored = RestoredMasks(
      np.asarray(masks, np.float32),
      (canvas.shape[1], canvas.shape[2]),
      seen,
      (image.shape[0], image.shape[1]),
      align_corners=self._rules.align_corners(canvas.shape[2]),
    )
    return MaskAnswer(self.settings, np.asarray(classes, np.float32), restored, self._rules)

  def objects(self, variables: Any, image: np.ndarray) -> Objects:
    """uint8 `[H, W, 3]` → its instances, each with the smallest box around its mask."""
    return self.answer(variables, image).objects()

  def panoptic(self, variables: Any, image: np.ndarray, things: Collection[int]) -> PanopticPicture:
    """uint8 `[H, W, 3]` → its segments; `things` are the classes that are countable."""
    return self.answer(variables, image).panoptic(things)


class RestoredMasks:
  """Mask logits at the picture's own size, made when they are asked for.

  Of a photo of usual size all at once, by two large products: many small ones take longer by far
  where cores are shared. Of a larger one each by itself.

  Attributes:
    maps: float32 `[Q, h, w]`, of the whole input.
    rows: float32 `[H, h]`, what makes the picture's rows of a map's.
    columns: float32 `[W, w]`.
  """

  def __init__(
    self,
    maps: np.ndarray,
    input_size: Size,
    picture_size: Size,
    size: Size,
    *,
    align_corners: bool = False,
  ):
    """See `tasks.mask2former_inference.restore_size`."""
    self.maps = maps
    self.rows, self.columns = (
      bilinear_matrix(seen, after, align_corners)
      @ bilinear_matrix(length, whole, align_corners)[:seen]
      for length, whole, seen, after in zip(maps.shape[1:], input_size, picture_size, size)
    )

  @property
  def shape(self) -> tuple[int, int, int]:
    """(H, W, Q)."""
    return len(self.rows), len(self.columns), len(self.maps)

  def __getitem__(self, place: tuple[Any, int]) -> np.ndarray:
    """`masks[..., query]`: float32 `[H, W]`."""
    if int(np.prod(self.shape)) > _AT_ONCE:
      return self.rows @ self.maps[place[1]] @ self.columns.T
    return self._planes[:, place[1]]

  @functools.cached_property
  def _planes(self) -> np.ndarray:
    """float32 `[H, Q, W]`."""
    queries, height, width = self.maps.shape
    lines = self.rows @ self.maps.transpose(1, 0, 2).reshape(height, queries * width)
    return (lines.reshape(-1, width) @ self.columns.T).reshape(len(self.rows), queries, -1)


@dataclasses.dataclass(frozen=True)
class MaskAnswer:
  """What the network says of one picture.

  Attributes:
    settings: of the inference.
    class_logits: float32 `[Q, K + 1]`.
    masks: of the queries.
    rules: of the head; for `panoptic` the settings have to be theirs.
  """

  settings: InstanceInferenceSettings
  class_logits: np.ndarray
  masks: RestoredMasks
  rules: MaskRules = MASK2FORMER

  def panoptic(self, things: Collection[int]) -> PanopticPicture:
    """Segments that do not overlap."""
    found, segments = self.rules.panoptic(self.class_logits, self.masks, things, self.settings)
    return PanopticPicture(found, tuple(segments))

  def objects(self, things: Collection[int] | None = None) -> Objects:
    """Instances of `things`, or of all classes, that have a pixel; boxes are those of masks."""
    found = self.rules.instances(self.class_logits, self.masks, things, self.settings)
    kept = np.flatnonzero(found.masks.any((1, 2)))
    masks = found.masks[kept]
    return Objects(
      boxes_around(masks),
      found.scores[kept].astype(np.float32),
      found.classes[kept].astype(np.int32),
      tuple(encode_mask(mask) for mask in masks),
    )

  def classes(self) -> np.ndarray:
    """The class of each pixel, int32 `[H, W]`, the highest of the rules' scores."""
    height, width, _ = self.masks.shape
    given = jax.device_put((self.class_logits, self.masks.maps, _padded(self.masks.columns)))
    strips = []
    for top in range(0, height, _STRIP):
      rows = _padded(self.masks.rows[top : top + _STRIP])
      strips.append(_strip_classes(*given, rows, self.rules.semantic_scores))
    return np.concatenate([np.asarray(strip) for strip in strips])[:height, :width]


def boxes_around(masks: np.ndarray) -> np.ndarray:
  """The smallest boxes (x0, y0, x1, y1) around masks `[N, H, W]`, float32 `[N, 4]`; 0 for none."""
  boxes = np.zeros((len(masks), 4), np.float32)
  for box, mask in zip(boxes, masks):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if rows.size:
      box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
  return boxes


def _padded(matrix: np.ndarray) -> np.ndarray:
  """Rows of zeros behind, which are cut off later, so that fewer sizes are compiled for."""
  return np.pad(matrix, ((0, -len(matrix) % _STRIP), (0, 0)))


@functools.partial(jax.jit, static_argnums=4)
def _strip_classes(
  class_logits: jax.Array,
  maps: jax.Array,
  columns: jax.Array,
  rows: jax.Array,
  semantic_scores: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Some rows of a map of classes, int32 `[rows, columns]`."""
  high = lax.Precision.HIGHEST
  masks = jnp.einsum("qhw,sh->qsw", maps, rows, precision=high)
  masks = jnp.einsum("qsw,cw->scq", masks, columns, precision=high)
  scores = semantic_scores(class_logits[None], masks[None])[0]
  return jnp.argmax(scores, axis=-1).astype(jnp.int32)
