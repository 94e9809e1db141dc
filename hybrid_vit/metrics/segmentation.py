"""Mean IoU, mean and pixel accuracy from one confusion matrix, which adds up over a whole set.

IoU of a class is the sum of its intersections over the sum of its unions: counts of batches and
hosts are added first and divided once (mmsegmentation's IoUMetric). It is not a mean over pictures.

Deviation: a predicted class that there is not is refused; mmsegmentation's histogram drops it from
the predictions' counts alone.
"""

from __future__ import annotations

import numpy as np


def confusion(
  predicted: np.ndarray, truth: np.ndarray, classes: int, ignore: int = 255
) -> np.ndarray:
  """Counts pixels by their true and their predicted class.

  Args:
    predicted: whole numbers `[...]`, 0 to `classes` - 1 wherever `truth` counts.
    truth: whole numbers of the same shape, each a class or `ignore`.
    classes: how many there are.
    ignore: pixels of this label count nowhere.

  Returns:
    int64 `[classes, classes]`, true class by predicted class.

  Raises:
    ValueError: two shapes, or a class that there is not, naming it.
    TypeError: an array of anything but whole numbers.
  """
  predicted, truth = np.asarray(predicted), np.asarray(truth)
  for name, values in (("predicted", predicted), ("truth", truth)):
    if values.dtype.kind not in "iu":
      raise TypeError(f"{name} is {values.dtype}; whole numbers, the classes, were expected")
  if predicted.shape != truth.shape:
    raise ValueError(
      f"the prediction is {list(predicted.shape)} and the truth {list(truth.shape)}: resize the "
      "logits to the truth's size before the classes are taken"
    )
  kept = truth != ignore
  pairs = {"predicted": predicted[kept].astype(np.int64), "true": truth[kept].astype(np.int64)}
  for name, values in pairs.items():
    wrong = values[(values < 0) | (values >= classes)]
    if wrong.size:
      raise ValueError(
        f"{name} class {wrong[0]}; 0 to {classes - 1} were expected"
        + (f" (or {ignore}, ignored)" if name == "true" else "")
      )
  cells = pairs["true"] * classes + pairs["predicted"]
  return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def class_ious(matrix: np.ndarray) -> np.ndarray:
  """IoU of each class, float64 `[C]`; NaN for one in neither truth nor prediction."""
  hit = np.diagonal(matrix)
  return _share(hit, matrix.sum(0) + matrix.sum(1) - hit)


def class_accuracies(matrix: np.ndarray) -> np.ndarray:
  """Part of each class's pixels that were found, float64 `[C]`; NaN for one not in the truth."""
  return _share(np.diagonal(matrix), matrix.sum(1))


def segmentation_metrics(matrix: np.ndarray) -> dict[str, float]:
  """Of the sum of `confusion` over a set: "mean_iou", "mean_accuracy" and "pixel_accuracy".

  Means are over the classes of which the value exists; NaN where none does.
  """
  return {
    "mean_iou": _mean(class_ious(matrix)),
    "mean_accuracy": _mean(class_accuracies(matrix)),
    "pixel_accuracy": float(_share(np.trace(matrix), matrix.sum())),
  }


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
  part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
  return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _mean(values: np.ndarray) -> float:
  found = values[~np.isnan(values)]
  return float(found.mean()) if found.size else float("nan")
