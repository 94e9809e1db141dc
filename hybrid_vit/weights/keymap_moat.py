"""MOAT: names of the authors' TensorFlow variables (deeplab2, `model/pixel_encoder/moat.py`)."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from hybrid_vit.weights import convert

_NORM_LEAVES = {
  "scale": "gamma",
  "bias": "beta",
  "mean": "moving_mean",
  "var": "moving_variance",
}
_PROJECTIONS = {"query": "q", "key": "k", "value": "v", "out": "o"}


def official_key(path: str) -> convert.OfficialKey:
  """The authors' variable for one of ours, such as "params/stage1_block0/expand_conv/kernel".

  Raises:
    ValueError: for a path that MOAT does not have.
  """
  parts = path.split("/")[1:]
  scope, modules, leaf = parts[0], parts[1:-1], parts[-1]
  block = re.fullmatch(r"stage(\d+)_block(\d+)", scope)
  if scope == "head_norm":
    return convert.OfficialKey(f"moat/final_layer_norm/{_NORM_LEAVES[leaf]}")
  if scope == "head":
    return _pointwise("moat/logits_head", leaf)
  if scope == "stem" and modules:
    prefix = "moat/stem"
  elif block and modules:
    prefix = f"moat/block_{int(block[1]) - 1:02d}_{int(block[2]):02d}"
  else:
    raise ValueError(f"MOAT has no variable {path!r}")

  module = modules[0]
  if module.startswith("norm_") or module.endswith("_norm"):
    return convert.OfficialKey(f"{prefix}/{module}/{_NORM_LEAVES[leaf]}")
  if module == "depthwise_conv":
    # (h, w, channels, 1) against our [h, w, 1, channels].
    name = f"{prefix}/depthwise_conv/depthwise_kernel"
    return convert.OfficialKey(name, _swap_last, _swap_last)
  if module == "se":
    return _pointwise(f"{prefix}/se/{modules[1]}_conv2d", leaf)
  if module == "attention":
    if leaf == "position_table":
      return convert.OfficialKey(f"{prefix}/attention/relative_position_embedding")
    leaf = "weight" if leaf == "kernel" else leaf
    return convert.OfficialKey(f"{prefix}/attention/{_PROJECTIONS[modules[1]]}/{leaf}")
  if scope == "stem":
    return convert.OfficialKey(f"{prefix}/{module}/{leaf}")
  if module in ("shortcut_conv", "expand_conv", "shrink_conv"):
    return _pointwise(f"{prefix}/{module}", leaf)
  raise ValueError(f"MOAT has no variable {path!r}")


def to_flax(
  weights: Mapping[str, np.ndarray], template: Mapping[str, Any], **allowances: str
) -> tuple[dict[str, Any], convert.ImportReport]:
  """Authors' variables to ours; see `convert.import_weights` for arguments and errors."""
  return convert.import_weights(weights, template, official_key, **allowances)


def from_flax(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Our variables to the authors' names and layouts."""
  return convert.export_weights(variables, official_key)


def _pointwise(name: str, leaf: str) -> convert.OfficialKey:
  # A 1x1 convolution there, a dense layer here.
  if leaf == "kernel":
    return convert.OfficialKey(f"{name}/kernel", lambda x: x[0, 0], lambda x: x[None, None])
  return convert.OfficialKey(f"{name}/{leaf}")


def _swap_last(x: np.ndarray) -> np.ndarray:
  return np.swapaxes(x, 2, 3)


# Slots of the optimizer, its step, and the checkpoint's own bookkeeping.
_NOT_WEIGHTS = r"(?:^|/)(?:global_step|save_counter|_CHECKPOINTABLE_OBJECT_GRAPH)|optimizer"

LAYOUTS = {"official": convert.Layout(lambda model: official_key, not_weights=_NOT_WEIGHTS)}
