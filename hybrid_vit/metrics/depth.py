"""Errors of predicted depth, by the protocols of NYU Depth v2 and KITTI.

Each picture has its own errors over its measured pixels; a set's are the means over pictures (the
evaluation of Eigen et al., arXiv:1406.2283, as bts and MIM-Depth-Estimation write it). Sums over
pictures and their number add up over batches and hosts.

Deviations: predictions that are not above 0 become the least depth, too, since they have no
logarithm; a picture without a measured pixel is left out instead of making the mean no number.
"""

from __future__ import annotations

import dataclasses

import numpy as np

# d1, d2, d3: part of pixels whose ratio to the truth, either way up, is below 1.25, 1.25^2, 1.25^3.
DEPTH_METRICS = (
  "d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog",
)  # fmt: skip
# (top, bottom, left, right) over the height or width, rounded down; in pixels where so measured.
_KITTI_CROPS = {
  "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
  "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}
_NYU_SIZE, _NYU_CROP = (480, 640), (45, 471, 41, 601)
CROPS = ("none", "nyu_eigen", "kitti_garg", "kitti_eigen")


@dataclasses.dataclass(frozen=True)
class DepthProtocol:
  """How errors are taken.

  Attributes:
    min_depth: metres; nearer truth does not count, 0 being "not measured".
    max_depth: metres; farther truth does not count. 10 for NYU Depth v2, 80 for KITTI.
    crop: one of `CROPS`: the part of the picture that counts. "nyu_eigen" is of 480 x 640.
    clip: predictions are cut to [min_depth, max_depth], as bts does; MIM-Depth-Estimation does not.
    median_scaling: predictions are first multiplied so that their median is the truth's: for
      networks that know depth up to a factor.
    silog_weight: of the squared mean in SILog, sqrt(mean e^2 - weight * (mean e)^2), e the
      difference of logarithms. 1 is KITTI's; MIM-Depth-Estimation prints that of its loss, 0.5.
    silog_scale: a factor of SILog: 100 as KITTI has it, 1 in MIM-Depth-Estimation.

  Raises:
    ValueError: an unknown crop, or depths that are not 0 < min_depth < max_depth.
  """

  min_depth: float = 1e-3
  max_depth: float = 10.0
  crop: str = "none"
  clip: bool = False
  median_scaling: bool = False
  silog_weight: float = 1.0
  silog_scale: float = 100.0

  def __post_init__(self) -> None:
    if self.crop not in CROPS:
      raise ValueError(f"crop is {self.crop!r}; one of {', '.join(CROPS)} was expected")
    if not 0 < self.min_depth < self.max_depth:
      raise ValueError(
        f"depths from {self.min_depth:g} to {self.max_depth:g} m: 0 < min_depth < max_depth was "
        "expected"
      )


def depth_sums(
  predicted: np.ndarray,
  truth: np.ndarray,
  protocol: DepthProtocol,
  counts: np.ndarray | None = None,
) -> np.ndarray:
  """Sums over the pictures of a batch, to be added to those of others.

  Args:
    predicted: metres, `[B, H, W]`.
    truth: metres, `[B, H, W]`; 0 for "not measured".
    protocol: how.
    counts: bool or 0/1 `[B]`, which pictures count; all by default.

  Returns:
    float64 `[len(DEPTH_METRICS) + 1]`: the sum of each error, then the number of pictures.
  """
  counts = np.ones(len(truth), bool) if counts is None else np.asarray(counts).astype(bool)
  rows = [depth_errors(p, t, protocol) for p, t, kept in zip(predicted, truth, counts) if kept]
  found = [np.append(row, 1.0) for row in rows if not np.isnan(row).any()]
  return np.sum(found, axis=0) if found else np.zeros(len(DEPTH_METRICS) + 1)


def depth_metrics(sums: np.ndarray) -> dict[str, float]:
  """The means that sums of `depth_sums` stand for; NaN where no picture counted."""
  number = sums[-1]
  return {
    name: float(value / number) if number else float("nan")
    for name, value in zip(DEPTH_METRICS, sums)
  }


def depth_errors(predicted: np.ndarray, truth: np.ndarray, protocol: DepthProtocol) -> np.ndarray:
  """One picture's errors, float64 `[len(DEPTH_METRICS)]`; NaN where nothing was measured.

  Args:
    predicted: metres, `[H, W]`.
    truth: metres, `[H, W]`; 0 for "not measured".
    protocol: how.

  Raises:
    ValueError: two sizes, or one that the protocol's crop is not made for.
  """
  if predicted.shape != truth.shape:
    raise ValueError(
      f"the predicted depth is {list(predicted.shape)} and the truth {list(truth.shape)}: resize "
      "the prediction to the truth's size"
    )
  part = depth_crop(protocol.crop, (truth.shape[0], truth.shape[1]))
  p, g = (np.asarray(values[part], np.float64) for values in (predicted, truth))
  measured = (g > protocol.min_depth) & (g < protocol.max_depth)
  if not measured.any():
    return np.full(len(DEPTH_METRICS), np.nan)
  p, g = p[measured], g[measured]
  p = np.where(np.isinf(p), protocol.max_depth, p)
  p = np.where(p > 0, p, protocol.min_depth)  # also what is no number
  if protocol.median_scaling:
    p = p * (np.median(g) / np.median(p))
  if protocol.clip:
    p = np.clip(p, protocol.min_depth, protocol.max_depth)
  ratio = np.maximum(p / g, g / p)
  apart = np.log(p) - np.log(g)
  spread = np.mean(apart**2) - protocol.silog_weight * np.mean(apart) ** 2
  return np.array(
    [
      *(np.mean(ratio < 1.25**power) for power in (1, 2, 3)),
      np.mean(np.abs(p - g) / g),
      np.mean((p - g) ** 2 / g),
      np.sqrt(np.mean((p - g) ** 2)),
      np.sqrt(np.mean(apart**2)),
      np.mean(np.abs(np.log10(p) - np.log10(g))),
      # A factor alone has no spread, but for rounding.
      protocol.silog_scale * np.sqrt(max(spread, 0.0)),
    ]
  )


def depth_crop(crop: str, size: tuple[int, int]) -> tuple[slice, slice]:
  """The rows and columns that count.

  Args:
    crop: one of `CROPS`.
    size: (height, width).

  Raises:
    ValueError: NYU's crop of another size than 480 x 640.
  """
  if crop == "none":
    return slice(None), slice(None)
  if crop == "nyu_eigen":
    if size != _NYU_SIZE:
      raise ValueError(
        f"crop 'nyu_eigen' is of 480 x 640, and the depth is {size[0]} x {size[1]}: resize the "
        "prediction to the truth's size, or take crop 'none'"
      )
    top, bottom, left, right = _NYU_CROP
  else:
    parts = _KITTI_CROPS[crop.removeprefix("kitti_")]
    top, bottom = (int(part * size[0]) for part in parts[:2])
    left, right = (int(part * size[1]) for part in parts[2:])
  return slice(top, bottom), slice(left, right)
