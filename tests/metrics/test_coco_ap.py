"""AP and AR: pycocotools' own figures, its present ones where installed, and what is refused."""

import dataclasses

import numpy as np
import pytest

from hybrid_vit.data.mask_encoding import encode_mask, write_segmentation
from hybrid_vit.metrics.coco_ap import (
  AREAS,
  Detected,
  Truth,
  category_ap,
  coco_metrics,
  evaluate_coco,
)
from tests import golden


def _ellipses(boxes, size):
  y, x = np.arange(size[0])[:, None] + 0.5, np.arange(size[1]) + 0.5
  for left, top, w, h in boxes:
    u, v = (x - left - w / 2) / (w / 2 + 1e-6), (y - top - h / 2) / (h / 2 + 1e-6)
    yield u**2 + v**2 <= 1


def _case():
  description, stored = golden.load("dense/coco_ap", "coco_ap_6_images")
  given = description["arguments"]
  rows, found = stored["annotations"], stored["detections"]
  truth = Truth(
    np.array([image["id"] for image in given["images"]]),
    rows[:, 1].astype(int),
    rows[:, 2].astype(int),
    rows[:, 3:7],
    rows[:, 7],
    rows[:, 8].astype(bool),
    list(_ellipses(rows[:, 3:7], (160, 240))),
  )
  detected = Detected(
    found[:, 0].astype(int),
    found[:, 1].astype(int),
    found[:, 6],
    found[:, 2:6],
    list(_ellipses(found[:, 2:6], (160, 240))),
  )
  return truth, detected, [c["id"] for c in given["categories"]], stored


@pytest.mark.parametrize(("kind", "suffix"), [("boxes", "bbox"), ("masks", "segm")])
def test_pycocotools_figures(kind, suffix):
  truth, detected, categories, stored = _case()
  result = evaluate_coco(truth, detected, categories, kind)
  found = list(coco_metrics(result).values())
  np.testing.assert_allclose(found, stored[f"stats_{suffix}"], rtol=1e-12)
  # A recall below 0 is "nothing there".
  there = result.recall[..., -1] > -1
  ap = np.where(there, result.precision[..., -1].mean(1), -1)
  np.testing.assert_allclose(ap, stored[f"ap_{suffix}"], rtol=1e-12)
  np.testing.assert_allclose(result.recall, stored[f"recall_{suffix}"], rtol=1e-12)
  each = np.where(there[0, :, 0], ap[:, :, 0].mean(0), -1)
  np.testing.assert_allclose(category_ap(result), each, rtol=1e-12)


def _random(seed, images=25, categories=(3, 1, 7, 9), objects=6, guesses=12):
  """Crowded rows with ties of scores and overlaps, areas at the ranges' ends, and crowds."""
  rng = np.random.default_rng(seed)
  ids = rng.permutation(1000)[:images]

  def boxes(count):
    corner, side = rng.integers(0, 8, (count, 2)) * 16, rng.integers(1, 7, (count, 2)) * 16
    return np.concatenate([corner, side], 1) + rng.choice([0, 0.5, 3], (count, 4))

  g, d = images * objects, images * guesses
  gt = boxes(g)
  gt_image, gt_category = rng.choice(ids[3:], g), rng.choice(categories[:-1], g)
  copies = rng.integers(0, g, d)
  near = rng.random(d) < 0.6
  found = np.where(near[:, None], gt[copies] + rng.choice([0, 2, 5], (d, 4)), boxes(d))
  truth = Truth(
    ids, gt_image, gt_category, gt, gt[:, 2] * gt[:, 3], rng.random(g) < 0.15,
    [encode_mask(m) for m in _ellipses(gt, (220, 230))],
  )  # fmt: skip
  detected = Detected(
    np.where(near, gt_image[copies], rng.choice(ids, d)),
    np.where(near, gt_category[copies], rng.choice(categories, d)),
    rng.integers(0, 20, d) / 20,
    found,
    [encode_mask(m) for m in _ellipses(found, (220, 230))],
  )
  return truth, detected, sorted(categories)


def _pycocotools(truth, detected, categories, kind, limits):
  coco = pytest.importorskip("pycocotools.coco").COCO()
  from pycocotools.cocoeval import COCOeval

  coco.dataset = {
    "info": {},
    "images": [{"id": int(i), "height": 220, "width": 230} for i in truth.images],
    "categories": [{"id": int(c)} for c in categories],
    "annotations": [
      {
        "id": i + 1, "image_id": int(truth.image[i]), "category_id": int(truth.category[i]),
        "bbox": truth.boxes[i].tolist(), "area": float(truth.areas[i]),
        "iscrowd": int(truth.crowd[i]), "segmentation": write_segmentation(truth.masks[i]),
      }
      for i in range(len(truth.image))
    ],
  }  # fmt: skip
  coco.createIndex()
  results = [
    {
      "image_id": int(detected.image[i]), "category_id": int(detected.category[i]),
      "score": float(detected.scores[i]),
      **(
        {"bbox": detected.boxes[i].tolist()}
        if kind == "boxes"
        else {"segmentation": write_segmentation(detected.masks[i])}
      ),
    }
    for i in range(len(detected.image))
  ]  # fmt: skip
  evaluation = COCOeval(coco, coco.loadRes(results), "bbox" if kind == "boxes" else "segm")
  evaluation.params.maxDets = list(limits)
  evaluation.evaluate()
  evaluation.accumulate()
  return evaluation.eval


