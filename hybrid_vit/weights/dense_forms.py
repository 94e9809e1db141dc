"""Weights of classification for the dense form of a network: what changes, what begins anew.

The forms are those of `models.dense`. Kernels grow by zeros around the trained ones, so that the
network answers as before until it is trained further: FocalNet's (see `focal_levels`), and RevCol's
largest, whose depthwise kernels of 3x3 become 7x7 (megvii-research/RevCol, README of its
segmentation). Norms of the outputs, which classification has not, begin anew. For ViTDet's windows
(`models.vitdet`) the positions of tokens that are no patches are left, and tables of relative
positions begin at zero.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from hybrid_vit.models.vitdet import RELATIVE_TABLES
from hybrid_vit.weights.focal_levels import fit_focal_levels, resize_kernel

_OUTPUT_NORM = re.compile(r"params/stage\d+_norm/")
# By what the families with norms beside the trunk are known: ConvNeXt, CSWin, FocalNet, L2ViT and
# Swin. SMT has norms of the same names in its trunk, which have to be there.
_HAS_OUTPUT_NORMS = re.compile(
  r"params/stage\d+_block\d+/"
  r"(depthwise_conv/|attention0/|modulation/projection_in/|position_conv/|attention/position_bias)"
)
_RELATIVE_TABLE = re.compile(rf"params/stage\d+_block\d+/(?:{'|'.join(RELATIVE_TABLES)})")
_POSITIONS = "params/position_embedding"
_TOKENS = ("params/class_token", "params/distillation_token")
_COLUMN_KERNEL = re.compile(r"params/column\d+/level\d+/block\d+/depthwise_conv/kernel")


def fit_dense_form(
  source: Mapping[str, Any], target: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str], dict[str, str]]:
  """Changes the leaves of `source` that have another shape in a dense `target`.

  Args:
    source: path of a leaf, "params/stage1_block0/…", to array.
    target: the same for the network that shall take the weights.

  Returns:
    (`source` with those leaves changed, path of each of them to what was done, path to reason of
    what `source` need not have). What cannot be fitted keeps its shape.
  """
  fitted, changes, new = fit_focal_levels(source, target)
  has_norms = any(_HAS_OUTPUT_NORMS.match(path) for path in source)
  has_relative = any(_RELATIVE_TABLE.fullmatch(path) for path in source)
  tokens = sum(path in source and path not in target for path in _TOKENS)
  for path, wanted in target.items():
    old = source.get(path)
    if old is None:
      if has_norms and _OUTPUT_NORM.match(path):
        new[path] = "a norm of the outputs"
      elif not has_relative and _RELATIVE_TABLE.fullmatch(path):
        new[path] = "relative positions, which begin at zero"
    elif _COLUMN_KERNEL.match(path) and _fits_inside(old.shape, wanted.shape):
      fitted[path] = resize_kernel(jnp.asarray(old), wanted.shape[:2])
      changes[path] = f"zeros around {old.shape[0]}x{old.shape[1]}"
    elif path == _POSITIONS and tokens:
      fitted[path] = old[tokens:]
      changes[path] = f"without the positions of {tokens} tokens"
  return fitted, changes, new


def _fits_inside(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
  """Whether a kernel `[h, w, 1, C]` is smaller than another, with a common centre."""
  larger = all(n > m and (n - m) % 2 == 0 for m, n in zip(old[:2], new[:2]))
  return larger and old[2:] == new[2:]
