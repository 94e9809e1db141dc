"""COCO's average precision and recall of boxes and masks, equal to pycocotools' `COCOeval`.

Rows of detections and of true objects go in, of all pictures at once: they can be gathered from
hosts in any order of pictures. In each picture and class detections by falling score take the free
true object of largest overlap (the later of equals), rather one that counts than one that does not:
crowds, which may be taken again and again and whose overlap is over the detection's area, and those
outside the range of areas. What takes one that does not count, or nothing and lies outside the
range itself, is left out. Precision is made falling and read at 101 recalls.

Many pictures and classes are matched at a time, for all thresholds and ranges at once, where
pycocotools goes one by one.

Deviations: a true object whose id is 0 can be found (pycocotools takes it for nothing found); a
picture or class that is not listed is refused, where classes are left out silently; metrics that
name no number of detections take the largest, where pycocotools asks for 100.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from hybrid_vit.data.mask_encoding import Rle, encode_mask, mask_area, mask_intervals

IOUS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0, 1, 101)
# Both ends belong to a range.
AREAS = {
  "all": (0.0, 1e10),
  "small": (0.0, 32.0**2),
  "medium": (32.0**2, 96.0**2),
  "large": (96.0**2, 1e10),
}
KINDS = ("boxes", "masks")
Mask = Rle | np.ndarray


@dataclasses.dataclass(frozen=True)
class Truth:
  """All true objects of a set, a row each.

  Attributes:
    images: int `[I]`, the ids of all pictures, those without objects, too.
    image: int `[G]`, the picture of each object.
    category: int `[G]`.
    boxes: `[G, 4]`, (x, y, width, height).
    areas: `[G]`, as the annotation has them: of the mask, even where boxes are evaluated.
    crowd: bool `[G]`.
    masks: `Rle` or bool `[H, W]` of each; None where boxes are evaluated alone.
  """

  images: np.ndarray
  image: np.ndarray
  category: np.ndarray
  boxes: np.ndarray
  areas: np.ndarray
  crowd: np.ndarray
  masks: Sequence[Mask] | None = None


@dataclasses.dataclass(frozen=True)
class Detected:
  """All detections of a set, a row each; among equal scores of a picture the earlier counts first.

  Attributes:
    image: int `[D]`.
    category: int `[D]`.
    scores: `[D]`.
    boxes: `[D, 4]`, (x, y, width, height).
    masks: `Rle` or bool `[H, W]` of each; None where boxes are evaluated alone.
  """

  image: np.ndarray
  category: np.ndarray
  scores: np.ndarray
  boxes: np.ndarray
  masks: Sequence[Mask] | None = None


@dataclasses.dataclass(frozen=True)
class CocoResult:
  """What `COCOeval.accumulate` gives; -1 where a category has no object in a range.

  Attributes:
    precision: `[T, R, K, A, M]`: thresholds, recalls, categories, ranges of areas, detections.
    recall: `[T, K, A, M]`.
    scores: `[T, R, K, A, M]`, of the detection at which each recall is reached.
    max_detections: M numbers, rising.
  """

  precision: np.ndarray
  recall: np.ndarray
  scores: np.ndarray
  max_detections: tuple[int, ...]


def evaluate_coco(
  truth: Truth,
  detected: Detected,
  categories: Sequence[int],
  kind: str = "boxes",
  max_detections: Sequence[int] = (1, 10, 100),
) -> CocoResult:
  """Precision and recall at all thresholds, ranges of areas and numbers of detections.

  Args:
    truth: all objects.
    detected: all detections.
    categories: ids, in the order of the result.
    kind: "boxes" or "masks", what overlaps.
    max_detections: of a picture and class that count, rising.

  Raises:
    ValueError: another kind, or none given; a picture or category that is not listed; a number
      that is not finite; rows of unequal number.
  """
  if kind not in KINDS:
    raise ValueError(f"kind is {kind!r}; one of {', '.join(KINDS)} was expected")
  limits = tuple(int(n) for n in max_detections)
  images = np.unique(truth.images)
  _check("truth", truth, kind)
  _check("detections", detected, kind)
  gt_group = _groups(truth, "true object", images, categories)
  dt_group = _groups(detected, "detection", images, categories)

  # Of each group the best, by falling score: `rank` counts within it.
  order = np.lexsort((-np.asarray(detected.scores, np.float64), dt_group))
  rank = _ranks(dt_group[order])
  order, rank = order[rank < limits[-1]], rank[rank < limits[-1]]
  dt_group = dt_group[order]
  scores = np.asarray(detected.scores, np.float64)[order]
  gt_order = np.argsort(gt_group, kind="stable")
  gt_group = gt_group[gt_order]

  ranges = np.array(list(AREAS.values()))
  dt_areas = _detected_areas(detected, order, kind)
  gt_areas = np.asarray(truth.areas, np.float64)[gt_order]
  crowd = np.asarray(truth.crowd).astype(bool)[gt_order]
  ignored = crowd[:, None] | _outside(gt_areas, ranges)

  matching = _Matching(dt_group, gt_group, crowd, ignored)
  matching.run(_overlaps(truth, detected, order, gt_order, kind))
  # What found nothing and lies outside the range counts nowhere.
  left_out = matching.left_out | (~matching.found & _outside(dt_areas, ranges)[:, :, None])

  shape = (len(IOUS), len(RECALLS), len(categories), len(AREAS), len(limits))
  precision, at = np.full(shape, -1.0), np.full(shape, -1.0)
  recall = np.full((shape[0], *shape[2:]), -1.0)
  edges = np.arange(len(categories) + 1) * len(images)
  dt_edges, gt_edges = (np.searchsorted(groups, edges) for groups in (dt_group, gt_group))
  for k in range(len(categories)):
    rows = slice(dt_edges[k], dt_edges[k + 1])
    positives = np.count_nonzero(~ignored[gt_edges[k] : gt_edges[k + 1]], axis=0)
    for m, limit in enumerate(limits):
      chosen = np.flatnonzero(rank[rows] < limit) + dt_edges[k]
      chosen = chosen[np.argsort(-scores[chosen], kind="stable")]
      curves = _curves(matching.found[chosen], left_out[chosen], scores[chosen], positives)
      precision[:, :, k, :, m], recall[:, k, :, m], at[:, :, k, :, m] = curves
  return CocoResult(precision, recall, at, limits)


def coco_metrics(result: CocoResult) -> dict[str, float]:
  """The twelve numbers of COCO; -1 where there is nothing to measure.

  "AP" (over thresholds), "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_<n>" for each
  number of detections, and "AR_small", "AR_medium", "AR_large".
  """
  areas = list(AREAS)
  metrics = {
    "AP": _mean(result.precision[:, :, :, 0, -1]),
    "AP50": _mean(result.precision[0, :, :, 0, -1]),
    "AP75": _mean(result.precision[5, :, :, 0, -1]),
  }
  for i, area in enumerate(areas[1:], 1):
    metrics[f"AP_{area}"] = _mean(result.precision[:, :, :, i, -1])
  for m, limit in enumerate(result.max_detections):
    metrics[f"AR_{limit}"] = _mean(result.recall[:, :, 0, m])
  for i, area in enumerate(areas[1:], 1):
    metrics[f"AR_{area}"] = _mean(result.recall[:, :, i, -1])
  return metrics


def category_ap(result: CocoResult, threshold: int | None = None) -> np.ndarray:
  """AP of each category, `[K]`; -1 for one without objects.

  Args:
    result: of the evaluation.
    threshold: place of the IoU in `IOUS`, 0 for AP50; None for the mean over all of them.
  """
  chosen = slice(None) if threshold is None else slice(threshold, threshold + 1)
  rows = np.moveaxis(result.precision[chosen, :, :, 0, -1], 2, 0)
  return np.array([_mean(row) for row in rows])


class _Matching:
  """Who takes whom, in all groups.

  Attributes:
    found: bool `[D, A, T]`, detections that took a true object.
    left_out: bool `[D, A, T]`, those that took one that does not count.
  """

  def __init__(self, dt_group, gt_group, crowd, ignored):
    self.found = np.zeros((len(dt_group), len(AREAS), len(IOUS)), bool)
    self.left_out = np.zeros_like(self.found)
    self._crowd, self._ignored = crowd, ignored
    groups = np.unique(gt_group)
    starts, ends = (np.searchsorted(dt_group, groups, side) for side in ("left", "right"))
    gt_starts, gt_ends = (np.searchsorted(gt_group, groups, side) for side in ("left", "right"))
    both = ends > starts
    # First detection, number, first true object, number: of groups that have both.
    self._first, self._count = starts[both], (ends - starts)[both]
    self._gt_first, self._gt_count = gt_starts[both], (gt_ends - gt_starts)[both]

  def run(self, overlaps) -> None:
    """Matches; `overlaps(dt_rows, gt_rows)` gives a group's IoU `[d, g]`."""
    width = np.maximum(self._gt_count, 1)
    size = 2 ** np.ceil(np.log2(width)).astype(int)
    for padded in np.unique(size):
      mine = np.flatnonzero(size == padded)
      mine = mine[np.argsort(-self._count[mine], kind="stable")]
      # So many groups at a time that tables stay small.
      step = max(1, 200_000 // int(padded))
      for start in range(0, len(mine), step):
        self._match(mine[start : start + step], int(padded), overlaps)

  def _match(self, groups, padded, overlaps) -> None:
    count, gt_count = self._count[groups], self._gt_count[groups]
    # True objects in reverse: the first of equals is then the later one. [n, g]
    place = gt_count[:, None] - 1 - np.arange(padded)
    there = place >= 0
    gt = self._gt_first[groups][:, None] + np.maximum(place, 0)
    crowd = self._crowd[gt] & there
    ignored = np.moveaxis(self._ignored[gt], 2, 1)[:, :, None]  # [n, A, 1, g]
    free = np.ones((len(groups), len(AREAS), len(IOUS), padded), bool) & there[:, None, None]
    tables = [
      overlaps(
        slice(self._first[i], self._first[i] + self._count[i]),
        slice(self._gt_first[i], self._gt_first[i] + self._gt_count[i]),
      )[:, ::-1]
      for i in groups
    ]
    least = np.minimum(IOUS, 1 - 1e-10)[:, None]
    for d in range(count[0]):
      n = int(np.count_nonzero(count > d))
      iou = np.full((n, padded), -1.0)
      for row, table in zip(iou, tables):
        row[: table.shape[1]] = table[d]
      near = iou[:, None, None] >= least
      if not near.any():
        continue
      able = near & (free[:n] | crowd[:n, None, None])
      counting = able & ~ignored[:n]
      pool = np.where(counting.any(-1, keepdims=True), counting, able)
      taken = np.argmax(np.where(pool, iou[:, None, None], -1.0), axis=-1)[..., None]
      found = np.take_along_axis(pool, taken, -1)
      still = np.take_along_axis(free[:n], taken, -1)
      np.put_along_axis(free[:n], taken, still & ~found, -1)
      unimportant = np.take_along_axis(np.broadcast_to(ignored[:n], able.shape), taken, -1)
      rows = self._first[groups[:n]] + d
      self.found[rows] = found[..., 0]
      self.left_out[rows] = (found & unimportant)[..., 0]


def _curves(found, left_out, scores, positives):
  """Precision `[T, R, A]`, recall `[T, A]` and scores `[T, R, A]` of a category's detections."""
  count, (areas, thresholds) = len(scores), (len(AREAS), len(IOUS))
  precision = np.full((thresholds, len(RECALLS), areas), -1.0)
  at, recall = precision.copy(), np.full((thresholds, areas), -1.0)
  there = positives > 0
  precision[:, :, there] = at[:, :, there] = recall[:, there] = 0.0
  if not count:
    return precision, recall, at
  right = np.cumsum(np.moveaxis(found & ~left_out, 0, -1), axis=-1, dtype=np.float64)
  wrong = np.cumsum(np.moveaxis(~found & ~left_out, 0, -1), axis=-1, dtype=np.float64)
  recalls = right / np.maximum(positives, 1)[:, None, None]
  precisions = right / (wrong + right + np.spacing(1))
  precisions = np.maximum.accumulate(precisions[..., ::-1], axis=-1)[..., ::-1]
  for a in np.flatnonzero(there):
    recall[:, a] = recalls[a, :, -1]
    for t in range(thresholds):
      places = np.searchsorted(recalls[a, t], RECALLS, side="left")
      places = places[places < count]
      precision[t, : len(places), a] = precisions[a, t, places]
      at[t, : len(places), a] = scores[places]
  return precision, recall, at


def _overlaps(truth, detected, order, gt_order, kind):
  """The function from a group's rows, in our order, to IoUs `[d, g]`."""
  crowd = np.asarray(truth.crowd).astype(bool)[gt_order]
  if kind == "boxes":
    boxes = np.asarray(detected.boxes, np.float64)[order]
    gt_boxes = np.asarray(truth.boxes, np.float64)[gt_order]
    return lambda d, g: box_iou(boxes[d], gt_boxes[g], crowd[g])

  def of_masks(d, g):
    masks = [_rle(detected.masks[i]) for i in order[d]]
    gt_masks = [_rle(truth.masks[i]) for i in gt_order[g]]
    return mask_iou(masks, gt_masks, crowd[g])

  return of_masks


def box_iou(boxes: np.ndarray, gt_boxes: np.ndarray, crowd: np.ndarray) -> np.ndarray:
  """IoU of each box with each true one; over the box's area where that is a crowd.

  Args:
    boxes: float64 `[D, 4]`, (x, y, width, height).
    gt_boxes: float64 `[G, 4]`.
    crowd: bool `[G]`.

  Returns:
    float64 `[D, G]`.
  """
  x, y, w, h = (boxes[:, i, None] for i in range(4))
  gx, gy, gw, gh = gt_boxes.T
  across = np.minimum(w + x, gw + gx) - np.maximum(x, gx)
  down = np.minimum(h + y, gh + gy) - np.maximum(y, gy)
  shared = np.where((across > 0) & (down > 0), across * down, 0.0)
  area = w * h
  union = np.where(crowd, area, area + gw * gh - shared)
  return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def mask_iou(masks: Sequence[Rle], gt_masks: Sequence[Rle], crowd: np.ndarray) -> np.ndarray:
  """IoU of each mask with each true one; over the mask's area where that is a crowd.

  Args:
    masks: D masks.
    gt_masks: G masks of the same picture.
    crowd: bool `[G]`.

  Returns:
    float64 `[D, G]`.

  Raises:
    ValueError: masks of different sizes.
  """
  sizes = {rle.size for rle in (*masks, *gt_masks)}
  if len(sizes) > 1:
    raise ValueError(f"masks of one picture have sizes {sorted(sizes)}; one was expected")
  intervals = [mask_intervals(rle) for rle in masks]
  areas = np.array([(ends - starts).sum() for starts, ends in intervals], np.float64)
  edges = np.concatenate([np.stack(pair) for pair in intervals], axis=1)
  owner = np.repeat(np.arange(len(masks)), [len(starts) for starts, _ in intervals])
  out = np.zeros((len(masks), len(gt_masks)))
  for g, rle in enumerate(gt_masks):
    starts, ends = mask_intervals(rle)
    if not starts.size:
      continue
    # Pixels of the true mask before each place: the differences are those in between.
    before = np.concatenate([[0], np.cumsum(ends - starts)])
    place = np.searchsorted(starts, edges, side="right") - 1
    inside = np.maximum(place, 0)
    pixels = before[inside] + np.clip(edges - starts[inside], 0, (ends - starts)[inside])
    shared = np.bincount(owner, pixels[1] - pixels[0], minlength=len(masks))
    union = areas if crowd[g] else areas + before[-1] - shared
    out[:, g] = np.divide(shared, union, out=np.zeros(len(masks)), where=shared > 0)
  return out


def _rle(mask: Mask) -> Rle:
  return mask if isinstance(mask, Rle) else encode_mask(mask)


def _detected_areas(detected, order, kind) -> np.ndarray:
  if kind == "boxes":
    boxes = np.asarray(detected.boxes, np.float64)[order]
    return boxes[:, 2] * boxes[:, 3]
  return np.array([mask_area(_rle(detected.masks[i])) for i in order], np.float64)


def _outside(areas: np.ndarray, ranges: np.ndarray) -> np.ndarray:
  """Whether each area is outside of each range, bool `[N, A]`."""
  return (areas[:, None] < ranges[:, 0]) | (areas[:, None] > ranges[:, 1])


def _groups(
  rows: Truth | Detected, name: str, images: np.ndarray, categories: Sequence[int]
) -> np.ndarray:
  """A number for each row's category and picture: categories by their order, pictures by id."""
  listed = np.asarray(categories)
  order = np.argsort(listed, kind="stable")
  places = []
  for what, values, known in (
    ("category", rows.category, listed[order]),
    ("image", rows.image, images),
  ):
    values = np.asarray(values)
    found = np.minimum(np.searchsorted(known, values), max(len(known) - 1, 0))
    strange = values[known[found] != values] if len(known) else values
    if strange.size:
      raise ValueError(f"a {name} is of {what} {strange[0]}, which is not listed")
    places.append(found)
  return order[places[0]].astype(np.int64) * len(images) + places[1]


def _ranks(groups: np.ndarray) -> np.ndarray:
  """Place of each row within its group; groups lie together."""
  first = np.flatnonzero(np.diff(groups, prepend=-1))
  return np.arange(len(groups)) - np.repeat(first, np.diff(first, append=len(groups)))


def _check(name: str, rows: Truth | Detected, kind: str) -> None:
  count = len(rows.image)
  for field in _numbers(rows):
    values = getattr(rows, field)
    if len(values) != count:
      raise ValueError(f"{name}: {len(values)} rows of {field} and {count} of image")
    if not np.isfinite(np.asarray(values, np.float64)).all():
      raise ValueError(f"{name}: {field} has numbers that are not finite")
  if count and np.asarray(rows.boxes).shape[1:] != (4,):
    raise ValueError(f"{name}: boxes are {np.asarray(rows.boxes).shape}; [N, 4] were expected")
  if kind == "masks" and (rows.masks is None or len(rows.masks) != count):
    found = "none" if rows.masks is None else len(rows.masks)
    raise ValueError(f"{name}: masks of all {count} rows were expected; found {found}")


def _numbers(rows: Truth | Detected) -> Iterator[str]:
  for field in dataclasses.fields(rows):
    if field.name not in ("images", "masks"):
      yield field.name


def _mean(values: np.ndarray) -> float:
  there = values[values > -1]
  return float(there.mean()) if there.size else -1.0
