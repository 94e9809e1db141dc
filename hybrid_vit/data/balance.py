"""Classes of unequal size: how often each example comes, and how much it weighs."""

from __future__ import annotations

import numpy as np

from hybrid_vit.data.sources import Source, Subset


class BalancedSource(Subset):
  """A source whose examples of small classes come several times in an epoch.

  A class of n examples comes n (N / n)^power times, N being the largest class's: 1 makes all
  classes alike, 0.5 is the square-root sampling of Mahajan et al. (arXiv:1805.00932), 0 changes
  nothing. No example is left out, so an epoch grows longer.

  Args:
    source: whose classes are known without reading its examples (`labels`, int `[N]`).
    power: from 0 to 1.

  Raises:
    ValueError: the source does not know its classes, or the power is out of range.
  """

  def __init__(self, source: Source, power: float):
    labels = getattr(source, "labels", None)
    if labels is None:
      raise ValueError(
        "`config.data.balance` is for data whose classes are known without reading it: folder:, "
        "zip:, digits and fashion_mnist; for others set config.task.class_weights"
      )
    super().__init__(source, balanced_indices(labels, power))


def balanced_indices(labels: np.ndarray, power: float) -> np.ndarray:
  """Indices into the examples, each at least once; see `BalancedSource`. int64."""
  if not 0.0 <= power <= 1.0:
    raise ValueError(f"`config.data.balance` is {power}; a number from 0 to 1 was expected")
  labels = np.asarray(labels)
  counts = np.bincount(labels)
  largest = counts.max()
  parts = []
  for label in np.flatnonzero(counts):
    members, n = np.flatnonzero(labels == label), counts[label]
    wanted = max(int(n), round(float(n) * (float(largest) / float(n)) ** power))
    # Spread evenly, so that what comes once more than the rest is no run of neighbours.
    parts.append(members[np.arange(wanted) * n // wanted])
  return np.concatenate(parts).astype(np.int64)


def class_weights(counts: np.ndarray) -> tuple[float, ...]:
  """Inverse frequencies whose mean over the examples is 1: examples / (classes x count).

  A class without examples has 0.
  """
  counts = np.asarray(counts, np.float64)
  here = counts > 0
  weights = np.zeros(len(counts))
  weights[here] = counts.sum() / (here.sum() * counts[here])
  return tuple(float(w) for w in weights)