@pytest.mark.parametrize("kind", ["boxes", "masks"])
@pytest.mark.parametrize("limits", [(1, 10, 100), (1, 2, 4)])
def test_pycocotools_itself(kind, limits):
  for seed in range(3):
    truth, detected, categories = _random(seed)
    expected = _pycocotools(truth, detected, categories, kind, limits)
    result = evaluate_coco(truth, detected, categories, kind, limits)
    for name in ("precision", "recall", "scores"):
      np.testing.assert_array_equal(getattr(result, name), expected[name])


def test_order_of_rows_of_pictures_does_not_matter():
  truth, detected, categories = _random(4)
  whole = evaluate_coco(truth, detected, categories)
  # Hosts' rows one after the other: those of a picture stay in order.
  hosts = np.concatenate([np.flatnonzero(detected.image % 2 == p) for p in (1, 0)])
  moved = {
    name: [getattr(detected, name)[i] for i in hosts] if name == "masks"
    else getattr(detected, name)[hosts]
    for name in ("image", "category", "scores", "boxes", "masks")
  }  # fmt: skip
  found = evaluate_coco(truth, Detected(**moved), categories)
  np.testing.assert_array_equal(found.precision, whole.precision)


def test_categories_in_any_order():
  truth, detected, categories = _random(5)
  whole = evaluate_coco(truth, detected, categories)
  turned = evaluate_coco(truth, detected, categories[::-1])
  np.testing.assert_array_equal(turned.recall, whole.recall[:, ::-1])


def test_perfect_and_nothing():
  truth, _, categories = _random(6)
  truth = dataclasses.replace(truth, crowd=np.zeros(len(truth.image), bool))
  own = Detected(truth.image, truth.category, np.ones(len(truth.image)), truth.boxes, truth.masks)
  for kind in ("boxes", "masks"):
    assert coco_metrics(evaluate_coco(truth, own, categories, kind))["AP"] == pytest.approx(1.0)
  none = Detected(*(np.zeros((0, *shape)) for shape in ((), (), (), (4,))), [])
  metrics = coco_metrics(evaluate_coco(truth, none, categories, "masks"))
  assert metrics["AP"] == 0 and metrics["AR_100"] == 0
  empty = dataclasses.replace(
    truth, **{f: getattr(truth, f)[:0] for f in ("image", "category", "boxes", "areas", "crowd")},
    masks=[],
  )  # fmt: skip
  assert set(coco_metrics(evaluate_coco(empty, own, categories)).values()) == {-1.0}
  assert set(coco_metrics(evaluate_coco(empty, none, categories)).values()) == {-1.0}
  assert list(AREAS) == ["all", "small", "medium", "large"]


@pytest.mark.parametrize(
  ("part", "change", "message"),
  [
    ("detected", dict(image=np.array([5])), "detection is of image 5, which is not listed"),
    ("detected", dict(category=np.array([5])), "detection is of category 5"),
    ("truth", dict(category=np.array([5])), "true object is of category 5"),
    ("detected", dict(scores=np.array([np.nan])), "scores has numbers that are not finite"),
    ("detected", dict(scores=np.ones(2)), "2 rows of scores and 1 of image"),
    ("detected", dict(masks=None), "masks of all 1 rows were expected; found none"),
    ("detected", dict(boxes=np.ones((1, 5))), r"boxes are \(1, 5\)"),
    ("detected", dict(masks=[np.ones((3, 2), bool)]), r"sizes \[\(2, 3\), \(3, 2\)\]"),
  ],
)
def test_what_does_not_fit_is_named(part, change, message):
  one, box, mask = np.ones(1, int), np.array([[0, 0, 2.0, 2.0]]), [np.ones((2, 3), bool)]
  rows = {
    "truth": Truth(one, one, one, box, np.ones(1), np.zeros(1, bool), mask),
    "detected": Detected(one, one, np.ones(1), box, mask),
  }
  rows[part] = dataclasses.replace(rows[part], **change)
  with pytest.raises(ValueError, match=message):
    evaluate_coco(rows["truth"], rows["detected"], [1], "masks")
  with pytest.raises(ValueError, match=r"'points'.*boxes, masks"):
    evaluate_coco(rows["truth"], rows["detected"], [1], "points")
