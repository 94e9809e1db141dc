"""Which failures of a detector are the worst: by hand, and beside COCO's own matching."""

import numpy as np

from hybrid_vit.metrics.coco_ap import Detected, Truth, category_ap, evaluate_coco
from hybrid_vit.metrics.detection_failures import Failure, false_alarms, missed_objects


def truth_of(rows, images=(0, 1, 2)):
  """Rows (image, class, box, crowd)."""
  image, category, boxes, crowd = zip(*rows)
  boxes = np.array(boxes, np.float64)
  areas = boxes[:, 2] * boxes[:, 3]
  return Truth(np.array(images), np.array(image), np.array(category), boxes, areas, np.array(crowd))


def detected_of(rows):
  """Rows (image, class, box, score)."""
  image, category, boxes, scores = zip(*rows)
  return Detected(
    np.array(image), np.array(category), np.array(scores), np.array(boxes, np.float64)
  )


TRUTH = truth_of(
  [
    (0, 0, (0, 0, 10, 10), False),  # found
    (0, 1, (20, 0, 30, 30), False),  # found as another class
    (1, 0, (0, 0, 20, 20), False),  # badly placed
    (1, 1, (40, 40, 50, 50), True),  # a crowd
    (2, 0, (5, 5, 6, 6), False),  # nothing there
  ]
)
DETECTED = detected_of(
  [
    (0, 0, (0, 0, 10, 9), 0.9),
    (0, 0, (1, 0, 10, 10), 0.8),  # the same once more
    (0, 0, (20, 0, 30, 29), 0.7),  # another class
    (1, 0, (10, 0, 20, 20), 0.95),
    (1, 1, (45, 45, 10, 10), 0.99),  # in the crowd
    (1, 1, (60, 60, 20, 20), 0.98),  # likewise
  ]
)


def test_what_is_missed_comes_by_size():
  found = missed_objects(TRUTH, DETECTED, 10)
  assert [failure.row for failure in found] == [1, 2, 4]
  assert found[0].nearest == 2 and np.isclose(found[0].iou, 29 / 30)
  assert found[1].nearest == 3 and np.isclose(found[1].iou, 1 / 3)
  assert found[2] == Failure(4, None, 0.0)
  assert [failure.row for failure in missed_objects(TRUTH, DETECTED, 1)] == [1]


def test_false_alarms_come_by_score():
  found = false_alarms(TRUTH, DETECTED, 10)
  assert [failure.row for failure in found] == [3, 1, 2]
  assert found[1].nearest == 0 and found[2].nearest == 1
  assert [failure.row for failure in false_alarms(TRUTH, DETECTED, 2)] == [3, 1]


def test_without_false_alarms_and_misses_ap50_is_all():
  rng = np.random.default_rng(0)
  rows = [
    (int(i), int(k), (*rng.uniform(0, 60, 2), *rng.uniform(10, 30, 2)))
    for i, k in rng.integers(0, 3, (40, 2))
  ]
  truth = truth_of([(*row, False) for row in rows])
  moved = [(i, k, np.array(box) + rng.normal(0, 2, 4), rng.random()) for i, k, box in rows]
  detected = detected_of(moved)
  alarms = {failure.row for failure in false_alarms(truth, detected, 99)}
  missed = {failure.row for failure in missed_objects(truth, detected, 99)}
  assert alarms and missed
  kept = detected_of([row for i, row in enumerate(moved) if i not in alarms])
  assert not false_alarms(truth, kept, 99)
  result = evaluate_coco(truth, kept, range(3))
  # What is left is right, and finds all but one object for each false alarm.
  assert np.isclose(result.recall[0, :, 0, -1] @ np.bincount(truth.category), 40 - len(alarms))
  np.testing.assert_allclose(category_ap(result, 0), result.precision[0, :, :, 0, -1].mean(0))


def test_nothing_found_and_nothing_there():
  none = Detected(*(np.zeros((0, *shape)) for shape in ((), (), (), (4,))))
  assert [f.row for f in missed_objects(TRUTH, none, 9)] == [1, 2, 0, 4]
  assert false_alarms(TRUTH, none, 9) == []
  empty = Truth(np.arange(3), *(np.zeros((0, *s)) for s in ((), (), (4,), (), ())))
  assert [f.row for f in false_alarms(empty, DETECTED, 9)] == [4, 5, 3, 0, 1, 2]
