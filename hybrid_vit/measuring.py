"""What predictions are worth, class by class: confusion, precision and recall, calibration.

Everything is NumPy in float64; a prediction is the class of the largest score, the first of equals.
"""

from __future__ import annotations

import dataclasses

import numpy as np


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
  """Counts, int64 `[K, K]`: row the true class, column the predicted one."""
  flat = np.asarray(labels, np.int64) * num_classes + np.asarray(predicted, np.int64)
  return np.bincount(flat, minlength=num_classes**2).reshape(num_classes, num_classes)


@dataclasses.dataclass(frozen=True)
class ClassFigures:
  """Figures of each class, float64 `[K]`; NaN where nothing is divided by nothing.

  Attributes:
    precision: right ones of those predicted as it.
    recall: right ones of those that are it.
    f1: harmonic mean, 2 right / (predicted + true); 0 where none is right, NaN where the class is
      neither there nor predicted.
    support: how many are it, int64.
  """

  precision: np.ndarray
  recall: np.ndarray
  f1: np.ndarray
  support: np.ndarray


def class_figures(confusion: np.ndarray) -> ClassFigures:
  """From `confusion_matrix`."""
  right = np.diagonal(confusion).astype(np.float64)
  true, predicted = confusion.sum(1), confusion.sum(0)
  with np.errstate(divide="ignore", invalid="ignore"):
    return ClassFigures(right / predicted, right / true, 2 * right / (true + predicted), true)


@dataclasses.dataclass(frozen=True)
class Calibration:
  """How far confidence and accuracy agree (Guo et al., arXiv:1706.04599).

  Attributes:
    edges: float64 `[B + 1]`, equally wide bins of the confidence; a bin has its upper edge, the
      first its lower one, too.
    count: int64 `[B]`.
    confidence: mean of each bin, NaN in empty ones.
    accuracy: the same.
    ece: expected calibration error, the mean over pictures of |accuracy - confidence| of their bin.
    mce: the largest of these.
  """

  edges: np.ndarray
  count: np.ndarray
  confidence: np.ndarray
  accuracy: np.ndarray
  ece: float
  mce: float


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> Calibration:
  """Calibration of predictions.

  Args:
    confidence: `[N]` in [0, 1], the probability of the predicted class.
    right: bool `[N]`.
    bins: equally wide ones.

  Raises:
    ValueError: no predictions, confidences out of range, or no bins.
  """
  confidence, right = np.asarray(confidence, np.float64), np.asarray(right, bool)
  if bins < 1 or not len(confidence) or not ((confidence >= 0) & (confidence <= 1)).all():
    raise ValueError(
      f"{len(confidence)} confidences in {bins} bins; at least one of both was expected, and "
      "numbers from 0 to 1"
    )
  edges = np.linspace(0.0, 1.0, bins + 1)
  place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
  count = np.bincount(place, minlength=bins)
  with np.errstate(invalid="ignore"):
    means = np.bincount(place, confidence, bins) / count
    accuracy = np.bincount(place, right, bins) / count
  gaps = np.abs(accuracy - means)
  return Calibration(
    edges,
    count,
    means,
    accuracy,
    float(np.nansum(gaps * count) / count.sum()),
    float(np.nanmax(gaps)),
  )


def probabilities(logits: np.ndarray, loss: str) -> np.ndarray:
  """Logits `[N, K]` → float64: over the classes ("softmax"), or of each by itself ("sigmoid").

  Raises:
    ValueError: another loss.
  """
  logits = np.asarray(logits, np.float64)
  if loss == "softmax":
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)
  if loss == "sigmoid":
    return 0.5 * (1.0 + np.tanh(0.5 * logits))
  raise ValueError(
    f"these weights were trained with the loss {loss!r}; softmax or sigmoid was expected: their "
    "outputs are no classes"
  )


def worst_mistakes(probability: np.ndarray, labels: np.ndarray, most: int) -> np.ndarray:
  """Rows that are wrong, those first whose wrong class is the most certain; int64 `[<= most]`.

  Among equally certain ones, the one whose own class is the least likely goes first.
  """
  predicted = probability.argmax(1)
  wrong = np.flatnonzero(predicted != labels)
  own = probability[wrong, np.asarray(labels)[wrong]]
  return wrong[np.lexsort((own, -probability[wrong, predicted[wrong]]))][:most]
